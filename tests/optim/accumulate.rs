//! Micro-batches: their step is the step on their union.

use crate::common::*;
use candle_core::{DType, Result};
use kronwake::curvature::{Damping, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{Bias, Every, NaturalGradient, Optimizer, Params, Q, QSolve, So, Wake};
use kronwake::tape::{Fisher, Likelihood};

const LIKELIHOOD: Likelihood = Likelihood::Categorical;

/// A layer used twice, and one loss term for each of two positions.
fn sequence(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 3, vb.pp("a"))?, nn::linear(3, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| {
        let x = x.reshape((x.dim(0)?, 3, 3))?.narrow(1, 0, 2)?;
        b.forward(&a.forward(&a.forward(&x)?.tanh()?)?.tanh()?)
    }))
}

fn check(
    what: &str,
    build: fn(VarBuilder) -> Result<Forward>,
    wake: impl Into<Wake> + Clone,
    change: impl Fn(Params) -> Params,
) -> Result<()> {
    let (whole, parts) = (Net::of(DType::F64, 1, build)?, Net::of(DType::F64, 1, build)?);
    let optimizer = |net: &Net| {
        let params =
            Params { every: Every { factors: 2, inverses: 2 }, ..Params::of(wake.clone(), &net.tape) };
        NaturalGradient::from_varmap(&net.varmap, change(params))
    };
    let (mut once, mut often) = (optimizer(&whole)?, optimizer(&parts)?);
    for k in 0..5 {
        let (x, _) = small_batch(k, 12, DType::F64)?;
        let z = (whole.forward)(&x)?;
        let per_example = LIKELIHOOD.terms(&z)? / 12;
        let y = labels(900 + k, 12 * per_example, 3)?;
        once.observe(&z, LIKELIHOOD)?;
        once.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)?;
        for (from, n) in [(0, 5), (5, 4), (9, 3)] {
            let z = (parts.forward)(&x.narrow(0, from, n)?)?;
            let y = y.narrow(0, from * per_example, n * per_example)?;
            often.observe(&z, LIKELIHOOD)?;
            often.accumulate(&mean_loss(LIKELIHOOD, &z, &y)?, n * per_example)?;
        }
        often.step_accumulated()?;
        let what = format!("{}, {what}, step {k}", once.params().wake.name());
        for block in once.block_names() {
            let (found, expected) = (often.factors(block).unwrap(), once.factors(block).unwrap());
            assert_close(&found.0, &expected.0, 1e-12, &format!("{what}: A of {block}"));
            assert_close(&found.1, &expected.1, 1e-12, &format!("{what}: G of {block}"));
        }
        for (name, (found, expected)) in whole.names().iter().zip(parts.values()?.iter().zip(whole.values()?))
        {
            assert_close(found, &expected, 1e-12, &format!("{what}: {name}"));
        }
    }
    Ok(())
}

fn every_option(wake: impl Into<Wake> + Clone, damping: Damping, ekfac: bool) -> Result<()> {
    for fisher in [Fisher::Empirical, Fisher::Sampled { draws: 2, seed: 3 }, Fisher::Exact] {
        for bias in [Bias::Folded, Bias::Split] {
            for sharing in [Sharing::Expand, Sharing::Reduce] {
                let what = format!("{fisher:?}, {bias:?}, {sharing:?}");
                let change = |p| Params { fisher, bias, sharing, damping, ..p };
                check(&what, small, wake.clone(), change)?;
                check(&format!("sequence, {what}"), sequence, wake.clone(), change)?;
            }
            if ekfac {
                let what = format!("ekfac, {fisher:?}, {bias:?}");
                check(&what, small, wake.clone(), |p| Params { fisher, bias, damping, ekfac, ..p })?;
                check(&format!("sequence, {what}"), sequence, wake.clone(), |p| Params {
                    fisher,
                    bias,
                    damping,
                    ekfac,
                    ..p
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn five_and_four_and_three_are_twelve() -> Result<()> {
    let (eigenvalue, pi) = (Damping::Eigenvalue(0.01), Damping::Pi(0.01));
    every_option(Wake::KFac, eigenvalue, true)?;
    every_option(So::default(), eigenvalue, true)?;
    every_option(Q::default(), eigenvalue, false)?;
    every_option(Q { wake_decay: None, solve: QSolve::Exact }, pi, false)
}
