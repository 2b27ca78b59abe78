//! Dense matrices on the host: the checks on `[g, d, d]` tensors that all of the algebra shares, and the driver that
//! runs a factorization group by group, in f32 with a second attempt in f64.
//!
//! A tensor on a CUDA device is factorized there (`device.rs`). From any other device it is copied to the host and the results
//! are copied back.
use std::ops::Range;

use candle_core::{DType, Device, Result, Storage, Tensor, WithDType, bail};
use faer::Par;
use faer::traits::RealField;
use rayon::prelude::*;

use super::device::{self, Job, Queued, Verdict};
use crate::gpu::Gpu;
use crate::ops::simd::vectorized;

/// An element type of the dense algebra: f32 or f64.
pub(crate) trait Real: WithDType + RealField {
    /// Distance from 1 to the next larger number.
    const EPSILON: f64;
}

impl Real for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;
}

impl Real for f64 {
    const EPSILON: f64 = f64::EPSILON;
}

/// A factorization of `I` symmetric matrices of one size into `O` arrays.
///
/// Matrices come as row-major slices of `dim * dim` numbers and only their lower triangles need be read. An array
/// is a row-major matrix or a vector of `dim` numbers. The error says what went wrong, without the name of the matrix.
pub(crate) trait Factorize<const I: usize, const O: usize>: Sync {
    /// Factorizes the matrices of one group.
    fn factorize<T: Real>(
        &self,
        inputs: [&[T]; I],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; O], String>;

    /// Queues the factorization of contiguous `inputs` `[groups, d, d]` on a device.
    fn queue(&self, gpu: &Gpu, inputs: [&Tensor; I]) -> Result<Queued<O>>;

    /// What is wrong with a factorization on a device, if anything is.
    fn reason(&self, verdict: &Verdict, dim: usize, dtype: DType) -> Option<String>;
}

/// `(g, d)` of a batch of square matrices.
///
/// # Errors
/// If `m` is not a `[g, d, d]` tensor of f32 or f64 with `g, d >= 1`.
pub(crate) fn square(m: &Tensor, name: &str) -> Result<(usize, usize)> {
    match (m.dims(), m.dtype()) {
        (&[groups, dim, columns], DType::F32 | DType::F64) if dim == columns && groups * dim > 0 => {
            Ok((groups, dim))
        }
        (dims, dtype) => {
            bail!("{name}: expected square f32 or f64 matrices [g, d, d], got {dtype:?} {dims:?}")
        }
    }
}

/// The numbers of `m` in row-major order.
///
/// # Errors
/// If one of them is NaN or infinite.
pub(crate) fn to_host<T: Real>(m: &Tensor, name: &str) -> Result<Vec<T>> {
    let values = m.flatten_all()?.to_vec1::<T>()?;
    refuse_not_finite(&values, name)?;
    Ok(values)
}

fn refuse_not_finite<T: Real>(values: &[T], name: &str) -> Result<()> {
    match first_not_finite(values) {
        Some(at) => bail!("{name}: expected finite numbers, got {} at flat index {at}", values[at]),
        None => Ok(()),
    }
}

/// Runs `method` on every group of `inputs`, tensors `[g, d, d]` of one shape, dtype and device.
///
/// Outputs are `[g, length]`, a matrix flattened, with the dtype and device of the inputs. A group that fails in f32 is done
/// again in f64, with a warning that names it.
///
/// # Errors
/// If the inputs are not such tensors or not finite, or if a group fails in f64 (or its result overflows f32).
pub(crate) fn by_group<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    inputs: [&Tensor; I],
    name: &str,
) -> Result<[Tensor; O]> {
    if let Some(gpu) = Gpu::of(inputs[0].device()) {
        return device::by_group(method, &gpu, &[Job { inputs, name }]).remove(0);
    }
    match inputs[0].dtype() {
        DType::F64 => run::<f64, I, O>(method, inputs, name),
        _ => run::<f32, I, O>(method, inputs, name),
    }
}

fn run<T: Real, const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    inputs: [&Tensor; I],
    name: &str,
) -> Result<[Tensor; O]> {
    let (groups, dim) = fitting(inputs, name)?;
    // Read in place where they are on the host.
    let host = inputs.iter().map(|m| m.to_device(&Device::Cpu)?.contiguous()).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = host.iter().map(Tensor::storage_and_layout).collect();
    let host = guards.iter().map(|(storage, layout)| {
        let Storage::Cpu(storage) = &**storage else { bail!("{name}: expected a copy in CPU memory") };
        let values = T::cpu_storage_as_slice(storage)?;
        Ok(&values[layout.start_offset()..layout.start_offset() + layout.shape().elem_count()])
    });
    let host = host.collect::<Result<Vec<&[T]>>>()?;
    host.iter().try_for_each(|values| refuse_not_finite(values, name))?;
    let size = dim * dim;
    let par = if groups == 1 { parallelism(dim) } else { Par::Seq };
    let one = |group: usize| {
        let matrices = std::array::from_fn(|i| &host[i][group * size..(group + 1) * size]);
        attempt(method, matrices, dim, par, name)
    };
    // Below this much arithmetic handing groups to threads costs more than it saves.
    let results: Vec<[Vec<T>; O]> = if groups > 1 && groups * size * dim > 1 << 18 {
        (0..groups).into_par_iter().map(one).collect::<Result<_>>()?
    } else {
        (0..groups).map(one).collect::<Result<_>>()?
    };
    let mut joined = [(); O].map(|()| Vec::new());
    for result in results {
        for (all, part) in joined.iter_mut().zip(result) {
            if all.is_empty() {
                *all = part;
            } else {
                all.extend_from_slice(&part);
            }
        }
    }
    let device = inputs[0].device();
    let tensors = joined.into_iter().map(|data| {
        let length = data.len() / groups;
        Tensor::from_vec(data, (groups, length), device)
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    tensors.try_into().map_err(|_| candle_core::Error::Msg(format!("{name}: expected {O} outputs")))
}

/// `(g, d)` of tensors that [`square`] takes, and that have one shape, dtype and device.
pub(crate) fn fitting<const I: usize>(inputs: [&Tensor; I], name: &str) -> Result<(usize, usize)> {
    let shape = square(inputs[0], name)?;
    for other in &inputs[1..] {
        if square(other, name)? != shape || other.dtype() != inputs[0].dtype() {
            bail!(
                "{name}: expected two tensors of one shape and dtype, got {:?} {:?} and {:?} {:?}",
                inputs[0].dtype(),
                inputs[0].dims(),
                other.dtype(),
                other.dims()
            );
        }
    }
    Ok(shape)
}

/// One group: in `T`, and in f64 where that fails.
fn attempt<T: Real, const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    inputs: [&[T]; I],
    dim: usize,
    par: Par,
    name: &str,
) -> Result<[Vec<T>; O]> {
    let first = checked(method, inputs, dim, par);
    let reason = match first {
        Ok(outputs) => return Ok(outputs),
        Err(reason) if T::DTYPE == DType::F64 => bail!("{name}: {reason}"),
        Err(reason) => reason,
    };
    tracing::warn!("{name}: {reason} in {:?}, trying again in F64", T::DTYPE);
    let wide = inputs.map(|m| m.iter().map(|&v| WithDType::to_f64(v)).collect::<Vec<f64>>());
    let outputs = checked(method, std::array::from_fn(|i| &wide[i][..]), dim, par)
        .map_err(|reason| candle_core::Error::Msg(format!("{name}: {reason} (in F64 too)")))?;
    let outputs = outputs.map(|m| m.into_iter().map(<T as WithDType>::from_f64).collect::<Vec<T>>());
    if outputs.iter().any(|m| first_not_finite(m).is_some()) {
        bail!("{name}: the result overflows {:?}", T::DTYPE)
    }
    Ok(outputs)
}

fn checked<T: Real, const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    inputs: [&[T]; I],
    dim: usize,
    par: Par,
) -> std::result::Result<[Vec<T>; O], String> {
    let outputs = method.factorize(inputs, dim, par)?;
    if outputs.iter().any(|m| first_not_finite(m).is_some()) {
        return Err("the result is not finite".into());
    }
    Ok(outputs)
}

fn first_not_finite<T: Real>(values: &[T]) -> Option<usize> {
    const RUN: usize = 1024;
    let zero = <T as WithDType>::from_f64(0.0);
    // Without a way out of the loop, so that it is done in vectors. Nothing finite times 0 is not 0.
    let wrong = |run: &[T]| run.iter().fold(false, |wrong, &v| wrong | (v * zero != zero));
    let wrong = |run: &[T]| {
        vectorized(
            #[inline(always)]
            || wrong(run),
        )
    };
    let run = match values.len() < LARGE * LARGE {
        true => values.chunks(RUN).position(wrong)?,
        false => values.par_chunks(RUN).with_min_len(32).position_first(wrong)?,
    };
    let at = values.get(run * RUN..)?.iter().position(|&v| !WithDType::to_f64(v).is_finite())?;
    Some(run * RUN + at)
}

/// Rows of a matrix below which starting threads for it costs more than it saves.
const LARGE: usize = 256;

/// Threads for one matrix.
fn parallelism(dim: usize) -> Par {
    if dim < LARGE { Par::Seq } else { Par::rayon(0) }
}

/// The transpose of a row-major `[dim, dim]` matrix (or its other memory order).
pub(crate) fn transposed<T: Real>(m: &[T], dim: usize) -> Vec<T> {
    const TILE: usize = 16;
    let mut out = vec![<T as WithDType>::from_f64(0.0); dim * dim];
    for i0 in (0..dim).step_by(TILE) {
        for j0 in (0..dim).step_by(TILE) {
            for i in i0..dim.min(i0 + TILE) {
                for j in j0..dim.min(j0 + TILE) {
                    out[i * dim + j] = m[j * dim + i];
                }
            }
        }
    }
    out
}

/// The lower triangle of a row-major `[dim, dim]` matrix in column-major order; above the diagonal what it likes.
pub(crate) fn lower_by_columns<T: Real>(m: &[T], dim: usize) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![<T as WithDType>::from_f64(0.0); dim * dim];
    let columns = |(tile, out): (usize, &mut [T])| {
        let j0 = tile * TILE;
        for i0 in (j0..dim).step_by(TILE) {
            for (i, row) in m.chunks_exact(dim).enumerate().skip(i0).take(TILE) {
                let row = &row[j0..dim.min(j0 + TILE)];
                for (column, &v) in out.chunks_exact_mut(dim).zip(row) {
                    column[i] = v;
                }
            }
        }
    };
    match dim < LARGE {
        true => out.chunks_mut(TILE * dim).enumerate().for_each(columns),
        false => out.par_chunks_mut(TILE * dim).enumerate().for_each(columns),
    }
    out
}

/// `m x` for a symmetric row-major matrix of which the lower triangle is read, summed in f64.
pub(crate) fn lower_times<T: Real>(m: &[T], x: &[f64]) -> Vec<f64> {
    let dim = x.len();
    if dim < LARGE {
        return lower_times_of(m, x, 0..dim);
    }
    /// Parts of the rows with as many numbers each: whatever the number of threads, the sums are the same.
    const PARTS: usize = 4;
    let cut = |part: usize| (dim as f64 * (part as f64 / PARTS as f64).sqrt()) as usize;
    let parts: Vec<_> =
        (0..PARTS).into_par_iter().map(|part| lower_times_of(m, x, cut(part)..cut(part + 1))).collect();
    let sum = |at: usize| parts.iter().filter_map(|part| part.get(at)).sum();
    (0..dim).map(sum).collect()
}

/// What some rows have part in [`lower_times`], up to the last of them.
fn lower_times_of<T: Real>(m: &[T], x: &[f64], rows: Range<usize>) -> Vec<f64> {
    let mut out = vec![0.0; rows.end];
    for (i, row) in m.chunks_exact(x.len()).enumerate().take(rows.end).skip(rows.start) {
        let (left, at) = (&row[..i], x[i]);
        let mut sums = [0.0; 8];
        let (mut xs, mut outs) = (x[..i].chunks_exact(8), out[..i].chunks_exact_mut(8));
        let rest = i / 8 * 8;
        for ((row, x), out) in left.chunks_exact(8).zip(&mut xs).zip(&mut outs) {
            for (((sum, &m), &x), out) in sums.iter_mut().zip(row).zip(x).zip(out) {
                let m = WithDType::to_f64(m);
                *sum += m * x;
                *out += m * at;
            }
        }
        let mut sum = WithDType::to_f64(row[i]) * at + sums.iter().sum::<f64>();
        for j in rest..i {
            let m = WithDType::to_f64(row[j]);
            sum += m * x[j];
            out[j] += m * at;
        }
        out[i] += sum;
    }
    out
}

/// A vector of signs that looks random: what a wrong decomposition does to it shows with near certainty, at the cost
/// of matrix-vector products.
pub(crate) fn probe(dim: usize) -> Vec<f64> {
    (0..dim as u64)
        .map(|i| if (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 0 { 1.0 } else { -1.0 })
        .collect()
}

/// `m x` for a row-major matrix with rows of `x.len()` numbers, summed in f64.
pub(crate) fn times<T: Real>(m: &[T], x: &[f64]) -> Vec<f64> {
    m.chunks_exact(x.len())
        .map(|row| row.iter().zip(x).map(|(&m, x)| WithDType::to_f64(m) * x).sum())
        .collect()
}

/// `m^T x`, likewise.
pub(crate) fn transpose_times<T: Real>(m: &[T], x: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; x.len()];
    for (row, x) in m.chunks_exact(x.len()).zip(x) {
        out.iter_mut().zip(row).for_each(|(out, &m)| *out += WithDType::to_f64(m) * x);
    }
    out
}

/// `||a - b|| / scale`, Euclidean.
pub(crate) fn distance(a: &[f64], b: &[f64], scale: f64) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / scale
}
