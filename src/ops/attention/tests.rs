use candle_core::Var;
use proptest::prelude::*;

use super::*;
use crate::nn::attention::{multi_head, plain};
use crate::ops::simd::forced::each_level;
use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};

/// `[batch, heads, rows, d]` as `[batch, rows, heads d]`.
fn join(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.flatten_from(2)
}

/// The outputs in blocks of `block`, from heads that are apart or `joined`.
fn fused(attention: &Attention, [q, k, v]: [&Tensor; 3], block: [usize; 2], joined: bool) -> Result<Tensor> {
    let (batch, heads, queries, d) = q.dims4()?;
    let (_, groups, keys, dv) = v.dims4()?;
    let sizes = Sizes { batch, heads, groups, queries, keys, d, dv };
    let mask = attention.mask.as_ref().map(|mask| by_rows(mask, sizes)).transpose()?;
    let attention = Attention { mask, ..attention.clone() };
    let op = Fused { attention, sizes, joined, block, kept: OnceLock::new() };
    if joined {
        let y = op.on(&join(q)?, &join(k)?, &join(v)?)?;
        return y.reshape((batch, queries, heads, dv))?.transpose(1, 2);
    }
    op.on(q, k, v)?.transpose(1, 2)
}

/// The outputs, and the gradients of a weighted sum of them.
fn all_of(vars: &[Var; 3], f: impl Fn([&Tensor; 3]) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let y = f(vars.each_ref().map(|var| var.as_tensor()))?;
    let grads = y.mul(&random(9, y.dims())?.to_dtype(y.dtype())?)?.sum_all()?.backward()?;
    let grads = vars.iter().map(|var| grads.get(var).cloned().unwrap_or_else(|| var.as_tensor().clone()));
    Ok(std::iter::once(y.clone()).chain(grads).collect())
}

fn vars([batch, heads, groups, queries, keys, d, dv]: [usize; 7]) -> Result<[Var; 3]> {
    Ok([
        random_var(0, &[batch, heads, queries, d])?,
        random_var(1, &[batch, groups, keys, d])?,
        random_var(2, &[batch, groups, keys, dv])?,
    ])
}

/// Of the shape of the `kind`: all of them are broadcast to the scores'. Some keys are hidden, and where a row has no other, all.
fn mask(kind: usize, [batch, heads, _, queries, keys, ..]: [usize; 7]) -> Result<Option<Tensor>> {
    let dims: &[usize] = match kind {
        0 => return Ok(None),
        1 => &[batch, 1, 1, keys],
        2 => &[queries, keys],
        3 => &[batch, heads, queries, keys],
        4 => &[1, heads, queries, 1],
        _ => &[1],
    };
    let hidden = |x: f64| if x > 1. { f64::NEG_INFINITY } else { x };
    let data: Vec<f64> = values(&random(3, dims)?)?.into_iter().map(hidden).collect();
    Ok(Some(Tensor::from_vec(data, dims, &Device::Cpu)?))
}

fn check(sizes: [usize; 7], block: [usize; 2], kind: usize, causal: bool, joined: bool) -> Result<()> {
    let (vars, mask) = (vars(sizes)?, mask(kind, sizes)?);
    let attention = Attention { scale: 0.4, causal, mask: mask.clone() };
    let expected = all_of(&vars, |qkv| plain(qkv, mask.as_ref(), causal, 0.4, None))?;
    let found = all_of(&vars, |qkv| fused(&attention, qkv, block, joined))?;
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found.dims(), expected.dims());
        assert_close(found, &values(expected)?, 1e-12);
    }
    let narrow = |t: &Tensor| t.to_dtype(DType::F32);
    let vars = [
        Var::from_tensor(&narrow(&vars[0])?)?,
        Var::from_tensor(&narrow(&vars[1])?)?,
        Var::from_tensor(&narrow(&vars[2])?)?,
    ];
    let attention = Attention { mask: mask.as_ref().map(narrow).transpose()?, ..attention };
    let found = all_of(&vars, |qkv| fused(&attention, qkv, block, joined))?;
    for (found, expected) in found.iter().zip(&expected) {
        assert_close(found, &values(expected)?, 2e-5);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn as_the_plain_path(
        batch in 1usize..4, groups in 1usize..4, each in 1usize..4, queries in 1usize..20, more in 0usize..12, d in 1usize..7,
        dv in 1usize..6, rows in 1usize..8, columns in 1usize..9, kind in 0usize..6, causal: bool, joined: bool,
    ) {
        let sizes = [batch, groups * each, groups, queries, queries + more, d, dv];
        check(sizes, [rows, columns], kind, causal, joined).unwrap();
    }
}

#[test]
fn blocks_as_they_are() -> Result<()> {
    for (queries, keys, causal, kind) in [(128, 128, false, 1), (200, 200, true, 0), (70, 1100, true, 2)] {
        check([1, 2, 1, queries, keys, 8, 4], BLOCK, kind, causal, true)?;
    }
    // Fewer keys than queries.
    check([2, 2, 2, 9, 4, 3, 3], [2, 3], 1, false, false)
}

#[test]
fn gradients_by_differences() -> Result<()> {
    for (kind, causal, joined) in [(0, false, true), (2, true, false), (3, false, false), (1, true, true)] {
        let sizes = [2, 4, 2, 5, 6, 3, 2];
        let attention = Attention { scale: 0.7, causal, mask: mask(kind, sizes)? };
        check_gradients(&vars(sizes)?, |a| fused(&attention, [&a[0], &a[1], &a[2]], [2, 4], joined));
    }
    Ok(())
}

/// Every level of vectors, heads in any layout, half types, and gradients of some of the arguments alone.
#[test]
fn levels_layouts_and_types() -> Result<()> {
    let sizes = [2, 4, 2, 37, 41, 16, 8];
    let (vars, mask) = (vars(sizes)?, mask(1, sizes)?);
    let expected = all_of(&vars, |qkv| plain(qkv, mask.as_ref(), true, 0.25, None))?;
    let sdpa = |[q, k, v]: [&Tensor; 3]| crate::nn::ops::sdpa(q, k, v, mask.as_ref(), true, 0.25, 1.);
    let narrow = |dtype| -> Result<[Var; 3]> {
        let of = |i: usize| Var::from_tensor(&vars[i].to_dtype(dtype)?);
        Ok([of(0)?, of(1)?, of(2)?])
    };
    for (dtype, tolerance) in
        [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 0.05), (DType::F16, 5e-3)]
    {
        let vars = narrow(dtype)?;
        for (_, found) in each_level(|| all_of(&vars, sdpa)) {
            for (found, expected) in found?.iter().zip(&expected) {
                assert_eq!(found.dtype(), dtype);
                assert_close(found, &values(expected)?, tolerance);
            }
        }
    }
    // Rows whose features lie apart, and heads that are views.
    let turned = |t: &Tensor| t.transpose(2, 3)?.contiguous()?.transpose(2, 3);
    let apart = |t: &Tensor| t.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    for layout in [turned, apart] {
        let found = all_of(&vars, |[q, k, v]| sdpa([&layout(q)?, &layout(k)?, &layout(v)?]))?;
        for (found, expected) in found.iter().zip(&expected) {
            assert_close(found, &values(expected)?, 1e-12);
        }
    }
    for wanted in 0..3 {
        let qkv: Vec<_> = (0..3)
            .map(|i| if i == wanted { vars[i].as_tensor().clone() } else { vars[i].as_tensor().detach() })
            .collect();
        let y = sdpa([&qkv[0], &qkv[1], &qkv[2]])?;
        let grads = y.mul(&random(9, y.dims())?)?.sum_all()?.backward()?;
        let Some(grad) = grads.get(&vars[wanted]) else { bail!("no gradient") };
        assert_close(grad, &values(&expected[1 + wanted])?, 1e-12);
    }
    Ok(())
}

/// A mask of large finite numbers alone leaves the scores' differences, as the softmax does, and not their sum with it.
#[test]
fn masks_of_large_numbers() -> Result<()> {
    let sizes = [1, 1, 1, 3, 4, 2, 2];
    let vars = vars(sizes)?.map(|var| Var::from_tensor(&var.to_dtype(DType::F32)?));
    let [q, k, v] = vars;
    let vars = [q?, k?, v?];
    let mask = Tensor::full(f32::MIN, (1, 1, 1, 4), &Device::Cpu)?;
    let attention = Attention { scale: 1., causal: false, mask: Some(mask.clone()) };
    let found = all_of(&vars, |qkv| fused(&attention, qkv, [2, 2], false))?;
    for (found, expected) in found.iter().zip(all_of(&vars, |qkv| plain(qkv, Some(&mask), false, 1., None))?)
    {
        assert_close(found, &values(&expected)?, 1e-5);
    }
    Ok(())
}

/// Two backward passes over one graph, with other gradients, as curvature and the evidence take them.
#[test]
fn several_backward_passes() -> Result<()> {
    let sizes = [2, 2, 1, 5, 5, 3, 3];
    let vars = vars(sizes)?;
    let [q, k, v] = vars.each_ref().map(|var| var.as_tensor());
    let (y, expected) =
        (crate::nn::ops::sdpa(q, k, v, None, true, 1., 1.)?, plain([q, k, v], None, true, 1., None)?);
    for stream in 20..23 {
        let weights = random(stream, y.dims())?;
        let [found, expected] = [&y, &expected].map(|y| y.mul(&weights)?.sum_all()?.backward());
        let (found, expected) = (found?, expected?);
        for var in &vars {
            let [found, expected] = [&found, &expected].map(|grads| grads.get(var).map(values));
            let (found, expected) =
                (found.transpose()?.unwrap_or_default(), expected.transpose()?.unwrap_or_default());
            assert!(!found.is_empty() && found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-13));
        }
    }
    Ok(())
}

#[test]
fn heads_side_by_side() -> Result<()> {
    let sizes = [2, 6, 3, 5, 7, 4, 2];
    let (vars, mask) = (vars(sizes)?, mask(1, sizes)?);
    let [q, k, v] = vars.each_ref().map(|var| var.as_tensor());
    let expected = join(&plain([q, k, v], mask.as_ref(), false, 0.5, None)?)?;
    let found = multi_head(&join(q)?, &join(k)?, &join(v)?, 6, mask.as_ref(), false, 0.5)?;
    assert_close(&found, &values(&expected)?, 1e-13);
    // A mask with a gradient goes the plain way.
    let bias = Var::from_tensor(&random(5, &[6, 5, 7])?)?;
    let y = multi_head(&join(q)?, &join(k)?, &join(v)?, 6, Some(&bias), false, 0.5)?;
    assert!(y.sqr()?.sum_all()?.backward()?.get(&bias).is_some());
    for heads in [0, 5, 7, 24] {
        assert!(multi_head(&join(q)?, &join(k)?, &join(v)?, heads, None, false, 1.).is_err());
    }
    assert!(
        multi_head(&join(q)?, &join(k)?.narrow(1, 0, 4)?, &join(v)?.narrow(1, 0, 4)?, 6, None, true, 1.)
            .is_err()
    );
    Ok(())
}
