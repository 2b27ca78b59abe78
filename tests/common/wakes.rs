//! The nets of the wake tests, and the matrices that their rules solve with, dense.

use super::*;
use candle_core::{DType, Result, Tensor};
use faer::Mat;
use kronwake::curvature::{Damping, FactorLimit, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{Bias, Every, Model, Optimizer, Params, QSolve, StepRule, Wake};
use kronwake::tape::{Fisher, Likelihood};

pub const DAMPING: f64 = 0.05;
pub const DECAY: f64 = 0.45;

pub fn net(seed: u64) -> Result<Net> {
    Net::of(DType::F64, seed, |vb: VarBuilder| {
        let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 2, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
    })
}

pub fn params(net: &Net, wake: impl Into<Wake> + Clone, damping: Damping) -> Params {
    Params {
        damping,
        stat_decay: DECAY,
        every: Every { factors: 1, inverses: 1 },
        fisher: Fisher::Exact,
        kl_clip: None,
        step_rule: StepRule::LearningRate,
        orthogonal: None,
        ..Params::of(wake, &net.tape)
    }
}

/// The factors of one batch, per block.
pub fn current(net: &Net, outputs: &Tensor, likelihood: Likelihood, bias: Bias) -> Result<Vec<Factors>> {
    let mut opt = observer(net, Fisher::Exact, Sharing::Expand, bias)?;
    opt.observe(outputs, likelihood)?;
    opt.backward_step(&outputs.sqr()?.sum_all()?)?;
    let of = |block: &&str| opt.factors(block).map(|(a, g)| (of_group(&a, 0), of_group(&g, 0)));
    Ok(opt.block_names().iter().filter_map(of).collect())
}

/// `A` and `G` of a block.
pub type Factors = (Mat<f64>, Mat<f64>);

/// `rho old + (1 - rho) new` of both factors.
pub fn average(old: Option<&Factors>, new: &Factors, rho: f64) -> Factors {
    let mix = |old: &Mat<f64>, new: &Mat<f64>| old * rho + new * (1.0 - rho);
    old.map_or(new.clone(), |old| (mix(&old.0, &new.0), mix(&old.1, &new.1)))
}

/// `A (x) G` with its damping.
pub fn damped((a, g): &Factors, damping: Damping) -> Mat<f64> {
    match damping {
        Damping::Pi(la) => {
            let mean = |m: &Mat<f64>| m.diagonal().column_vector().sum() / m.nrows() as f64;
            let pi = (mean(a) / mean(g)).sqrt();
            kron(&(a + eye(a.nrows()) * (pi * la.sqrt())), &(g + eye(g.nrows()) * (la.sqrt() / pi)))
        }
        _ => kron(a, g) + eye(a.nrows() * g.nrows()) * DAMPING,
    }
}

/// What factors under a limit stand for.
pub fn both_kept((a, g): &Factors, limit: FactorLimit) -> Factors {
    (kept(a, limit), kept(g, limit))
}

/// The matrix that a rule solves with at rate `lr`.
pub fn solved(
    model: Model,
    bar: &Factors,
    now: &Factors,
    lr: f64,
    (damping, limit): (Damping, FactorLimit),
) -> Mat<f64> {
    let damped = |factors: &Factors| damped(&both_kept(factors, limit), damping);
    let curvature = |factors: &Factors| {
        let (a, g) = both_kept(factors, limit);
        kron(&a, &g)
    };
    match model {
        Model::Linear => damped(bar),
        Model::Quadratic(QSolve::Exact) => damped(bar) + curvature(now) * lr,
        Model::Quadratic(QSolve::Factor) => damped(&(&bar.0 + &now.0 * lr, &bar.1 + &now.1 * lr)),
    }
}
