//! EKFAC's step against per-example gradients, projected densely into the eigenbasis.

use crate::common::*;
use candle_core::{DType, Result, Tensor};
use faer::{Mat, Side};
use kronwake::curvature::{Beyond, Damping, FactorLimit};
use kronwake::nn::{self, Conv2dConfig, Module, VarBuilder};
use kronwake::optim::{Bias, Every, NaturalGradient, Optimizer, Params};
use kronwake::tape::{Fisher, Likelihood};
use std::collections::HashMap;

const RATE: f64 = 0.1;
const DAMPING: f64 = 0.02;
const DECAY: f64 = 0.4;

fn eigenvectors(m: &Mat<f64>) -> Mat<f64> {
    m.self_adjoint_eigen(Side::Lower).unwrap().U().to_owned()
}

/// The state of one group of one block, dense: an orthogonal basis, and the average of the gradients' second moments,
/// diagonal in that basis unless it is a bias's.
struct Dense {
    basis: Mat<f64>,
    average: Mat<f64>,
}

impl Dense {
    fn step(&self, gradient: &Mat<f64>) -> Mat<f64> {
        let inside = self.basis.transpose() * gradient;
        let moments = self.basis.transpose() * &self.average * &self.basis;
        let scaled =
            Mat::from_fn(inside.nrows(), 1, |i, _| -RATE * inside[(i, 0)] / (moments[(i, i)] + DAMPING));
        &self.basis * scaled
    }
}

/// `m` without what is off its diagonal in `basis`.
fn diagonal_in(basis: &Mat<f64>, m: &Mat<f64>) -> Mat<f64> {
    let inside = basis.transpose() * m * basis;
    let diagonal = Mat::from_fn(m.nrows(), m.nrows(), |i, j| if i == j { inside[(i, i)] } else { 0.0 });
    basis * diagonal * basis.transpose()
}

/// The mean over examples of `D D^T`, from the gradients `[examples, elements]` of their losses.
fn second_moments(gradients: &Mat<f64>) -> Mat<f64> {
    gradients.transpose() * gradients * (1.0 / gradients.nrows() as f64)
}

/// The same in expectation over the model's labels, from the Jacobian of the outputs `z`.
fn expected_second_moments(jacobian: &Mat<f64>, z: &[f64], terms: usize) -> Mat<f64> {
    let classes = z.len() / terms;
    let mut total = Mat::zeros(jacobian.ncols(), jacobian.ncols());
    for term in 0..terms {
        let rows = jacobian.subrows(term * classes, classes);
        let h = hessian(Likelihood::Categorical, &z[term * classes..][..classes]);
        total += rows.transpose() * h * rows * (1.0 / terms as f64);
    }
    total
}

fn mlp(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
}

fn cnn(vb: VarBuilder, groups: usize) -> Result<Forward> {
    let config = Conv2dConfig { stride: 2, padding: 1, groups, ..Default::default() };
    let (a, b) = (nn::conv2d(2, 4, 2, config, vb.pp("a"))?, nn::linear(16, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?.flatten_from(1)?)))
}

fn twice(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 3, vb.pp("a"))?, nn::linear(3, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(&a.forward(x)?.tanh()?)?.tanh()?)))
}

fn check(
    what: &str,
    net: &Net,
    dims: &[usize],
    fisher: Fisher,
    (bias, limit): (Bias, FactorLimit),
    every: Every,
) -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let mut opt = NaturalGradient::from_varmap(
        &net.varmap,
        Params {
            lr: RATE,
            damping: Damping::Eigenvalue(DAMPING),
            ekfac: true,
            stat_decay: DECAY,
            every,
            fisher,
            bias,
            factor_limit: limit,
            kl_clip: None,
            ..Params::k_fac(&net.tape)
        },
    )?;
    let mut state: HashMap<(String, usize), Dense> = HashMap::new();
    for k in 0..4usize {
        let x = random(50 + k as u64, dims)?;
        let y = labels(60 + k as u64, dims[0], 3)?;
        let losses = || term_losses(likelihood, &(net.forward)(&x)?, &y);
        let z = (net.forward)(&x)?;
        let outputs = flat(&z);
        // Derivatives at the values before the step.
        let mut derivatives = HashMap::new();
        for block in opt.block_names() {
            let groups = net.groups(block);
            for group in 0..groups {
                let elements = net.elements(block, group, groups);
                let gradients = jacobian(&elements, 2e-3, &losses)?;
                let jacobian = jacobian(&elements, 2e-3, &|| (net.forward)(&x))?;
                derivatives.insert((block.to_string(), group), (gradients, jacobian));
            }
        }
        let before = net.values()?;
        opt.observe(&z, likelihood)?;
        opt.backward_step(&losses()?.mean_all()?)?;
        let after = net.values()?;
        for (key, (gradients, jacobian)) in derivatives {
            let (a, g) = opt.factors(&key.0).unwrap();
            let [groups, out, columns] =
                opt.summary().blocks.iter().find(|block| block.name == key.0).unwrap().dims;
            let (a, g) = (joined(&a, key.1, groups, columns), joined(&g, key.1, groups, out));
            let basis = match state.get(&key) {
                Some(last) if !k.is_multiple_of(every.inverses) => last.basis.clone(),
                _ => kron(&eigenvectors(&a), &eigenvectors(&g)),
            };
            let current = match fisher {
                Fisher::Exact => expected_second_moments(&jacobian, &outputs, dims[0]),
                _ => second_moments(&gradients),
            };
            let average = match state.get(&key) {
                None => current,
                Some(last) if k.is_multiple_of(every.factors) => {
                    &last.average * DECAY + current * (1.0 - DECAY)
                }
                Some(last) => last.average.clone(),
            };
            // Of a bias the whole average is kept: it is the factor G.
            let average = if key.0.ends_with(".bias") { average } else { diagonal_in(&basis, &average) };
            let dense = Dense { basis, average };
            let mean = Mat::from_fn(gradients.ncols(), 1, |j, _| gradients.col(j).sum() / dims[0] as f64);
            let groups = net.groups(&key.0);
            let value = |values: &[Tensor]| -> Result<Mat<f64>> {
                net.set(values)?;
                Ok(values_at(&net.elements(&key.0, key.1, groups)))
            };
            let found = value(&after)? - value(&before)?;
            net.set(&after)?;
            assert_same(
                &found,
                &dense.step(&mean),
                1e-8,
                &format!("{what}, {fisher:?}, {bias:?}, {limit:?}, {key:?}, step {k}"),
            );
            state.insert(key, dense);
        }
    }
    Ok(())
}

/// Batches are larger than the factors: in a null space of several dimensions the eigenbasis would be arbitrary.
#[test]
fn steps() -> Result<()> {
    let always = Every { factors: 1, inverses: 1 };
    // The basis of an old inverse stays while the moments go on; and an inverse is renewed without new records.
    let (old_basis, old_records) = (Every { factors: 1, inverses: 2 }, Every { factors: 2, inverses: 1 });
    for fisher in [Fisher::Empirical, Fisher::Exact] {
        for bias in [Bias::Folded, Bias::Split] {
            for every in [always, old_basis, old_records] {
                let full = (bias, FactorLimit::NONE);
                check("mlp", &Net::of(DType::F64, 1, mlp)?, &[6, 3], fisher, full, every)?;
                check("cnn", &Net::of(DType::F64, 2, |vb| cnn(vb, 1))?, &[20, 2, 3, 3], fisher, full, every)?;
                for limit in [
                    FactorLimit::NONE,
                    FactorLimit { rows: 3, beyond: Beyond::BlockDiagonal },
                    FactorLimit { rows: 3, beyond: Beyond::Diagonal },
                ] {
                    let (net, how) = (Net::of(DType::F64, 3, |vb| cnn(vb, 2))?, (bias, limit));
                    check("groups", &net, &[20, 2, 3, 3], fisher, how, every)?;
                }
                check("twice", &Net::of(DType::F64, 4, twice)?, &[6, 3], fisher, full, every)?;
            }
        }
    }
    Ok(())
}
