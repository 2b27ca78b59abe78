//! Fine-tunes a saved model by adapters of low rank: `cargo run --release --example adapters`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{self, Lora, Module, ParamsLora, Sequential, VarBuilder, VarMap, init, loss};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::tape::{Likelihood, Tape};

/// Points `[400, 2]` of a square, and in which of four quarters each is once the square is turned.
fn quarters(angle: f32) -> Result<(Tensor, Tensor)> {
    let at = |i: u32| i as f32 / 9.5 - 1.0;
    let x = Tensor::from_iter((0..400).flat_map(|i| [at(i % 20), at(i / 20)]), &Device::Cpu)?;
    let turn = Tensor::new(&[[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]], &Device::Cpu)?;
    let right_and_up = x.reshape((400, 2))?.matmul(&turn)?.gt(0f32)?.to_dtype(DType::F32)?;
    let y = right_and_up.matmul(&Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?)?;
    Ok((x.reshape((400, 2))?, y.squeeze(1)?.to_dtype(DType::U32)?))
}

fn model(vars: &VarMap) -> Result<Sequential> {
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    let layer = |from, to, name| nn::linear(from, to, vb.pp(name));
    let hidden = nn::seq().add(layer(2, 48, "fc1")?).add_fn(|x| x.tanh());
    Ok(hidden.add(layer(48, 48, "fc2")?).add_fn(|x| x.tanh()).add(layer(48, 4, "fc3")?))
}

/// Trains the parameters in `vars` for some steps.
fn train(model: &impl Module, vars: &VarMap, tape: &Tape, (x, y): (&Tensor, &Tensor)) -> Result<()> {
    let mut opt = NaturalGradient::from_varmap(vars, Params::kld_wrm(tape))?;
    for _ in 0..60 {
        let logits = model.forward(x)?;
        opt.observe(&logits, Likelihood::Categorical)?;
        opt.backward_step(&loss::cross_entropy(&logits, y)?)?;
    }
    opt.adopt_average() // the averaged parameters are the ones to keep
}

fn main() -> Result<()> {
    let file = std::env::temp_dir().join(format!("kronwake-base-{}.safetensors", std::process::id()));
    let right = |model: &Sequential, (x, y): (&Tensor, &Tensor)| {
        model.forward(x)?.argmax(1)?.eq(y)?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()
    };
    let (x, y) = quarters(0.0)?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let base = tape.build(|| model(&vars))?;
    init::seeded_uniform(&init::named(&vars)?, 0)?;
    train(&base, &vars, &tape, (&x, &y))?;
    vars.save(&file)?;
    println!("the base: {:.3} right", right(&base, (&x, &y))?);
    let (x, y) = quarters(0.5)?; // another task
    let (vars, tape) = (VarMap::new(), Tape::new());
    let lora = Lora::new(ParamsLora { rank: 2, ..Default::default() })?;
    let tuned = lora.build(|| tape.build(|| model(&vars)))?;
    Checkpoint::read(&file, &Device::Cpu)?.load_into(&vars)?;
    println!("on the new task {:.3}", right(&tuned, (&x, &y))?);
    train(&tuned, lora.varmap(), &tape, (&x, &y))?; // of each layer two small matrices
    let adapters: usize = lora.varmap().all_vars().iter().map(|var| var.elem_count()).sum();
    println!("after tuning {adapters} parameters {:.3}", right(&tuned, (&x, &y))?);
    lora.merge(&vars)?; // `vars` is a model without adapters again
    Ok(std::fs::remove_file(&file)?)
}
