//! The evidence and its derivatives on a GPU are those on the CPU.

use crate::common::*;
use crate::device::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, Outputs, Parts, Posterior, Problem, Split,
    Structure,
};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};

/// Numbers of every estimator, and of predictions, for a net of convolutions and norms.
fn numbers(device: &Device, dtype: DType) -> Result<Vec<(String, f64)>> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, dtype, device);
    let (conv, norm, last) = tape.build(|| {
        let padded = nn::Conv2dConfig { padding: 1, ..Default::default() };
        Ok((
            nn::conv2d(2, 3, 3, padded, vb.pp("conv"))?,
            nn::layer_norm(48, 1e-5, vb.pp("norm"))?,
            nn::linear(48, 4, vb.pp("last"))?,
        ))
    })?;
    let mut named: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (seed, (_, var)) in named.iter().enumerate() {
        var.set(&random(seed as u64, var.dims())?.to_dtype(dtype)?.to_device(device)?)?;
    }
    let model = |x: &Tensor| last.forward(&norm.forward(&conv.forward(x)?.tanh()?.flatten_from(1)?)?);
    let x = random(10, &[24, 2, 4, 4])?.to_dtype(dtype)?.to_device(device)?;
    let y = Tensor::from_iter((0..24).map(|i| i * i % 4u32), device)?;
    let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    let examples = Examples::new(x.clone(), y)?;
    let mut found = vec![];
    let mut estimators = vec![Estimator::extrapolated(16)];
    for curvature in [
        Curvature::Kernel(Outputs::Joint),
        Curvature::Kernel(Outputs::Independent(Split::Root)),
        Curvature::Kernel(Outputs::OneEach(Split::Diagonal)),
        Curvature::Full,
        Curvature::BlockPerTensor,
        Curvature::Kron,
        Curvature::Diagonal,
    ] {
        estimators.push(Estimator::new(curvature, Parts::Whole));
        estimators.push(Estimator::new(curvature, Parts::ByLabel(5)));
    }
    for estimator in estimators {
        for structure in [Structure::PerTensor, Structure::Diagonal] {
            if structure == Structure::Diagonal && estimator.curvature == Curvature::Kron {
                continue;
            }
            let hyper = Hyper::new(&problem, structure, 0.9)?.with_temperature(0.8)?;
            let evidence = estimator.fit(&problem, &examples, 3)?.evidence(&hyper)?;
            let what = format!("{estimator:?} {structure:?}");
            found.push((what.clone(), evidence.log_evidence));
            found.extend(evidence.grad_log_precision.iter().map(|g| (what.clone(), *g)));
        }
    }
    let hyper = Hyper::new(&problem, Structure::PerTensor, 0.9)?;
    for structure in [HessianStructure::Full, HessianStructure::Kron, HessianStructure::Diagonal] {
        let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
        let predictive = posterior.predict(&problem, &x)?;
        for t in [predictive.probit()?, predictive.variance()?, predictive.sampled(3, 1)?] {
            let t = t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            found.extend(t.into_iter().map(|v| (format!("{structure:?}"), v)));
        }
    }
    Ok(found)
}

#[test]
fn a_gpu_agrees_with_the_cpu() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 2e-3)] {
        let exact = numbers(&Device::Cpu, DType::F64)?;
        for ((what, found), (_, exact)) in numbers(&device, dtype)?.into_iter().zip(exact) {
            let near = (found - exact).abs() <= tolerance * exact.abs().max(1.0);
            assert!(near, "{dtype:?} {what}: {found}, on the CPU {exact}");
        }
    }
    Ok(())
}

/// The same numbers where there is no GPU: single precision is near double.
#[test]
fn single_precision_is_near() -> Result<()> {
    let (found, exact) = (numbers(&Device::Cpu, DType::F32)?, numbers(&Device::Cpu, DType::F64)?);
    for ((what, found), (_, exact)) in found.into_iter().zip(exact) {
        assert!((found - exact).abs() <= 2e-3 * exact.abs().max(1.0), "{what}: {found} {exact}");
    }
    Ok(())
}
