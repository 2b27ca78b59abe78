//! Means and averages of factors against sums over all rows, on the CPU and under emulation, and the launches they take.

use super::*;
use crate::gpu::emulate::{emulate, launches};
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::ops::factor::ema;
use crate::ops::patches::ConvShape;
use crate::ops::testing::{assert_close, random, values};
use crate::optim::{Every, NaturalGradient, Optimizer, Params};
use crate::tape::{Fisher, Likelihood, Tape};
use candle_core::Device;
use std::sync::Arc;

const TERMS: [usize; 2] = [4, 3];
const SCALES: [f64; 2] = [2.0, 0.5];
const DECAY: f64 = 0.75;

/// A linear layer, one that each forward pass uses twice, and a convolution in two groups; all with biases.
fn layers() -> Result<Vec<Arc<Layer>>> {
    let layer = |(index, weight, groups): (usize, &[usize], usize)| {
        let (weight, bias) = (random(0, weight)?, random(1, &weight[..1])?);
        let (name, kind, bias) = (format!("layer{index}"), Kind::Matrix, Some(bias));
        Ok(Arc::new(Layer { index, name, kind, weight, bias, groups }))
    };
    [(0, &[4, 5][..], 1), (1, &[3, 6], 1), (2, &[4, 1, 3, 2], 2)].into_iter().map(layer).collect()
}

/// The records of pass `pass` of micro-batch `part`, with the layers that made them. The convolution sees the first part only.
fn records(part: usize, pass: usize) -> Result<Vec<(usize, Record)>> {
    let n = TERMS[part];
    let seed = |index: usize| (100 * part + index) as u64;
    let grads = |index: usize, dims: &[usize]| random(seed(index) + 10 * (pass as u64 + 1), dims);
    let rows = |index: usize, dims: &[usize], out: usize| -> Result<Record> {
        let inputs = Inputs::Rows(random(seed(index), dims)?);
        Ok(Record { inputs, grads: grads(index, &[dims[0], dims[1], out])?, mask: None })
    };
    let mut all =
        vec![(0, rows(0, &[n, 2, 5], 4)?), (1, rows(1, &[n, 1, 6], 3)?), (1, rows(2, &[n, 1, 6], 3)?)];
    if part == 0 {
        let x = random(seed(3), &[n, 2, 5, 4])?;
        let shape = ConvShape::new("test", x.dims(), &[4, 1, 3, 2], (1, 1), (1, 0), (1, 1), 2)?;
        let grads = grads(3, &[n, shape.positions(), 4])?;
        all.push((2, Record { inputs: Inputs::Patches { x, shape }, grads, mask: None }));
    }
    Ok(all)
}

/// The factors of all records, two passes over each of two micro-batches; averages with `last`, if there are any.
fn finished(
    want: impl Fn(usize, usize) -> Want,
    sharing: Sharing,
    last: Option<&[LayerFactors]>,
) -> Result<Vec<LayerFactors>> {
    let layers = layers()?;
    let of = |layer: &Arc<Layer>| Some(want(layer.in_features() + 1, layer.out_features() / layer.groups));
    let mut sums = FactorSums::new(layers.iter().map(of).collect(), sharing);
    if let Some(last) = last {
        sums = sums.averaging(last.to_vec(), DECAY);
    }
    for (part, terms) in TERMS.into_iter().enumerate() {
        for (pass, scale) in SCALES.into_iter().enumerate() {
            sums.begin(terms, scale, pass == 0);
            for (index, record) in records(part, pass)? {
                sums.record(&layers[index], &record)?;
            }
            sums.end()?;
        }
    }
    sums.finish(&layers)
}

fn full(a: usize, g: usize) -> Want {
    Want {
        weight: Some(WantWeight { folded: true, a: Runs::full(a), g: Runs::full(g) }),
        bias: None,
        keep: false,
    }
}

/// The mean of `weight x x^T` over `count` by a loop, `x` the features of each group, with a 1 after them.
fn mean(rows: &[(Tensor, f64)], groups: usize, one: bool, count: usize) -> Result<Vec<f64>> {
    let mut sums = Vec::new();
    for (x, weight) in rows {
        for row in x.flatten(0, 1)?.to_vec2::<f64>()? {
            let mut at = 0;
            for group in row.chunks(row.len() / groups) {
                let x: Vec<f64> = group.iter().copied().chain(one.then_some(1.0)).collect();
                sums.resize(groups * x.len() * x.len(), 0.0);
                for (a, b) in x.iter().flat_map(|a| x.iter().map(move |b| (a, b))) {
                    sums[at] += weight * a * b / count as f64;
                    at += 1;
                }
            }
        }
    }
    Ok(sums)
}

#[test]
fn factors_are_means_over_micro_batches_uses_and_passes() -> Result<()> {
    for (index, (groups, rows)) in
        [(1, 2 * (4 + 3)), (1, 2 * (4 + 3)), (2, 4 * 5 * 3)].into_iter().enumerate()
    {
        let (mut inputs, mut grads) = (vec![], vec![]);
        for (part, pass) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            for (_, record) in records(part, pass)?.into_iter().filter(|(of, _)| *of == index) {
                if pass == 0 {
                    inputs.push((record.inputs.rows()?.contiguous()?, 1.0));
                }
                grads.push((record.grads, SCALES[pass] * SCALES[pass]));
            }
        }
        let (a, g) = (mean(&inputs, groups, true, 4 + 3)?, mean(&grads, groups, false, rows)?);
        for found in
            [finished(full, Sharing::Expand, None)?, emulate(|| finished(full, Sharing::Expand, None))?]
        {
            assert_close(found[index].a.as_ref().expect("wanted"), &a, 1e-13);
            assert_close(found[index].g.as_ref().expect("wanted"), &g, 1e-13);
        }
    }
    Ok(())
}

#[test]
fn averages_are_those_of_the_factors() -> Result<()> {
    let limited = |runs: fn(usize) -> Runs| {
        move |a: usize, g: usize| {
            let weight = WantWeight { folded: true, a: runs(a), g: runs(g) };
            Want { weight: Some(weight), bias: Some(Runs::full(g)), keep: false }
        }
    };
    let one_group = |a: usize, g: usize| Want { bias: None, ..limited(Runs::full)(a, g) };
    type Wanted<'a> = &'a dyn Fn(usize, usize) -> Want;
    let wants: [Wanted<'_>; 4] = [
        &one_group,
        &limited(|dim| Runs::of(dim, 2)),
        &limited(Runs::diagonal),
        &limited(|dim| Runs { rank: Some(1), ..Runs::full(dim) }),
    ];
    for (want, sharing) in
        wants.into_iter().flat_map(|want| [(want, Sharing::Expand), (want, Sharing::Reduce)])
    {
        // A bias counts the outputs of all groups.
        let want = |a: usize, g: usize| {
            let own = want(a, g);
            let outputs = if a == 7 { 2 * g } else { g };
            Want { bias: own.bias.map(|_| Runs::full(outputs)), ..own }
        };
        let current = finished(want, sharing, None)?;
        let mut last = current.clone();
        // One layer has no average yet.
        for (index, layer) in last.iter_mut().enumerate() {
            for (seed, factor) in [&mut layer.a, &mut layer.g, &mut layer.g_bias].into_iter().enumerate() {
                *factor = match factor {
                    Some(factor) if index != 1 => Some(random(seed as u64, factor.dims())?),
                    _ => None,
                };
            }
        }
        for on_gpu in [false, true] {
            let run = || finished(want, sharing, Some(&last));
            let found = if on_gpu { emulate(run) } else { run() }?;
            for ((found, current), last) in found.iter().zip(&current).zip(&last) {
                for (found, current, last) in [
                    (&found.a, &current.a, &last.a),
                    (&found.g, &current.g, &last.g),
                    (&found.g_bias, &current.g_bias, &last.g_bias),
                ] {
                    let Some(current) = current else { continue };
                    let expected = ema(last.as_ref(), current, DECAY)?;
                    assert_close(found.as_ref().expect("wanted"), &values(&expected)?, 1e-12);
                }
            }
        }
    }
    Ok(())
}

/// The kernels that the second refresh of an MLP with these widths launches, until its step.
fn refresh(widths: &[usize], fisher: Fisher) -> Result<Vec<String>> {
    let (tape, vars) = (Tape::new(), VarMap::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layers = tape.build(|| {
        let sides = widths.iter().zip(&widths[1..]).enumerate();
        sides.map(|(i, (&from, &to))| nn::linear(from, to, vb.pp(i))).collect::<Result<Vec<_>>>()
    })?;
    let forward = |x: &Tensor| layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x)?.tanh());
    let every = Every { factors: 1, inverses: 100 };
    let mut optimizer =
        NaturalGradient::from_varmap(&vars, Params { every, fisher, ..Params::k_fac(&tape) })?;
    let x = random(90, &[6, widths[0]])?.to_dtype(DType::F32)?;
    let labels = Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?;
    let mut counted = vec![];
    for _ in 0..2 {
        let (done, kernels) = launches(|| {
            let outputs = forward(&x)?;
            optimizer.observe(&outputs, Likelihood::Categorical)?;
            optimizer.backward_step(&nn::loss::cross_entropy(&outputs, &labels)?)
        });
        done?;
        counted = kernels;
    }
    Ok(counted)
}

#[test]
fn launches_do_not_grow_with_the_number_of_layers() -> Result<()> {
    for (fisher, passes) in
        [(Fisher::Sampled { draws: 1, seed: 0 }, 1), (Fisher::Empirical, 1), (Fisher::Exact, 3)]
    {
        let [three, six] =
            [&[200, 40, 9, 3][..], &[200, 40, 9, 33, 150, 20, 3]].map(|widths| refresh(widths, fisher));
        let [three, six] = [three?, six?].map(|mut kernels| {
            // Those of the model's layers.
            kernels.retain(|name| !name.starts_with("bias_"));
            kernels
        });
        assert_eq!(three, six);
        let of_factors = three.iter().filter(|name| name.starts_with("factor_")).count();
        // Tiles of three sizes at most, and no rows worth dividing. No other kernel makes the averages.
        assert!(three.is_empty() || (3..=3 * passes).contains(&of_factors), "{three:?}");
        assert!(!three.iter().any(|name| name.starts_with("mix_")), "{three:?}");
    }
    Ok(())
}
