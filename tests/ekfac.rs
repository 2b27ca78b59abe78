//! EKFAC's step against per-example gradients, projected densely into the eigenbasis.

mod common;

use candle_core::{DType, Result, Tensor};
use common::*;
use faer::{Mat, Side};
use kronwake::curvature::Damping;
use kronwake::nn::{self, Conv2dConfig, Module, VarBuilder};
use kronwake::optim::{Bias, Every, KFac, Optimizer, ParamsKFac};
use kronwake::tape::{Fisher, Likelihood};
use std::collections::HashMap;

const DAMPING: f64 = 0.02;
const DECAY: f64 = 0.4;

fn eigenvectors(m: &Mat<f64>) -> Mat<f64> {
    m.self_adjoint_eigen(Side::Lower).unwrap().U().to_owned()
}

/// The whole state of one group of one block, dense: an orthogonal basis of the block and its second moments.
struct Dense {
    basis: Mat<f64>,
    moments: Mat<f64>,
}

impl Dense {
    /// The average of second moments in a basis that may have turned: the old average is the diagonal matrix that it is in the
    /// old basis, the new one takes its diagonal in the new basis.
    fn next(last: Option<&Dense>, basis: Mat<f64>, squares: Mat<f64>) -> Dense {
        let moments = match last {
            None => squares,
            Some(last) => {
                let d = Mat::from_fn(squares.nrows(), squares.nrows(), |i, j| {
                    if i == j { last.moments[(i, 0)] } else { 0.0 }
                });
                let old = &last.basis * d * last.basis.transpose();
                let turned = basis.transpose() * old * &basis;
                Mat::from_fn(squares.nrows(), 1, |i, _| {
                    DECAY * turned[(i, i)] + (1.0 - DECAY) * squares[(i, 0)]
                })
            }
        };
        Dense { basis, moments }
    }

    fn step(&self, gradient: &Mat<f64>) -> Mat<f64> {
        let inside = self.basis.transpose() * gradient;
        let scaled =
            Mat::from_fn(inside.nrows(), 1, |i, _| -inside[(i, 0)] / (self.moments[(i, 0)] + DAMPING));
        &self.basis * scaled
    }
}

/// The mean over examples of the squares of their gradients in `basis`, and the mean gradient. With the exact Fisher the
/// gradients are those of the outputs, times a square root of the Hessian.
fn squares(
    gradients: &Mat<f64>,
    outputs: Option<(&Mat<f64>, &[f64])>,
    terms: usize,
    basis: &Mat<f64>,
) -> (Mat<f64>, Mat<f64>) {
    let n = gradients.nrows() as f64;
    let mean = Mat::from_fn(gradients.ncols(), 1, |j, _| gradients.col(j).sum() / n);
    let moments = match outputs {
        None => {
            let inside = gradients * basis;
            Mat::from_fn(inside.ncols(), 1, |j, _| inside.col(j).squared_norm_l2() / n)
        }
        Some((jacobian, z)) => {
            let classes = z.len() / terms;
            let mut total = Mat::<f64>::zeros(basis.ncols(), 1);
            for term in 0..terms {
                let inside = jacobian.subrows(term * classes, classes) * basis;
                let h = hessian(Likelihood::Categorical, &z[term * classes..][..classes]);
                let curved = inside.transpose() * h * &inside;
                total += Mat::from_fn(basis.ncols(), 1, |i, _| curved[(i, i)] / terms as f64);
            }
            total
        }
    };
    (moments, mean)
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

fn check(what: &str, net: &Net, dims: &[usize], fisher: Fisher, bias: Bias, every: Every) -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let mut opt = KFac::from_varmap(
        &net.varmap,
        ParamsKFac {
            lr: 1.0,
            damping: Damping::Eigenvalue(DAMPING),
            ekfac: true,
            stat_decay: DECAY,
            every,
            fisher,
            bias,
            kl_clip: None,
            ..ParamsKFac::on(&net.tape)
        },
    )?;
    let mut state: HashMap<(String, usize), Dense> = HashMap::new();
    for k in 0..4 {
        let x = random(50 + k, dims)?;
        let y = labels(60 + k, dims[0], 3)?;
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
            let last = state.get(&key);
            let basis = match last {
                Some(last) if !(k as usize).is_multiple_of(every.inverses) => last.basis.clone(),
                _ => kron(&eigenvectors(&of_group(&a, key.1)), &eigenvectors(&of_group(&g, key.1))),
            };
            let exact = (fisher == Fisher::Exact).then_some((&jacobian, &outputs[..]));
            let (moments, mean) = squares(&gradients, exact, dims[0], &basis);
            let dense = if (k as usize).is_multiple_of(every.factors) {
                Dense::next(last, basis, moments)
            } else {
                Dense { basis, moments: last.unwrap().moments.clone() }
            };
            let groups = net.groups(&key.0);
            let value = |values: &[Tensor]| -> Result<Mat<f64>> {
                net.set(values)?;
                let elements = net.elements(&key.0, key.1, groups);
                Ok(Mat::from_fn(elements.len(), 1, |i, _| flat(elements[i].0.as_tensor())[elements[i].1]))
            };
            let found = value(&after)? - value(&before)?;
            net.set(&after)?;
            assert_same(
                &found,
                &dense.step(&mean),
                1e-7,
                &format!("{what}, {fisher:?}, {bias:?}, {key:?}, step {k}"),
            );
            state.insert(key, dense);
        }
    }
    Ok(())
}

#[test]
fn steps() -> Result<()> {
    let always = Every { factors: 1, inverses: 1 };
    // The basis of an old inverse stays while the moments go on.
    let lazy = Every { factors: 1, inverses: 2 };
    for fisher in [Fisher::Empirical, Fisher::Exact] {
        for bias in [Bias::Folded, Bias::Split] {
            for every in [always, lazy] {
                check("mlp", &Net::of(DType::F64, 1, mlp)?, &[6, 3], fisher, bias, every)?;
                check("cnn", &Net::of(DType::F64, 2, |vb| cnn(vb, 1))?, &[5, 2, 3, 3], fisher, bias, every)?;
                check(
                    "groups",
                    &Net::of(DType::F64, 3, |vb| cnn(vb, 2))?,
                    &[5, 2, 3, 3],
                    fisher,
                    bias,
                    every,
                )?;
                check("twice", &Net::of(DType::F64, 4, twice)?, &[6, 3], fisher, bias, every)?;
            }
        }
    }
    Ok(())
}
