//! The rectifier, with the derivative that PyTorch has at 0.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor, WithDType};

use super::element::{Host, contiguous, float_dispatch};
use super::row_launch::THREADS;
use super::simd::vectorized;
use crate::gpu::{self, Gpu, Grid, Module, Operand, args, typed};

struct Relu;

args! {
    /// The argument of `relu` in `relu.cu`.
    struct ReluArgs { x: u64, gy: u64, y: u64, len: u64 }
}

/// `max(x, 0)`, or the gradient where `x > 0`.
fn gpu_relu(gpu: &Gpu, x: &Operand, gy: Option<&Operand>) -> Result<Storage> {
    let out = gpu.storage(x.len, x.dtype)?;
    let y = gpu.of_storage(&out, x.len, "relu")?;
    let gy = gy.map_or(0, Operand::address);
    let args = ReluArgs { x: x.address(), gy, y: y.address(), len: x.len as u64 };
    // A thread has 16 bytes.
    let threads = x.len.div_ceil(16 / x.dtype.size_in_bytes());
    let grid = Grid::line(threads.div_ceil(THREADS as usize), THREADS)?;
    gpu.launch(Module::Relu, &typed("relu", x.dtype)?, grid, &args)?;
    Ok(out)
}

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        if let Some(gpu) = Gpu::emulated() {
            let y = gpu_relu(&gpu, &gpu.on_cpu(x, layout, "relu")?, None)?;
            return Ok((gpu::into_cpu(y)?, layout.shape().clone()));
        }
        float_dispatch!(self.name(), x.dtype(), T => {
            let x = contiguous::<T>(x, layout)?;
            let zero = T::default();
            // A NaN is not below zero, so that it passes.
            let y: Vec<T> =
                vectorized(#[inline(always)] || x.iter().map(|&v| if v <= zero { zero } else { v }).collect());
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let y = gpu_relu(&gpu, &gpu.on_cuda(x, layout, "relu")?, None)?;
        Ok((gpu::into_cuda(y)?, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        if let Some(gpu) = Gpu::of(y.device()) {
            let (y, gy) = (y.contiguous()?, gy.contiguous()?);
            let gx = gpu_relu(&gpu, &gpu.operand(&y, "relu")?, Some(&gpu.operand(&gy, "relu")?))?;
            let none = candle_core::op::BackpropOp::none();
            return Ok(Some(Tensor::from_storage(gx, y.shape(), none, false)));
        }
        float_dispatch!(self.name(), gy.dtype(), T => {
            let (ys, gys) = (Host::of(y), Host::of(gy));
            let (ys, gys) = (ys.values::<T>()?, gys.values::<T>()?);
            let zero = T::default();
            let pairs = ys.iter().zip(&*gys);
            let gx: Vec<T> = vectorized(#[inline(always)] || {
                pairs.map(|(&y, &g)| if y <= zero { zero } else { g }).collect()
            });
            Ok(Some(Tensor::from_vec(gx, y.shape(), &Device::Cpu)?))
        })
    }
}

/// `max(x, 0)` element by element, of any shape, with derivative 0 at 0 (candle's own has 1). A NaN stays one.
///
/// # Errors
/// When `x` is not of a floating point type.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    if Gpu::of(x.device()).is_some() {
        return x.contiguous()?.apply_op1(Relu);
    }
    if x.device().is_cpu() { x.apply_op1(Relu) } else { relu_compose(x) }
}

fn relu_compose(x: &Tensor) -> Result<Tensor> {
    let zero = x.zeros_like()?;
    x.detach().le(&zero)?.where_cond(&zero, x)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{gradient, random, values};

    #[test]
    fn relu_at_zero() -> Result<()> {
        let x = Var::new(&[-1f32, 0., -0., 2., f32::INFINITY, f32::NEG_INFINITY], &Device::Cpu)?;
        for f in [relu, relu_compose] {
            assert_eq!(values(&f(&x)?)?, [0., 0., 0., 2., f64::INFINITY, 0.]);
            assert_eq!(gradient(&x, f)?, [0., 0., 0., 4., 5., 0.]);
            assert!(values(&f(&Tensor::new(&[f32::NAN], &Device::Cpu)?)?)?[0].is_nan());
        }
        Ok(())
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for dims in [[0, 3], [1, 1], [3, 11], [8, 16], [1000, 5]] {
                let mut x = values(&random(0, &dims)?)?;
                x.iter_mut().step_by(5).for_each(|x| *x = 0.);
                x.iter_mut().step_by(23).for_each(|x| *x = f64::NAN);
                let x = Var::from_tensor(&Tensor::from_vec(x, &dims, &Device::Cpu)?.to_dtype(dtype)?)?;
                let bits = |v: Vec<f64>| {
                    v.into_iter()
                        .map(|v| (v.is_nan(), v.to_bits() * u64::from(!v.is_nan())))
                        .collect::<Vec<_>>()
                };
                let run = || -> Result<_> { Ok((bits(values(&relu(&x.t()?)?)?), bits(gradient(&x, relu)?))) };
                assert_eq!(emulate(run)?, run()?, "{dtype:?} {dims:?}");
            }
        }
        Ok(())
    }
}
