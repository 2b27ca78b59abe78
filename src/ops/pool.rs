//! Max pooling, with the derivative that PyTorch uses where it is not unique.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, float_dispatch};
use super::simd::vectorized;
use crate::gpu::{self, Gpu, Grid, Module, Operand, args, typed};

pub use super::relu::relu;

struct MaxPool {
    kernel: (usize, usize),
    stride: (usize, usize),
    /// Position of each output's maximum within its input plane, from the forward pass.
    at: OnceLock<Places>,
}

enum Places {
    Host(Vec<u32>),
    /// u32, in the shape of the outputs.
    Device(Tensor),
}

impl MaxPool {
    fn geometry(&self, (h, w): (usize, usize), (oh, ow): (usize, usize)) -> Result<[u32; 8]> {
        if h * w > u32::MAX as usize {
            bail!("max-pool2d: an image of {h} x {w} elements, expected below 2^32")
        }
        let (kernel, stride) = (self.kernel, self.stride);
        Ok([h, w, oh, ow, kernel.0, kernel.1, stride.0, stride.1]
            .map(|size| size.min(u32::MAX as usize) as u32))
    }

    fn gpu_forward(&self, gpu: &Gpu, x: &Operand, layout: &Layout) -> Result<(Storage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let (oh, ow) = pooled_size(h, w, self.kernel, self.stride)?;
        let shape = Shape::from((n, c, oh, ow));
        let len = shape.elem_count();
        let (out, at) = (gpu.storage(&shape, x.dtype)?, gpu.tensor(&shape, DType::U32)?);
        let (y, of_at) = (gpu.of_storage(&out, len, "max-pool2d")?, gpu.operand(&at, "max-pool2d")?);
        let args = PoolArgs {
            x: x.address(),
            y: y.address(),
            at: of_at.address(),
            len: len as u64,
            geometry: self.geometry((h, w), (oh, ow))?,
        };
        gpu.launch(Module::Pool, &typed("max_pool", x.dtype)?, one_each(len)?, &args)?;
        // Set once: an op is applied to one tensor.
        self.at.get_or_init(|| Places::Device(at));
        Ok((out, shape))
    }

    fn gpu_backward(&self, gpu: &Gpu, at: &Tensor, x: &Shape, gy: &Tensor) -> Result<Tensor> {
        let gy = gy.contiguous()?;
        let gx = gpu.tensor(x, gy.dtype())?;
        let operand = |t: &Tensor| gpu.operand(t, "max-pool2d");
        let (of_gy, of_at, of_gx) = (operand(&gy)?, operand(at)?, operand(&gx)?);
        let ((_, _, h, w), (_, _, oh, ow)) = (x.dims4()?, gy.dims4()?);
        let args = PoolGradientArgs {
            gy: of_gy.address(),
            at: of_at.address(),
            gx: of_gx.address(),
            len: of_gx.len as u64,
            geometry: self.geometry((h, w), (oh, ow))?,
        };
        let grid = one_each(of_gx.len)?;
        gpu.launch(Module::Pool, &typed("max_pool_gradient", gy.dtype())?, grid, &args)?;
        Ok(gx)
    }
}

args! {
    /// The argument of `max_pool` in `pool.cu`.
    struct PoolArgs {
        x: u64, y: u64, at: u64, len: u64,
        /// Sizes of input and output, kernel and stride.
        geometry: [u32; 8],
    }
}

args! {
    /// The argument of `max_pool_gradient` in `pool.cu`.
    struct PoolGradientArgs { gy: u64, at: u64, gx: u64, len: u64, geometry: [u32; 8] }
}

const THREADS: u32 = 256;

/// A thread for each of `len` elements.
fn one_each(len: usize) -> Result<Grid> {
    Grid::line(len.div_ceil(THREADS as usize), THREADS)
}

/// The maxima of one plane of width `w` and their positions. The first of equal ones counts; a NaN is larger than
/// everything. Inlined, so that a kernel and stride that are known unroll.
#[inline(always)]
fn plane<T: WithDType>(
    (x, w): (&[T], usize),
    (kernel, stride): ((usize, usize), (usize, usize)),
    ow: usize,
    y: &mut [T],
    at: &mut [u32],
) {
    for (p, (y, at)) in y.chunks_exact_mut(ow).zip(at.chunks_exact_mut(ow)).enumerate() {
        let corner = p * stride.0 * w;
        let rows = &x[corner..corner + (kernel.0 - 1) * w + (ow - 1) * stride.1 + kernel.1];
        for (q, (y, at)) in y.iter_mut().zip(at).enumerate() {
            let mut first = q * stride.1;
            let (mut max, mut place) = (rows[first], first);
            for _ in 0..kernel.0 {
                for (col, &v) in rows[first..first + kernel.1].iter().enumerate() {
                    // Without a branch, which the maxima of an image would mispredict. `v != v` only for a NaN.
                    #[allow(clippy::eq_op)]
                    let larger = (v > max) | (v != v);
                    max = if larger { v } else { max };
                    place = if larger { first + col } else { place };
                }
                first += w;
            }
            (*y, *at) = (max, (corner + place) as u32);
        }
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (n, c, h, w) = layout.shape().dims4()?;
        let (oh, ow) = pooled_size(h, w, self.kernel, self.stride)?;
        if let Some(gpu) = Gpu::emulated() {
            let (y, shape) = self.gpu_forward(&gpu, &gpu.on_cpu(x, layout, "max-pool2d")?, layout)?;
            return Ok((gpu::into_cpu(y)?, shape));
        }
        float_dispatch!(self.name(), x.dtype(), T => {
            let x = contiguous::<T>(x, layout)?;
            let (mut y, mut at) = (vec![T::default(); n * c * oh * ow], vec![0u32; n * c * oh * ow]);
            y.par_chunks_exact_mut(oh * ow)
                .zip(at.par_chunks_exact_mut(oh * ow))
                .zip(x.par_chunks_exact(h * w))
                .with_min_len(c)
                .for_each(|((y, at), x)| match (self.kernel, self.stride) {
                    ((2, 2), (2, 2)) => {
                        vectorized(#[inline(always)] || plane((x, w), ((2, 2), (2, 2)), ow, y, at))
                    }
                    window => vectorized(#[inline(always)] || plane((x, w), window, ow, y, at)),
                });
            // Set once: an op is applied to one tensor.
            self.at.get_or_init(|| Places::Host(at));
            Ok((T::to_cpu_storage_owned(y), Shape::from((n, c, oh, ow))))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let (y, shape) = self.gpu_forward(&gpu, &gpu.on_cuda(x, layout, "max-pool2d")?, layout)?;
        Ok((gpu::into_cuda(y)?, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        let at = match (self.at.get(), Gpu::of(x.device())) {
            (Some(Places::Host(at)), _) => at,
            (Some(Places::Device(at)), Some(gpu)) => {
                return Ok(Some(self.gpu_backward(&gpu, at, x.shape(), gy)?));
            }
            _ => bail!("max-pool2d: backward without a forward pass on the same device"),
        };
        let (_, _, h, w) = x.dims4()?;
        let (_, c, oh, ow) = gy.dims4()?;
        float_dispatch!(self.name(), gy.dtype(), T => {
            let gy = Host::of(gy);
            let gy = gy.values::<T>()?;
            let mut gx = vec![<T as Element>::Acc::ZERO; x.elem_count()];
            gx.par_chunks_exact_mut(h * w)
                .zip(gy.par_chunks_exact(oh * ow).zip(at.par_chunks_exact(oh * ow)))
                .with_min_len(c)
                .for_each(|(gx, (gy, at))| gy.iter().zip(at).for_each(|(&g, &at)| gx[at as usize] += g.widen()));
            Ok(Some(Tensor::from_vec(T::narrow_vec(gx), x.shape(), &Device::Cpu)?))
        })
    }
}

pub(crate) fn pooled_size(
    h: usize,
    w: usize,
    kernel: (usize, usize),
    stride: (usize, usize),
) -> Result<(usize, usize)> {
    if [kernel.0, kernel.1, stride.0, stride.1].contains(&0) {
        bail!("max-pool2d: expected kernel and stride of at least 1, got {kernel:?} and {stride:?}")
    }
    if h < kernel.0 || w < kernel.1 {
        bail!("max-pool2d: kernel {kernel:?} is larger than the input {:?}", (h, w))
    }
    Ok(((h - kernel.0) / stride.0 + 1, (w - kernel.1) / stride.1 + 1))
}

/// The maxima of windows of `kernel` (height, width), `stride` apart, without padding: `[n, c, h, w]` to
/// `[n, c, (h - kh) / stride + 1, (w - kw) / stride + 1]`. The gradient goes to the first maximum of a window in row-major
/// order, as in PyTorch. A NaN in a window is its maximum. (On devices other than the CPU and NVIDIA's, ties and NaN go
/// where the device's argmax says.)
///
/// # Errors
/// On a zero kernel or stride, on a kernel larger than the input, and when `x` does not have four dimensions.
pub fn max_pool2d(x: &Tensor, kernel: (usize, usize), stride: (usize, usize)) -> Result<Tensor> {
    let &[_, _, h, w] = x.dims() else {
        bail!("max-pool2d: expected an input [batch, channels, height, width], got {:?}", x.dims())
    };
    pooled_size(h, w, kernel, stride)?;
    if Gpu::of(x.device()).is_some() {
        return x.contiguous()?.apply_op1(MaxPool { kernel, stride, at: OnceLock::new() });
    }
    if x.device().is_cpu() {
        return x.apply_op1(MaxPool { kernel, stride, at: OnceLock::new() });
    }
    max_pool_compose(x, kernel, stride)
}

/// The same from candle's own operations.
fn max_pool_compose(x: &Tensor, kernel: (usize, usize), stride: (usize, usize)) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let (oh, ow) = pooled_size(h, w, kernel, stride)?;
    let taps = |out: usize, kernel: usize, stride: usize| {
        let taps: Vec<u32> =
            (0..out).flat_map(|o| (0..kernel).map(move |k| (o * stride + k) as u32)).collect();
        Tensor::from_vec(taps, out * kernel, x.device())
    };
    let windows = x
        .index_select(&taps(oh, kernel.0, stride.0)?, 2)?
        .index_select(&taps(ow, kernel.1, stride.1)?, 3)?
        .reshape(&[n, c, oh, kernel.0, ow, kernel.1])?
        .permute([0, 1, 2, 4, 3, 5])?
        .contiguous()?
        .reshape((n * c * oh * ow, kernel.0 * kernel.1))?;
    let at = windows.detach().argmax_keepdim(D::Minus1)?;
    windows.gather(&at, 1)?.reshape((n, c, oh, ow))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{gradient, random_var, values};

    #[test]
    fn maxima_and_gradients_of_overlapping_windows() -> Result<()> {
        for (kernel, stride) in [((2, 2), (2, 2)), ((3, 2), (2, 1)), ((2, 3), (3, 4)), ((1, 1), (1, 1))] {
            let x = random_var(0, &[2, 3, 7, 9])?;
            let (inputs, y) = (values(&x)?, max_pool2d(&x, kernel, stride)?);
            let (_, _, oh, ow) = y.dims4()?;
            let mut expected = vec![0.; inputs.len()];
            for (o, &y) in values(&y)?.iter().enumerate() {
                let (plane, p, q) = (o / (oh * ow), o / ow % oh, o % ow);
                let window = (0..kernel.0).flat_map(|a| (0..kernel.1).map(move |b| (a, b)));
                let place = |(a, b)| (plane * 7 + p * stride.0 + a) * 9 + q * stride.1 + b;
                let max = window.map(place).max_by(|&i, &j| inputs[i].total_cmp(&inputs[j])).unwrap_or(0);
                assert_eq!(y, inputs[max]);
                expected[max] += (o + 1) as f64;
            }
            assert_eq!(gradient(&x, |x| max_pool2d(x, kernel, stride))?, expected);
            assert_eq!(emulate(|| gradient(&x, |x| max_pool2d(x, kernel, stride)))?, expected);
            assert_eq!(values(&emulate(|| max_pool2d(&x, kernel, stride))?)?, values(&y)?);
            assert_eq!(gradient(&x, |x| max_pool_compose(x, kernel, stride))?, expected);
            assert_eq!(values(&max_pool_compose(&x, kernel, stride)?)?, values(&y)?);
        }
        Ok(())
    }

    #[test]
    fn ties_go_to_the_first_and_nan_wins() -> Result<()> {
        let nan = f32::NAN;
        let rows = [[1f32, 3., 5., 5.], [3., 3., 5., nan]];
        let x = Var::from_tensor(&Tensor::new(&rows, &Device::Cpu)?.reshape((1, 1, 2, 4))?)?;
        let check = || -> Result<()> {
            let y = values(&max_pool2d(&x, (2, 2), (2, 2))?)?;
            assert!(y[0] == 3. && y[1].is_nan());
            assert_eq!(gradient(&x, |x| max_pool2d(x, (2, 2), (2, 2)))?, [0., 1., 0., 0., 0., 0., 0., 2.]);
            for dtype in [DType::F16, DType::BF16, DType::F64] {
                let x = x.to_dtype(dtype)?.transpose(2, 3)?.contiguous()?.transpose(2, 3)?;
                assert_eq!(values(&max_pool2d(&x, (2, 2), (2, 1))?)?[..2], [3., 5.]);
                assert_eq!(max_pool2d(&x.narrow(0, 0, 0)?, (2, 2), (2, 1))?.dims(), [0, 1, 1, 3]);
            }
            Ok(())
        };
        check()?;
        emulate(check)?;
        for (kernel, stride) in [((0, 1), (1, 1)), ((1, 1), (1, 0)), ((3, 1), (1, 1))] {
            assert!(max_pool2d(&x, kernel, stride).is_err());
        }
        assert!(max_pool2d(&x.squeeze(0)?, (1, 1), (1, 1)).is_err());
        Ok(())
    }

    #[test]
    fn candles_own_gradient_is_too_small() -> Result<()> {
        // Why this file exists: for a window of 4 with one maximum, candle's gradient is a quarter of the true one.
        let x = Var::new(&[[[[1f64, 2.], [3., 4.]]]], &Device::Cpu)?;
        assert_eq!(gradient(&x, |x| max_pool2d(x, (2, 2), (2, 2)))?, [0., 0., 0., 1.]);
        assert_eq!(gradient(&x, |x| x.max_pool2d(2))?, [0., 0., 0., 0.25]);
        Ok(())
    }
}
