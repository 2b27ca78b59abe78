//! Kronecker factors from the records of a layer: second moments of its inputs or gradients, second moments of its
//! per-example gradients, and their exponential averages.
//!
//! Records are `[n, t, features]`: examples, positions that share the weights (of a convolution or a sequence, else
//! 1), and the features of all groups side by side. The moments are sums over the examples, not means; the caller
//! divides. f16 and bf16 are summed in f32.
use candle_core::{DType, Result, Tensor, WithDType, bail};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::traits::RealField;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

pub use super::cross::cross_square;
use super::dense::mix;
use super::moment_queue::{Average, Moments};
use super::patch_moment::moment_in_place;
pub use super::patch_moment::patch_moment;
use super::record_layout::{
    PARTS, Piece, Pieces, WORTH_A_THREAD, by_group, cpu_slice, in_place, record_shape, widen,
};
use super::simd::vectorized;

/// Columns of the result that one task computes.
const BLOCK: usize = 128;

/// `sum_n sum_t x x^T` for each group, `[groups, d', d']`, in f32 (f64 for f64), exactly symmetric.
///
/// `x` is `[n, t, groups * d]`. With `append_one`, `x` is followed by a constant feature 1 (the input of a bias), and
/// `d' = d + 1`: the last row and column hold the sums of the features and the count `n t`. Contiguous records and
/// transposed `[n, groups * d, t]` records (the patches of a convolution) are read in place, others are copied. The
/// result does not depend on the number of threads. On a GPU the products of f32 numbers are as precise as f32, unless candle's
/// own products of f32 matrices are allowed TF32 (`set_gemm_reduced_precision_f32`).
///
/// # Errors
/// If `x` is not a floating point tensor of three dimensions, or `groups` does not divide the features.
pub fn second_moment(x: &Tensor, groups: usize, append_one: bool, name: &str) -> Result<Tensor> {
    let mut moments = Moments::default();
    let moment = moments.of_rows(Average::times(1.0), x, groups, append_one, name)?;
    moments.run()?;
    Ok(moment)
}

/// `decay bar + (1 - decay) M` for the [`second_moment`] `M` of `x`, `[groups, d', d']`: the next exponential average, which a GPU computes in
/// the pass that computes `M`. `bar` has the shape and dtype of `M`, and is not changed.
///
/// # Errors
/// As for [`second_moment`], if `bar` has not the shape, dtype and device of `M`, or `decay` is not in `[0, 1]`.
pub fn averaged_second_moment(
    bar: &Tensor,
    decay: f64,
    x: &Tensor,
    groups: usize,
    append_one: bool,
    name: &str,
) -> Result<Tensor> {
    check_decay(decay)?;
    let average = Average { bar: Some((bar, decay)), ..Average::times(1.0 - decay) };
    let mut moments = Moments::default();
    let next = moments.of_rows(average, x, groups, append_one, name)?;
    moments.run()?;
    Ok(next)
}

fn check_decay(decay: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&decay) {
        bail!("exponential average: expected a decay in [0, 1], got {decay}")
    }
    Ok(())
}

pub(super) fn host_second_moment(x: &Tensor, groups: usize, append_one: bool, name: &str) -> Result<Tensor> {
    let (_, _, dim) = record_shape(x, groups, name)?;
    let x = widen(x)?;
    if !x.device().is_cpu() {
        return compose_second_moment(&x, groups, append_one);
    }
    if !append_one && let Some(moment) = moment_in_place(&x, groups)? {
        return Ok(moment);
    }
    let x = if in_place(x.layout()) { x } else { x.contiguous()? };
    let size = dim + usize::from(append_one);
    match x.dtype() {
        DType::F64 => cpu_second_moment::<f64>(&x, groups, dim, size, name),
        _ => cpu_second_moment::<f32>(&x, groups, dim, size, name),
    }
}

/// The next exponential average: `current` without an earlier one, else `decay bar + (1 - decay) current`.
///
/// # Errors
/// If the two differ in shape, dtype or device, or `decay` is not in `[0, 1]`.
pub fn ema(bar: Option<&Tensor>, current: &Tensor, decay: f64) -> Result<Tensor> {
    check_decay(decay)?;
    match bar {
        None => Ok(current.clone()),
        Some(bar) if bar.dims() != current.dims() || bar.dtype() != current.dtype() => bail!(
            "exponential average: expected {:?} {:?} as before, got {:?} {:?}",
            bar.dtype(),
            bar.dims(),
            current.dtype(),
            current.dims()
        ),
        Some(bar) => mix(bar, decay, current, 1.0 - decay),
    }
}

fn compose_second_moment(x: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
    let x = by_group(x, groups, append_one)?;
    let sums = x.transpose(1, 2)?.matmul(&x)?;
    (&sums + sums.transpose(1, 2)?)? * 0.5
}

fn cpu_second_moment<T: WithDType + RealField>(
    x: &Tensor,
    groups: usize,
    dim: usize,
    size: usize,
    name: &str,
) -> Result<Tensor> {
    let (storage, layout) = x.storage_and_layout();
    let pieces = Pieces::new(cpu_slice::<T>(&storage, name)?, layout, true);
    Tensor::from_vec(sum_products(&pieces, groups, dim, size), (groups, size, size), x.device())
}

fn sum_products<T: WithDType + RealField>(x: &Pieces<T>, groups: usize, dim: usize, size: usize) -> Vec<T> {
    // Small matrices are divided by positions, large ones by their own columns: sums of their own would cost more
    // memory traffic than the products. Neither division depends on the number of threads.
    let total: usize = x.list.iter().map(|piece| piece.1).sum();
    let parts = if dim > 2 * BLOCK { 1 } else { (total * dim * dim / WORTH_A_THREAD).clamp(1, PARTS) };
    let chunks: Vec<_> = x.list.chunks(x.list.len().div_ceil(parts).max(1)).collect();
    let area = size * size;
    let stride = chunks.len().max(1) * area;
    let mut sums = vec![<T as WithDType>::from_f64(0.0); groups * stride];
    let mut tasks = Vec::new();
    for (group, sums) in sums.chunks_mut(stride).enumerate() {
        for (chunk, sum) in chunks.iter().zip(sums.chunks_mut(area)) {
            for (block, columns) in sum[..dim * size].chunks_mut(BLOCK * size).enumerate() {
                tasks.push((*chunk, Block { group, first: block * BLOCK, dim, size, columns }));
            }
        }
    }
    let run = |(chunk, block): (&[_], _)| add_products(x, chunk, block);
    if groups * total * dim * dim > WORTH_A_THREAD {
        tasks.into_par_iter().with_max_len(1).for_each(run);
    } else {
        tasks.into_iter().for_each(run);
    }
    for sums in sums.chunks_mut(stride) {
        let (first, others) = sums.split_at_mut(area);
        for other in others.chunks(area) {
            vectorized(
                #[inline(always)]
                || first.iter_mut().zip(other).for_each(|(sum, part)| *sum += *part),
            );
        }
        if size > dim {
            first[area - 1] = <T as WithDType>::from_f64(total as f64);
        }
        mirror_upper(first, size);
    }
    if stride == area { sums } else { sums.chunks(stride).flat_map(|sums| &sums[..area]).copied().collect() }
}

/// Adds to a block of columns of a `[size, size]` matrix, from its diagonal down, the products of its features with
/// those below over some pieces, and to row `dim`, if there is one, the sums of its features.
fn add_products<T: WithDType + RealField>(x: &Pieces<T>, pieces: &[Piece], block: Block<T>) {
    let Block { group, first, dim, size, columns } = block;
    let one = <T as WithDType>::from_f64(1.0);
    let width = columns.len() / size;
    for &piece in pieces {
        let rows = x.matrix(piece, group * dim + first..(group + 1) * dim);
        let (own, below) = rows.split_at_row(width);
        let sums = MatMut::from_column_major_slice_mut(columns, size, width);
        let (diagonal, beyond) = sums.subrows_mut(first, dim - first).split_at_row_mut(width);
        triangular_matmul(
            diagonal,
            BlockStructure::TriangularLower,
            Accum::Add,
            own,
            BlockStructure::Rectangular,
            own.transpose(),
            BlockStructure::Rectangular,
            one,
            Par::Seq,
        );
        matmul(beyond, Accum::Add, below, own.transpose(), one, Par::Seq);
        if size > dim {
            let features = group * dim + first..group * dim + first + width;
            x.add_sums(piece, features, columns[dim..].iter_mut().step_by(size));
        }
    }
}

/// One task: columns of the sum over some positions for one group.
struct Block<'a, T> {
    group: usize,
    /// The first of the columns.
    first: usize,
    dim: usize,
    size: usize,
    /// Column-major.
    columns: &'a mut [T],
}

/// Overwrites the part of a row-major `[size, size]` matrix below the diagonal by that above it.
pub(super) fn mirror_upper<T: Copy>(m: &mut [T], size: usize) {
    const TILE: usize = 16;
    for i0 in (0..size).step_by(TILE) {
        for j0 in (0..=i0).step_by(TILE) {
            for i in i0..size.min(i0 + TILE) {
                for j in j0..i.min(j0 + TILE) {
                    m[i * size + j] = m[j * size + i];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::ops::record_layout::testing::{Values, assert_near, group, record};

    fn naive_second_moment(x: &Values, groups: usize, append_one: bool) -> Vec<f64> {
        let mut result = Vec::new();
        for g in 0..groups {
            let rows: Vec<_> = x.iter().flatten().map(|p| group(p, g, groups, append_one)).collect();
            let size = rows[0].len();
            for i in 0..size {
                result.extend((0..size).map(|j| rows.iter().map(|r| r[i] * r[j]).sum::<f64>()));
            }
        }
        result
    }

    #[test]
    fn averages_are_those_of_moments() -> Result<()> {
        let average = |x: &Tensor, bar: &Tensor| averaged_second_moment(bar, 0.75, x, 2, true, "x");
        let x = crate::ops::testing::random(1, &[5, 3, 8])?.to_dtype(DType::F32)?;
        let bar = crate::ops::testing::random(2, &[2, 5, 5])?.to_dtype(DType::F32)?;
        let bar = (&bar + bar.transpose(1, 2)?)?;
        let expected = ((&bar * 0.75)? + (second_moment(&x, 2, true, "x")? * 0.25)?)?;
        let expected = expected.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        assert_near(&average(&x, &bar)?, &expected, 1e-5, "on the CPU")?;
        assert_near(&crate::gpu::emulate::emulate(|| average(&x, &bar))?, &expected, 1e-5, "by the kernel")?;
        let wrong = average(&x, &bar.narrow(0, 0, 1)?).unwrap_err().to_string();
        assert!(wrong.starts_with("x: expected an average F32 [2, 5, 5]"), "{wrong}");
        let wrong = averaged_second_moment(&bar, 1.5, &x, 2, true, "x").unwrap_err().to_string();
        assert!(wrong.contains("expected a decay in [0, 1], got 1.5"), "{wrong}");
        Ok(())
    }

    fn check(n: usize, t: usize, d: usize, groups: usize, layout: usize, append_one: bool) -> Result<()> {
        for (dtype, tolerance) in
            [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 1e-5), (DType::BF16, 1e-5)]
        {
            let what =
                format!("n {n} t {t} d {d} groups {groups} layout {layout} one {append_one} {dtype:?}");
            let (x, values) = record(n, t, d * groups, layout, dtype)?;
            let exact = naive_second_moment(&values, groups, append_one);
            let found = second_moment(&x, groups, append_one, "x")?;
            assert_eq!(found.dtype(), if dtype == DType::F64 { dtype } else { DType::F32 });
            assert_near(&found, &exact, tolerance, &what)?;
            let mirrored = found.transpose(1, 2)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            assert_near(&found, &mirrored, 0.0, &what)?;
            assert_near(&compose_second_moment(&widen(&x)?, groups, append_one)?, &exact, tolerance, &what)?;
        }
        Ok(())
    }

    #[test]
    fn large_shapes() -> Result<()> {
        for layout in 0..3 {
            // Several blocks of columns, several parts, several pieces a part.
            for (n, t, d, groups) in [(3, 2, 300, 1), (40, 9, 130, 1), (700, 4, 25, 2), (2500, 1, 40, 1)] {
                check(n, t, d, groups, layout, true)?;
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn small_shapes(n in 1usize..6, t in 1usize..7, d in 1usize..20, groups in 1usize..4, layout in 0usize..3, append_one: bool) {
            check(n, t, d, groups, layout, append_one).unwrap();
        }
    }

    #[test]
    fn threads_do_not_change_the_result() -> Result<()> {
        let (x, _) = record(300, 40, 60, 1, DType::F32)?;
        let run = |threads: usize| -> Result<Vec<f32>> {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .map_err(candle_core::Error::wrap)?;
            pool.install(|| second_moment(&x, 1, true, "x"))?.flatten_all()?.to_vec1::<f32>()
        };
        assert_eq!(run(1)?, run(3)?);
        Ok(())
    }

    #[test]
    fn averages() -> Result<()> {
        let first = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
        let second = Tensor::new(&[5f32, -2.0], &Device::Cpu)?;
        let bar = ema(None, &first, 0.75)?;
        assert_eq!(ema(Some(&bar), &second, 0.75)?.to_vec1::<f32>()?, [2.0, 1.0]);
        Ok(())
    }

    #[test]
    fn empty_batches_and_refusals() -> Result<()> {
        let cpu = &Device::Cpu;
        let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::F32, cpu);
        let none = zeros((0, 3, 4))?;
        for none in [&none, &zeros((3, 0, 4))?] {
            assert_eq!(second_moment(none, 2, true, "x")?.flatten_all()?.to_vec1::<f32>()?, [0.0; 18]);
        }
        let x = zeros((2, 3, 4))?;
        for (result, part) in [
            (second_moment(&x, 3, true, "conv1"), "multiple of 3"),
            (second_moment(&x, 0, true, "conv1"), "multiple of 0"),
            (second_moment(&x.get(0)?, 1, true, "conv1"), "[3, 4]"),
            (second_moment(&x.to_dtype(DType::U32)?, 1, true, "conv1"), "U32"),
            (ema(Some(&x), &none, 0.5), "exponential average"),
            (ema(None, &x, 1.5), "1.5"),
        ] {
            let message = result.expect_err("must fail").to_string();
            assert!(message.contains(part), "{message}");
        }
        Ok(())
    }
}
