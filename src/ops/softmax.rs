//! Softmax over the last dimension and its logarithm: safe for large inputs, differentiable.
//!
//! For a row with largest entry `m`: `log softmax(x) = (x - m) - log sum exp(x - m)`. A row with a NaN or +inf gives NaN, as in
//! PyTorch. A row of -inf alone, which masks everything, has no probabilities to give: the softmax is 0, its logarithm -inf and
//! the gradient of both 0, so that a row that the loss leaves out leaves the others alone (PyTorch has NaN).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, dot, float_dispatch, sum};
use super::row_launch::a_team_each;
use super::simd::{Level, with_level};
use crate::gpu::{self, Gpu, Module, Operand, args, typed};

pub use super::cross_entropy::cross_entropy;

/// `exp(x) / sum exp(x)` over the last dimension, in the shape and dtype of `x`.
///
/// # Errors
/// When there are no elements in that dimension, or `x` is not of a floating point type.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: false }.apply(x)
}

/// `log softmax(x)` over the last dimension, in the shape and dtype of `x`.
///
/// # Errors
/// As [`softmax_last_dim`].
pub fn log_softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: true }.apply(x)
}

#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub(super) log: bool,
}

/// What a row's exponentials are taken less: its largest entry, and 0 where all are -inf, less which they would be NaN. A NaN, which
/// no maximum shows, is one in the sum of the exponentials all the same.
#[inline(always)]
fn shift<T: Element>(row: &[T]) -> T::Acc {
    let max = largest(row);
    if max == T::Acc::NEG_INFINITY { T::Acc::ZERO } else { max }
}

/// The largest entry that is no NaN, in parts that vectorize.
#[inline(always)]
pub(super) fn largest<T: Element>(row: &[T]) -> T::Acc {
    const PARTS: usize = 16;
    let larger = |a: T::Acc, b: T::Acc| if b > a { b } else { a };
    let (chunks, rest) = row.as_chunks::<PARTS>();
    let mut parts = [T::Acc::NEG_INFINITY; PARTS];
    for chunk in chunks {
        for i in 0..PARTS {
            parts[i] = larger(parts[i], chunk[i].widen());
        }
    }
    let mut most = T::Acc::NEG_INFINITY;
    for part in &parts {
        most = larger(most, *part);
    }
    for v in rest {
        most = larger(most, v.widen());
    }
    most
}

/// The largest entry `m` of a row, and `log sum exp(x - m)`: apart, since in the sum of the two a large `m` would swallow
/// the other. Both are 0 where all entries are -inf.
#[inline(always)]
pub(super) fn log_sum_exp<L: Level, T: Element>(level: L, row: &[T]) -> (T::Acc, T::Acc) {
    let shift = shift(row);
    let total = sum(
        row,
        #[inline(always)]
        |v| (v - shift).exp_in(level),
    );
    (shift, if total == T::Acc::ZERO { total } else { total.ln() })
}

/// The exponentials `exp(x - m)` of a row in `exps`, and one over their sum; 0 where all are 0.
#[inline(always)]
pub(super) fn exponentials<L: Level, T: Element>(level: L, row: &[T], exps: &mut Vec<T::Acc>) -> T::Acc {
    let shift = shift(row);
    exps.resize(row.len(), T::Acc::ZERO);
    for (exp, v) in exps.iter_mut().zip(row) {
        *exp = (v.widen() - shift).exp_in(level);
    }
    let total = sum(exps, |v| v);
    if total == T::Acc::ZERO { total } else { T::Acc::from_f64(1.) / total }
}

/// Rows that are worth a task of their own.
pub(super) fn rows_of_part(d: usize) -> usize {
    (1024 / d).max(1)
}

impl Softmax {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        if !matches!(x.dims().last(), Some(1..)) {
            bail!("{}: expected an input [.., classes], got {:?}", self.name(), x.dims())
        }
        if Gpu::of(x.device()).is_some() {
            // The kernels read rows alone; the CPU's version reads any layout.
            return x.contiguous()?.apply_op1(self);
        }
        if x.device().is_cpu() { x.apply_op1(self) } else { self.compose(x) }
    }

    /// The same from candle's own operations.
    pub(super) fn compose(self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let x = x.to_dtype(wide)?;
        // The largest entry moves nothing: no gradient need flow through it.
        let max = x.detach().max_keepdim(D::Minus1)?;
        // A row of -inf alone is taken less 0, and its sum is 1: its softmax is 0.
        let masked = max.eq(f64::NEG_INFINITY)?;
        let x = x.broadcast_sub(&masked.where_cond(&max.zeros_like()?, &max)?)?;
        let exp = x.exp()?;
        let sum = (exp.sum_keepdim(D::Minus1)? + masked.to_dtype(wide)?)?;
        if !self.log {
            return exp.broadcast_div(&sum)?.to_dtype(dtype);
        }
        let y = x.broadcast_sub(&sum.log()?)?;
        // Constants there, without a gradient.
        let masked = masked.broadcast_as(y.shape())?;
        masked.where_cond(&y.detach(), &y)?.to_dtype(dtype)
    }

    fn forward<T: Element>(self, x: &[T], d: usize) -> Vec<T> {
        let mut y = vec![T::narrow(T::Acc::ZERO); x.len()];
        let part = rows_of_part(d) * d;
        y.par_chunks_mut(part).zip(x.par_chunks(part)).for_each(
            |(y, x)| with_level!(level => level.call(#[inline(always)] || self.forward_rows(level, x, y, d))),
        );
        y
    }

    #[inline(always)]
    fn forward_rows<L: Level, T: Element>(self, level: L, x: &[T], y: &mut [T], d: usize) {
        let mut exps = Vec::new();
        for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            if self.log {
                let (max, log_sum) = log_sum_exp(level, x);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = T::narrow(x.widen() - max - log_sum));
            } else {
                let scale = exponentials(level, x, &mut exps);
                y.iter_mut().zip(&exps).for_each(|(y, e)| *y = T::narrow(*e * scale));
            }
        }
    }

    /// `y (g - sum g y)`, and `g - exp(y) sum g` for the logarithm, 0 where all of that is -inf.
    fn backward<T: Element>(self, y: &[T], gy: &[T], d: usize) -> Vec<T> {
        let mut gx = vec![T::narrow(T::Acc::ZERO); y.len()];
        let part = rows_of_part(d) * d;
        gx.par_chunks_mut(part).zip(y.par_chunks(part).zip(gy.par_chunks(part))).for_each(|(gx, (y, gy))| {
            with_level!(level => level.call(#[inline(always)] || self.backward_rows(level, y, gy, gx, d)))
        });
        gx
    }

    #[inline(always)]
    fn backward_rows<L: Level, T: Element>(self, level: L, y: &[T], gy: &[T], gx: &mut [T], d: usize) {
        for (gx, (y, gy)) in gx.chunks_exact_mut(d).zip(y.chunks_exact(d).zip(gy.chunks_exact(d))) {
            let pairs = gx.iter_mut().zip(y.iter().zip(gy));
            if self.log {
                if y.iter().all(|y| y.widen() == T::Acc::NEG_INFINITY) {
                    continue;
                }
                let total = sum(gy, |v| v);
                for (gx, (y, g)) in pairs {
                    *gx = T::narrow(g.widen() - y.widen().exp_in(level) * total);
                }
            } else {
                let total = dot(y, gy);
                for (gx, (y, g)) in pairs {
                    *gx = T::narrow(y.widen() * (g.widen() - total));
                }
            }
        }
    }

    fn gpu_forward(self, gpu: &Gpu, x: &Operand, d: usize) -> Result<Storage> {
        let out = gpu.storage(x.len, x.dtype)?;
        let y = gpu.of_storage(&out, x.len, self.name())?;
        let rows = x.len / d;
        let (grid, block) = a_team_each(rows, d, x.dtype)?;
        let log = u32::from(self.log);
        let args = SoftmaxArgs { x: x.address(), y: y.address(), rows: rows as u64, d: d as u64, log, block };
        gpu.launch(Module::Softmax, &typed("softmax", x.dtype)?, grid, &args)?;
        Ok(out)
    }

    fn gpu_backward(self, gpu: &Gpu, y: &Tensor, gy: &Tensor) -> Result<Tensor> {
        let (y, gy) = (y.contiguous()?, gy.contiguous()?);
        let gx = gpu.tensor(y.shape(), y.dtype())?;
        let operand = |t: &Tensor| gpu.operand(t, self.name());
        let (of_y, of_gy, of_gx) = (operand(&y)?, operand(&gy)?, operand(&gx)?);
        let d = y.dim(D::Minus1)?;
        let rows = y.elem_count() / d;
        let (grid, block) = a_team_each(rows, d, y.dtype())?;
        let args = SoftmaxGradientArgs {
            y: of_y.address(),
            gy: of_gy.address(),
            gx: of_gx.address(),
            rows: rows as u64,
            d: d as u64,
            log: self.log.into(),
            block,
        };
        gpu.launch(Module::Softmax, &typed("softmax_gradient", y.dtype())?, grid, &args)?;
        Ok(gx)
    }
}

args! {
    /// The argument of `softmax` in `softmax.cu`.
    struct SoftmaxArgs { x: u64, y: u64, rows: u64, d: u64, log: u32, block: u32 }
}

args! {
    /// The argument of `softmax_gradient` in `softmax.cu`.
    struct SoftmaxGradientArgs { y: u64, gy: u64, gx: u64, rows: u64, d: u64, log: u32, block: u32 }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax_last_dim" } else { "softmax_last_dim" }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let d = layout.shape().dim(D::Minus1)?;
        if let Some(gpu) = Gpu::emulated() {
            let y = self.gpu_forward(&gpu, &gpu.on_cpu(x, layout, self.name())?, d)?;
            return Ok((gpu::into_cpu(y)?, layout.shape().clone()));
        }
        float_dispatch!(self.name(), x.dtype(), T => {
            let y = self.forward(&contiguous::<T>(x, layout)?, d);
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let d = layout.shape().dim(D::Minus1)?;
        let y = self.gpu_forward(&gpu, &gpu.on_cuda(x, layout, self.name())?, d)?;
        Ok((gpu::into_cuda(y)?, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        if let Some(gpu) = Gpu::of(y.device()) {
            return Ok(Some(self.gpu_backward(&gpu, y, gy)?));
        }
        float_dispatch!(self.name(), y.dtype(), T => {
            let hosts = [Host::of(y), Host::of(gy)];
            let gx = self.backward(&hosts[0].values::<T>()?, &hosts[1].values::<T>()?, y.dim(D::Minus1)?);
            Ok(Some(Tensor::from_vec(gx, y.shape(), &Device::Cpu)?))
        })
    }
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::Var;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, check_gradients, extreme, random, random_var, values};

    #[test]
    fn values_and_gradients() -> Result<()> {
        for dims in [[4, 5], [1, 1], [3, 37]] {
            let x = random_var(0, &dims)?;
            let p: Vec<f64> = values(&x)?
                .chunks(dims[1])
                .flat_map(|row| {
                    let total: f64 = row.iter().map(|v| v.exp()).sum();
                    row.iter().map(move |v| v.exp() / total).collect::<Vec<_>>()
                })
                .collect();
            let log_p: Vec<f64> = p.iter().map(|p| p.ln()).collect();
            for (softmax, expected) in [(Softmax { log: false }, &p), (Softmax { log: true }, &log_p)] {
                assert_close(&softmax.apply(&x)?, expected, 1e-14);
                assert_close(&softmax.compose(&x)?, expected, 1e-14);
                check_gradients(std::slice::from_ref(&x), |a| softmax.apply(&a[0]));
            }
        }
        Ok(())
    }

    #[test]
    fn extreme_rows() -> Result<()> {
        let inf = f32::INFINITY;
        let x = Var::new(&[[1e4f32, 1e4, -1e4], [-1e30, -1e30, -inf], [0., 100., -100.]], &Device::Cpu)?;
        assert_close(&softmax_last_dim(&x)?, &[0.5, 0.5, 0., 0.5, 0.5, 0., 0., 1., 0.], 1e-7);
        for bad in [[f32::NAN, 0.], [inf, 0.], [-inf, f32::NAN], [-inf, inf]] {
            let p = values(&softmax_last_dim(&Tensor::new(&bad, &Device::Cpu)?)?)?;
            assert!(p.iter().any(|p| p.is_nan()), "{bad:?} gives {p:?}");
        }
        Ok(())
    }

    /// A row of -inf alone has weight 0 and gradient 0, short or long, in every dtype, natively, composed and in the kernels; the other
    /// rows are as without it.
    #[test]
    fn a_row_wholly_masked() -> Result<()> {
        for (d, dtype) in [1, 3, 33, 1000, 9001]
            .into_iter()
            .flat_map(|d| [DType::F32, DType::F64, DType::F16, DType::BF16].map(|dtype| (d, dtype)))
        {
            let free = random(0, &[2, d])?.to_dtype(dtype)?;
            let masked = Tensor::full(f32::NEG_INFINITY, (1, d), &Device::Cpu)?.to_dtype(dtype)?;
            let x = Var::from_tensor(&Tensor::cat(
                &[&free.narrow(0, 0, 1)?, &masked, &free.narrow(0, 1, 1)?],
                0,
            )?)?;
            let gy = random(1, &[3, d])?.to_dtype(dtype)?;
            for log in [false, true] {
                let softmax = Softmax { log };
                let expected = values(&softmax.apply(&free)?)?;
                let of_free = Var::from_tensor(&free)?;
                let gy_free = Tensor::cat(&[gy.narrow(0, 0, 1)?, gy.narrow(0, 2, 1)?], 0)?;
                let grads = softmax.apply(&of_free)?.mul(&gy_free)?.sum_all()?.backward()?;
                let expected_grad = grads.get(&of_free).map(values).transpose()?.unwrap_or_default();
                let check = |y: Tensor, tolerance: f64| -> Result<()> {
                    // By the operation's own backward: a product with -inf has none.
                    let y = values(&y)?;
                    let nothing = if log { f64::NEG_INFINITY } else { 0. };
                    assert_eq!(y[d..2 * d], vec![nothing; d], "{d} {dtype:?}");
                    let others = [&y[..d], &y[2 * d..]].concat();
                    assert_close(&Tensor::new(&others[..], &Device::Cpu)?, &expected, tolerance);
                    Ok(())
                };
                let check_grad = |grad: &Tensor, tolerance: f64| -> Result<()> {
                    let grad = values(grad)?;
                    assert_eq!(grad[d..2 * d], vec![0.; d], "{d} {dtype:?} {log}");
                    let others = [&grad[..d], &grad[2 * d..]].concat();
                    assert_close(&Tensor::new(&others[..], &Device::Cpu)?, &expected_grad, tolerance);
                    Ok(())
                };
                let tolerance = match dtype {
                    DType::F64 => 1e-13,
                    DType::F32 => 1e-5,
                    DType::F16 => 1e-2,
                    _ => 5e-2,
                };
                let native = || -> Result<()> {
                    let y = softmax.apply(&x)?;
                    check(y.clone(), tolerance)?;
                    let grad = softmax.bwd(&x, &y, &gy)?;
                    check_grad(grad.as_ref().unwrap_or(&y), tolerance)
                };
                native()?;
                if d < 5000 || dtype == DType::F32 {
                    emulate(native)?;
                }
                let y = softmax.compose(&x)?;
                check(y.clone(), tolerance)?;
                // The loss takes the free rows alone.
                let free = Tensor::new(&[0u32, 2], &Device::Cpu)?;
                let loss = y.index_select(&free, 0)?.mul(&gy_free)?.sum_all()?;
                let grads = loss.backward()?;
                check_grad(grads.get(&x).unwrap_or(&y), tolerance)?;
            }
        }
        Ok(())
    }

    #[test]
    pub(in crate::ops) fn other_layouts_and_dtypes() -> Result<()> {
        let x = random_var(0, &[6, 4, 5])?;
        let turned = x.transpose(0, 2)?;
        let expected = values(&softmax_last_dim(&turned.contiguous()?)?)?;
        assert_close(&softmax_last_dim(&turned)?, &expected, 1e-15);
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)] {
            assert_close(&softmax_last_dim(&turned.to_dtype(dtype)?)?, &expected, tolerance);
        }
        Ok(())
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        let all = [1, 3, 31, 33, 127, 513, 1000]
            .into_iter()
            .flat_map(|d| [DType::F32, DType::F64, DType::F16, DType::BF16].map(|dtype| ([10, d], dtype)));
        let few = [
            ([0, 3], DType::F32),
            ([6, 4099], DType::F32),
            ([6, 5003], DType::BF16),
            ([6, 2501], DType::F64),
        ];
        for (dims, dtype) in all.chain(few) {
            let x = Var::from_tensor(&extreme(dims)?.to_dtype(dtype)?)?;
            let tolerance = match dtype {
                DType::F64 => 1e-13,
                DType::F32 => 2e-6,
                DType::F16 => 1e-3,
                _ => 1e-2,
            };
            for log in [false, true] {
                let run = || -> Result<Vec<Vec<f64>>> {
                    let y = Softmax { log }.apply(&x)?;
                    // Not by a product with the outputs, which may be infinite.
                    let gy = random(3, &dims)?.to_dtype(dtype)?;
                    let gx = Softmax { log }.bwd(&x, &y, &gy)?;
                    [Some(y), gx].iter().flatten().map(values).collect()
                };
                for (found, expected) in emulate(run)?.iter().zip(&run()?) {
                    assert_close(&Tensor::new(&found[..], &Device::Cpu)?, expected, tolerance);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_inputs_are_refused() -> Result<()> {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        assert!(softmax_last_dim(&x.narrow(1, 0, 0)?).is_err());
        assert!(emulate(|| softmax_last_dim(&x.to_dtype(DType::U32)?)).is_err());
        Ok(())
    }
}
