//! Softmax over the last dimension and its logarithm: safe for large inputs, differentiable.
//!
//! For a row with largest entry `m`: `log softmax(x) = (x - m) - log sum exp(x - m)`. A row of -inf alone, or with a NaN or
//! +inf, gives NaN, as in PyTorch.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, dot, float_dispatch, sum};
use super::rows::a_team_each;
use crate::gpu::{self, Gpu, Module, Operand, args, typed};

pub use super::cross_entropy::cross_entropy;

/// `exp(x) / sum exp(x)` over the last dimension, in the shape and dtype of `x`. Fails on a tensor without elements in
/// that dimension.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: false }.apply(x)
}

/// `log softmax(x)` over the last dimension, in the shape and dtype of `x`. Fails as [`softmax_last_dim`] does.
pub fn log_softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: true }.apply(x)
}

#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub(super) log: bool,
}

/// The largest entry `m` of a row, and `log sum exp(x - m)`: apart, since in the sum of the two a large `m` would swallow
/// the other.
pub(super) fn log_sum_exp<T: Element>(row: &[T]) -> (T::Acc, T::Acc) {
    let max = row.iter().fold(T::Acc::NEG_INFINITY, |m, v| m.max(v.widen()));
    (max, sum(row, |v| (v - max).exp()).ln())
}

/// The exponentials `exp(x - m)` of a row in `exps`, and one over their sum.
pub(super) fn exponentials<T: Element>(row: &[T], exps: &mut Vec<T::Acc>) -> T::Acc {
    let max = row.iter().fold(T::Acc::NEG_INFINITY, |m, v| m.max(v.widen()));
    exps.clear();
    exps.extend(row.iter().map(|v| (v.widen() - max).exp()));
    T::Acc::from_f64(1.) / sum(exps, |v| v)
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
        let x = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
        let exp = x.exp()?;
        let sum = exp.sum_keepdim(D::Minus1)?;
        let y = if self.log { x.broadcast_sub(&sum.log()?)? } else { exp.broadcast_div(&sum)? };
        y.to_dtype(dtype)
    }

    fn forward<T: Element>(self, x: &[T], d: usize) -> Vec<T> {
        let mut y = vec![T::narrow(T::Acc::ZERO); x.len()];
        let rows = y.par_chunks_exact_mut(d).zip(x.par_chunks_exact(d));
        rows.with_min_len(rows_of_part(d)).for_each_init(Vec::new, |exps, (y, x)| {
            if self.log {
                let (max, log_sum) = log_sum_exp(x);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = T::narrow(x.widen() - max - log_sum));
            } else {
                let scale = exponentials(x, exps);
                y.iter_mut().zip(exps).for_each(|(y, e)| *y = T::narrow(*e * scale));
            }
        });
        y
    }

    /// `y (g - sum g y)`, and `g - exp(y) sum g` for the logarithm.
    fn backward<T: Element>(self, y: &[T], gy: &[T], d: usize) -> Vec<T> {
        let mut gx = vec![T::narrow(T::Acc::ZERO); y.len()];
        let rows = gx.par_chunks_exact_mut(d).zip(y.par_chunks_exact(d).zip(gy.par_chunks_exact(d)));
        rows.with_min_len(rows_of_part(d)).for_each(|(gx, (y, gy))| {
            let pairs = gx.iter_mut().zip(y.iter().zip(gy));
            let pairs = pairs.map(|(gx, (y, g))| (gx, y.widen(), g.widen()));
            if self.log {
                let total = sum(gy, |v| v);
                pairs.for_each(|(gx, y, g)| *gx = T::narrow(g - y.exp() * total));
            } else {
                let total = dot(y, gy);
                pairs.for_each(|(gx, y, g)| *gx = T::narrow(y * (g - total)));
            }
        });
        gx
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
mod tests {
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
        for bad in [[f32::NAN, 0.], [inf, 0.], [-inf, -inf]] {
            let p = values(&softmax_last_dim(&Tensor::new(&bad, &Device::Cpu)?)?)?;
            assert!(p.iter().any(|p| p.is_nan()), "{bad:?} gives {p:?}");
        }
        Ok(())
    }

    #[test]
    fn other_layouts_and_dtypes() -> Result<()> {
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
