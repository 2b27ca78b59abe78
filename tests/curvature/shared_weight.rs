//! A weight that is used with its bias and without: the second use has no part in the bias, nor the bias in its inputs.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::Sharing;
use kronwake::nn::{self, Linear, Module, VarBuilder};
use kronwake::optim::{Every, NaturalGradient, Optimizer, Params};
use kronwake::tape::{Fisher, Likelihood};

fn net() -> Result<Net> {
    Net::of(DType::F64, 3, |vb: VarBuilder| {
        let (weight, bias) = (vb.get((3, 3), "shared.weight")?, vb.get(3, "shared.bias")?);
        let (first, second) = (Linear::new(weight.clone(), Some(bias)), Linear::new(weight, None));
        let last = nn::linear(3, 2, vb.pp("last"))?;
        Ok(Box::new(move |x| last.forward(&second.forward(&first.forward(x)?.tanh()?)?.tanh()?)))
    })
}

fn params(net: &Net, sharing: Sharing) -> Params {
    let every = Every { factors: 1, inverses: 1 };
    Params { lr: 0.0, stat_decay: 0.0, every, sharing, fisher: Fisher::Exact, ..Params::k_fac(&net.tape) }
}

#[test]
fn factors_of_its_uses() -> Result<()> {
    let (net, n) = (net()?, 5);
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, Sharing::Expand))?;
    assert!(opt.block_names().contains(&"shared.weight") && opt.block_names().contains(&"shared.bias"));
    let x = random(8, &[n, 3])?;
    let z = (net.forward)(&x)?;
    opt.observe(&z, Likelihood::Gaussian)?;
    opt.backward_step(&mean_loss(Likelihood::Gaussian, &z, &random(9, &[n, 2])?)?)?;

    // The inputs of both uses, without a 1.
    let (w, b) = (net.var("shared.weight"), net.var("shared.bias"));
    let hidden = x.matmul(&w.t()?)?.broadcast_add(&b)?.tanh()?;
    let moment = |rows: &Tensor| rows.t()?.matmul(rows)? / n as f64;
    let expected = (moment(&x)? + moment(&hidden)?)?.unsqueeze(0)?;
    assert_close(&opt.factors("shared.weight").unwrap().0, &expected, 1e-12, "A of the weight");

    // The bias's block is exact: of squared losses the mean of J^T J, by differences.
    let elements: Vec<_> = (0..3).map(|i| (b.clone(), i)).collect();
    let j = jacobian(&elements, 1e-6, &|| (net.forward)(&x)?.flatten_all())?;
    let exact = tensor(&(j.transpose() * &j / faer::Scale(n as f64)));
    let found = opt.factors("shared.bias").unwrap().1;
    assert_close(&found, &exact.reshape((1, 3, 3))?.to_device(&Device::Cpu)?, 1e-8, "G of the bias");
    Ok(())
}

#[test]
fn sums_over_its_uses_are_refused() -> Result<()> {
    let net = net()?;
    let made = NaturalGradient::from_varmap(&net.varmap, params(&net, Sharing::Reduce));
    assert_says(made.map(drop), &["with several biases or without one", "Sharing::Expand"]);
    Ok(())
}
