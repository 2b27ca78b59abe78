//! Removes most weights of a trained net by what they are worth, and makes it smaller: `cargo run --release --example prune`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Collect, Sharing};
use kronwake::nn::{self, Linear, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::prune::{Stage, Surgeon, Weights, compact, keep_largest};
use kronwake::tape::{Fisher, Likelihood, Tape};

/// Pictures `[600, 64]` of 8 x 8 pixels, a bar at one of six heights with noise, and the bar's height.
fn bars() -> Result<(Tensor, Tensor)> {
    let numbers = init::Stream::new(0, "pixels", 0);
    let pixel = |i: usize| {
        let (picture, row, column) = (i / 64, i % 64 / 8, i % 8);
        let bar = row == picture % 6 + 1 && (1..7).contains(&column);
        if bar { 1.0 } else { 0.6 * numbers.uniform(i) as f32 }
    };
    let x = Tensor::from_iter((0..600 * 64).map(pixel), &Device::Cpu)?.reshape((600, 64))?;
    Ok((x, Tensor::from_iter((0..600).map(|i| i % 6), &Device::Cpu)?))
}

/// The layers as stages, with ReLU between them.
fn stages(layers: &[Weights]) -> Vec<Stage> {
    let each = layers.iter().flat_map(|layer| [Stage::Linear(layer.clone()), Stage::Map(|x| x.relu())]);
    each.take(2 * layers.len() - 1).collect()
}

fn main() -> Result<()> {
    let (x, y) = bars()?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layer = |from, to, name: &str| nn::linear(from, to, vb.pp(name));
    let layers = tape.build(|| Ok([layer(64, 40, "fc1")?, layer(40, 30, "fc2")?, layer(30, 6, "fc3")?]))?;
    init::seeded_uniform(&init::named(&vars)?, 0)?;
    let forward = |x: &Tensor| {
        let hidden = |x: Tensor, layer: &Linear| x.apply(layer)?.relu();
        layers[..2].iter().try_fold(x.clone(), hidden)?.apply(&layers[2])
    };
    let params = Params { weight_decay: 1e-3, ..Params::kld_wrm(&tape) };
    let mut opt = NaturalGradient::from_varmap(&vars, params)?;
    for _ in 0..60 {
        let logits = forward(&x)?;
        opt.observe(&logits, Likelihood::Categorical)?;
        opt.backward_step(&cross_entropy(&logits, &y)?)?;
    }
    // The layers' Kronecker factors over all examples say what each weight is worth, and how the others make up for it.
    let mut collect = Collect::new(&tape, Likelihood::Categorical, Fisher::Exact, Sharing::Expand)?;
    collect.add(&forward(&x)?, None)?;
    let surgeons = collect.finish()?.iter().map(|f| Surgeon::new(f, 1e-3)).collect::<Result<Vec<_>>>()?;
    let all: Vec<Tensor> = layers.iter().map(|l| l.weight().ne(f32::NAN)).collect::<Result<_>>()?;
    let worth = surgeons.iter().zip(&layers).zip(&all);
    let worth = worth.map(|((surgeon, l), all)| surgeon.saliency(l.weight(), l.bias(), all));
    let worth = worth.collect::<Result<Vec<_>>>()?;
    for count in [3940, 1000, 400, 200, 100] {
        let kept = keep_largest(&worth, &all, count)?;
        let removed = surgeons.iter().zip(&layers).zip(&kept).map(|((surgeon, l), kept)| {
            let left = surgeon.remove(l.weight(), l.bias(), kept)?;
            Ok(Weights { name: surgeon.name().into(), weight: left.weight, bias: left.bias })
        });
        let small = compact(&stages(&removed.collect::<Result<Vec<_>>>()?))?; // without dead units and pixels
        let right = small.forward(&x)?.argmax(1)?.eq(&y)?.to_dtype(DType::F32)?.mean_all()?;
        println!("{count} weights, {} pixels: {right:.3} right", small.inputs.len());
    }
    Ok(())
}
