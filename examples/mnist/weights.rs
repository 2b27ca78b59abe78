//! Initial parameters: seeded as PyTorch would draw them, or read from a safetensors file.

use super::random::Stream;
use super::sentence::sentence;
use candle_core::{Device, Result, Tensor, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::VarMap;
use std::path::Path;

/// Sets every parameter to uniform numbers in `+-1/sqrt(fan_in)`, PyTorch's default for linear and convolution layers.
/// `fan_in` is the number of inputs of an output (also for biases). Depends on the seed, the names and the shapes alone.
pub fn draw(vars: &VarMap, seed: u64) -> Result<()> {
    for (name, var) in named(vars)? {
        let weight = match name.strip_suffix(".bias") {
            Some(layer) => format!("{layer}.weight"),
            None => name.clone(),
        };
        let Some((_, weight)) = named(vars)?.into_iter().find(|(other, _)| *other == weight) else {
            bail!("{name}: there is no {weight}, whose shape gives the scale of the initial values");
        };
        let fan_in: usize = weight.dims().iter().skip(1).product();
        let bound = 1.0 / (fan_in as f64).sqrt();
        let stream = Stream::new(seed, &name, 0);
        let values: Vec<f64> =
            (0..var.elem_count()).map(|i| bound * (2.0 * stream.uniform(i) - 1.0)).collect();
        let values = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
        var.set(&values.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}

/// Sets every parameter from the safetensors file `path`; all that does not fit is in one error, and nothing is changed.
pub fn load(vars: &VarMap, path: &Path) -> Result<()> {
    match Checkpoint::read(path, &Device::Cpu)?.load_into(vars) {
        Err(e) => bail!("--init {}: {}", path.display(), sentence(&e)),
        loaded => loaded,
    }
}

/// The parameters in the order of their names.
pub fn named(vars: &VarMap) -> Result<Vec<(String, candle_core::Var)>> {
    let Ok(all) = vars.data().lock() else {
        bail!("the table of parameters was left locked by a thread that failed")
    };
    let mut named: Vec<_> = all.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(named)
}

/// The number of parameters, all elements counted.
pub fn count(vars: &VarMap) -> Result<usize> {
    Ok(named(vars)?.iter().map(|(_, var)| var.elem_count()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use kronwake::nn::{VarBuilder, conv2d, linear};

    fn network(dtype: DType) -> VarMap {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        linear(100, 50, vb.pp("fc1")).unwrap();
        conv2d(2, 3, 5, Default::default(), vb.pp("conv1")).unwrap();
        vars
    }

    fn values(vars: &VarMap, name: &str) -> Vec<f64> {
        let (_, var) = named(vars).unwrap().into_iter().find(|(n, _)| n == name).unwrap();
        var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn draws_fill_the_interval_of_the_fan_in() {
        let vars = network(DType::F64);
        draw(&vars, 5).unwrap();
        for (name, fan_in) in
            [("fc1.weight", 100.0), ("fc1.bias", 100.0), ("conv1.weight", 50.0), ("conv1.bias", 50.0)]
        {
            let largest = values(&vars, name).iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let bound = 1.0 / f64::sqrt(fan_in);
            assert!(largest <= bound && largest > 0.3 * bound, "{name}: {largest} {bound}");
        }
        let again = network(DType::F32);
        draw(&again, 5).unwrap();
        for (a, b) in values(&vars, "fc1.weight").iter().zip(values(&again, "fc1.weight")) {
            assert_eq!(*a as f32, b as f32);
        }
        draw(&again, 6).unwrap();
        assert_ne!(values(&vars, "fc1.bias")[0] as f32, values(&again, "fc1.bias")[0] as f32);
    }
}
