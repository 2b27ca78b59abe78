//! Kronecker factors from the records of a layer: second moments of its inputs or gradients, second moments of its
//! per-example gradients, and their exponential averages.
//!
//! Records are `[n, t, features]`: examples, positions that share the weights (of a convolution or a sequence, else
//! 1), and the features of all groups side by side. Everything here is a sum over the examples, not a mean; the
//! caller divides. f16 and bf16 are summed in f32.
use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// `sum_n sum_t x x^T` for each group, `[groups, d', d']`, in f32 (f64 for f64), exactly symmetric.
///
/// `x` is `[n, t, groups * d]`. With `append_one`, `x` is followed by a constant feature 1 (the input of a bias), and
/// `d' = d + 1`: the last row and column hold the sums of the features and the count `n t`. Contiguous records and
/// transposed `[n, groups * d, t]` records (the patches of a convolution) are read in place, others are copied. The
/// result does not depend on the number of threads.
///
/// # Errors
/// If `x` is not a floating point tensor of three dimensions, or `groups` does not divide the features.
pub fn second_moment(x: &Tensor, groups: usize, append_one: bool, name: &str) -> Result<Tensor> {
    let (n, t, dim) = record_shape(x, groups, name)?;
    let x = widen(x)?;
    if !x.device().is_cpu() {
        return compose_second_moment(&x, groups, append_one);
    }
    let size = dim + usize::from(append_one);
    let x = if in_place(x.layout()) { x } else { x.contiguous()? };
    let (storage, layout) = x.storage_and_layout();
    let shape = (groups, size, size);
    match &*storage {
        Storage::Cpu(CpuStorage::F64(data)) => {
            let sums = sum_products(&Pieces::new(data, layout, true), groups, dim, size, (n * t) as f64);
            Tensor::from_vec(sums, shape, x.device())
        }
        Storage::Cpu(CpuStorage::F32(data)) => {
            let sums = sum_products(&Pieces::new(data, layout, true), groups, dim, size, (n * t) as f32);
            Tensor::from_vec(sums, shape, x.device())
        }
        _ => bail!("{name}: expected records of f32 or f64, got {:?}", x.dtype()),
    }
}

/// `sum_n (sum_t e a^T)^2`, squares entry by entry, for each group, `[groups, o, d']`, in f32 (f64 for f64).
///
/// These are the second moments of the per-example gradients of a weight `[o, d]`, in the basis that `e`
/// `[n, t, groups * o]` and `a` `[n, t, groups * d]` are written in (George et al. 2018, EKFAC). With `append_one` the
/// last column is that of a bias, the input 1.
///
/// # Errors
/// If the two are not floating point tensors of one dtype with equal `n` and `t`, or `groups` does not divide their
/// features.
pub fn cross_square(
    e: &Tensor,
    a: &Tensor,
    groups: usize,
    append_one: bool,
    name: &str,
) -> Result<Tensor> {
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
        return e.transpose(1, 2)?.matmul(&by_group(&a.sqr()?, groups, append_one)?);
    }
    if !e.device().is_cpu() {
        return compose_cross_square(&e, &a, groups, append_one);
    }
    let e = if in_place(e.layout()) { e } else { e.contiguous()? };
    let a = if in_place(a.layout()) { a } else { a.contiguous()? };
    let size = dim + usize::from(append_one);
    let shape = (groups, out, size);
    let ((e_storage, e_layout), (a_storage, a_layout)) = (e.storage_and_layout(), a.storage_and_layout());
    match (&*e_storage, &*a_storage) {
        (Storage::Cpu(CpuStorage::F64(e_data)), Storage::Cpu(CpuStorage::F64(a_data))) => {
            let (e_pieces, a_pieces) = (Pieces::new(e_data, e_layout, false), Pieces::new(a_data, a_layout, false));
            Tensor::from_vec(sum_squares(&e_pieces, &a_pieces, groups, out, dim, size), shape, e.device())
        }
        (Storage::Cpu(CpuStorage::F32(e_data)), Storage::Cpu(CpuStorage::F32(a_data))) => {
            let (e_pieces, a_pieces) = (Pieces::new(e_data, e_layout, false), Pieces::new(a_data, a_layout, false));
            Tensor::from_vec(sum_squares(&e_pieces, &a_pieces, groups, out, dim, size), shape, e.device())
        }
        _ => bail!("{name}: expected records of f32 or f64, got {:?}", e.dtype()),
    }
}

/// The next exponential average: `current` without an earlier one, else `decay bar + (1 - decay) current`.
///
/// # Errors
/// If the two differ in shape, dtype or device, or `decay` is not in `[0, 1]`.
pub fn ema(bar: Option<&Tensor>, current: &Tensor, decay: f64) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&decay) {
        bail!("exponential average: expected a decay in [0, 1], got {decay}")
    }
    match bar {
        None => Ok(current.clone()),
        Some(bar) if bar.dims() != current.dims() || bar.dtype() != current.dtype() => bail!(
            "exponential average: expected {:?} {:?} as before, got {:?} {:?}",
            bar.dtype(),
            bar.dims(),
            current.dtype(),
            current.dims()
        ),
        Some(bar) => (bar * decay)? + (current * (1.0 - decay))?,
    }
}

/// `(n, t, features of a group)`.
fn record_shape(x: &Tensor, groups: usize, name: &str) -> Result<(usize, usize, usize)> {
    match x.dims() {
        &[n, t, width] if groups > 0 && width > 0 && width % groups == 0 && x.dtype().is_float() => {
            Ok((n, t, width / groups))
        }
        dims => bail!(
            "{name}: expected a floating point record [n, t, features] with features a multiple of {groups}, got \
             {:?} {dims:?}",
            x.dtype()
        ),
    }
}

/// Half precision to f32, in the same memory order.
fn widen(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        _ if x.stride()[1] == 1 => x.transpose(1, 2)?.to_dtype(DType::F32)?.transpose(1, 2),
        _ => x.to_dtype(DType::F32),
    }
}

/// Whether one position, or one feature over the positions of an example, lies contiguous in memory.
fn in_place(layout: &Layout) -> bool {
    let (dims, strides) = (layout.dims(), layout.stride());
    strides[2] == 1 || dims[2] == 1 || (strides[1] == 1 && dims[1] > 1)
}

/// `[groups, n t, d']`, contiguous.
fn by_group(x: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
    let (n, t, _) = x.dims3()?;
    let x = x.reshape((n * t, groups, ()))?.transpose(0, 1)?;
    if append_one { Tensor::cat(&[&x, &x.narrow(2, 0, 1)?.ones_like()?], 2) } else { x.contiguous() }
}

fn compose_second_moment(x: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
    let x = by_group(x, groups, append_one)?;
    let sums = x.transpose(1, 2)?.matmul(&x)?;
    (&sums + sums.transpose(1, 2)?)? * 0.5
}

fn compose_cross_square(e: &Tensor, a: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
    /// Numbers in the gradients of the examples that are held at once.
    const HELD: usize = 1 << 24;
    let (n, t, width) = e.dims3()?;
    let size = a.dim(2)? / groups + 1;
    let step = (HELD / (width * size)).clamp(1, n.max(1));
    let mut total: Option<Tensor> = None;
    for start in (0..n).step_by(step) {
        let count = step.min(n - start);
        let cut = |x: &Tensor| x.narrow(0, start, count)?.reshape((count, t, groups, ()))?.transpose(1, 2)?.contiguous();
        let (e, mut a) = (cut(e)?, cut(a)?);
        if append_one {
            a = Tensor::cat(&[&a, &a.narrow(3, 0, 1)?.ones_like()?], 3)?;
        }
        let part = e.transpose(2, 3)?.matmul(&a)?.sqr()?.sum(0)?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    match total {
        Some(total) => Ok(total),
        None => Tensor::zeros((groups, width / groups, size - usize::from(!append_one)), e.dtype(), e.device()),
    }
}

/// A record in memory: matrices of features by positions, with unit stride in one direction.
struct Pieces<'a, T> {
    data: &'a [T],
    /// Distance between the features of a position.
    feature: usize,
    /// Distance between the positions of a piece.
    position: usize,
    /// Where the first feature of a piece lies, and how many positions the piece has.
    list: Vec<(usize, usize)>,
}

impl<'a, T: WithDType + RealField> Pieces<'a, T> {
    /// Pieces of one example each, or, with `joined`, of [`POSITIONS`] where memory lets examples be joined.
    fn new(data: &'a [T], layout: &Layout, joined: bool) -> Self {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (n, t) = (dims[0], dims[1]);
        let feature = if dims[2] == 1 { 1 } else { strides[2] };
        let data = &data[layout.start_offset()..];
        let merged = if t == 1 {
            Some(strides[0])
        } else if n == 1 || strides[0] == t * strides[1] {
            Some(strides[1])
        } else {
            None
        };
        match merged {
            Some(position) if joined => {
                let starts = (0..n * t).step_by(POSITIONS);
                let list = starts.map(|p| (p * position, POSITIONS.min(n * t - p))).collect();
                Self { data, feature, position, list }
            }
            _ => {
                let list = (0..n).map(|i| (i * strides[0], t)).collect();
                Self { data, feature, position: strides[1], list }
            }
        }
    }

    /// Some features by the positions of a piece.
    fn matrix(&self, (start, positions): (usize, usize), features: Range<usize>) -> MatRef<'a, T> {
        let data = &self.data[start + features.start * self.feature..];
        if self.feature == 1 {
            MatRef::from_column_major_slice_with_stride(data, features.len(), positions, self.position)
        } else {
            MatRef::from_row_major_slice_with_stride(data, features.len(), positions, self.feature)
        }
    }
}

/// Positions that are joined to one product.
const POSITIONS: usize = 2048;
/// Columns of the result that one task computes.
const BLOCK: usize = 128;
/// Parts that the positions are divided into, each with a sum of its own.
const PARTS: usize = 16;
/// Multiplications that pay for a task of their own.
const WORTH_A_THREAD: usize = 1 << 20;

/// The second moments of [`second_moment`]; `count` is the number of positions.
fn sum_products<T: WithDType + RealField>(
    x: &Pieces<T>,
    groups: usize,
    dim: usize,
    size: usize,
    count: T,
) -> Vec<T> {
    // Small matrices are divided by positions, large ones by their own columns: sums of their own would cost more
    // memory traffic than the products.
    let total: usize = x.list.iter().map(|piece| piece.1).sum();
    let parts = if dim > 2 * BLOCK { 1 } else { (total * dim * dim / WORTH_A_THREAD).clamp(1, PARTS) };
    let chunks: Vec<_> = x.list.chunks(x.list.len().div_ceil(parts).max(1)).collect();
    let area = size * size;
    let mut sums = vec![<T as WithDType>::from_f64(0.0); groups * chunks.len().max(1) * area];
    let mut tasks = Vec::new();
    for (group, sums) in sums.chunks_mut(chunks.len().max(1) * area).enumerate() {
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
    let mut result = Vec::with_capacity(groups * area);
    for sums in sums.chunks_mut(chunks.len().max(1) * area) {
        let (first, others) = sums.split_at_mut(area);
        for other in others.chunks(area) {
            first.iter_mut().zip(other).for_each(|(sum, part)| *sum += *part);
        }
        if size > dim {
            first[area - 1] = count;
        }
        mirror_upper(first, size);
        result.extend_from_slice(first);
    }
    result
}

/// Adds to a block of columns of a `[size, size]` matrix, from its diagonal down, the products of its features with
/// those below over some pieces, and to row `dim`, if there is one, the sums of its features.
fn add_products<T: WithDType + RealField>(x: &Pieces<T>, pieces: &[(usize, usize)], block: Block<T>) {
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
            add_sums(own, columns[dim..].iter_mut().step_by(size));
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

/// Adds the sum of each row.
fn add_sums<'a, T: WithDType + RealField>(rows: MatRef<T>, sums: impl Iterator<Item = &'a mut T>) {
    let zero = <T as WithDType>::from_f64(0.0);
    if rows.col_stride() == 1 {
        for (row, sum) in (0..rows.nrows()).map(|i| rows.row(i)).zip(sums) {
            *sum += row.iter().copied().fold(zero, |a, b| a + b);
        }
    } else {
        let mut total = vec![zero; rows.nrows()];
        for column in (0..rows.ncols()).map(|j| rows.col(j)) {
            total.iter_mut().zip(column.iter()).for_each(|(total, x)| *total += *x);
        }
        sums.zip(total).for_each(|(sum, total)| *sum += total);
    }
}

/// The sum over examples of the squared products of [`cross_square`].
fn sum_squares<T: WithDType + RealField>(
    e: &Pieces<T>,
    a: &Pieces<T>,
    groups: usize,
    out: usize,
    dim: usize,
    size: usize,
) -> Vec<T> {
    let zero = <T as WithDType>::from_f64(0.0);
    let area = out * size;
    let pairs: Vec<_> = e.list.iter().copied().zip(a.list.iter().copied()).collect();
    let total: usize = e.list.iter().map(|piece| piece.1).sum();
    let parts = (total * area / WORTH_A_THREAD).clamp(1, PARTS);
    let chunks: Vec<_> = pairs.chunks(pairs.len().div_ceil(parts).max(1)).collect();
    let one_sum = |(group, chunk): (usize, &[((usize, usize), (usize, usize))])| {
        let (mut sum, mut product) = (vec![zero; area], vec![zero; area]);
        for &(e_piece, a_piece) in chunk {
            let e = e.matrix(e_piece, group * out..(group + 1) * out);
            let a = a.matrix(a_piece, group * dim..(group + 1) * dim);
            let gradient = MatMut::from_row_major_slice_mut(&mut product, out, size).subcols_mut(0, dim);
            matmul(gradient, Accum::Replace, e, a.transpose(), <T as WithDType>::from_f64(1.0), Par::Seq);
            if size > dim {
                product[dim..].iter_mut().step_by(size).for_each(|bias| *bias = zero);
                add_sums(e, product[dim..].iter_mut().step_by(size));
            }
            sum.iter_mut().zip(&product).for_each(|(sum, p)| *sum += *p * *p);
        }
        sum
    };
    let tasks: Vec<_> = (0..groups).flat_map(|group| chunks.iter().map(move |chunk| (group, *chunk))).collect();
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

/// Overwrites the part of a row-major `[size, size]` matrix below the diagonal by that above it.
fn mirror_upper<T: Copy>(m: &mut [T], size: usize) {
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
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// `[n, t, width]`, in one of three memory layouts, and its numbers as candle reads them.
    fn record(n: usize, t: usize, width: usize, layout: usize, dtype: DType) -> Result<(Tensor, Vec<Vec<Vec<f64>>>)> {
        let mut rng = StdRng::seed_from_u64((n * 31 + t * 7 + width) as u64);
        let numbers: Vec<f64> = (0..n * t * width * 2).map(|_| rng.random_range(-1.0..1.0)).collect();
        let numbers = Tensor::from_vec(numbers, (2, n * t * width), &Device::Cpu)?.to_dtype(dtype)?.get(1)?;
        let x = match layout {
            0 => numbers.reshape((n, t, width))?,
            1 => numbers.reshape((n, width, t))?.transpose(1, 2)?,
            _ => numbers.reshape((width, t, n))?.permute((2, 1, 0))?,
        };
        let values = x.to_dtype(DType::F64)?.contiguous()?.to_vec3::<f64>()?;
        Ok((x, values))
    }

    /// The features of one group at one position, with the one.
    fn group(position: &[f64], group: usize, groups: usize, append_one: bool) -> Vec<f64> {
        let dim = position.len() / groups;
        let mut features = position[group * dim..(group + 1) * dim].to_vec();
        features.extend(append_one.then_some(1.0));
        features
    }

    fn naive_second_moment(x: &[Vec<Vec<f64>>], groups: usize, append_one: bool) -> Vec<f64> {
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

    fn naive_cross_square(e: &[Vec<Vec<f64>>], a: &[Vec<Vec<f64>>], groups: usize, append_one: bool) -> Vec<f64> {
        let mut result = Vec::new();
        for g in 0..groups {
            let split = |x: &[Vec<f64>], one| -> Vec<Vec<f64>> { x.iter().map(|p| group(p, g, groups, one)).collect() };
            let pairs: Vec<_> = e.iter().zip(a).map(|(e, a)| (split(e, false), split(a, append_one))).collect();
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

    fn assert_near(found: &Tensor, exact: &[f64], tolerance: f64, what: &str) -> Result<()> {
        let found = found.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        assert_eq!(found.len(), exact.len(), "{what}");
        let scale = exact.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
        for (found, exact) in found.iter().zip(exact) {
            assert!((found - exact).abs() <= tolerance * scale, "{what}: {found} {exact}");
        }
        Ok(())
    }

    fn check(n: usize, t: usize, d: usize, o: usize, groups: usize, layout: usize, append_one: bool) -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 1e-5), (DType::BF16, 1e-5)] {
            let what = format!("n {n} t {t} d {d} o {o} groups {groups} layout {layout} one {append_one} {dtype:?}");
            let (a, a_values) = record(n, t, d * groups, layout, dtype)?;
            let found = second_moment(&a, groups, append_one, "a")?;
            assert_eq!(found.dtype(), if dtype == DType::F64 { dtype } else { DType::F32 });
            assert_near(&found, &naive_second_moment(&a_values, groups, append_one), tolerance, &what)?;
            assert_eq!((&found - found.transpose(1, 2)?)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?, 0.0);
            let composed = compose_second_moment(&widen(&a)?, groups, append_one)?;
            assert_near(&composed, &naive_second_moment(&a_values, groups, append_one), tolerance, &what)?;
            let (e, e_values) = record(n, t, o * groups, (layout + n) % 3, dtype)?;
            let exact = naive_cross_square(&e_values, &a_values, groups, append_one);
            assert_near(&cross_square(&e, &a, groups, append_one, "ea")?, &exact, tolerance, &what)?;
            let composed = compose_cross_square(&widen(&e)?, &widen(&a)?, groups, append_one)?;
            assert_near(&composed, &exact, tolerance, &what)?;
        }
        Ok(())
    }

    #[test]
    fn large_shapes() -> Result<()> {
        for layout in 0..3 {
            // Several blocks of columns, several parts, several pieces a part.
            for (n, t, d, o, groups) in [(3, 2, 300, 3, 1), (40, 9, 130, 2, 1), (700, 4, 25, 3, 2), (2500, 1, 40, 3, 1)] {
                check(n, t, d, o, groups, layout, true)?;
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn small_shapes(n in 1usize..6, t in 1usize..7, d in 1usize..20, o in 1usize..6, groups in 1usize..4, layout in 0usize..3, append_one: bool) {
            check(n, t, d, o, groups, layout, append_one).unwrap();
        }
    }

    #[test]
    fn threads_do_not_change_the_result() -> Result<()> {
        let (x, _) = record(300, 40, 60, 1, DType::F32)?;
        let (e, _) = record(300, 40, 20, 1, DType::F32)?;
        let run = |threads: usize| -> Result<Vec<f32>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(candle_core::Error::wrap)?;
            pool.install(|| {
                let sums = second_moment(&x, 1, true, "x")?.flatten_all()?;
                Tensor::cat(&[sums, cross_square(&e, &x, 1, true, "x")?.flatten_all()?], 0)?.to_vec1::<f32>()
            })
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
        assert_eq!(second_moment(&none, 2, true, "x")?.flatten_all()?.to_vec1::<f32>()?, [0.0; 18]);
        assert_eq!(cross_square(&none, &none, 2, true, "x")?.flatten_all()?.to_vec1::<f32>()?, [0.0; 12]);
        let x = zeros((2, 3, 4))?;
        for (result, part) in [
            (second_moment(&x, 3, true, "conv1"), "multiple of 3"),
            (second_moment(&x, 0, true, "conv1"), "multiple of 0"),
            (second_moment(&x.get(0)?, 1, true, "conv1"), "[3, 4]"),
            (second_moment(&x.to_dtype(DType::U32)?, 1, true, "conv1"), "U32"),
            (cross_square(&x, &zeros((2, 4, 4))?, 1, true, "conv1"), "equal"),
            (cross_square(&x, &x.to_dtype(DType::F64)?, 1, true, "conv1"), "one dtype"),
            (ema(Some(&x), &none, 0.5), "exponential average"),
            (ema(None, &x, 1.5), "1.5"),
        ] {
            let message = result.expect_err("must fail").to_string();
            assert!(message.contains(part), "{message}");
        }
        Ok(())
    }
}
