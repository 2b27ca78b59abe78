//! Dropout by a mask that is a function of a seed, a stream and an element's place.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{rng, simd::vectorized};
use crate::gpu::{self, Gpu, Grid, Module, Operand, args, typed};

/// Places of the random stream, of four elements each, that are worth a task of their own.
const PLACES: usize = 1024;

/// Sets each element of `x` to 0 with probability `p`, in [0, 1), and divides the others by `1 - p`. Differentiable. The first element is the
/// one of the number `first` in the stream.
pub(crate) fn dropout(x: &Tensor, p: f64, seed: u64, stream: u64, first: u64) -> Result<Tensor> {
    let mask = Mask { p, seed, stream, first };
    if Gpu::of(x.device()).is_some() {
        return x.contiguous()?.apply_op1(mask);
    }
    x * mask.on_host(x.shape())?.to_dtype(x.dtype())?.to_device(x.device())?
}

#[derive(Clone, Copy)]
struct Mask {
    p: f64,
    seed: u64,
    stream: u64,
    first: u64,
}

impl Mask {
    /// What random words must not be below, for the probability exact to 2^-33, and the factor of the others.
    fn numbers(&self) -> (u64, f32) {
        ((self.p * 2f64.powi(32)).round() as u64, (1. / (1. - self.p)) as f32)
    }

    fn on_host(&self, shape: &Shape) -> Result<Tensor> {
        let (threshold, kept) = self.numbers();
        // A place has four elements, and the first may be within one.
        let (place, within) = (self.first / 4, (self.first % 4) as usize);
        let mut mask = vec![0f32; within + shape.elem_count()];
        mask.par_chunks_mut(4 * PLACES).enumerate().for_each(|(part, mask)| {
            vectorized(
                #[inline(always)]
                || {
                    for (at, mask) in mask.chunks_mut(4).enumerate() {
                        let bits = rng::bits(self.seed, self.stream, place + (part * PLACES + at) as u64);
                        for (mask, bits) in mask.iter_mut().zip(bits) {
                            *mask = if u64::from(bits) < threshold { 0. } else { kept };
                        }
                    }
                },
            )
        });
        mask.drain(..within);
        Tensor::from_vec(mask, shape, &Device::Cpu)
    }

    fn gpu(&self, gpu: &Gpu, x: &Operand) -> Result<Storage> {
        const THREADS: u32 = 256;
        let out = gpu.storage(x.len, x.dtype)?;
        let y = gpu.of_storage(&out, x.len, "dropout")?;
        let (threshold, kept) = self.numbers();
        let args = DropoutArgs {
            x: x.address(),
            y: y.address(),
            len: x.len as u64,
            seed: self.seed,
            stream: self.stream,
            threshold,
            kept: kept.into(),
            first: self.first,
        };
        let within = (self.first % 4) as usize;
        let grid = Grid::line((within + x.len).div_ceil(4 * THREADS as usize), THREADS)?;
        gpu.launch(Module::Dropout, &typed("dropout", x.dtype)?, grid, &args)?;
        Ok(out)
    }
}

args! {
    /// The argument of the kernels in `dropout.cu`.
    struct DropoutArgs { x: u64, y: u64, len: u64, seed: u64, stream: u64, threshold: u64, kept: f64, first: u64 }
}

impl CustomOp1 for Mask {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some(gpu) = Gpu::emulated() else {
            bail!("dropout: expected a tensor on a GPU, got one on the CPU")
        };
        let y = self.gpu(&gpu, &gpu.on_cpu(x, layout, "dropout")?)?;
        Ok((gpu::into_cpu(y)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let y = self.gpu(&gpu, &gpu.on_cuda(x, layout, "dropout")?)?;
        Ok((gpu::into_cuda(y)?, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gy.contiguous()?.apply_op1_no_bwd(self)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{random, values};

    #[test]
    fn the_kernel_drops_what_the_cpu_does() -> Result<()> {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for (dims, p) in [([0, 3], 0.5), ([1, 1], 0.), ([3, 7], 0.1), ([33, 31], 0.9), ([5, 1024], 0.5)] {
                let x = Var::from_tensor(&random(0, &dims)?.to_dtype(dtype)?)?;
                for first in [0, 8, 13] {
                    let run = || -> Result<Vec<Vec<f64>>> {
                        let y = dropout(&x.t()?, p, 3, 1 << 63 | 5, first)?;
                        let grads = y.sqr()?.sum_all()?.backward()?;
                        [Some(&y), grads.get(&x)].into_iter().flatten().map(values).collect()
                    };
                    let (found, expected) = (emulate(run)?, run()?);
                    assert_eq!(found.len(), 2);
                    assert_eq!(found, expected, "{dtype:?} {dims:?} {p} {first}");
                }
            }
        }
        Ok(())
    }
}
