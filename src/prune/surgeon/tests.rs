use faer::Mat;
use faer::linalg::solvers::Solve;

use super::*;
use crate::curvature::{Collect, Sharing};
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::ops::testing::{assert_close, random, values};
use crate::tape::{Fisher, Likelihood, Tape};

/// Positive definite `[groups, d, d]`.
fn spd(seed: u64, groups: usize, d: usize) -> Result<Tensor> {
    let m = random(seed, &[groups, d, 2 * d])?;
    m.matmul(&m.transpose(1, 2)?.contiguous()?)
}

fn surgeon(groups: usize, out: usize, columns: usize) -> Result<Surgeon> {
    let (a, g) = (spd(1, groups, columns)?, spd(2, groups, out)?);
    Surgeon::new(&Factors { name: "fc".into(), a, g }, 0.)
}

/// 0 at every `step`-th weight.
fn mask(dims: &[usize], step: usize) -> Result<Tensor> {
    let kept: Vec<u8> = (0..dims.iter().product()).map(|i| u8::from(i % step != 0)).collect();
    Tensor::from_vec(kept, dims, &Device::Cpu)
}

fn matrix(t: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = t.dims2()?;
    let values = values(t)?;
    Ok(Mat::from_fn(rows, columns, |i, j| values[i * columns + j]))
}

#[test]
fn the_correction_is_constrained_least_squares() -> Result<()> {
    let (n, inputs, out) = (60, 9, 4);
    let (varmap, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
    let layer = tape.build(|| nn::linear(inputs, out, vb))?;
    let x = random(3, &[n, inputs])?;
    let mut collect = Collect::new(&tape, Likelihood::Gaussian, Fisher::Exact, Sharing::Expand)?;
    // In two batches of different sizes: the factors are those of the whole.
    for (from, count) in [(0, 45), (45, 15)] {
        collect.add(&layer.forward(&x.narrow(0, from, count)?)?, None)?;
    }
    let factors = collect.finish()?;
    assert_close(&factors[0].g, &values(&Tensor::eye(out, DType::F64, &Device::Cpu)?.unsqueeze(0)?)?, 1e-12);
    let surgeon = Surgeon::new(&factors[0], 0.)?;
    let ones = Tensor::ones((n, 1), DType::F64, &Device::Cpu)?;
    let data = matrix(&Tensor::cat(&[&x, &ones], 1)?)?;
    let bias = layer.bias().cloned();
    // Few are removed, most are, all are but the bias, none is.
    for (mask, what) in [
        (mask(&[out, inputs], 4)?, "few"),
        ((1. - mask(&[out, inputs], 4)?.to_dtype(DType::F64)?)?.to_dtype(DType::U8)?, "most"),
        (Tensor::zeros((out, inputs), DType::U8, &Device::Cpu)?, "all"),
        (Tensor::ones((out, inputs), DType::U8, &Device::Cpu)?, "none"),
    ] {
        let operated = surgeon.remove(layer.weight(), bias.as_ref(), &mask)?;
        let targets = matrix(&layer.forward(&x)?.detach())?;
        let (weights, biases) = (values(&operated.weight)?, values(operated.bias.as_ref().unwrap_or(&x))?);
        let kept = mask.to_vec2::<u8>()?;
        for o in 0..out {
            let columns: Vec<usize> = (0..=inputs).filter(|&i| i == inputs || kept[o][i] != 0).collect();
            let design = Mat::from_fn(n, columns.len(), |i, j| data[(i, columns[j])]);
            let target = Mat::from_fn(n, 1, |i, _| targets[(i, o)]);
            let solution = (design.transpose() * &design).partial_piv_lu().solve(design.transpose() * target);
            let mut expected = vec![0.; inputs + 1];
            columns.iter().enumerate().for_each(|(j, &i)| expected[i] = solution[(j, 0)]);
            let found = weights[o * inputs..][..inputs].iter().chain(&biases[o..=o]);
            for (found, expected) in found.zip(&expected) {
                assert!((found - expected).abs() < 1e-10, "{what}, row {o}: {found} {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn one_weight_costs_its_saliency() -> Result<()> {
    let (out, columns) = (3, 5);
    let surgeon = surgeon(1, out, columns)?;
    let (w, b) = (random(5, &[out, columns - 1])?, random(6, &[out])?);
    let (a, g) = (matrix(&spd(1, 1, columns)?.squeeze(0)?)?, matrix(&spd(2, 1, out)?.squeeze(0)?)?);
    let d = out * columns;
    let fisher = Mat::from_fn(d, d, |i, j| g[(i / columns, j / columns)] * a[(i % columns, j % columns)]);
    let cost_of_one = surgeon.cost_of_one(&w, Some(&b))?.to_vec2::<f64>()?;
    let before = surgeon.rows(&w, Some(&b))?;
    for (row, column) in [(0, 0), (1, 3), (2, 2)] {
        let at = row * columns + column;
        let unit = Mat::from_fn(d, 1, |i, _| f64::from(i == at));
        let inverse = fisher.partial_piv_lu().solve(&unit);
        let step = &inverse * (-before[at] / inverse[(at, 0)]);
        let (w, b) = surgeon.remove_one(&w, Some(&b), (row, column))?;
        let after = surgeon.rows(&w, b.as_ref())?;
        for i in 0..d {
            assert!((after[i] - before[i] - step[(i, 0)]).abs() < 1e-11, "{row} {column}");
        }
        assert_eq!(after[at], 0.);
        let cost = 0.5 * (step.transpose() * &fisher * &step)[(0, 0)];
        assert!((cost / cost_of_one[row][column] - 1.).abs() < 1e-10);
    }
    Ok(())
}

/// Beside removed weights the inverse is that of the kept part; a removal in two rounds is the one at once.
#[test]
fn rounds() -> Result<()> {
    let (out, columns) = (4, 12);
    let surgeon = surgeon(1, out, columns)?;
    let (w, a) = (random(7, &[out, columns])?, matrix(&spd(1, 1, columns)?.squeeze(0)?)?);
    let g = matrix(&spd(2, 1, out)?.squeeze(0)?)?;
    for step in [5, 2] {
        let first = mask(&[out, columns], step)?;
        let once = surgeon.remove(&w, None, &first)?;
        let weights = once.weight.to_vec2::<f64>()?;
        for (o, row) in first.to_vec2::<u8>()?.iter().enumerate() {
            let kept: Vec<usize> = (0..columns).filter(|&i| row[i] != 0).collect();
            let part = Mat::from_fn(kept.len(), kept.len(), |i, j| a[(kept[i], kept[j])]);
            let inverse = part.partial_piv_lu().solve(Mat::<f64>::identity(kept.len(), kept.len()));
            let mut expected = vec![0.; columns];
            for (at, &k) in kept.iter().enumerate() {
                expected[k] = g[(o, o)] * weights[o][k].powi(2) / (2. * inverse[(at, at)]);
            }
            assert_close(&once.saliency.get(o)?, &expected, 1e-10);
        }
        let again = surgeon.saliency(&once.weight, None, &first)?;
        assert_close(&again, &values(&once.saliency)?, 1e-12);
        // One more in the first row costs what it is worth, in the model and by the correction.
        let (column, _) = (0..columns).map(|i| (i, weights[0][i])).find(|w| w.1 != 0.).unwrap_or_default();
        let mut less = first.to_vec2::<u8>()?;
        less[0][column] = 0;
        let after = surgeon.remove(&once.weight, None, &Tensor::new(less, &Device::Cpu)?)?.weight;
        let change = matrix(&(after - &once.weight)?.narrow(0, 0, 1)?)?;
        let cost = 0.5 * g[(0, 0)] * (&change * &a * change.transpose())[(0, 0)];
        assert!((cost / once.saliency.to_vec2::<f64>()?[0][column] - 1.).abs() < 1e-10);
        let second = (first * mask(&[out, columns], 3)?)?;
        let (twice, at_once) =
            (surgeon.remove(&once.weight, None, &second)?, surgeon.remove(&w, None, &second)?);
        assert_close(&twice.weight, &values(&at_once.weight)?, 1e-10);
    }
    Ok(())
}

#[test]
fn groups_are_layers_of_their_own() -> Result<()> {
    let (groups, out, columns) = (2, 3, 4);
    let all = surgeon(groups, out, columns)?;
    let (w, kept) = (random(8, &[groups * out, 1, 2, 2])?, mask(&[groups * out, 1, 2, 2], 3)?);
    let found = all.remove(&w, None, &kept)?;
    for group in 0..groups {
        let part = |t: Tensor| t.narrow(0, group, 1);
        let (a, g) = (part(spd(1, groups, columns)?)?, part(spd(2, groups, out)?)?);
        let one = Surgeon::new(&Factors { name: "fc".into(), a, g }, 0.)?;
        let (w, kept) = (w.narrow(0, group * out, out)?, kept.narrow(0, group * out, out)?);
        let expected = one.remove(&w, None, &kept)?;
        let here = |t: &Tensor| t.narrow(0, group * out, out);
        assert_close(&here(&found.weight)?, &values(&expected.weight)?, 1e-13);
        assert_close(&here(&found.saliency)?, &values(&expected.saliency)?, 1e-13);
        let (one, _) = one.remove_one(&w, None, (1, 2))?;
        let (both, _) = all.remove_one(&found_all(&w, group, groups)?, None, (group * out + 1, 2))?;
        assert_close(&here(&both)?, &values(&one)?, 1e-13);
    }
    Ok(())
}

/// `w` as the group `group` of weights that are zero in the others.
fn found_all(w: &Tensor, group: usize, groups: usize) -> Result<Tensor> {
    let zero = w.zeros_like()?;
    let parts: Vec<&Tensor> = (0..groups).map(|i| if i == group { w } else { &zero }).collect();
    Tensor::cat(&parts, 0)
}

#[test]
fn refusals() -> Result<()> {
    let fc = surgeon(1, 3, 5)?;
    let (w, b) = (random(0, &[3, 4])?, random(1, &[3])?);
    let kept = mask(&[3, 4], 2)?;
    let nan = (&w / 0.)?;
    let cases: Vec<(Result<Tensor>, &str)> = vec![
        (fc.saliency(&w, None, &kept), "5 columns, got weights [3, 4] without a bias"),
        (fc.saliency(&w, Some(&w), &kept), "expected a bias [3], got [3, 4]"),
        (fc.saliency(&w, Some(&b), &w), "expected a mask of U8 [3, 4], got F64"),
        (fc.saliency(&nan, Some(&b), &kept), "layer fc: the weights have NaN or infinite elements"),
        (fc.remove_one(&w, Some(&b), (3, 0)).map(|(w, _)| w), "no weight (3, 0)"),
        (fc.remove_one(&w, Some(&b), (0, 4)).map(|(w, _)| w), "no weight (0, 4)"),
    ];
    for (result, part) in cases {
        let message = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    let (a, g) = (spd(0, 1, 5)?, Tensor::zeros((1, 3, 3), DType::F64, &Device::Cpu)?);
    for (factors, damping, part) in [
        (Factors { name: "fc".into(), a: a.clone(), g: g.clone() }, 0., "factor G of layer fc"),
        (Factors { name: "fc".into(), a: a.squeeze(0)?, g: g.clone() }, 0., "factor A of layer fc"),
        (Factors { name: "fc".into(), a, g }, f64::NAN, "damping"),
    ] {
        let message = Surgeon::new(&factors, damping).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    Ok(())
}
