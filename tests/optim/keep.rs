//! A decomposition that fails keeps the last good inverse; without one it is an error that names the block.

use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::curvature::{Damping, Inverse};
use kronwake::optim::{Every, NaturalGradient, Optimizer, Params};
use kronwake::tape::Likelihood;

/// K-FAC on inputs so alike that f32 cannot invert their factor without damping.
fn step(opt: &mut NaturalGradient, net: &Net) -> Result<()> {
    let (_, y) = small_batch(1, 12, DType::F32)?;
    let (x, _) = small_batch(2, 1, DType::F32)?;
    let mut dims = x.dims().to_vec();
    dims[0] = 12;
    let logits = (net.forward)(&x.broadcast_as(dims)?.contiguous()?)?;
    opt.observe(&logits, Likelihood::Categorical)?;
    opt.backward_step(&candle_nn::loss::cross_entropy(&logits, &y)?)
}

fn params(net: &Net, damping: f64) -> Params {
    Params {
        damping: Damping::Pi(damping),
        inverse: Inverse::Newton,
        every: Every { factors: 1, inverses: 1 },
        ..Params::k_fac(&net.tape)
    }
}

#[test]
fn a_failed_inverse() -> Result<()> {
    let net = Net::of(DType::F32, 1, small)?;
    assert_says(
        step(&mut NaturalGradient::from_varmap(&net.varmap, params(&net, 1e-30))?, &net),
        &["Newton"],
    );

    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, 0.1))?;
    step(&mut opt, &net)?;
    let inverses = |opt: &NaturalGradient| -> Result<Vec<_>> {
        let all = saved(opt)?.0;
        Ok(all.into_iter().filter(|(name, _)| name.contains("/inv_")).collect())
    };
    let before = inverses(&opt)?;
    opt.set_params(params(&net, 1e-30))?;
    let values: Vec<Tensor> = net.values()?;
    step(&mut opt, &net)?;
    assert_eq!(inverses(&opt)?, before);
    assert!(
        net.values()?.iter().zip(&values).any(|(a, b)| relative(a, b).unwrap() > 0.0),
        "a step was taken"
    );
    Ok(())
}
