//! Removes most weights of a trained net by what they are worth, and makes it smaller: `cargo run --release --example prune`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Collect, Sharing};
use kronwake::nn::{self, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::prune::{Operated, Stage, Surgeon, Weights, compact, keep_largest};
use kronwake::tape::{Fisher, Likelihood, Tape};

/// Pictures `[600, 64]` of 8 x 8 pixels, a bar at one of six heights with noise, and the bar's height.
fn bars() -> Result<(Tensor, Tensor)> {
    let numbers = init::Stream::new(0, "pixels", 0);
    let pixel = |i: usize| {
        let (picture, row, column) = (i / 64, i % 64 / 8, i % 8);
        if row == picture % 6 + 1 && column < 6 { 1.0 } else { 0.6 * numbers.uniform(i) as f32 }
    };
    let x = Tensor::from_iter((0..600 * 64).map(pixel), &Device::Cpu)?.reshape((600, 64))?;
    Ok((x, Tensor::from_iter((0..600).map(|i| i % 6u32), &Device::Cpu)?))
}

fn main() -> Result<()> {
    let (x, y) = bars()?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layer = |from, to, name: &str| nn::linear(from, to, vb.pp(name));
    let layers = tape.build(|| Ok([layer(64, 40, "fc1")?, layer(40, 30, "fc2")?, layer(30, 6, "fc3")?]))?;
    init::seeded_uniform(&init::named(&vars)?, 0)?;
    let [fc1, fc2, fc3] = &layers;
    let forward = |x: &Tensor| x.apply(fc1)?.relu()?.apply(fc2)?.relu()?.apply(fc3);
    let params = Params { weight_decay: 0.01, ..Params::kld_wrm(&tape) }; // to a net that is certain no weight is worth anything
    let mut opt = NaturalGradient::from_varmap(&vars, params)?;
    for _ in 0..100 {
        let logits = forward(&x)?;
        opt.observe(&logits, Likelihood::Categorical)?;
        opt.backward_step(&cross_entropy(&logits, &y)?)?;
    }
    opt.adopt_average()?;
    // The layers' Kronecker factors over all examples say what each weight is worth, and how the others make up for it.
    let mut collect = Collect::new(&tape, Likelihood::Categorical, Fisher::Exact, Sharing::Expand)?;
    collect.add(&forward(&x)?, None)?;
    let surgeons = collect.finish()?.iter().map(|f| Surgeon::new(f, 1e-3)).collect::<Result<Vec<_>>>()?;
    let (mut worth, mut all) = (Vec::new(), Vec::new());
    for (surgeon, layer) in surgeons.iter().zip(&layers) {
        all.push(layer.weight().ones_like()?.to_dtype(DType::U8)?);
        worth.push(surgeon.saliency(layer.weight(), layer.bias(), &all[all.len() - 1])?);
    }
    for count in [3940, 400, 100, 50, 25] {
        let mut stages = Vec::new(); // linear layers with ReLU between them
        let kept = keep_largest(&worth, &all, count)?;
        for ((surgeon, layer), kept) in surgeons.iter().zip(&layers).zip(&kept) {
            let Operated { weight, bias, .. } = surgeon.remove(layer.weight(), layer.bias(), kept)?;
            stages.push(Stage::Linear(Weights { name: surgeon.name().into(), weight, bias }));
            stages.push(Stage::Map(|x| x.relu()));
        }
        let small = compact(&stages[..stages.len() - 1])?; // without dead units and pixels
        let right = small.forward(&x)?.argmax(1)?.eq(&y)?.to_dtype(DType::F32)?.mean_all()?;
        println!("{count} weights, {} pixels: {:.3} right", small.inputs.len(), right.to_scalar::<f32>()?);
    }
    Ok(())
}
