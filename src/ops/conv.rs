//! 2-D convolution and its gradients, with stride, padding, dilation and groups.
//!
//! With `P` the patches of a group (`[features, t]`, see [`patches`](super::patches)) and `W` its weight as
//! `[o / groups, features]`, a sample's output is `y = W P + b`, so for an output gradient `gy`:
//! `dL/dW = sum_n gy P^T`, `dL/dP = W^T gy` (added up where patches overlap) and `dL/db = sum_{n, t} gy`.
//! All sums run over the batch: nothing is divided by its size.

use super::{
    conv_device::{bias_gradient, gradients},
    conv_slices::{conv_slices, grad_input_slices, weight_grads},
    element::{Element, Host, Real, contiguous, float_dispatch, sum},
    patches::{ConvShape, fold_compose, unfold_compose},
    simd::vectorized,
};
use crate::gpu::Gpu;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Convolution of CPU storages of any layout, for the body of a custom op: `x [n, c, h, w]`, `w [o, c / groups, kh, kw]`
/// and `bias [o]` give `[n, o, oh, ow]`.
///
/// # Errors
/// When dimensions differ from `shape`, or dtypes from each other.
pub fn conv_cpu(
    x: &CpuStorage,
    x_layout: &Layout,
    w: &CpuStorage,
    w_layout: &Layout,
    bias: Option<(&CpuStorage, &Layout)>,
    shape: &ConvShape,
) -> Result<(CpuStorage, Shape)> {
    use candle_core::backend::BackendStorage;
    let n = shape.input_batch("conv2d", x_layout.dims())?;
    shape.check_weight("conv2d", w_layout.dims())?;
    if let Some((_, layout)) = bias
        && layout.dims() != [shape.out_channels]
    {
        bail!("conv2d: expected a bias [{}], got {:?}", shape.out_channels, layout.dims())
    }
    float_dispatch!("conv2d", x.dtype(), T => {
        let bias = match bias {
            Some((storage, layout)) => Some(contiguous::<T>(storage, layout)?),
            None => None,
        };
        let (x, w) = (contiguous::<T>(x, x_layout)?, contiguous::<T>(w, w_layout)?);
        let (x, w, bias) = (T::widen_slice(&x), T::widen_slice(&w), bias.as_deref().map(T::widen_slice));
        let features = shape.group_features();
        let y = conv_slices(&x, |o, k| w[o * features + k], bias.as_deref(), shape, n);
        let dims = (n, shape.out_channels, shape.output.0, shape.output.1);
        Ok((candle_core::WithDType::to_cpu_storage_owned(T::narrow_vec(y)), Shape::from(dims)))
    })
}

/// [`conv_cpu`] from candle's own operations: differentiable, on any device.
///
/// # Errors
/// When dimensions differ from `shape`.
pub fn conv_compose(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, shape: &ConvShape) -> Result<Tensor> {
    let n = shape.input_batch("conv2d", x.dims())?;
    shape.check_weight("conv2d", w.dims())?;
    // candle takes one number for both axes; along an axis of one output (or one kernel element) any stride (or
    // dilation) is the same.
    let one = |pair: (usize, usize), along: (usize, usize)| match along {
        (1, _) => Some(pair.1),
        (_, 1) => Some(pair.0),
        _ => (pair.0 == pair.1).then_some(pair.0),
    };
    let y = match (one(shape.stride, shape.output), one(shape.dilation, shape.kernel)) {
        (Some(stride), Some(dilation)) => x
            .pad_with_zeros(2, shape.padding.0, shape.padding.0)?
            .pad_with_zeros(3, shape.padding.1, shape.padding.1)?
            .contiguous()?
            .conv2d(w, 0, stride, dilation, shape.groups)?
            // A stride other than the asked one on an axis of one output may leave more outputs: drop them.
            .narrow(2, 0, shape.output.0)?
            .narrow(3, 0, shape.output.1)?,
        _ => {
            let w = w.reshape((1, shape.groups, shape.group_outputs(), shape.group_features()))?;
            let patches = unfold_compose(x, shape)?.reshape((
                n,
                shape.groups,
                shape.group_features(),
                shape.positions(),
            ))?;
            w.broadcast_matmul(&patches)?.reshape((n, shape.out_channels, shape.output.0, shape.output.1))?
        }
    };
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, shape.out_channels, 1, 1))?),
        None => Ok(y),
    }
}

/// `dL/dx [n, c, h, w]` from `gy = dL/dy [n, o, oh, ow]` and the weight `[o, c / groups, kh, kw]`. Not differentiable.
///
/// # Errors
/// When dimensions differ from `shape`, or dtypes from each other.
pub fn grad_input(gy: &Tensor, w: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let n = shape.output_batch("grad_input", gy.dims())?;
    shape.check_weight("grad_input", w.dims())?;
    let dims = (n, shape.channels, shape.input.0, shape.input.1);
    if let Some(gpu) = Gpu::of(gy.device()) {
        let (gx, _) = gradients(&gpu, &gy.detach(), None, Some(w), (n, gy.dtype()), shape)?;
        return gx.map_or_else(|| Tensor::zeros(dims, gy.dtype(), gy.device()), Ok);
    }
    if !gy.device().is_cpu() {
        return grad_input_compose(gy, w, shape);
    }
    float_dispatch!("grad_input", gy.dtype(), T => {
        let (gy, w) = (Host::of(gy), Host::of(w));
        let (gy, w) = (gy.values::<T>()?, w.values::<T>()?);
        let gx = grad_input_slices(&T::widen_slice(&gy), &T::widen_slice(&w), shape, n);
        Tensor::from_vec(T::narrow_vec(gx), dims, &Device::Cpu)
    })
}

fn grad_input_compose(gy: &Tensor, w: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let w = w.detach().reshape((1, shape.groups, shape.group_outputs(), shape.group_features()))?;
    let gy = gy.detach().reshape(((), shape.groups, shape.group_outputs(), shape.positions()))?;
    fold_compose(&w.transpose(2, 3)?.contiguous()?.broadcast_matmul(&gy)?, shape)
}

/// `dL/dw [o, c / groups, kh, kw]` from the input `x [n, c, h, w]` and `gy = dL/dy [n, o, oh, ow]`, summed over the batch.
/// Not differentiable.
///
/// # Errors
/// When dimensions differ from `shape`, or batch sizes or dtypes from each other.
pub fn grad_weight(x: &Tensor, gy: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let n = shape.output_batch("grad_weight", gy.dims())?;
    if shape.input_batch("grad_weight", x.dims())? != n {
        bail!("grad_weight: input {:?} and output gradient {:?} differ in batch size", x.dims(), gy.dims())
    }
    if let Some(gpu) = Gpu::of(gy.device()) {
        let (_, gw) = gradients(&gpu, &gy.detach(), Some(x), None, (n, gy.dtype()), shape)?;
        return gw.map_or_else(|| Tensor::zeros(&shape.weight_dims(), gy.dtype(), gy.device()), Ok);
    }
    if !gy.device().is_cpu() {
        return grad_weight_compose(x, gy, shape);
    }
    float_dispatch!("grad_weight", gy.dtype(), T => {
        let (x, gy) = (Host::of(x), Host::of(gy));
        let (x, gy) = (x.values::<T>()?, gy.values::<T>()?);
        let gw = weight_grads(shape, n, &T::widen_slice(&x), &T::widen_slice(&gy));
        Tensor::from_vec(T::narrow_vec(gw), &shape.weight_dims(), &Device::Cpu)
    })
}

fn grad_weight_compose(x: &Tensor, gy: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    // One product a group, over batch and positions together.
    let across = |x: &Tensor, rows: usize| {
        x.transpose(0, 1)?.contiguous()?.reshape((shape.groups, rows / shape.groups, ()))
    };
    let gy = gy.detach().reshape(((), shape.out_channels, shape.positions()))?;
    let patches = across(&unfold_compose(&x.detach(), shape)?, shape.features())?;
    across(&gy, shape.out_channels)?.matmul(&patches.transpose(1, 2)?)?.reshape(&shape.weight_dims())
}

/// `dL/db [o]` from `gy = dL/dy [n, o, oh, ow]`: its sum over batch and positions. Not differentiable.
///
/// # Errors
/// When `gy` does not have four dimensions.
pub fn grad_bias(gy: &Tensor) -> Result<Tensor> {
    let (n, o, oh, ow) = gy.dims4()?;
    if let Some(gpu) = Gpu::of(gy.device()) {
        return bias_gradient(&gpu, gy, None);
    }
    if !gy.device().is_cpu() {
        let dtype = gy.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        return gy.detach().to_dtype(wide)?.sum((0, 2, 3))?.to_dtype(dtype);
    }
    float_dispatch!("grad_bias", gy.dtype(), T => {
        let host = Host::of(gy);
        let gy = host.values::<T>()?;
        // Parts are summed in parallel and added in order: the result does not depend on the number of threads.
        let part = n.div_ceil(16).max(1) * o * oh * ow;
        let parts = gy.par_chunks(part.max(1)).map(|part| {
            let mut sums = vec![<T as Element>::Acc::ZERO; o];
            for sample in part.chunks_exact(o * oh * ow) {
                for (total, run) in sums.iter_mut().zip(sample.chunks_exact(oh * ow)) {
                    *total += vectorized(#[inline(always)] || sum(run, |v| v));
                }
            }
            sums
        });
        let mut sums = vec![<T as Element>::Acc::ZERO; o];
        for part in parts.collect::<Vec<_>>() {
            sums.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        }
        Tensor::from_vec(T::narrow_vec(sums), o, &Device::Cpu)
    })
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::CustomOp3;

    use super::*;
    use crate::ops::testing::{assert_close, random, values};

    /// Input `[n, c, h, w]`, output channels, kernel, stride, padding, dilation, groups.
    pub(in crate::ops) type Case =
        ([usize; 4], usize, (usize, usize), (usize, usize), (usize, usize), (usize, usize), usize);

    pub(in crate::ops) const CASES: [Case; 12] = [
        ([3, 1, 28, 28], 5, (5, 5), (1, 1), (0, 0), (1, 1), 1),
        ([2, 5, 12, 11], 7, (5, 3), (1, 1), (0, 0), (1, 1), 1),
        ([2, 3, 7, 9], 17, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        ([2, 4, 9, 8], 6, (3, 2), (2, 3), (1, 2), (1, 1), 2),
        ([1, 6, 10, 7], 6, (3, 3), (1, 1), (2, 1), (2, 1), 6),
        ([2, 4, 11, 11], 8, (3, 3), (2, 2), (1, 1), (2, 3), 4),
        ([2, 20, 6, 6], 40, (3, 3), (1, 1), (1, 1), (1, 1), 2),
        ([2, 3, 5, 5], 4, (1, 1), (1, 1), (2, 2), (1, 1), 1),
        ([2, 3, 5, 5], 2, (1, 1), (2, 2), (0, 0), (1, 1), 1),
        ([2, 3, 1, 17], 4, (1, 4), (1, 2), (0, 3), (1, 2), 1),
        ([1, 2, 40, 70], 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        ([0, 2, 4, 4], 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ];

    struct Conv(ConvShape);

    impl CustomOp3 for Conv {
        fn name(&self) -> &'static str {
            "conv-under-test"
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
            conv_cpu(x, lx, w, lw, Some((b, lb)), &self.0)
        }
    }

    /// Calls `f` with the positions in x, w and y of every product that the definition of a convolution sums.
    fn products(s: &ConvShape, n: usize, mut f: impl FnMut(usize, usize, usize)) {
        let ((h, w), (oh, ow), (kh, kw)) = (s.input, s.output, s.kernel);
        let (cg, og) = (s.channels / s.groups, s.out_channels / s.groups);
        for (i, o, c) in (0..n)
            .flat_map(|i| (0..s.out_channels).map(move |o| (i, o)))
            .flat_map(|(i, o)| (0..cg).map(move |c| (i, o, c)))
        {
            for (p, q) in (0..oh).flat_map(|p| (0..ow).map(move |q| (p, q))) {
                for (a, b) in (0..kh).flat_map(|a| (0..kw).map(move |b| (a, b))) {
                    let row = (p * s.stride.0 + a * s.dilation.0) as isize - s.padding.0 as isize;
                    let col = (q * s.stride.1 + b * s.dilation.1) as isize - s.padding.1 as isize;
                    if (0..h as isize).contains(&row) && (0..w as isize).contains(&col) {
                        let channel = o / og * cg + c;
                        let x = ((i * s.channels + channel) * h + row as usize) * w + col as usize;
                        f(x, ((o * cg + c) * kh + a) * kw + b, ((i * s.out_channels + o) * oh + p) * ow + q);
                    }
                }
            }
        }
    }

    #[test]
    pub(in crate::ops) fn agrees_with_the_definition() -> Result<()> {
        for (x_dims, o, kernel, stride, padding, dilation, groups) in CASES {
            let w_dims = [o, x_dims[1] / groups, kernel.0, kernel.1];
            let shape = ConvShape::new("test", &x_dims, &w_dims, stride, padding, dilation, groups)?;
            let (n, (oh, ow)) = (x_dims[0], shape.output);
            let (x, w, b) = (random(0, &x_dims)?, random(1, &w_dims)?, random(2, &[o])?);
            let gy = random(3, &[n, o, oh, ow])?;
            let (vx, vw, vb, vgy) = (values(&x)?, values(&w)?, values(&b)?, values(&gy)?);
            let mut y: Vec<f64> = (0..vgy.len()).map(|i| vb[i / (oh * ow) % o]).collect();
            let (mut gx, mut gw, mut gb) = (vec![0.; vx.len()], vec![0.; vw.len()], vec![0.; o]);
            products(&shape, n, |ix, iw, iy| {
                y[iy] += vx[ix] * vw[iw];
                gx[ix] += vw[iw] * vgy[iy];
                gw[iw] += vx[ix] * vgy[iy];
            });
            vgy.iter().enumerate().for_each(|(i, g)| gb[i / (oh * ow) % o] += g);

            // The same values in another memory order, and behind an offset.
            let turned = x.permute((3, 1, 0, 2))?.contiguous()?.permute((2, 1, 3, 0))?;
            let back = Tensor::cat(&[&w, &w], 0)?.narrow(0, o, o)?;
            for (x, w) in [(&x, &w), (&turned, &back)] {
                assert_close(&x.apply_op3_no_bwd(w, &b, &Conv(shape))?, &y, 1e-13);
            }
            assert_close(&grad_input(&gy, &w, &shape)?, &gx, 1e-13);
            assert_close(&grad_weight(&x, &gy, &shape)?, &gw, 1e-13);
            assert_close(&grad_bias(&gy)?, &gb, 1e-13);
            if n > 0 {
                assert_close(&conv_compose(&x, &w, Some(&b), &shape)?, &y, 1e-13);
                assert_close(&grad_input_compose(&gy, &w, &shape)?, &gx, 1e-13);
                assert_close(&grad_weight_compose(&x, &gy, &shape)?, &gw, 1e-13);
            }
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 5e-2)] {
                let to = |t: &Tensor| t.to_dtype(dtype);
                assert_close(&to(&x)?.apply_op3_no_bwd(&to(&w)?, &to(&b)?, &Conv(shape))?, &y, tolerance);
                assert_close(&grad_input(&to(&gy)?, &to(&w)?, &shape)?, &gx, tolerance);
                assert_close(&grad_weight(&to(&x)?, &to(&gy)?, &shape)?, &gw, tolerance);
                assert_close(&grad_bias(&to(&gy)?)?, &gb, tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_tensors_are_refused() -> Result<()> {
        let shape = ConvShape::new("test", &[2, 3, 5, 5], &[4, 3, 3, 3], (1, 1), (0, 0), (1, 1), 1)?;
        let (x, w, gy) = (random(0, &[2, 3, 5, 5])?, random(1, &[4, 3, 3, 3])?, random(2, &[2, 4, 3, 3])?);
        let b = random(3, &[4])?;
        assert!(x.apply_op3_no_bwd(&w, &random(3, &[3])?, &Conv(shape)).is_err());
        assert!(x.apply_op3_no_bwd(&w.to_dtype(DType::F32)?, &b, &Conv(shape)).is_err());
        assert!(gy.apply_op3_no_bwd(&w, &b, &Conv(shape)).is_err());
        assert!(grad_input(&x, &w, &shape).is_err() && grad_input(&gy, &gy, &shape).is_err());
        assert!(grad_weight(&x, &x, &shape).is_err() && grad_weight(&gy, &gy, &shape).is_err());
        assert!(grad_weight(&x.narrow(0, 0, 1)?, &gy, &shape).is_err());
        Ok(())
    }
}
