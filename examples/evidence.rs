//! Finds weight decays and the noise of a regression without validation data: `cargo run --release --example evidence`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::evidence::{
    Estimator, Examples, HessianStructure, Hyper, ParamsTune, Posterior, Problem, Structure, tune,
};
use kronwake::nn::{self, Module, VarBuilder, VarMap, init, loss::mse};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::tape::{Likelihood, Tape};

const NOISE: f64 = 0.2;

/// Points of a sine between -2 and 2, with noise.
fn points(n: usize) -> Result<(Tensor, Tensor)> {
    let x: Vec<f64> = (0..n).map(|i| 4.0 * (i as f64 + 0.5) / n as f64 - 2.0).collect();
    let numbers = init::Stream::new(1, "noise", 0);
    // The sum of twelve uniform numbers is nearly normal, with variance 1.
    let noise = |i: usize| (0..12).map(|k| numbers.uniform(12 * i + k)).sum::<f64>() - 6.0;
    let y: Vec<f64> = x.iter().enumerate().map(|(i, x)| (3.0 * x).sin() + NOISE * noise(i)).collect();
    Ok((Tensor::new(x, &Device::Cpu)?.unsqueeze(1)?, Tensor::new(y, &Device::Cpu)?.unsqueeze(1)?))
}

fn main() -> Result<()> {
    let (x, y) = points(150)?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let model = tape.build(|| {
        let hidden = nn::seq().add(nn::linear(1, 50, vb.pp("fc1"))?).add_fn(|x| x.tanh());
        Ok(hidden.add(nn::linear(50, 1, vb.pp("fc2"))?))
    })?;
    init::seeded_uniform(&init::named(&vars)?, 0)?;
    let mut opt = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?;
    for _ in 0..300 {
        let outputs = model.forward(&x)?;
        opt.observe(&outputs, Likelihood::Gaussian)?;
        opt.backward_step(&(mse(&outputs, &y)? * 0.5)?)?; // the likelihood's loss: half of the square
    }
    opt.adopt_average()?;

    let problem = Problem::new(&tape, &vars, &model, Likelihood::Gaussian)?;
    let examples = Examples::new(x, y)?;
    // A prior precision for each tensor, and the noise.
    let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?.tune_noise(1.0)?;
    let steps = ParamsTune { steps: 300, ..Default::default() };
    let evidence = tune(&problem, &examples, &Estimator::batch(50), &hyper, &steps, |_, _| ())?.log_evidence;
    println!("log evidence {evidence:.1}, noise {:.3} (the data's is {NOISE})", hyper.noise()?);
    for (parameter, precision) in problem.parameters().iter().zip(hyper.tensor_precisions()?) {
        println!("{}: prior precision {precision:.2}", parameter.name);
    }
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, usize::MAX)?;
    let at = Tensor::new(&[[0f64], [1.0], [3.0]], &Device::Cpu)?; // the last is far from all data
    let predicted = posterior.predict(&problem, &at)?;
    let (mean, deviation) = (predicted.mean.flatten_all()?, predicted.variance()?.sqrt()?.flatten_all()?);
    for (x, (mean, deviation)) in
        [0, 1, 3].iter().zip(mean.to_vec1::<f64>()?.iter().zip(deviation.to_vec1::<f64>()?))
    {
        println!("at {x}: {mean:.2} with a deviation of {deviation:.2}");
    }
    Ok(())
}
