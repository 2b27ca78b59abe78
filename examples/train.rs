//! Trains a classifier with KLD-WRM and, from the same start, with AdamW: `cargo run --release --example train`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::nn::{self, Module, Sequential, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::optim::{AdamW, NaturalGradient, Optimizer, Params, ParamsAdamW, Schedule};
use kronwake::tape::{Likelihood, Tape};

/// Points on three arms of a spiral, and which arm each is on.
fn spiral(n: usize, shift: f32) -> Result<(Tensor, Tensor)> {
    let point = |i: usize| {
        let radius = (i as f32 + shift) / n as f32;
        let angle = 7.0 * radius + (i % 3) as f32 * std::f32::consts::TAU / 3.0;
        [radius * angle.cos(), radius * angle.sin()]
    };
    let x = Tensor::from_iter((0..n).flat_map(point), &Device::Cpu)?.reshape((n, 2))?;
    Ok((x, Tensor::from_iter((0..n).map(|i| i as u32 % 3), &Device::Cpu)?))
}

fn model(vars: &VarMap, tape: &Tape) -> Result<Sequential> {
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    let layer = |from, to, name| nn::linear(from, to, vb.pp(name));
    // Layers that are built inside `Tape::build` show the optimizer their curvature.
    let model = tape.build(|| {
        let hidden = nn::seq().add(layer(2, 32, "fc1")?).add_fn(|x| x.tanh());
        Ok(hidden.add(layer(32, 32, "fc2")?).add_fn(|x| x.tanh()).add(layer(32, 3, "fc3")?))
    })?;
    init::seeded_uniform(&init::named(vars)?, 0)?;
    Ok(model)
}

fn main() -> Result<()> {
    const STEPS: usize = 200;
    let (x, y) = spiral(300, 0.0)?;
    let (test_x, test_y) = spiral(300, 0.5)?;
    for name in ["KLD-WRM", "AdamW"] {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let model = model(&vars, &tape)?;
        let mut kld_wrm = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?;
        let mut adamw = AdamW::from_varmap(&vars, ParamsAdamW::default())?;
        let schedule = Schedule::cosine(if name == "AdamW" { 0.02 } else { 1.0 }, STEPS, 10, 0.05)?;
        for step in 0..STEPS {
            let logits = model.forward(&x)?;
            let loss = cross_entropy(&logits, &y)?;
            if name == "AdamW" {
                adamw.set_learning_rate(schedule.at(step));
                adamw.backward_step(&loss)?;
            } else {
                kld_wrm.set_learning_rate(schedule.at(step));
                kld_wrm.observe(&logits, Likelihood::Categorical)?; // no work unless curvature is due
                kld_wrm.backward_step(&loss)?;
            }
            if (step + 1) % 50 == 0 {
                let right = model.forward(&test_x)?.argmax(1)?.eq(&test_y)?.to_dtype(DType::F32)?;
                let (loss, right) = (loss.to_scalar::<f32>()?, right.mean_all()?.to_scalar::<f32>()?);
                println!("{name}, step {}: loss {loss:.4}, {right:.3} of the test points right", step + 1);
            }
        }
    }
    Ok(())
}
