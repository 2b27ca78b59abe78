//! Means and averages of factors against sums over all rows, on the CPU and under emulation, and the launches they take.

use super::*;
use crate::gpu::emulate::{emulate, launches};
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::ops::factor::ema;
use crate::ops::patches::ConvShape;
use crate::ops::testing::{assert_close, random, values};
use crate::optim::{Every, NaturalGradient, Optimizer, Params};
use crate::tape::{Fisher, Kind, Likelihood, Mask, Tape, Terms};
use candle_core::Device;
use std::sync::Arc;

const TERMS: [usize; 2] = [4, 3];
const SCALES: [f64; 2] = [2.0, 0.5];
const DECAY: f64 = 0.75;

/// A linear layer, one that each forward pass uses twice, and a convolution in two groups; all with biases.
fn layers() -> Result<Vec<Arc<Layer>>> {
    let layer = |(index, weight, groups): (usize, &[usize], usize)| {
        let (weight, bias) = (random(0, weight)?, random(1, &weight[..1])?);
        let (name, kind, bias) = (format!("layer{index}"), Kind::Linear, Some(bias));
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
            sums.begin(Pass::equal(terms, scale, pass == 0));
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
        weight: Some(WantWeight { folded: true, a: FactorShape::full(a), g: FactorShape::full(g) }),
        bias: None,
        of_bias: None,
        keep: false,
        optional: false,
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
    let limited = |runs: fn(usize) -> FactorShape| {
        move |a: usize, g: usize| {
            let weight = WantWeight { folded: true, a: runs(a), g: runs(g) };
            Want {
                weight: Some(weight),
                bias: Some(FactorShape::full(g)),
                of_bias: None,
                keep: false,
                optional: false,
            }
        }
    };
    let one_group = |a: usize, g: usize| Want { bias: None, ..limited(FactorShape::full)(a, g) };
    type Wanted<'a> = &'a dyn Fn(usize, usize) -> Want;
    let wants: [Wanted<'_>; 4] = [
        &one_group,
        &limited(|dim| FactorShape::of(dim, 2)),
        &limited(FactorShape::diagonal),
        &limited(|dim| FactorShape { rank: Some(1), ..FactorShape::full(dim) }),
    ];
    for (want, sharing) in
        wants.into_iter().flat_map(|want| [(want, Sharing::Expand), (want, Sharing::Reduce)])
    {
        // A bias counts the outputs of all groups.
        let want = |a: usize, g: usize| {
            let own = want(a, g);
            let outputs = if a == 7 { 2 * g } else { g };
            Want { bias: own.bias.map(|_| FactorShape::full(outputs)), ..own }
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

/// A pass over outputs `[4, positions, 1]` with these weights, by its own or by the examples.
fn weighted_pass(weights: &[f64], mixing: bool) -> Result<Pass> {
    let outputs = random(0, &[4, weights.len() / 4, 1])?;
    let terms = Terms::weighted(&Tensor::new(weights, &Device::Cpu)?)?;
    let terms = if mixing { terms.mixing() } else { terms };
    let weights = Arc::new(terms.of(Likelihood::Gaussian, &outputs)?);
    Ok(Pass { share: weights.total, weights, scale: 1.0, fresh: true, of_loss: false })
}

/// Rows of every kind of layer with weights of examples, of positions, and of positions under a mask: against sums over all rows.
#[test]
fn weighted_factors_are_weighted_means() -> Result<()> {
    let mut layers = layers()?;
    let (index, kind) = (3, Kind::Embedding);
    let (weight, name) = (random(0, &[7, 2])?, "table".to_string());
    layers.push(Arc::new(Layer { index, name, kind, weight, bias: None, groups: 1 }));
    // The layers' records have 2, 1 and 20 positions, and the table's 2.
    let mut seen = records(0, 0)?;
    let numbers = Tensor::new(&[[0u32, 3], [3, 3], [6, 1], [2, 2]], &Device::Cpu)?;
    seen.push((3, Record { inputs: Inputs::Indices(numbers), grads: random(7, &[4, 2, 2])?, mask: None }));
    let of_examples = vec![0.5, 0.0, 2.0, 1.5];
    let spread = |positions: usize| -> Vec<f64> {
        (0..4 * positions).map(|i| [0.5, 0.0, 2.0, 1.5, 1.0][i * 7 % 5] * (1.0 + (i % 3) as f64)).collect()
    };
    for (of, record) in &seen {
        let (layer, positions) = (&layers[*of], record.grads.dim(1)?);
        let mask = [[1u8, 0], [1, 1], [0, 1], [1, 1]];
        let mask = (positions == 2)
            .then(|| Mask::new(&Tensor::new(&mask, &Device::Cpu)?))
            .transpose()?
            .map(Arc::new);
        for (weights, mixing, mask) in [
            (of_examples.clone(), false, None),
            (vec![0.0, 1.0, 1.0, 0.0], false, None),
            (spread(positions), false, None),
            (spread(positions), true, None),
            (spread(positions), false, mask),
        ] {
            let record = Record { mask: mask.clone(), ..record.clone() };
            // Row by row, by the definition.
            let mut by_rows = match (weights.len() == 4 * positions, mixing) {
                (true, false) => weights.clone(),
                (own, _) => {
                    let share = if own { positions } else { 1 };
                    let means = weights.chunks(share).map(|w| w.iter().sum::<f64>() / share as f64);
                    means.flat_map(|w| std::iter::repeat_n(w, positions)).collect()
                }
            };
            if let Some(mask) = &mask {
                by_rows.iter_mut().zip(mask.counts()).filter(|(_, live)| !**live).for_each(|(w, _)| *w = 0.0);
            }
            let total: f64 = weights.iter().sum();
            let inputs = match &record.inputs {
                Inputs::Indices(numbers) => {
                    let eye = Tensor::eye(7, DType::F64, &Device::Cpu)?;
                    eye.index_select(&numbers.flatten_all()?, 0)?.unsqueeze(1)?
                }
                inputs => inputs.rows()?.contiguous()?.flatten(0, 1)?.unsqueeze(1)?,
            };
            let grads = record.grads.flatten(0, 1)?.unsqueeze(1)?;
            let (mut rows, mut slopes) = (vec![], vec![]);
            for (i, w) in by_rows.iter().enumerate() {
                rows.push((inputs.narrow(0, i, 1)?, *w));
                let live = mask.as_ref().is_none_or(|mask| mask.counts()[i]);
                slopes.push((grads.narrow(0, i, 1)?, f64::from(u8::from(live))));
            }
            let table = layer.kind.is_embedding();
            let uses = if layer.index == 1 { 2.0 } else { 1.0 };
            let scaled = |sums: Vec<f64>, by: f64| sums.iter().map(|v| v / by).collect::<Vec<f64>>();
            let mut a = scaled(mean(&rows, layer.groups, !table, 1)?, total / uses);
            if table {
                a = (0..7).map(|i| a[8 * i]).collect();
            }
            let g = scaled(mean(&slopes, layer.groups, false, 1)?, by_rows.iter().sum());
            let (inputs, outputs) = (layer.in_features(), layer.out_features() / layer.groups);
            let want = match table {
                true => WantWeight { folded: false, a: FactorShape::diagonal(7), g: FactorShape::full(2) },
                false => WantWeight {
                    folded: true,
                    a: FactorShape::full(inputs + 1),
                    g: FactorShape::full(outputs),
                },
            };
            let run = || -> Result<LayerFactors> {
                let mut wants = vec![None; 4];
                wants[layer.index] = Some(Want {
                    weight: Some(want),
                    bias: None,
                    of_bias: None,
                    keep: false,
                    optional: false,
                });
                let mut sums = FactorSums::new(wants, Sharing::Expand);
                sums.begin(weighted_pass(&weights, mixing)?);
                // The second use of a layer is another row for each of its terms.
                for _ in 0..uses as usize {
                    sums.record(layer, &record)?;
                }
                sums.end()?;
                Ok(sums.finish(&layers)?.swap_remove(layer.index))
            };
            for found in [run()?, emulate(run)?] {
                let what = format!("{} {weights:?} {mixing} {}", layer.name, mask.is_some());
                let close = |found: Option<&Tensor>, expected: &[f64]| {
                    let found = values(found.expect("wanted")).expect("readable");
                    let off = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
                    assert!(found.len() == expected.len() && off < 1e-12, "{what}: {found:?} {expected:?}");
                };
                close(found.a.as_ref(), &a);
                close(found.g.as_ref(), &g);
            }
        }
    }
    Ok(())
}

/// Steps of an optimizer that lives on a device with weighted terms are those of copied examples on the host.
#[test]
fn weights_are_copies_on_a_device_too() -> Result<()> {
    let copies = [2usize, 0, 1, 3, 0, 2];
    let run = |weighted: bool, ekfac: bool, fisher: Fisher| -> Result<Vec<f64>> {
        let (tape, vars) = (Tape::new(), VarMap::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let (conv, last) = tape.build(|| {
            Ok((nn::conv2d(1, 2, 2, Default::default(), vb.pp("conv"))?, nn::linear(8, 3, vb.pp("fc"))?))
        })?;
        let mut named: Vec<_> =
            vars.data().lock().expect("not poisoned").iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        for (seed, (_, var)) in named.iter().enumerate() {
            var.set(&random(seed as u64, var.dims())?)?;
        }
        let every = Every { factors: 1, inverses: 1 };
        // Averaged moments would depend on which vectors span the inputs' null space.
        let stat_decay = if ekfac { 0.0 } else { 0.9 };
        let mut kfac = NaturalGradient::from_varmap(
            &vars,
            Params { every, fisher, ekfac, stat_decay, ..Params::k_fac(&tape) },
        )?;
        for step in 0..4 {
            let (x, y) =
                (random(20 + step, &[6, 1, 3, 3])?, Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?);
            let of = |x: &Tensor| last.forward(&conv.forward(x)?.tanh()?.flatten_from(1)?);
            let rows = copies.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n));
            let rows = Tensor::new(rows.collect::<Vec<_>>(), &Device::Cpu)?;
            if weighted {
                let z = of(&x)?;
                let w: Vec<f64> = copies.iter().map(|&n| n as f64).collect();
                let w = Tensor::new(w, &Device::Cpu)?;
                kfac.observe_weighted(&z, Likelihood::Categorical, &Terms::weighted(&w)?)?;
                let log_p = candle_nn::ops::log_softmax(&z, 1)?.gather(&y.unsqueeze(1)?, 1)?.squeeze(1)?;
                kfac.backward_step(&((log_p * w)?.sum_all()? * (-1.0 / 8.0))?)?;
            } else {
                let z = of(&x.index_select(&rows, 0)?)?;
                kfac.observe(&z, Likelihood::Categorical)?;
                kfac.backward_step(&nn::loss::cross_entropy(&z, &y.index_select(&rows, 0)?)?)?;
            }
        }
        kfac.settle()?;
        named.iter().map(|(_, var)| values(var)).collect::<Result<Vec<_>>>().map(|all| all.concat())
    };
    for (ekfac, fisher) in [(false, Fisher::Exact), (false, Fisher::Empirical), (true, Fisher::Exact)] {
        let expected = run(false, ekfac, fisher)?;
        for found in [run(true, ekfac, fisher)?, emulate(|| run(true, ekfac, fisher))?] {
            assert_close(&Tensor::new(found, &Device::Cpu)?, &expected, 1e-10);
        }
    }
    Ok(())
}
