//! candle_nn's initial values, and values that follow from a seed: the same on every machine and device, whatever was drawn before.
//!
//! candle_nn's layers draw their first values from one generator for all of a process. A comparison of optimizers wants the same start for each:
//!
//! ```
//! use candle_core::{DType, Device};
//! use kronwake::nn::{self, VarBuilder, VarMap, init};
//!
//! let start = || -> candle_core::Result<Vec<f32>> {
//!     let vars = VarMap::new();
//!     let fc = nn::linear(4, 2, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("fc"))?;
//!     init::seeded_uniform(&init::named(&vars)?, 7)?;
//!     fc.weight().flatten_all()?.to_vec1()
//! };
//! assert_eq!(start()?, start()?);
//! # candle_core::Result::Ok(())
//! ```

mod stream;

pub use candle_nn::init::*;
pub use stream::Stream;

use crate::ops::rng::normal;
use candle_core::{Device, Result, Tensor, Var, bail};
use candle_nn::VarMap;

/// The Vars of `varmap` in the order of their names.
///
/// # Errors
/// When a thread that failed left the VarMap locked.
pub fn named(varmap: &VarMap) -> Result<Vec<(String, Var)>> {
    let Ok(all) = varmap.data().lock() else { bail!("VarMap: a thread that failed left it locked") };
    let mut named: Vec<_> = all.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(named)
}

/// Sets every Var to uniform numbers in `+-1 / sqrt(fan_in)`, PyTorch's default for linear and convolution layers, where `fan_in` is the
/// number of inputs of an output, for `LAYER.bias` that of `LAYER.weight`. A value depends on the seed, the Var's name and its place in
/// the Var alone.
///
/// # Errors
/// When there is no `LAYER.weight` for a `LAYER.bias` in `vars`; nothing has changed then.
pub fn seeded_uniform(vars: &[(String, Var)], seed: u64) -> Result<()> {
    let fan_in = |name: &String| {
        let weight = name.strip_suffix(".bias").map_or(name.clone(), |layer| format!("{layer}.weight"));
        match vars.iter().find(|(other, _)| *other == weight) {
            Some((_, weight)) => Ok(fan_in(weight)),
            None => bail!("{name}: there is no {weight}, whose shape gives the scale of the initial values"),
        }
    };
    let sizes = vars.iter().map(|(name, _)| fan_in(name)).collect::<Result<Vec<_>>>()?;
    for ((name, var), fan_in) in vars.iter().zip(sizes) {
        let (stream, bound) = (Stream::new(seed, name, 0), 1.0 / (fan_in as f64).sqrt());
        set(var, |i| bound * (2.0 * stream.uniform(i) - 1.0))?;
    }
    Ok(())
}

/// Sets every Var to what transformers start from: matrices to normal numbers of variance `1 / fan_in`, but embeddings (Vars with `embed`
/// or `token` in their names) of deviation 0.02; vectors to 1, but those whose name ends in `bias` to 0. A value depends on the seed and
/// on its place in `vars` and in the Var alone.
///
/// # Errors
/// When a Var cannot be set.
pub fn seeded_normal(vars: &[(String, Var)], seed: u64) -> Result<()> {
    for ((name, var), stream) in vars.iter().zip(0..) {
        let table = name.contains("embed") || name.contains("token");
        let scale = if table { 0.02 } else { 1.0 / (fan_in(var) as f64).sqrt() };
        match var.rank() {
            0 | 1 => set(var, |_| if name.ends_with("bias") { 0.0 } else { 1.0 })?,
            _ => set(var, |i| scale * normal(seed, stream, i as u64))?,
        }
    }
    Ok(())
}

/// Inputs of an output.
fn fan_in(weight: &Var) -> usize {
    weight.dims().iter().skip(1).product()
}

fn set(var: &Var, value: impl Fn(usize) -> f64) -> Result<()> {
    let values = (0..var.elem_count()).map(value).collect();
    let values = Tensor::from_vec::<_, f64>(values, var.shape(), &Device::Cpu)?;
    var.set(&values.to_dtype(var.dtype())?.to_device(var.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{VarBuilder, conv2d, embedding, layer_norm, linear};
    use candle_core::DType;

    fn network(dtype: DType) -> Vec<(String, Var)> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        linear(100, 50, vb.pp("fc1")).unwrap();
        conv2d(2, 3, 5, Default::default(), vb.pp("conv1")).unwrap();
        named(&vars).unwrap()
    }

    fn values(vars: &[(String, Var)], name: &str) -> Vec<f64> {
        let (_, var) = vars.iter().find(|(n, _)| n == name).unwrap();
        var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn uniform_values_fill_the_interval_of_the_fan_in() {
        let vars = network(DType::F64);
        seeded_uniform(&vars, 5).unwrap();
        for (name, fan_in) in
            [("fc1.weight", 100.0), ("fc1.bias", 100.0), ("conv1.weight", 50.0), ("conv1.bias", 50.0)]
        {
            let largest = values(&vars, name).iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let bound = 1.0 / f64::sqrt(fan_in);
            assert!(largest <= bound && largest > 0.3 * bound, "{name}: {largest} {bound}");
        }
        let again = network(DType::F32);
        seeded_uniform(&again, 5).unwrap();
        for (a, b) in values(&vars, "fc1.weight").iter().zip(values(&again, "fc1.weight")) {
            assert_eq!(*a as f32, b as f32);
        }
        seeded_uniform(&again, 6).unwrap();
        assert_ne!(values(&vars, "fc1.bias")[0] as f32, values(&again, "fc1.bias")[0] as f32);
        let before = values(&vars, "fc1.bias");
        let alone: Vec<_> = vars.iter().filter(|(name, _)| name != "fc1.weight").cloned().collect();
        let error = seeded_uniform(&alone, 6).unwrap_err().to_string();
        assert!(error.contains("fc1.bias: there is no fc1.weight"), "{error}");
        assert_eq!(values(&vars, "fc1.bias"), before);
    }

    #[test]
    fn normal_values_have_their_deviations() {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        linear(400, 100, vb.pp("fc")).unwrap();
        layer_norm(8, 1e-5, vb.pp("norm")).unwrap();
        embedding(100, 400, vb.pp("embed_tokens")).unwrap();
        let vars = named(&vars).unwrap();
        seeded_normal(&vars, 3).unwrap();
        // 40,000 numbers: the deviation's standard error is 1 / sqrt(80,000), 0.35 %; five of them.
        for (name, deviation) in [("fc.weight", 0.05), ("embed_tokens.weight", 0.02)] {
            let found = values(&vars, name).iter().map(|v| v * v).sum::<f64>() / 40_000.0;
            assert!((found.sqrt() / deviation - 1.0).abs() < 0.018, "{name}: {}", found.sqrt());
        }
        assert_eq!((values(&vars, "fc.bias"), values(&vars, "norm.bias")), (vec![0.0; 100], vec![0.0; 8]));
        assert_eq!(values(&vars, "norm.weight"), [1.0; 8]);
    }
}
