//! Matrix products and weighted sums of tensors that belong to no graph, for the inner loop of the optimizers.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::record_layout::{WORTH_A_THREAD, cpu_slice};
use super::simd::vectorized;
use crate::gpu::{Gpu, Grid, Module, args, typed};

/// `a b` for `[.., m, k]` and `[.., k, n]` with the same leading dimensions: `[.., m, n]`. Not differentiable.
///
/// On the CPU f32 and f64 take faer's kernels, which use the whole width of the processor's vectors; transposed operands are read
/// in place. All else is candle's `matmul`.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a_dims, b_dims) = (a.dims(), b.dims());
    let rank = a_dims.len();
    let fit = rank >= 2
        && b_dims.len() == rank
        && a_dims[..rank - 2] == b_dims[..rank - 2]
        && a_dims[rank - 1] == b_dims[rank - 2]
        && a.dtype() == b.dtype();
    if !fit {
        bail!(
            "product: expected [.., m, k] and [.., k, n], got {:?} {a_dims:?} and {:?} {b_dims:?}",
            a.dtype(),
            b.dtype()
        )
    }
    if !(a.device().is_cpu() && b.device().is_cpu()) {
        #[cfg(feature = "cuda")]
        if let Some(found) = tf32_on_gpu(a, b)? {
            return Ok(found);
        }
        return a.detach().matmul(&b.detach());
    }
    match a.dtype() {
        DType::F32 => on_cpu::<f32>(a, b),
        DType::F64 => on_cpu::<f64>(a, b),
        _ => a.detach().matmul(&b.detach()),
    }
}

thread_local! {
    static TF32: Cell<bool> = const { Cell::new(false) };
}

/// Calls `body`; where it is `allowed`, a [`product`] of f32 on an NVIDIA GPU may round its operands to TF32 there.
pub(crate) fn with_tf32<T>(allowed: bool, body: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            TF32.set(self.0);
        }
    }
    let _before = Before(TF32.replace(allowed));
    body()
}

#[cfg(feature = "cuda")]
fn tf32_on_gpu(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    use crate::gpu::blas::{Factor, tf32_product};
    let (candle_core::Device::Cuda(device), true, DType::F32) = (a.device(), TF32.get(), a.dtype()) else {
        return Ok(None);
    };
    let (batch, rank) = (&a.dims()[..a.rank() - 2], a.rank());
    let sizes = [a.dims()[rank - 2], a.dims()[rank - 1], b.dims()[rank - 1]];
    let factor = |t: &Tensor| dense(t).map(|(data, turned)| Factor { data, turned });
    tf32_product(device, (&factor(a)?, &factor(b)?), (batch, sizes))
}

/// Matrices `[rows, columns]` one after the other in a slice, each by rows, or by columns where it is `transposed`.
pub(crate) struct Matrices<'a, T> {
    pub data: &'a [T],
    pub rows: usize,
    pub columns: usize,
    pub transposed: bool,
}

impl<T> Matrices<'_, T> {
    pub(super) fn get(&self, index: usize) -> MatRef<'_, T> {
        let size = self.rows * self.columns;
        let data = &self.data[index * size..(index + 1) * size];
        if self.transposed {
            MatRef::from_column_major_slice(data, self.rows, self.columns)
        } else {
            MatRef::from_row_major_slice(data, self.rows, self.columns)
        }
    }
}

/// `t` as it lies in memory, if its matrices do so densely by rows or columns.
pub(crate) fn dense(t: &Tensor) -> Result<(Tensor, bool)> {
    let swapped = t.transpose(t.rank() - 2, t.rank() - 1)?;
    if t.is_contiguous() {
        Ok((t.clone(), false))
    } else if swapped.is_contiguous() {
        Ok((swapped, true))
    } else {
        Ok((t.contiguous()?, false))
    }
}

fn on_cpu<T: WithDType + RealField>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    on_cpu_by::<T>(a, b, products)
}

/// What multiplies so many pairs of matrices.
pub(super) type Products<T> = fn(&Matrices<'_, T>, &Matrices<'_, T>, usize) -> Vec<T>;

pub(super) fn on_cpu_by<T: WithDType + RealField>(
    a: &Tensor,
    b: &Tensor,
    products: Products<T>,
) -> Result<Tensor> {
    let rank = a.rank();
    let (m, k, n) = (a.dims()[rank - 2], a.dims()[rank - 1], b.dims()[rank - 1]);
    let count: usize = a.dims()[..rank - 2].iter().product();
    let mut dims = a.dims().to_vec();
    dims[rank - 1] = n;
    let ((a, a_transposed), (b, b_transposed)) = (dense(a)?, dense(b)?);
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    let part = |slice, layout: &Layout| offset::<T>(slice, layout);
    let a = part(cpu_slice::<T>(&a_storage, "product")?, a_layout);
    let b = part(cpu_slice::<T>(&b_storage, "product")?, b_layout);
    let a = Matrices { data: a, rows: m, columns: k, transposed: a_transposed };
    let b = Matrices { data: b, rows: k, columns: n, transposed: b_transposed };
    let out = products(&a, &b, count);
    let storage = Storage::Cpu(<T as WithDType>::to_cpu_storage_owned(out));
    Ok(Tensor::from_storage(storage, dims, candle_core::op::BackpropOp::none(), false))
}

/// The products of `count` pairs of matrices, each by rows.
pub(crate) fn products<T: WithDType + RealField>(
    a: &Matrices<'_, T>,
    b: &Matrices<'_, T>,
    count: usize,
) -> Vec<T> {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    let mut out = vec![<T as WithDType>::from_f64(0.0); count * m * n];
    if k > 0 && !out.is_empty() {
        let large = m * k * n > WORTH_A_THREAD;
        let one = |(index, out): (usize, &mut [T]), par| {
            let out = MatMut::from_row_major_slice_mut(out, m, n);
            matmul(out, Accum::Replace, a.get(index), b.get(index), <T as WithDType>::from_f64(1.0), par);
        };
        match (count, large) {
            (1, true) => one((0, &mut out), Par::rayon(0)),
            (_, true) => {
                let par = par_within(count);
                out.par_chunks_mut(m * n).enumerate().for_each(|chunk| one(chunk, par));
            }
            _ => out.chunks_mut(m * n).enumerate().for_each(|chunk| one(chunk, Par::Seq)),
        }
    }
    out
}

/// How one of so many matrices uses threads, where all are worked on at a time: few of them would leave some of the threads idle.
pub(crate) fn par_within(count: usize) -> Par {
    if count < 2 * rayon::current_num_threads() { Par::rayon(0) } else { Par::Seq }
}

/// `slice` from where the layout begins.
pub(crate) fn offset<'a, T>(slice: &'a [T], layout: &Layout) -> &'a [T] {
    &slice[layout.start_offset()..layout.start_offset() + layout.shape().elem_count()]
}

/// Elements that are worth handing to a thread.
const SHARE: usize = 1 << 15;

/// `sum_i a_i b_i` of two tensors of one shape, accumulated in f64 over runs summed in the tensors' dtype.
///
/// # Errors
/// If shapes, dtypes or devices differ.
pub fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() || a.dtype() != b.dtype() {
        bail!(
            "dot: expected two tensors alike, got {:?} {:?} and {:?} {:?}",
            a.dtype(),
            a.dims(),
            b.dtype(),
            b.dims()
        )
    }
    if a.elem_count() == 0 {
        // candle's kernels take no empty tensors.
        return Ok(0.0);
    }
    let (a, b) = (a.detach().contiguous()?, b.detach().contiguous()?);
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    Ok(match (&*a_storage, &*b_storage) {
        (Storage::Cpu(CpuStorage::F32(a)), Storage::Cpu(CpuStorage::F32(b))) => {
            dot_slices(offset(a, a_layout), offset(b, b_layout), |sums: &[f32]| {
                sums.iter().map(|&s| f64::from(s)).sum()
            })
        }
        (Storage::Cpu(CpuStorage::F64(a)), Storage::Cpu(CpuStorage::F64(b))) => {
            dot_slices(offset(a, a_layout), offset(b, b_layout), |sums: &[f64]| sums.iter().sum())
        }
        _ => {
            // Sums of many half-precision numbers would lose the small ones.
            let wide =
                |t: &Tensor| if t.dtype() == DType::F64 { Ok(t.clone()) } else { t.to_dtype(DType::F32) };
            wide(&a)?.mul(&wide(&b)?)?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?
        }
    })
}

/// Runs of this length are summed in lanes before they are added up in f64.
const RUN: usize = 1 << 12;
const LANES: usize = 32;

pub(crate) fn dot_slices<T: WithDType>(a: &[T], b: &[T], total: impl Fn(&[T]) -> f64) -> f64 {
    vectorized(
        #[inline(always)]
        || a.chunks(RUN).zip(b.chunks(RUN)).map(|(a, b)| total(&run_sums(a, b))).sum(),
    )
}

#[inline(always)]
fn run_sums<T: WithDType>(a: &[T], b: &[T]) -> [T; LANES] {
    let mut sums = [T::from_f64(0.0); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    for ((sum, &a), &b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    sums
}

/// `alpha a + beta b` of two tensors of one shape, in one pass. Not differentiable.
///
/// # Errors
/// If shapes, dtypes or devices differ.
pub fn mix(a: &Tensor, alpha: f64, b: &Tensor, beta: f64) -> Result<Tensor> {
    let cpu = a.device().is_cpu() && b.device().is_cpu();
    let fit = a.dims() == b.dims() && a.dtype() == b.dtype();
    if let Some(gpu) = Gpu::of(a.device())
        && fit
        && !a.dtype().is_int()
    {
        return gpu_mix(&gpu, &a.contiguous()?, alpha, &b.contiguous()?, beta);
    }
    if !(cpu && fit && a.is_contiguous() && b.is_contiguous()) {
        return (a.detach() * alpha)? + (b.detach() * beta)?;
    }
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    fn mixed<T: WithDType>(a: &[T], alpha: f64, b: &[T], beta: f64) -> Vec<T> {
        let (alpha, beta) = (T::from_f64(alpha), T::from_f64(beta));
        let one = |a: &[T], b: &[T]| -> Vec<T> {
            vectorized(
                #[inline(always)]
                || a.iter().zip(b).map(|(&a, &b)| alpha * a + beta * b).collect(),
            )
        };
        if a.len() < 2 * SHARE {
            return one(a, b);
        }
        let mut out = Vec::with_capacity(a.len());
        let spare = out.spare_capacity_mut()[..a.len()].par_chunks_mut(SHARE);
        spare.zip(a.par_chunks(SHARE).zip(b.par_chunks(SHARE))).for_each(|(out, (a, b))| {
            vectorized(
                #[inline(always)]
                || {
                    for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                        out.write(alpha * a + beta * b);
                    }
                },
            )
        });
        // SAFETY: `b` is as long as `a`, so the chunks cover as many elements, and each of them has been written.
        unsafe { out.set_len(a.len()) };
        out
    }
    let storage = match (&*a_storage, &*b_storage) {
        (Storage::Cpu(CpuStorage::F32(a)), Storage::Cpu(CpuStorage::F32(b))) => {
            CpuStorage::F32(mixed(offset(a, a_layout), alpha, offset(b, b_layout), beta))
        }
        (Storage::Cpu(CpuStorage::F64(a)), Storage::Cpu(CpuStorage::F64(b))) => {
            CpuStorage::F64(mixed(offset(a, a_layout), alpha, offset(b, b_layout), beta))
        }
        _ => return (a.detach() * alpha)? + (b.detach() * beta)?,
    };
    let none = candle_core::op::BackpropOp::none();
    Ok(Tensor::from_storage(Storage::Cpu(storage), a.shape().clone(), none, false))
}

args! {
    /// The argument of the kernels in `mix.cu`.
    struct MixArgs { a: u64, b: u64, out: u64, len: u64, alpha: f64, beta: f64 }
}

fn gpu_mix(gpu: &Gpu, a: &Tensor, alpha: f64, b: &Tensor, beta: f64) -> Result<Tensor> {
    const THREADS: u32 = 256;
    /// Elements of a thread: enough blocks for the largest GPU, few enough that a block is worth starting.
    const EACH: usize = 4;
    let out = gpu.tensor(a.shape(), a.dtype())?;
    let [a, b, target] = [gpu.operand(a, "mix")?, gpu.operand(b, "mix")?, gpu.operand(&out, "mix")?];
    let len = target.len;
    let args =
        MixArgs { a: a.address(), b: b.address(), out: target.address(), len: len as u64, alpha, beta };
    let grid = Grid::line(len.div_ceil(THREADS as usize * EACH), THREADS)?;
    gpu.launch(Module::Mix, &typed("mix", target.dtype)?, grid, &args)?;
    Ok(out)
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::Device;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for (groups, m, k, n) in [(1, 1, 1, 1), (3, 4, 5, 6), (1, 70, 33, 129), (2, 0, 3, 4), (2, 3, 0, 4)] {
            let (a, b) = (random(0, &[groups, m, k])?, random(1, &[groups, k, n])?);
            let turned = |t: &Tensor| t.transpose(1, 2)?.contiguous()?.transpose(1, 2);
            let behind = Tensor::cat(&[&a, &a], 0)?.narrow(0, groups, groups)?;
            let (va, vb) = (values(&a)?, values(&b)?);
            let expected: Vec<f64> = (0..groups * m * n)
                .map(|at| {
                    let (group, i, j) = (at / (m * n), at / n % m, at % n);
                    (0..k).map(|l| va[(group * m + i) * k + l] * vb[(group * k + l) * n + j]).sum()
                })
                .collect();
            for (a, b) in [(&a, &b), (&turned(&a)?, &turned(&b)?), (&behind, &turned(&b)?)] {
                assert_close(&product(a, b)?, &expected, 1e-13);
                let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
                assert_close(&product(&a, &b)?, &expected, 1e-5);
            }
            if groups == 1 {
                assert_close(&product(&a.squeeze(0)?, &b.squeeze(0)?)?, &expected, 1e-13);
            }
        }
        Ok(())
    }

    #[test]
    pub(in crate::ops) fn mixes() -> Result<()> {
        let (a, b) = (random(0, &[3, 4])?, random(1, &[4, 3])?.t()?);
        let expected: Vec<f64> =
            values(&a)?.iter().zip(values(&b)?).map(|(a, b)| 0.3 * a - 2.0 * b).collect();
        for (a, b) in [(a.clone(), b.clone()), (a.clone(), b.contiguous()?)] {
            assert_close(&mix(&a, 0.3, &b, -2.0)?, &expected, 1e-14);
            assert_close(
                &mix(&a.to_dtype(DType::F32)?, 0.3, &b.to_dtype(DType::F32)?, -2.0)?,
                &expected,
                1e-6,
            );
        }
        Ok(())
    }

    #[test]
    pub(in crate::ops) fn dots() -> Result<()> {
        for n in [0, 1, 31, 33, 5000] {
            let (a, b) = (random(0, &[n])?, random(1, &[n])?);
            let expected: f64 = values(&a)?.iter().zip(values(&b)?).map(|(a, b)| a * b).sum();
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4), (DType::BF16, 0.3)] {
                let found = dot(&a.to_dtype(dtype)?, &b.to_dtype(dtype)?)?;
                assert!((found - expected).abs() <= tolerance, "{n} {dtype:?}: {found} {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_tensors_are_refused() -> Result<()> {
        let a = random(0, &[2, 3])?;
        for b in [
            random(1, &[2, 3])?,
            random(1, &[1, 3, 2])?,
            random(1, &[3])?,
            random(1, &[3, 2])?.to_dtype(DType::F32)?,
        ] {
            assert!(product(&a, &b).is_err() && dot(&a, &b).is_err() == (b.dims() != [2, 3]));
            assert!(mix(&a, 1.0, &b, 1.0).is_err() == (b.dims() != [2, 3]));
        }
        Ok(())
    }

    #[test]
    fn mixes_on_a_gpu_as_on_the_cpu() -> Result<()> {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for len in [0, 1, 31, 257, 5000] {
                let random = || Tensor::randn(0f32, 1f32, len, &Device::Cpu)?.to_dtype(dtype);
                let (a, b) = (random()?, random()?);
                let found = emulate(|| mix(&a, 0.75, &b, -2.5))?;
                // Half-precision sums of the CPU round each product.
                let wide = |t: &Tensor| t.to_dtype(if dtype == DType::F64 { dtype } else { DType::F32 });
                let exact = mix(&wide(&a)?, 0.75, &wide(&b)?, -2.5)?.to_dtype(dtype)?;
                let found = found.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                assert_eq!(found, exact.to_dtype(DType::F64)?.to_vec1::<f64>()?, "{dtype:?} {len}");
            }
        }
        Ok(())
    }
}
