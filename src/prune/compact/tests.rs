use super::*;
use crate::ops::pool::relu;
use crate::ops::testing::{assert_close, random, values};

mod nets;

/// Random weights of which whole rows, whole columns and single ones are zero.
fn weights(name: &str, seed: u64, dims: &[usize], bias: bool) -> Result<Weights> {
    let (out, per_row) = (dims[0], dims[1..].iter().product::<usize>());
    let per_channel = dims[2..].iter().product::<usize>();
    let mut w = values(&random(seed, dims)?)?;
    let coin = values(&random(seed + 100, &[out + dims[1]])?)?;
    for (at, w) in w.iter_mut().enumerate() {
        let (row, channel) = (at / per_row, at % per_row / per_channel);
        if coin[row] < -0.2 || coin[out + channel] < -0.2 || at % 3 == 0 {
            *w = 0.;
        }
    }
    let bias = if bias { Some(random(seed + 200, &[out])?) } else { None };
    Ok(Weights { name: name.into(), weight: Tensor::from_vec(w, dims, &Device::Cpu)?, bias })
}

fn sizes(stages: &[Stage]) -> Vec<Vec<usize>> {
    let dims = |stage: &Stage| match stage {
        Stage::Linear(w) | Stage::Conv(w, _) => Some(w.weight.dims().to_vec()),
        _ => None,
    };
    stages.iter().filter_map(dims).collect()
}

#[test]
fn outputs_stay() -> Result<()> {
    let mut smaller = 0;
    for seed in 0..12 {
        let bias = seed % 3 != 0;
        let padding = (seed % 2) as usize;
        let config = Conv2dConfig { padding, ..Default::default() };
        let side = (10 + 2 * padding - 2) / 2 + 2 * padding - 2;
        let map: fn(&Tensor) -> Result<Tensor> = if seed % 4 < 2 { relu } else { |x| x.tanh()? + 0.5 };
        let linear = vec![
            Stage::Flatten,
            Stage::Linear(weights("fc1", seed, &[9, 12], bias)?),
            Stage::Map(map),
            Stage::Linear(weights("fc2", seed + 1, &[8, 9], bias)?),
            Stage::Map(map),
            Stage::Linear(weights("fc3", seed + 2, &[3, 8], bias)?),
        ];
        let conv = vec![
            Stage::Conv(weights("conv1", seed, &[6, 3, 3, 3], bias)?, config),
            Stage::Map(map),
            Stage::MaxPool((2, 2), (2, 2)),
            Stage::Conv(weights("conv2", seed + 1, &[7, 6, 3, 3], bias)?, config),
            Stage::Map(map),
            Stage::Flatten,
            Stage::Linear(weights("fc1", seed + 2, &[5, 7 * side * side], bias)?),
            Stage::Map(map),
            Stage::Linear(weights("fc2", seed + 3, &[4, 5], bias)?),
        ];
        for (stages, dims) in [(linear, vec![5, 3, 2, 2]), (conv, vec![2, 3, 10, 10])] {
            for dtype in [DType::F64, DType::F32] {
                let stages: Vec<Stage> =
                    stages.iter().map(|stage| cast(stage, dtype)).collect::<Result<_>>()?;
                let x = random(seed + 50, &dims)?.to_dtype(dtype)?;
                let expected = values(&run(&stages, &x)?)?;
                let small = compact(&stages)?;
                let found = small.forward(&x)?;
                assert_eq!(found.dtype(), dtype);
                assert_close(&found, &expected, if dtype == DType::F64 { 1e-13 } else { 1e-5 });
                // Nothing is left to remove.
                let again = compact(&small.stages)?;
                assert_eq!(sizes(&again.stages), sizes(&small.stages), "{seed}");
                smaller += usize::from(sizes(&small.stages) != sizes(&stages));
                assert_eq!(sizes(&small.stages)[0][1], small.inputs.len());
                for (size, units) in sizes(&small.stages).iter().zip(&small.units) {
                    assert_eq!(size[0], units.len());
                }
            }
        }
    }
    assert!(smaller >= 44, "{smaller} of 48");
    Ok(())
}

fn cast(stage: &Stage, dtype: DType) -> Result<Stage> {
    let cast = |w: &Weights| -> Result<Weights> {
        let bias = w.bias.as_ref().map(|b| b.to_dtype(dtype)).transpose()?;
        Ok(Weights { name: w.name.clone(), weight: w.weight.to_dtype(dtype)?, bias })
    };
    Ok(match stage {
        Stage::Linear(w) => Stage::Linear(cast(w)?),
        Stage::Conv(w, config) => Stage::Conv(cast(w)?, *config),
        other => other.clone(),
    })
}

/// A constant before padding stays where it is not zero: at the border it is not there.
#[test]
fn padding() -> Result<()> {
    let zero = Tensor::zeros((2, 1, 3, 3), DType::F64, &Device::Cpu)?;
    for (bias, expected) in [(-1., 1), (1., 2)] {
        let bias = Tensor::new(&[1., bias], &Device::Cpu)?;
        let mut first = weights("conv1", 3, &[2, 1, 3, 3], false)?;
        first.weight = Tensor::cat(&[&random(3, &[1, 1, 3, 3])?, &zero.narrow(0, 1, 1)?], 0)?;
        first.bias = Some(bias);
        let second = Weights { name: "conv2".into(), weight: random(4, &[2, 2, 3, 3])?, bias: None };
        let config = Conv2dConfig { padding: 1, ..Default::default() };
        let stages = [Stage::Conv(first, config), Stage::Map(relu), Stage::Conv(second, config)];
        let small = compact(&stages)?;
        assert_eq!(small.units[0].len(), expected);
        let x = random(5, &[2, 1, 4, 4])?;
        assert_close(&small.forward(&x)?, &values(&run(&stages, &x)?)?, 1e-13);
    }
    Ok(())
}

/// All weights zero: a unit and an input are left everywhere, and the outputs are the constant.
#[test]
fn nothing_left() -> Result<()> {
    let zero = |name: &str, dims: &[usize]| -> Result<Stage> {
        let weight = Tensor::zeros(dims, DType::F64, &Device::Cpu)?;
        Ok(Stage::Linear(Weights { name: name.into(), weight, bias: Some(random(1, &dims[..1])?) }))
    };
    let stages =
        [zero("a", &[4, 6])?, Stage::Map(relu), zero("b", &[3, 4])?, Stage::Map(relu), zero("c", &[2, 3])?];
    let small = compact(&stages)?;
    assert_eq!(sizes(&small.stages), [[1, 1], [1, 1], [2, 1]]);
    let x = random(2, &[3, 6])?;
    assert_close(&small.forward(&x)?, &values(&run(&stages, &x)?)?, 1e-15);
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let linear = |name: &str, dims: &[usize]| weights(name, 0, dims, true).map(Stage::Linear);
    let conv = |dims: &[usize]| weights("conv", 0, dims, true).map(|w| Stage::Conv(w, Default::default()));
    let mut short = weights("fc1", 0, &[4, 6], true)?;
    short.bias = Some(random(0, &[3])?);
    for (stages, part) in [
        (vec![Stage::Flatten], "at least one layer"),
        (
            vec![linear("fc1", &[4, 6])?, linear("fc2", &[3, 5])?],
            "layer fc2 [3, 5] does not follow layer fc1 of 4 units",
        ),
        (vec![conv(&[4, 2, 3, 3])?, linear("fc1", &[3, 4])?], "layer fc1 [3, 4] does not follow layer conv"),
        (vec![conv(&[4, 2, 3, 3])?, Stage::Flatten, linear("fc1", &[3, 18])?], "does not follow"),
        (vec![linear("fc1", &[4, 6])?, conv(&[3, 4, 1, 1])?], "layer conv [3, 4, 1, 1] does not follow"),
        (vec![conv(&[4, 2])?], "expected 4 dimensions"),
        (vec![Stage::Linear(short)], "layer fc1: expected a bias [4], got [3]"),
    ] {
        let message = compact(&stages).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    Ok(())
}
