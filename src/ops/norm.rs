//! Layer normalization and its variant by the root mean square, differentiable in all arguments.
//!
//! Over the last dimension, of size `d`: `y = xh w + b` with `xh = (x - mean) r` and `r = 1 / sqrt(variance + eps)`; the
//! root-mean-square variant has no mean: `r = 1 / sqrt(sum x^2 / d + eps)`. With `g = dL/dy w`, a row's gradient is
//! `dL/dx = r (g - sum g / d - xh sum(g xh) / d)`, without its second term in the variant.
//! (Ba, Kiros, Hinton, "Layer normalization", 2016; Zhang, Sennrich, "Root mean square layer normalization", 2019.)

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, dot, float_dispatch, sum};
use super::simd::vectorized;
use crate::gpu::{self, Gpu};

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension, with the biased variance; `weight` and
/// `bias` are `[d]`, in the dtype of `x [.., d]`.
///
/// # Errors
/// When dimensions or dtypes differ.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    Norm { name: "layer_norm", center: true, eps }.apply(x, weight, bias)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension; `weight` is `[d]`, in the dtype of `x [.., d]`.
///
/// # Errors
/// When dimensions or dtypes differ.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Norm { name: "rms_norm", center: false, eps }.apply(x, weight, None)
}

#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) name: &'static str,
    /// Whether the mean is taken off.
    pub(crate) center: bool,
    pub(crate) eps: f64,
}

impl Norm {
    pub(crate) fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self.apply_as(x, weight, bias, self)? {
            Some(y) => Ok(y),
            None => self.compose(x, weight, bias),
        }
    }

    /// [`Norm::apply`] by an operation that does this norm's work and something beside it; `None` on devices that it is not for, once shapes and
    /// dtypes are checked.
    pub(crate) fn apply_as<O: CustomOp2 + CustomOp3 + Send + Sync + 'static>(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        op: O,
    ) -> Result<Option<Tensor>> {
        let name = self.name;
        let Some(&d @ 1..) = x.dims().last() else {
            bail!("{name}: expected an input [.., features], got {:?}", x.dims())
        };
        for (what, parameter) in [("weight", Some(weight)), ("bias", bias)] {
            let Some(parameter) = parameter else { continue };
            if parameter.dims() != [d] || parameter.dtype() != x.dtype() {
                bail!(
                    "{name}: expected a {what} [{d}] of {:?}, got {:?} of {:?}",
                    x.dtype(),
                    parameter.dims(),
                    parameter.dtype()
                )
            }
        }
        let kernels = Gpu::of(x.device()).is_some();
        if !x.device().is_cpu() && !kernels {
            return Ok(None);
        }
        // The kernels read rows alone; the CPU's version reads any layout.
        let laid = |t: &Tensor| if kernels { t.contiguous() } else { Ok(t.clone()) };
        let y = match bias {
            Some(bias) => laid(x)?.apply_op3(&laid(weight)?, &laid(bias)?, op),
            None => laid(x)?.apply_op2(&laid(weight)?, op),
        };
        y.map(Some)
    }

    /// The same from candle's own operations.
    fn compose(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let dtype = x.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let x = x.to_dtype(wide)?;
        let x = if self.center { x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)? } else { x };
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        let y = x.broadcast_div(&scale)?.broadcast_mul(&weight.to_dtype(wide)?)?;
        let y = match bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(wide)?)?,
            None => y,
        };
        y.to_dtype(dtype)
    }

    /// The mean that is taken off a row, and the `r` that it is scaled by.
    #[inline(always)]
    fn moments<T: Element>(&self, row: &[T]) -> (T::Acc, T::Acc) {
        let d = T::Acc::from_f64(row.len() as f64);
        let mean = if self.center { sum(row, |v| v) / d } else { T::Acc::ZERO };
        let variance = sum(row, |v| (v - mean) * (v - mean)) / d;
        (mean, T::Acc::from_f64(1.) / (variance + T::Acc::from_f64(self.eps)).sqrt())
    }

    fn forward<T: Element>(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
        let d = weight.len();
        let mut y = vec![T::narrow(T::Acc::ZERO); x.len()];
        let part = rows_of_part(d) * d;
        y.par_chunks_mut(part).zip(x.par_chunks(part)).for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || self.forward_rows(x, weight, bias, y),
            )
        });
        y
    }

    #[inline(always)]
    fn forward_rows<T: Element>(&self, x: &[T], weight: &[T], bias: Option<&[T]>, y: &mut [T]) {
        let d = weight.len();
        for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            let (mean, r) = self.moments(x);
            let scaled = y.iter_mut().zip(x).zip(weight);
            match bias {
                Some(bias) => {
                    for (((y, x), w), b) in scaled.zip(bias) {
                        *y = T::narrow((x.widen() - mean) * r * w.widen() + b.widen());
                    }
                }
                None => {
                    for ((y, x), w) in scaled {
                        *y = T::narrow((x.widen() - mean) * r * w.widen());
                    }
                }
            }
        }
    }

    /// `dL/dx`, `dL/dweight` and `dL/dbias`.
    fn backward<T: Element>(&self, x: &[T], weight: &[T], gy: &[T]) -> (Vec<T>, Vec<T>, Vec<T>) {
        let d = weight.len();
        let size = T::Acc::from_f64(d as f64);
        let mut gx = vec![T::narrow(T::Acc::ZERO); x.len()];
        // The rows are cut by their number alone, so that the sums do not depend on the number of threads.
        let part = rows_of_part(d).max((x.len() / d).div_ceil(64)) * d;
        let sums: Vec<Vec<T::Acc>> = gx
            .par_chunks_mut(part)
            .zip(x.par_chunks(part).zip(gy.par_chunks(part)))
            .map(|(gx, (x, gy))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let mut sums = vec![T::Acc::ZERO; 2 * d];
                        let (gw, gb) = sums.split_at_mut(d);
                        let (mut xh, mut g) = (vec![T::Acc::ZERO; d], vec![T::Acc::ZERO; d]);
                        for (gx, (x, gy)) in
                            gx.chunks_exact_mut(d).zip(x.chunks_exact(d).zip(gy.chunks_exact(d)))
                        {
                            let (mean, r) = self.moments(x);
                            for i in 0..d {
                                let gy = gy[i].widen();
                                xh[i] = (x[i].widen() - mean) * r;
                                g[i] = gy * weight[i].widen();
                                gw[i] += gy * xh[i];
                                gb[i] += gy;
                            }
                            let shift = if self.center { sum(&g, |v| v) / size } else { T::Acc::ZERO };
                            let slope = dot(&g, &xh) / size;
                            for (gx, (&g, &xh)) in gx.iter_mut().zip(g.iter().zip(&xh)) {
                                *gx = T::narrow(r * (g - shift - xh * slope));
                            }
                        }
                        sums
                    },
                )
            })
            .collect();
        let mut total = vec![T::Acc::ZERO; 2 * d];
        for sums in sums {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        let gb = total.split_off(d);
        (gx, T::narrow_vec(total), T::narrow_vec(gb))
    }

    fn run(
        &self,
        (x, x_layout): (&CpuStorage, &Layout),
        (weight, weight_layout): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        if let Some(gpu) = Gpu::emulated() {
            let bias = bias.map(|(b, layout)| gpu.on_cpu(b, layout, self.name)).transpose()?;
            let (x, weight) =
                (gpu.on_cpu(x, x_layout, self.name)?, gpu.on_cpu(weight, weight_layout, self.name)?);
            let y = self.gpu_forward(&gpu, &x, &weight, bias.as_ref())?;
            return Ok((gpu::into_cpu(y)?, x_layout.shape().clone()));
        }
        float_dispatch!(self.name, x.dtype(), T => {
            let bias = match bias {
                Some((storage, layout)) => Some(contiguous::<T>(storage, layout)?),
                None => None,
            };
            let (x, weight) = (contiguous::<T>(x, x_layout)?, contiguous::<T>(weight, weight_layout)?);
            let y = self.forward(&x, &weight, bias.as_deref());
            Ok((T::to_cpu_storage_owned(y), x_layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn run_cuda(
        &self,
        (x, x_layout): (&CudaStorage, &Layout),
        (weight, weight_layout): (&CudaStorage, &Layout),
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let bias = bias.map(|(b, layout)| gpu.on_cuda(b, layout, self.name)).transpose()?;
        let (x, weight) =
            (gpu.on_cuda(x, x_layout, self.name)?, gpu.on_cuda(weight, weight_layout, self.name)?);
        let y = self.gpu_forward(&gpu, &x, &weight, bias.as_ref())?;
        Ok((gpu::into_cuda(y)?, x_layout.shape().clone()))
    }

    fn gradients(&self, x: &Tensor, weight: &Tensor, gy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        if let Some(gpu) = Gpu::of(x.device()) {
            return self.gpu_gradients(&gpu, x, weight, gy);
        }
        float_dispatch!(self.name, x.dtype(), T => {
            let hosts = [Host::of(x), Host::of(weight), Host::of(gy)];
            let (gx, gw, gb) =
                self.backward(&hosts[0].values::<T>()?, &hosts[1].values::<T>()?, &hosts[2].values::<T>()?);
            Ok([
                Some(Tensor::from_vec(gx, x.shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(gw, weight.shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(gb, weight.shape(), &Device::Cpu)?),
            ])
        })
    }
}

/// Rows that are worth a task of their own.
fn rows_of_part(d: usize) -> usize {
    (4096 / d).max(1)
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), (w, lw), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run_cuda((x, lx), (w, lw), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [gx, gw, _] = self.gradients(x, w, gy)?;
        Ok((gx, gw))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), (w, lw), Some((b, lb)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run_cuda((x, lx), (w, lw), Some((b, lb)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [gx, gw, gb] = self.gradients(x, w, gy)?;
        Ok((gx, gw, gb))
    }
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    #[test]
    pub(in crate::ops) fn values_and_gradients() -> Result<()> {
        for (dims, center) in
            [([5, 7], true), ([5, 7], false), ([3, 40], true), ([300, 33], false), ([1, 1], true)]
        {
            let d = dims[1];
            let args = [random_var(0, &dims)?, random_var(1, &[d])?, random_var(2, &[d])?];
            let norm = Norm { name: "norm", center, eps: 1e-3 };
            let y = norm.apply(&args[0], &args[1], Some(&args[2]))?;
            assert_close(&y, &values(&norm.compose(&args[0], &args[1], Some(&args[2]))?)?, 1e-12);
            let (x, w, b) = (values(&args[0])?, values(&args[1])?, values(&args[2])?);
            let mut expected = Vec::new();
            for row in x.chunks(d) {
                let mean = if center { row.iter().sum::<f64>() / d as f64 } else { 0. };
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
                expected.extend((0..d).map(|i| (row[i] - mean) / (variance + 1e-3).sqrt() * w[i] + b[i]));
            }
            assert_close(&y, &expected, 1e-12);
            if dims[0] < 100 {
                check_gradients(&args, |a| norm.apply(&a[0], &a[1], Some(&a[2])));
                check_gradients(&args[..2], |a| norm.apply(&a[0], &a[1], None));
            } else {
                // Several parts: against candle's derivative of the composition.
                let grad = |f: &dyn Fn() -> Result<Tensor>| -> Result<Vec<Vec<f64>>> {
                    let grads = f()?.sqr()?.sum_all()?.backward()?;
                    args.iter().filter_map(|a| grads.get(a)).map(values).collect()
                };
                let native = grad(&|| norm.apply(&args[0], &args[1], Some(&args[2])))?;
                let composed = grad(&|| norm.compose(&args[0], &args[1], Some(&args[2])))?;
                for (native, composed) in native.iter().zip(&composed) {
                    assert_close(&Tensor::new(&native[..], &Device::Cpu)?, composed, 1e-12);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn other_layouts_and_dtypes() -> Result<()> {
        let (x, w) = (random_var(0, &[6, 4, 5])?, random_var(1, &[6])?);
        let turned = x.transpose(0, 2)?;
        let expected = values(&rms_norm(&turned.contiguous()?, &w, 1e-5)?)?;
        assert_close(&rms_norm(&turned, &w, 1e-5)?, &expected, 1e-13);
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let (x, w) = (Var::from_tensor(&turned.to_dtype(dtype)?)?, w.to_dtype(dtype)?);
            let y = layer_norm(&x, &w, Some(&w), 1e-5)?;
            let wide = |t: &Tensor| t.to_dtype(DType::F64);
            let expected = values(&layer_norm(&wide(&x)?, &wide(&w)?, Some(&wide(&w)?), 1e-5)?)?;
            assert_close(&y, &expected, tolerance);
            assert_eq!(y.sum_all()?.backward()?.get(&x).map(|g| g.dtype()), Some(dtype));
        }
        Ok(())
    }

    #[test]
    fn unfitting_parameters_are_refused() -> Result<()> {
        let x = random_var(0, &[2, 3])?;
        let (fits, long) = (random_var(1, &[3])?, random_var(1, &[4])?);
        assert!(rms_norm(&x, &long, 1e-5).is_err());
        assert!(layer_norm(&x, &fits, Some(&long), 1e-5).is_err());
        assert!(rms_norm(&x, &fits.to_dtype(DType::F32)?, 1e-5).is_err());
        assert!(rms_norm(&x.get(0)?.get(0)?, &fits, 1e-5).is_err());
        assert_eq!(rms_norm(&x.narrow(0, 0, 0)?, &fits, 1e-5)?.dims(), [0, 3]);
        Ok(())
    }
}
