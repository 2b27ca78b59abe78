//! Low-rank adapters: what they compute, train, merge and save.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{self, Lora, Module, ParamsLora, VarBuilder, VarMap};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::tape::{Likelihood, Tape};

struct Mlp(nn::Linear, nn::Linear);

impl Mlp {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self(nn::linear(5, 4, vb.pp("fc1"))?, nn::linear_no_bias(4, 3, vb.pp("fc2"))?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.1.forward(&self.0.forward(x)?.tanh()?)
    }
}

struct Adapted {
    base: VarMap,
    tape: Tape,
    lora: Lora,
    model: Mlp,
    x: Tensor,
}

fn adapted(dtype: DType, params: ParamsLora) -> Result<Adapted> {
    let (base, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&base, dtype, &Device::Cpu);
    let lora = Lora::new(params)?;
    let model = lora.build(|| tape.build(|| Mlp::new(vb)))?;
    Ok(Adapted { base, tape, lora, model, x: random(3, &[7, 5])?.to_dtype(dtype)? })
}

fn rank_two(layers: &[&str]) -> ParamsLora {
    let layers = layers.iter().map(|l| l.to_string()).collect();
    ParamsLora { rank: 2, alpha: 3.0, layers, seed: 4, ..Default::default() }
}

fn var(vars: &VarMap, name: &str) -> Tensor {
    vars.data().lock().unwrap()[name].as_detached_tensor()
}

/// Sets every adapter to random numbers.
fn fill(lora: &Lora) -> Result<()> {
    for (i, var) in lora.varmap().data().lock().unwrap().values().enumerate() {
        var.set(&random(20 + i as u64, var.dims())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

#[test]
fn at_first_the_model_is_the_base_and_later_the_formula() -> Result<()> {
    let Adapted { base, lora, model, x, .. } = adapted(DType::F64, rank_two(&["fc1"]))?;
    assert_eq!(lora.layers(), ["fc1"]);
    let plain = Mlp::new(VarBuilder::from_varmap(&base, DType::F64, &Device::Cpu))?;
    assert_eq!(flat(&model.forward(&x)?), flat(&plain.forward(&x)?));
    // As PyTorch draws it: uniform in 1 / sqrt(in).
    let a = flat(&var(lora.varmap(), "fc1.lora_A.weight"));
    assert!(a.iter().all(|a| a.abs() <= 1.0 / 5f64.sqrt()) && a.iter().any(|a| a.abs() > 0.2));
    fill(&lora)?;
    let (a, b) = (var(lora.varmap(), "fc1.lora_A.weight"), var(lora.varmap(), "fc1.lora_B.weight"));
    let w = (var(&base, "fc1.weight") + (b.matmul(&a)? * 1.5)?)?;
    let hidden = x.matmul(&w.t()?)?.broadcast_add(&var(&base, "fc1.bias"))?.tanh()?;
    let expected = hidden.matmul(&var(&base, "fc2.weight").t()?)?;
    assert_close(&model.forward(&x)?, &expected, 1e-13, "outputs");
    Ok(())
}

#[test]
fn gradients_agree_with_differences_and_the_base_has_none() -> Result<()> {
    let Adapted { base, lora, model, x, .. } = adapted(DType::F64, rank_two(&["*"]))?;
    fill(&lora)?;
    let loss = || model.forward(&x)?.sqr()?.sum_all();
    let grads = loss()?.backward()?;
    for var in base.all_vars() {
        assert!(grads.get(&var).is_none());
    }
    for (name, var) in lora.varmap().data().lock().unwrap().iter() {
        let (found, values) = (flat(grads.get(var).unwrap()), flat(var));
        for i in 0..values.len() {
            let at = |h: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] += h;
                var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu)?)?;
                loss()?.to_scalar()
            };
            let difference = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            at(0.0)?;
            assert!((found[i] - difference).abs() < 1e-7 * (1.0 + difference.abs()), "{name} {i}");
        }
    }
    Ok(())
}

#[test]
fn only_adapters_are_trained_and_merged_they_are_the_model() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 0.05)] {
        let Adapted { base, tape, lora, model, x } = adapted(dtype, rank_two(&["fc?"]))?;
        let before = [var(&base, "fc1.weight").copy()?, var(&base, "fc2.weight").copy()?];
        let mut opt: NaturalGradient = NaturalGradient::from_varmap(lora.varmap(), Params::k_fac(&tape))?;
        assert_eq!(opt.block_names(), ["fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"]);
        let y = labels(5, 7, 3)?;
        let loss = |z: &Tensor| mean_loss(Likelihood::Categorical, &z.to_dtype(DType::F64)?, &y);
        let start = loss(&model.forward(&x)?)?.to_scalar::<f64>()?;
        for _ in 0..20 {
            let z = model.forward(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&loss(&z)?)?;
        }
        let tuned = model.forward(&x)?;
        let end = loss(&tuned)?.to_scalar::<f64>()?;
        assert!(end < 0.9 * start, "{dtype:?}: {start} {end}");
        for (before, name) in before.iter().zip(["fc1.weight", "fc2.weight"]) {
            assert_eq!(flat(before), flat(&var(&base, name)));
        }
        let (adapters, file) = (scratch("adapters"), scratch("base"));
        lora.save(&adapters)?;
        base.save(&file)?;
        let merged = lora.merged(&Checkpoint::read(&file, &Device::Cpu)?)?;
        lora.merge(&base)?;
        let plain = Mlp::new(VarBuilder::from_varmap(&base, dtype, &Device::Cpu))?;
        assert_close(&plain.forward(&x)?, &tuned, tolerance, "merged");
        assert_eq!(flat(&plain.forward(&x)?), flat(&model.forward(&x)?));
        for (name, tensor) in &merged.tensors {
            assert_eq!(flat(tensor), flat(&var(&base, name)), "{name}");
        }
        // The adapters alone, onto the base as it was.
        let again = adapted(dtype, rank_two(&["fc?"]))?;
        Checkpoint::read(&file, &Device::Cpu)?.load_into(&again.base)?;
        again.lora.load(&adapters)?;
        assert_eq!(flat(&again.model.forward(&x)?), flat(&tuned));
    }
    Ok(())
}

#[test]
fn a_model_that_is_built_twice_shares_its_adapters() -> Result<()> {
    let Adapted { base, lora, model, x, .. } = adapted(DType::F64, rank_two(&["fc2"]))?;
    fill(&lora)?;
    let vb = VarBuilder::from_varmap(&base, DType::F64, &Device::Cpu);
    let again = lora.build(|| Mlp::new(vb))?;
    assert_eq!(flat(&again.forward(&x)?), flat(&model.forward(&x)?));
    assert_eq!(lora.varmap().all_vars().len(), 2);
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let new = |rank, alpha, layers: &[&str]| {
        let layers = layers.iter().map(|l| l.to_string()).collect();
        Lora::new(ParamsLora { rank, alpha, layers, seed: 0, ..Default::default() })
    };
    assert_says(new(0, 1.0, &["*"]), &["lora", "rank of 1 or more", "rank 0"]);
    assert_says(new(1, f64::NAN, &["*"]), &["finite alpha", "NaN"]);
    assert_says(new(1, 1.0, &[]), &["at least one pattern"]);
    assert_says(
        adapted(DType::F32, rank_two(&["head"])).map(drop),
        &["\"head\" matches no linear layer", "fc1, fc2"],
    );
    let large = ParamsLora { rank: 4, ..rank_two(&["*"]) };
    assert_says(adapted(DType::F32, large).map(drop), &["rank 4", "fc2 [3, 4]"]);

    let Adapted { lora, base, .. } = adapted(DType::F32, rank_two(&["*"]))?;
    assert_says(lora.merge(&VarMap::new()), &["the base has no fc1.weight"]);
    let other = VarMap::new();
    let vb = VarBuilder::from_varmap(&other, DType::F32, &Device::Cpu);
    nn::linear(6, 4, vb.pp("fc1"))?;
    assert_says(lora.merge(&other), &["fc1.weight has shape [4, 6]", "[4, 5]"]);
    let file = scratch("adapters");
    lora.save(&file)?;
    let alpha = adapted(DType::F32, ParamsLora { alpha: 5.0, ..rank_two(&["*"]) })?;
    assert_says(alpha.lora.load(&file), &["lora_alpha is 3", "expected 5"]);
    let fewer = adapted(DType::F32, rank_two(&["fc1"]))?;
    assert_says(fewer.lora.load(&file), &["unexpected fc2.lora_A.weight"]);
    base.save(&file)?;
    assert_says(lora.load(&file), &["missing fc1.lora_A.weight"]);
    Ok(())
}
