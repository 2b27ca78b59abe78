//! Initial parameters: seeded as PyTorch would draw them, or read from a safetensors file.

use super::random::Stream;
use super::sentence::sentence;
use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarMap;
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

/// Sets every parameter from the safetensors file `path`, converted to the parameter's dtype. Refuses, and changes
/// nothing, if a tensor is missing, has another shape or belongs to no parameter: all differences in one error.
pub fn load(vars: &VarMap, path: &Path) -> Result<()> {
    let file = path.display();
    let mut found = match candle_core::safetensors::load(path, &Device::Cpu) {
        Ok(found) => found,
        Err(e) => bail!("--init {file}: cannot be read as safetensors ({})", sentence(&e)),
    };
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    for (name, var) in named(vars)? {
        match found.remove(&name) {
            None => problems.push(format!("{name} is missing")),
            Some(value) if value.dims() != var.dims() => {
                problems.push(format!("{name} has shape {:?}, expected {:?}", value.dims(), var.dims()));
            }
            Some(value) => values.push((var, value)),
        }
    }
    let mut extra: Vec<_> = found.into_keys().map(|name| format!("{name} belongs to no parameter")).collect();
    extra.sort();
    problems.append(&mut extra);
    if !problems.is_empty() {
        bail!("--init {file} does not fit this --model: {}", problems.join("; "));
    }
    for (var, value) in values {
        var.set(&value.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
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
    use candle_nn::VarBuilder;
    use std::collections::HashMap;

    fn network(dtype: DType) -> VarMap {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        candle_nn::linear(100, 50, vb.pp("fc1")).unwrap();
        candle_nn::conv2d(2, 3, 5, Default::default(), vb.pp("conv1")).unwrap();
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

    #[test]
    fn a_file_is_loaded_or_refused_as_a_whole() {
        let path = std::env::temp_dir().join(format!("kronwake-init-{}.safetensors", std::process::id()));
        let (from, to) = (network(DType::F32), network(DType::F64));
        draw(&from, 1).unwrap();
        draw(&to, 2).unwrap();
        from.save(&path).unwrap();
        load(&to, &path).unwrap();
        assert_eq!(values(&from, "conv1.weight"), values(&to, "conv1.weight"));

        let mut tensors: HashMap<_, _> =
            named(&from).unwrap().into_iter().map(|(n, v)| (n, v.as_tensor().clone())).collect();
        tensors.remove("fc1.bias");
        tensors.insert("head".into(), tensors["conv1.bias"].clone());
        tensors.insert("fc1.weight".into(), tensors["conv1.bias"].clone());
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let before = values(&to, "conv1.weight");
        let error = sentence(&load(&to, &path).unwrap_err());
        assert!(
            error.ends_with(
                "does not fit this --model: fc1.bias is missing; fc1.weight has shape [3], expected [50, 100]; \
                 head belongs to no parameter"
            ),
            "{error}"
        );
        assert_eq!(values(&to, "conv1.weight"), before);
        std::fs::write(&path, b"not safetensors").unwrap();
        assert!(sentence(&load(&to, &path).unwrap_err()).contains("cannot be read as safetensors"));
        std::fs::remove_file(&path).unwrap();
    }
}
