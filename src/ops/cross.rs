//! Second moments of per-example gradients.
use candle_core::{DType, Result, Tensor, WithDType, bail};
use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

use super::record_layout::{
    PARTS, Piece, Pieces, WORTH_A_THREAD, by_group, cpu_slice, in_place, record_shape, widen,
};
use super::simd::vectorized;

/// `sum_n (sum_t e a^T)^2`, squares entry by entry, for each group, `[groups, o, d]`, in f32 (f64 for f64).
///
/// These are the second moments of the per-example gradients of a weight `[o, d]`, in the basis that `e`
/// `[n, t, groups * o]` and `a` `[n, t, groups * d]` are written in (George et al. 2018, EKFAC). A bias
/// has to be among the features of `a` already.
///
/// # Errors
/// If the two are not floating point tensors of one dtype with equal `n` and `t`, or `groups` does not divide their
/// features.
pub fn cross_square(e: &Tensor, a: &Tensor, groups: usize, name: &str) -> Result<Tensor> {
    let (n, t, out) = record_shape(e, groups, name)?;
    let (a_n, a_t, dim) = record_shape(a, groups, name)?;
    if (n, t) != (a_n, a_t) || e.dtype() != a.dtype() {
        bail!(
            "{name}: expected two records of one dtype with equal examples and positions, got {:?} {:?} and {:?} {:?}",
            e.dtype(),
            e.dims(),
            a.dtype(),
            a.dims()
        )
    }
    let (e, a) = (widen(e)?, widen(a)?);
    if t == 1 {
        // The square of an outer product is the outer product of the squares.
        let e = by_group(&e.sqr()?, groups, false)?;
        return e.transpose(1, 2)?.matmul(&by_group(&a.sqr()?, groups, false)?);
    }
    if !e.device().is_cpu() {
        return compose_cross_square(&e, &a, groups);
    }
    let e = if in_place(e.layout()) { e } else { e.contiguous()? };
    let a = if in_place(a.layout()) { a } else { a.contiguous()? };
    let sizes = Sizes { groups, out, dim };
    match e.dtype() {
        DType::F64 => cpu_cross_square::<f64>(&e, &a, sizes, name),
        _ => cpu_cross_square::<f32>(&e, &a, sizes, name),
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    groups: usize,
    /// Features of `e` and of `a` in a group.
    out: usize,
    dim: usize,
}

/// By tensor operations, some examples at a time.
fn compose_cross_square(e: &Tensor, a: &Tensor, groups: usize) -> Result<Tensor> {
    /// Numbers in the gradients of the examples that are held at once.
    const HELD: usize = 1 << 24;
    let (n, t, width) = e.dims3()?;
    let dim = a.dim(2)? / groups;
    let step = (HELD / (width * dim).max(1)).clamp(1, n.max(1));
    let mut total: Option<Tensor> = None;
    for start in (0..n).step_by(step) {
        let count = step.min(n - start);
        let cut = |x: &Tensor| {
            let width = x.dim(2)? / groups;
            x.narrow(0, start, count)?.reshape((count, t, groups, width))?.transpose(1, 2)?.contiguous()
        };
        let part = cut(e)?.transpose(2, 3)?.matmul(&cut(a)?)?.sqr()?.sum(0)?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    match total {
        Some(total) => Ok(total),
        None => Tensor::zeros((groups, width / groups, dim), e.dtype(), e.device()),
    }
}

fn cpu_cross_square<T: WithDType + RealField>(
    e: &Tensor,
    a: &Tensor,
    sizes: Sizes,
    name: &str,
) -> Result<Tensor> {
    let ((e_storage, e_layout), (a_storage, a_layout)) = (e.storage_and_layout(), a.storage_and_layout());
    let e_pieces = Pieces::new(cpu_slice::<T>(&e_storage, name)?, e_layout, false);
    let a_pieces = Pieces::new(cpu_slice::<T>(&a_storage, name)?, a_layout, false);
    let shape = (sizes.groups, sizes.out, sizes.dim);
    Tensor::from_vec(sum_squares(&e_pieces, &a_pieces, sizes), shape, e.device())
}

fn sum_squares<T: WithDType + RealField>(e: &Pieces<T>, a: &Pieces<T>, sizes: Sizes) -> Vec<T> {
    let Sizes { groups, out, dim } = sizes;
    let zero = <T as WithDType>::from_f64(0.0);
    let area = out * dim;
    let pairs: Vec<_> = e.list.iter().copied().zip(a.list.iter().copied()).collect();
    let total: usize = e.list.iter().map(|piece| piece.1).sum();
    let parts = (total * area / WORTH_A_THREAD).clamp(1, PARTS);
    let chunks: Vec<_> = pairs.chunks(pairs.len().div_ceil(parts).max(1)).collect();
    let one_sum = |(group, chunk): (usize, &[(Piece, Piece)])| {
        let (mut sum, mut product) = (vec![zero; area], vec![zero; area]);
        for &(e_piece, a_piece) in chunk {
            let rows = e.matrix(e_piece, group * out..(group + 1) * out);
            let a = a.matrix(a_piece, group * dim..(group + 1) * dim);
            let gradient = MatMut::from_row_major_slice_mut(&mut product, out, dim);
            matmul(gradient, Accum::Replace, rows, a.transpose(), <T as WithDType>::from_f64(1.0), Par::Seq);
            vectorized(
                #[inline(always)]
                || sum.iter_mut().zip(&product).for_each(|(sum, p)| *sum += *p * *p),
            );
        }
        sum
    };
    let tasks: Vec<_> =
        (0..groups).flat_map(|group| chunks.iter().map(move |chunk| (group, *chunk))).collect();
    let sums: Vec<Vec<T>> = if groups * total * area > WORTH_A_THREAD {
        tasks.into_par_iter().with_max_len(1).map(one_sum).collect()
    } else {
        tasks.into_iter().map(one_sum).collect()
    };
    let mut result = vec![zero; groups * area];
    for (i, part) in sums.iter().enumerate() {
        let group = i / chunks.len();
        result[group * area..(group + 1) * area].iter_mut().zip(part).for_each(|(sum, part)| *sum += *part);
    }
    result
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::record_layout::testing::{Values, assert_near, group, record};

    fn naive_cross_square(e: &Values, a: &Values, groups: usize) -> Vec<f64> {
        let mut result = Vec::new();
        for g in 0..groups {
            let split = |x: &[Vec<f64>], one| -> Vec<Vec<f64>> {
                x.iter().map(|p| group(p, g, groups, one)).collect()
            };
            let pairs: Vec<_> = e.iter().zip(a).map(|(e, a)| (split(e, false), split(a, false))).collect();
            for i in 0..pairs[0].0[0].len() {
                for j in 0..pairs[0].1[0].len() {
                    let gradient = |(e, a): &(Vec<Vec<f64>>, Vec<Vec<f64>>)| {
                        e.iter().zip(a).map(|(e, a)| e[i] * a[j]).sum::<f64>().powi(2)
                    };
                    result.push(pairs.iter().map(gradient).sum());
                }
            }
        }
        result
    }

    fn check(n: usize, t: usize, d: usize, o: usize, groups: usize, layout: usize) -> Result<()> {
        for (dtype, tolerance) in
            [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 1e-5), (DType::BF16, 1e-5)]
        {
            let what = format!("n {n} t {t} d {d} o {o} groups {groups} layout {layout} {dtype:?}");
            let (a, a_values) = record(n, t, d * groups, layout, dtype)?;
            let (e, e_values) = record(n, t, o * groups, (layout + n) % 3, dtype)?;
            let exact = naive_cross_square(&e_values, &a_values, groups);
            assert_near(&cross_square(&e, &a, groups, "ea")?, &exact, tolerance, &what)?;
            let composed = compose_cross_square(&widen(&e)?, &widen(&a)?, groups)?;
            assert_near(&composed, &exact, tolerance, &what)?;
        }
        Ok(())
    }

    #[test]
    fn several_parts() -> Result<()> {
        check(600, 30, 20, 7, 2, 0)?;
        check(600, 30, 20, 7, 2, 1)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn small_shapes(
            n in 1usize..6, t in 1usize..7, d in 1usize..12, o in 1usize..6, groups in 1usize..4, layout in 0usize..3,
            ) {
            check(n, t, d, o, groups, layout).unwrap();
        }
    }

    #[test]
    fn threads_do_not_change_the_result() -> Result<()> {
        let (a, _) = record(300, 40, 60, 1, DType::F32)?;
        let (e, _) = record(300, 40, 20, 1, DType::F32)?;
        let run = |threads: usize| -> Result<Vec<f32>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.map_err(candle_core::Error::wrap)?;
            pool.install(|| cross_square(&e, &a, 1, "ea"))?.flatten_all()?.to_vec1::<f32>()
        };
        assert_eq!(run(1)?, run(3)?);
        Ok(())
    }

    #[test]
    fn empty_batches_and_refusals() -> Result<()> {
        let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        for none in [zeros((0, 3, 4))?, zeros((3, 0, 4))?, zeros((0, 1, 4))?] {
            assert_eq!(cross_square(&none, &none, 2, "ea")?.flatten_all()?.to_vec1::<f32>()?, [0.0; 8]);
        }
        let e = zeros((2, 3, 4))?;
        for (a, groups, part) in [
            (zeros((2, 4, 4))?, 1, "equal examples"),
            (e.to_dtype(DType::F64)?, 1, "one dtype"),
            (zeros((2, 3, 5))?, 2, "multiple of 2"),
        ] {
            let message = cross_square(&e, &a, groups, "conv1").expect_err("must fail").to_string();
            assert!(message.contains("conv1") && message.contains(part), "{message}");
        }
        Ok(())
    }
}
