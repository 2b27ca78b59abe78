//! The penalties by norms, against sums and optimality conditions written down anew, on the CPU and under emulation.

use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

use super::*;
use crate::gpu::emulate::emulate;
use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};

const GROUPINGS: [Grouping; 8] = [
    Grouping::Rows,
    Grouping::Columns,
    Grouping::Filters,
    Grouping::InputChannels,
    Grouping::Blocks { rows: 2, columns: 3 },
    Grouping::Blocks { rows: 33, columns: 5 },
    Grouping::Blocks { rows: 1, columns: 40 },
    Grouping::Whole,
];

fn all(grouping: Grouping) -> Result<Vec<Box<dyn Penalty>>> {
    Ok(vec![
        Box::new(Lp::l1()),
        Box::new(Lp::l2()),
        Box::new(Lp::elastic_net(0.3)?),
        Box::new(GroupLasso { grouping, size_weighted: true }),
        Box::new(GroupLasso { grouping, size_weighted: false }),
        Box::new(SparseGroupLasso::new(0.4, grouping, true)?),
    ])
}

/// `(l1, l2, group, size weighted)` of [`all`].
const FACTORS: [(f64, f64, f64, bool); 6] = [
    (1., 0., 0., false),
    (0., 1., 0., false),
    (0.3, 0.7, 0., false),
    (0., 0., 1., true),
    (0., 0., 1., false),
    (0.4, 0., 0.6, true),
];

/// The indices of each group, from the definitions in the docs.
fn members(grouping: Grouping, dims: &[usize]) -> Vec<Vec<usize>> {
    let width: usize = dims[1..].iter().product();
    let kernel: usize = dims.get(2..).unwrap_or(&[]).iter().product();
    let mut groups = std::collections::BTreeMap::<(usize, usize), Vec<usize>>::new();
    for at in 0..dims[0] * width {
        let (i, j) = (at / width, at % width);
        let group = match grouping {
            Grouping::Rows | Grouping::Filters => (i, 0),
            Grouping::Columns => (0, j),
            Grouping::InputChannels => (0, j / kernel),
            Grouping::Blocks { rows, columns } => (i / rows, j / columns),
            Grouping::Whole => (0, 0),
        };
        groups.entry(group).or_default().push(at);
    }
    groups.into_values().collect()
}

fn reference(w: &[f64], groups: &[Vec<usize>], (l1, l2, group, sized): (f64, f64, f64, bool)) -> f64 {
    let single: f64 = w.iter().map(|w| l1 * w.abs() + l2 * w * w).sum();
    let norm = |members: &Vec<usize>| members.iter().map(|&at| w[at] * w[at]).sum::<f64>().sqrt();
    let size = |members: &Vec<usize>| if sized { (members.len() as f64).sqrt() } else { 1. };
    single + groups.iter().map(|members| group * size(members) * norm(members)).sum::<f64>()
}

#[test]
fn values_and_gradients() -> Result<()> {
    for dims in [vec![5, 7], vec![3, 4, 2, 3], vec![6], vec![1, 1], vec![40, 3]] {
        for grouping in GROUPINGS {
            let w = random_var(0, &dims)?;
            let groups = members(grouping, &dims);
            assert_eq!(grouping.count(&dims)?, groups.len(), "{grouping}");
            for (penalty, factors) in all(grouping)?.iter().zip(FACTORS) {
                let expected = reference(&values(&w)?, &groups, factors);
                assert_close(&penalty.value(&w)?, &[expected], 1e-13);
                check_gradients(std::slice::from_ref(&w), |a| penalty.value(&a[0]));
                let grads = penalty.value(&w)?.backward()?;
                assert_close(&penalty.gradient(&w)?, &values(grads.get(&w).unwrap())?, 1e-14);
                let (value, gradient) = penalty.value_and_gradient(&w, 0.3)?;
                assert_close(&value, &[0.3 * expected], 1e-13);
                assert_close(&gradient, &values(&(grads.get(&w).unwrap() * 0.3)?)?, 1e-14);
            }
        }
    }
    Ok(())
}

/// The objective of a proximal step is 1-strongly convex: `x` minimizes it exactly if every other point is higher by half its
/// squared distance from `x`.
fn is_prox(x: &[f64], w: &[f64], step: f64, penalty: impl Fn(&[f64]) -> f64, scale: f64) {
    let objective =
        |x: &[f64]| x.iter().zip(w).map(|(x, w)| 0.5 * (x - w).powi(2)).sum::<f64>() + step * penalty(x);
    let least = objective(x);
    for trial in 0..60 {
        let distance = scale * 10f64.powi(-(trial % 6));
        let d = values(&random(trial as u64, &[x.len()]).unwrap()).unwrap();
        // Every third moves one weight alone.
        let moved: Vec<f64> = x
            .iter()
            .zip(&d)
            .enumerate()
            .map(|(at, (x, d))| {
                let keep = trial % 3 > 0 || at == trial as usize % w.len();
                if keep { x + distance * d } else { *x }
            })
            .collect();
        let away: f64 = moved.iter().zip(x).map(|(a, b)| 0.5 * (a - b).powi(2)).sum();
        let rise = objective(&moved) - least;
        assert!(rise >= away - 1e-13 * least, "{rise} {away} at {least}");
    }
}

#[test]
fn proximal_steps_minimize() -> Result<()> {
    for dims in [vec![5, 7], vec![3, 4, 2, 3], vec![40, 3]] {
        for grouping in GROUPINGS {
            let (w, groups) = (random(0, &dims)?, members(grouping, &dims));
            for (penalty, factors) in all(grouping)?.iter().zip(FACTORS) {
                for step in [0., 0.05, 0.5, 20.] {
                    let x = values(&penalty.prox(&w, step)?)?;
                    is_prox(&x, &values(&w)?, step, |x| reference(x, &groups, factors), 1.);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn zeros_stay_and_have_no_gradient() -> Result<()> {
    let mut w = values(&random(0, &[6, 8])?)?;
    w[8..24].fill(0.);
    w[3] = 0.;
    let w = Var::from_tensor(&Tensor::from_vec(w, (6, 8), &Device::Cpu)?)?;
    for grouping in GROUPINGS {
        for penalty in all(grouping)? {
            let grad = penalty.value(&w)?.backward()?;
            for x in [grad.get(&w).unwrap(), &penalty.prox(&w, 0.1)?] {
                let x = values(x)?;
                assert!(x[3] == 0. && x[8..24].iter().all(|x| *x == 0.), "{}", penalty.name());
                assert!(x.iter().all(|x| x.is_finite()));
            }
            let empty = Var::from_tensor(&w.narrow(0, 0, 0)?.contiguous()?)?;
            assert_eq!(values(&penalty.value(&empty)?)?, [0.]);
            assert_eq!(penalty.prox(&empty, 1.)?.dims(), [0, 8]);
        }
    }
    Ok(())
}

#[test]
fn half_precision_and_layouts() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)] {
        let w = Var::from_tensor(&random(0, &[9, 10])?.to_dtype(dtype)?)?;
        let turned = w.t()?;
        let exact = turned.to_dtype(DType::F64)?.contiguous()?;
        for penalty in all(Grouping::Blocks { rows: 4, columns: 4 })? {
            let value = penalty.value(&turned)?;
            assert_eq!(value.dtype(), DType::F32);
            assert_close(&value, &values(&penalty.value(&exact)?)?, 1e-6);
            assert_eq!(
                value.backward()?.get(&w).map(|g| (g.dtype(), g.dims() == w.dims())),
                Some((dtype, true))
            );
            assert_close(&penalty.gradient(&turned)?, &values(&penalty.gradient(&exact)?)?, tolerance);
            assert_close(&penalty.prox(&turned, 0.3)?, &values(&penalty.prox(&exact, 0.3)?)?, tolerance);
        }
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    for bad in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        assert!(Lp::elastic_net(bad).is_err() && SparseGroupLasso::new(bad, Grouping::Rows, true).is_err());
    }
    let w = random(0, &[2, 3])?;
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let broken = Tensor::new(&[[1., 2., 3.], [4., bad, 6.]], &Device::Cpu)?;
        for penalty in all(Grouping::Rows)? {
            for broken in [broken.clone(), broken.to_dtype(DType::F16)?] {
                let both = penalty.value_and_gradient(&broken, 1.).map(|both| both.0);
                let results =
                    [penalty.value(&broken), penalty.gradient(&broken), penalty.prox(&broken, 1e9), both];
                for result in results {
                    let message = result.err().map(|e| e.to_string()).unwrap_or_default();
                    assert!(message.contains("weight 4 of [2, 3] is "), "{}: {message}", penalty.name());
                }
            }
            assert!([-1., f64::NAN, f64::INFINITY].iter().all(|step| penalty.prox(&w, *step).is_err()));
            assert!(
                [-1., f64::NAN, f64::INFINITY].iter().all(|f| penalty.value_and_gradient(&w, *f).is_err())
            );
        }
    }
    let blocks = Grouping::Blocks { rows: 0, columns: 1 };
    assert!(GroupLasso { grouping: blocks, size_weighted: true }.value(&w).is_err());
    assert!(Lp::l1().value(&Tensor::new(&[1u32], &Device::Cpu)?).is_err());
    Ok(())
}

#[test]
fn large_tensors_are_cut_alike() -> Result<()> {
    for dims in [vec![300, 401], vec![2, 150_001], vec![70_000, 3], vec![140_000]] {
        let w = random(0, &dims)?.to_dtype(DType::F32)?;
        for grouping in
            [Grouping::Rows, Grouping::Columns, Grouping::Blocks { rows: 130, columns: 7 }, Grouping::Whole]
        {
            let penalty = SparseGroupLasso::new(0.4, grouping, true)?;
            let groups = members(grouping, &dims);
            let expected = reference(&values(&w)?, &groups, FACTORS[5]);
            let found = f64::from(penalty.value(&w)?.to_scalar::<f32>()?);
            assert!((found - expected).abs() <= 1e-6 * expected, "{dims:?} {grouping}: {found} {expected}");
            let (x, w) = (values(&penalty.prox(&w, 0.7)?)?, values(&w)?);
            let soft: Vec<f64> = w.iter().map(|w| (w.abs() - 0.28).max(0.).copysign(*w)).collect();
            for members in groups {
                let norm = members.iter().map(|&at| soft[at] * soft[at]).sum::<f64>().sqrt();
                let factor = (1. - 0.42 * (members.len() as f64).sqrt() / norm).max(0.);
                assert!(members.iter().all(|&at| (x[at] - factor * soft[at]).abs() < 1e-6));
            }
        }
    }
    Ok(())
}

#[test]
fn kernels_agree_with_the_cpu() -> Result<()> {
    let shapes = [
        vec![0, 3],
        vec![1, 1],
        vec![5, 7],
        vec![3, 4, 3, 3],
        vec![300, 3],
        vec![33, 45],
        vec![2, 700],
        vec![20_000],
    ];
    for dims in shapes {
        let mut w = values(&random(0, &dims)?)?;
        w.iter_mut().step_by(5).for_each(|w| *w = 0.);
        let w = Tensor::from_vec(w, &dims[..], &Device::Cpu)?;
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            if dims[0] > 1000 && dtype != DType::F32 {
                continue;
            }
            let w = Var::from_tensor(&w.to_dtype(dtype)?)?;
            let tolerance = match dtype {
                DType::F64 => 1e-14,
                DType::F32 => 1e-6,
                DType::F16 => 1e-3,
                _ => 1e-2,
            };
            for grouping in GROUPINGS {
                if dims[0] > 1000 && grouping != Grouping::Whole {
                    continue;
                }
                for penalty in [&all(grouping)?[2], &all(grouping)?[4], &all(grouping)?[5]] {
                    let run = || -> Result<Vec<Tensor>> {
                        let value = (penalty.value(&w)? * 3.)?;
                        let grad = value.backward()?.get(&w).unwrap().clone();
                        let (both, of_both) = penalty.value_and_gradient(&w, 0.3)?;
                        Ok(vec![value, grad, both, of_both, penalty.gradient(&w)?, penalty.prox(&w, 0.3)?])
                    };
                    for (found, expected) in emulate(run)?.iter().zip(&run()?) {
                        assert_eq!(found.dtype(), expected.dtype());
                        assert_close(found, &values(expected)?, tolerance);
                    }
                }
            }
        }
    }
    let broken = Tensor::new(&[[1f32, 2.], [f32::NAN, 3.]], &Device::Cpu)?;
    let found = emulate(|| GroupLasso::default().prox(&broken, 1e3).and_then(|x| values(&x)))?;
    if crate::gpu::emulate::emulate(|| crate::gpu::Gpu::emulated().is_some()) {
        assert!(found[0] == 0. && found[2].is_nan() && found[3].is_nan(), "{found:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A penalty of degree 1 scales as its weights do, at any scale.
    #[test]
    fn homogeneous(m in 1usize..9, n in 1usize..9, exponent in -20i32..=20, which in 0usize..8, stream in 0u64..1000) {
        let grouping = GROUPINGS[which];
        let scale = 10f64.powi(exponent);
        for dtype in [DType::F32, DType::F64] {
            let w = random(stream, &[m, n]).unwrap();
            let scaled = (&w * scale).unwrap().to_dtype(dtype).unwrap();
            let w = (scaled.to_dtype(DType::F64).unwrap() * (1. / scale)).unwrap();
            let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-6 };
            for at in [0, 3, 5] {
                let penalty = &all(grouping).unwrap()[at];
                let found = values(&penalty.value(&scaled).unwrap()).unwrap()[0] / scale;
                let expected = values(&penalty.value(&w).unwrap()).unwrap()[0];
                prop_assert!((found - expected).abs() <= tolerance * expected, "{found} {expected}");
                assert_close(&penalty.gradient(&scaled).unwrap(), &values(&penalty.gradient(&w).unwrap()).unwrap(), tolerance);
                let x: Vec<f64> = values(&penalty.prox(&scaled, 0.3 * scale).unwrap()).unwrap().iter().map(|x| x / scale).collect();
                let x = Tensor::new(&x[..], &Device::Cpu).unwrap();
                assert_close(&x, &values(&penalty.prox(&w, 0.3).unwrap()).unwrap(), tolerance);
            }
        }
    }
}
