//! A convolution, the maxima of windows of its outputs and, if wanted, a rectifier, as one operation on the CPU (on a GPU:
//! `conv_pool_device.rs`).
//!
//! Of `relu(max_pool(conv(x)))` only the pooled outputs are kept, with a byte for each: which element of its window was
//! the maximum, or that the rectifier cut it. The convolution's own outputs, several times as many, exist only for a few
//! rows at a time. The gradient with respect to them has one number other than zero a window at most, and the sums of the
//! backward pass run over those alone.

use super::{
    conv_pool_forward::pooled_sums,
    conv_pool_grads::{pooled_grad_input, pooled_sample_grads, pooled_weight_grads, unpool},
    element::{Element, Host, contiguous, float_dispatch},
    patches::ConvShape,
    pool::pooled_size,
};
use candle_core::{CpuStorage, Device, Layout, Result, Shape, Tensor, WithDType, bail};

/// The sizes of a convolution whose outputs are pooled by windows of `kernel`, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PooledShape {
    pub conv: ConvShape,
    pub kernel: (usize, usize),
    pub stride: (usize, usize),
    /// Pooled rows and columns.
    pub output: (usize, usize),
}

/// The byte of an output that the rectifier cut; smaller ones count the elements of a window, row by row.
pub(crate) const CUT: u8 = u8::MAX;

impl PooledShape {
    /// Fails on a zero kernel or stride and on windows larger than the convolution's output.
    pub(crate) fn new(conv: ConvShape, kernel: (usize, usize), stride: (usize, usize)) -> Result<Self> {
        let output = pooled_size(conv.output.0, conv.output.1, kernel, stride)?;
        Ok(Self { conv, kernel, stride, output })
    }

    /// Whether this file is the way to compute it: where windows overlap, the outputs that they share would be computed
    /// more than once, and a large window's elements need more than a byte.
    pub(crate) fn fused(&self) -> bool {
        self.kernel.0 <= self.stride.0
            && self.kernel.1 <= self.stride.1
            && self.kernel.0 * self.kernel.1 < usize::from(CUT)
    }

    /// Pooled outputs of a channel.
    pub(crate) fn positions(&self) -> usize {
        self.output.0 * self.output.1
    }

    fn check(&self, what: &str, gy: &Tensor, at: &[u8]) -> Result<usize> {
        let (o, (ph, pw)) = (self.conv.out_channels, self.output);
        match *gy.dims() {
            [n, dims_o, dims_h, dims_w]
                if [dims_o, dims_h, dims_w] == [o, ph, pw] && at.len() == gy.elem_count() =>
            {
                Ok(n)
            }
            ref dims => bail!(
                "{what}: expected the gradient of [n, {o}, {ph}, {pw}] pooled outputs, {} in all, got {dims:?}",
                at.len()
            ),
        }
    }
}

/// The pooled outputs `[n, o, ph, pw]` of `x [n, c, h, w]` and the byte of each, from CPU storages of any layout. Fails
/// where dimensions differ from `shape`, or dtypes from each other.
pub(crate) fn conv_pool_cpu(
    (x, x_layout): (&CpuStorage, &Layout),
    (w, w_layout): (&CpuStorage, &Layout),
    bias: Option<(&CpuStorage, &Layout)>,
    shape: &PooledShape,
    relu: bool,
) -> Result<(CpuStorage, Shape, Vec<u8>)> {
    use candle_core::backend::BackendStorage;
    let conv = &shape.conv;
    let n = conv.input_batch("pooled conv2d", x_layout.dims())?;
    conv.check_weight("pooled conv2d", w_layout.dims())?;
    if let Some((_, layout)) = bias
        && layout.dims() != [conv.out_channels]
    {
        bail!("pooled conv2d: expected a bias [{}], got {:?}", conv.out_channels, layout.dims())
    }
    float_dispatch!("pooled conv2d", x.dtype(), T => {
        let bias = match bias {
            Some((storage, layout)) => Some(contiguous::<T>(storage, layout)?),
            None => None,
        };
        let (x, w) = (contiguous::<T>(x, x_layout)?, contiguous::<T>(w, w_layout)?);
        let (x, w, bias) = (T::widen_slice(&x), T::widen_slice(&w), bias.as_deref().map(T::widen_slice));
        let (y, at) = pooled_sums(&x, &w, bias.as_deref(), shape, relu, n);
        let dims = Shape::from((n, conv.out_channels, shape.output.0, shape.output.1));
        Ok((T::to_cpu_storage_owned(T::narrow_vec(y)), dims, at))
    })
}

/// `dL/dx [n, c, h, w]` from the gradient `gy [n, o, ph, pw]` of the pooled outputs, their bytes `at` and the weight.
pub(crate) fn grad_input(gy: &Tensor, at: &[u8], w: &Tensor, shape: &PooledShape) -> Result<Tensor> {
    let n = shape.check("grad_input", gy, at)?;
    shape.conv.check_weight("grad_input", w.dims())?;
    let dims = (n, shape.conv.channels, shape.conv.input.0, shape.conv.input.1);
    float_dispatch!("grad_input", gy.dtype(), T => {
        let (gy, w) = (Host::of(gy), Host::of(w));
        let (gy, w) = (gy.values::<T>()?, w.values::<T>()?);
        let gx = pooled_grad_input(&T::widen_slice(&gy), at, &T::widen_slice(&w), shape, n);
        Tensor::from_vec(T::narrow_vec(gx), dims, &Device::Cpu)
    })
}

/// The batch size, which inputs and output gradients have to share.
fn same_batch(name: &str, x: &Tensor, gy: &Tensor, at: &[u8], shape: &PooledShape) -> Result<usize> {
    let n = shape.check(name, gy, at)?;
    if shape.conv.input_batch(name, x.dims())? != n {
        bail!("{name}: input {:?} and output gradient {:?} differ in batch size", x.dims(), gy.dims())
    }
    Ok(n)
}

/// `dL/dw [o, c / groups, kh, kw]` and `dL/db [o]`, summed over the batch, from `x [n, c, h, w]` and the gradient
/// `gy [n, o, ph, pw]` of the pooled outputs with their bytes `at`.
pub(crate) fn grad_weight(
    x: &Tensor,
    gy: &Tensor,
    at: &[u8],
    shape: &PooledShape,
) -> Result<(Tensor, Tensor)> {
    let n = same_batch("grad_weight", x, gy, at, shape)?;
    float_dispatch!("grad_weight", gy.dtype(), T => {
        let (x, gy) = (Host::of(x), Host::of(gy));
        let (x, gy) = (x.values::<T>()?, gy.values::<T>()?);
        let (gw, gb) = pooled_weight_grads((&T::widen_slice(&x), &T::widen_slice(&gy), at), shape, n);
        Ok((
            Tensor::from_vec(T::narrow_vec(gw), &shape.conv.weight_dims(), &Device::Cpu)?,
            Tensor::from_vec(T::narrow_vec(gb), shape.conv.out_channels, &Device::Cpu)?,
        ))
    })
}

/// [`grad_weight`] of each sample alone: `[n, o * c / groups * kh * kw]` and `[n, o]`.
pub(crate) fn sample_grads(
    x: &Tensor,
    gy: &Tensor,
    at: &[u8],
    shape: &PooledShape,
) -> Result<(Tensor, Tensor)> {
    let n = same_batch("sample_grads", x, gy, at, shape)?;
    let outputs = shape.conv.out_channels;
    float_dispatch!("sample_grads", gy.dtype(), T => {
        let (x, gy) = (Host::of(x), Host::of(gy));
        let (x, gy) = (x.values::<T>()?, gy.values::<T>()?);
        let (gw, gb) = pooled_sample_grads((&T::widen_slice(&x), &T::widen_slice(&gy), at), shape, n);
        Ok((
            Tensor::from_vec(T::narrow_vec(gw), (n, outputs * shape.conv.group_features()), &Device::Cpu)?,
            Tensor::from_vec(T::narrow_vec(gb), (n, outputs), &Device::Cpu)?,
        ))
    })
}

/// The gradient `[n, o, oh, ow]` of the convolution's own outputs from that of the pooled ones.
pub(crate) fn grad_output(gy: &Tensor, at: &[u8], shape: &PooledShape) -> Result<Tensor> {
    let n = shape.check("grad_output", gy, at)?;
    let (o, (oh, ow)) = (shape.conv.out_channels, shape.conv.output);
    float_dispatch!("grad_output", gy.dtype(), T => {
        let host = Host::of(gy);
        let wide = unpool(&host.values::<T>()?, at, shape, T::default());
        Tensor::from_vec(wide, (n, o, oh, ow), &Device::Cpu)
    })
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::{DType, Module, Var};
    use candle_nn::Conv2dConfig;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::nn::Conv2d;
    use crate::ops::{
        pool::{max_pool2d, relu},
        testing::{assert_close, random, random_var, values},
    };
    use crate::tape::{ExampleGrads, Keep, Layer, Record, Reduce, Tape};

    /// Input `[n, c, h, w]`, weight `[o, c / groups, kh, kw]`, stride, padding, dilation, groups; pool kernel and stride.
    pub(in crate::ops) type Case = ([usize; 4], [usize; 4], [usize; 4], (usize, usize), (usize, usize));

    pub(in crate::ops) const CASES: [Case; 15] = [
        ([3, 1, 28, 28], [5, 1, 5, 5], [1, 0, 1, 1], (2, 2), (2, 2)),
        ([2, 5, 12, 12], [7, 5, 5, 5], [1, 0, 1, 1], (2, 2), (2, 2)),
        ([2, 1, 28, 28], [6, 1, 5, 5], [1, 2, 1, 1], (2, 2), (2, 2)),
        ([2, 3, 11, 13], [9, 3, 3, 2], [1, 1, 1, 1], (2, 3), (2, 3)),
        ([1, 4, 13, 17], [6, 2, 3, 3], [2, 1, 1, 2], (2, 2), (2, 2)),
        ([2, 4, 15, 14], [4, 1, 3, 3], [1, 2, 2, 4], (3, 2), (3, 3)),
        ([2, 2, 16, 19], [3, 2, 2, 3], [3, 1, 2, 1], (2, 2), (2, 2)),
        ([2, 2, 9, 9], [3, 2, 3, 3], [1, 0, 1, 1], (1, 2), (3, 4)),
        ([2, 2, 30, 25], [2, 2, 3, 21], [1, 0, 1, 1], (3, 3), (3, 3)),
        ([2, 3, 7, 7], [17, 3, 1, 1], [1, 0, 1, 1], (1, 1), (1, 1)),
        ([2, 3, 7, 7], [2, 3, 2, 2], [1, 0, 1, 1], (6, 6), (6, 6)),
        ([1, 1, 90, 95], [2, 1, 3, 3], [1, 1, 1, 1], (2, 2), (2, 2)),
        // Not fused: windows that overlap, and one too large.
        ([2, 2, 9, 9], [3, 2, 3, 3], [1, 1, 1, 1], (3, 3), (2, 2)),
        ([1, 1, 20, 20], [2, 1, 3, 3], [1, 1, 1, 1], (16, 16), (16, 16)),
        ([0, 2, 8, 8], [3, 2, 3, 3], [1, 0, 1, 1], (2, 2), (2, 2)),
    ];

    #[test]
    pub(in crate::ops) fn agrees_with_the_three_operations() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups], kernel, step) in CASES {
            for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
                for (with_bias, rectify) in [(true, true), (false, true), (true, false)] {
                    let make =
                        |stream, dims: &[usize]| Var::from_tensor(&random(stream, dims)?.to_dtype(dtype)?);
                    let (x, w, b) = (make(0, &x)?, make(1, &w)?, make(2, &w[..1])?);
                    let config = Conv2dConfig { stride, padding, dilation, groups, ..Default::default() };
                    let bias = with_bias.then(|| b.as_tensor().clone());
                    let tape = Tape::new();
                    let layer = tape.build(|| Ok(Conv2d::new(w.as_tensor().clone(), bias, config)))?;
                    let plain = max_pool2d(&layer.forward(&x)?, kernel, step)?;
                    let plain = if rectify { relu(&plain)? } else { plain };
                    let fused = layer.forward_pooled(&x, kernel, step, rectify)?;
                    assert_close(&fused, &values(&plain)?, tolerance);
                    assert_eq!(fused.dims(), plain.dims());
                    if fused.elem_count() == 0 {
                        assert!(fused.sum_all()?.backward()?.get(&w).is_some());
                        continue;
                    }
                    let cotangent = random(3, fused.dims())?.to_dtype(dtype)?;
                    let grads = |y: &Tensor| y.mul(&cotangent)?.sum_all()?.backward();
                    let (of_fused, of_plain) = (grads(&fused)?, grads(&plain)?);
                    for var in [&x, &w, &b] {
                        assert_eq!(of_fused.get(var).is_some(), of_plain.get(var).is_some());
                        if let (Some(fused), Some(plain)) = (of_fused.get(var), of_plain.get(var)) {
                            assert_close(fused, &values(plain)?, tolerance);
                        }
                    }
                    let kept = |y: &Tensor| tape.reduce(y, &cotangent, Keep::default());
                    let (of_fused, of_plain) = (kept(&fused)?, kept(&plain)?);
                    for ((_, fused), (_, plain)) in of_fused.0.iter().zip(&of_plain.0) {
                        assert_close(&fused.inputs.rows()?, &values(&plain.inputs.rows()?)?, 0.);
                        assert_close(&fused.grads, &values(&plain.grads)?, 0.);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes gradients an example where a layer has them.
    #[derive(Default)]
    struct OfExamples(Vec<ExampleGrads>);

    impl Reduce for OfExamples {
        fn record(&mut self, _: &Layer, _: &Record) -> Result<()> {
            Ok(())
        }

        fn takes_examples(&self, _: &Layer) -> bool {
            true
        }

        fn examples(&mut self, _: &Layer, grads: ExampleGrads) -> Result<()> {
            self.0.push(grads);
            Ok(())
        }
    }

    /// Against the records' sums of products over positions, written out. Windows that overlap and a mask make records.
    #[test]
    fn gradients_an_example() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups], kernel, step) in CASES {
            let (fused, empty) = (kernel.0 <= step.0 && kernel.0 < 16, x[0] == 0);
            let (x, w, b) = (random_var(0, &x)?, random_var(1, &w)?, random_var(2, &w[..1])?);
            let config = Conv2dConfig { stride, padding, dilation, groups, ..Default::default() };
            let tape = Tape::new();
            let bias = Some(b.as_tensor().clone());
            let layer = tape.build(|| Ok(Conv2d::new(w.as_tensor().clone(), bias, config)))?;
            let y = layer.forward_pooled(&x, kernel, step, true)?;
            if empty {
                continue;
            }
            let cotangent = random(3, y.dims())?;
            let found = tape.reduce(&y, &cotangent, OfExamples::default())?.0;
            assert_eq!(found.len(), usize::from(fused));
            let Some(ExampleGrads { weight, bias }) = found.first() else { continue };
            let kept = tape.reduce(&y, &cotangent, Keep::default())?.0;
            let (_, record) = kept.first().expect("a record");
            let (inputs, grads) = (record.inputs.rows()?.contiguous()?, record.grads.contiguous()?);
            let (outs, columns) = (w.dim(0)? / groups, w.elem_count() / w.dim(0)?);
            let of_groups = (0..groups).map(|group| {
                let grads = grads.narrow(2, group * outs, outs)?.transpose(1, 2)?.contiguous()?;
                grads.matmul(&inputs.narrow(2, group * columns, columns)?.contiguous()?)
            });
            let exact = Tensor::cat(&of_groups.collect::<Result<Vec<_>>>()?, 1)?.flatten_from(1)?;
            assert_eq!((weight.dims(), bias.dims()), (exact.dims(), &[x.dim(0)?, w.dim(0)?][..]));
            assert_close(weight, &values(&exact)?, 1e-12);
            assert_close(bias, &values(&grads.sum(1)?)?, 1e-12);
            tape.mask(Some(&Tensor::ones((x.dim(0)?, grads.dim(1)?), DType::U8, &Device::Cpu)?))?;
            assert!(tape.reduce(&y, &cotangent, OfExamples::default())?.0.is_empty());
        }
        Ok(())
    }

    #[test]
    fn ties_and_nan() -> Result<()> {
        // The layer multiplies by 1, so that its outputs are its inputs.
        let w = Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu)?;
        let layer = Conv2d::new(w, None, Default::default());
        let nan = f32::NAN;
        let rows = [[1f32, 3., 5., 5., -1., -2., 0., -0.], [3., 3., 5., nan, -1., -3., -1., 0.]];
        let x = Var::from_tensor(&Tensor::new(&rows, &Device::Cpu)?.reshape((1, 1, 2, 8))?)?;
        let check = || -> Result<()> {
            for (rectify, at) in [(true, vec![1, 11]), (false, vec![1, 4, 6, 11])] {
                let y = layer.forward_pooled(&x, (2, 2), (2, 2), rectify)?;
                let found = values(&y)?;
                assert!(found[0] == 3. && found[1].is_nan());
                assert_eq!(found[2..], [if rectify { 0. } else { -1. }, 0.]);
                let grads = y.sum_all()?.backward()?;
                let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
                let expected: Vec<f64> = (0..16).map(|i| f64::from(u8::from(at.contains(&i)))).collect();
                assert_eq!(grad, expected);
            }
            Ok(())
        };
        check()?;
        emulate(check)
    }

    #[test]
    fn half_types_and_refusals() -> Result<()> {
        let (x, w, b) = (random(0, &[2, 2, 9, 9])?, random(1, &[3, 2, 3, 3])?, random(2, &[3])?);
        let layer = |dtype| -> Result<Conv2d> {
            Ok(Conv2d::new(w.to_dtype(dtype)?, Some(b.to_dtype(dtype)?), Default::default()))
        };
        let exact = values(&layer(DType::F64)?.forward_pooled(&x, (2, 2), (2, 2), true)?)?;
        for (dtype, tolerance) in [(DType::F16, 1e-2), (DType::BF16, 5e-2)] {
            let y = layer(dtype)?.forward_pooled(&x.to_dtype(dtype)?, (2, 2), (2, 2), true)?;
            assert_close(&y, &exact, tolerance);
        }
        let layer = layer(DType::F64)?;
        let refused = |x: &Tensor, kernel, stride| layer.forward_pooled(x, kernel, stride, true).is_err();
        assert!(refused(&x, (0, 1), (1, 1)) && refused(&x, (2, 2), (2, 0)) && refused(&x, (8, 1), (8, 1)));
        assert!(
            refused(&x.to_dtype(DType::F32)?, (2, 2), (2, 2))
                && refused(&random(0, &[2, 3, 9, 9])?, (2, 2), (2, 2))
        );
        let narrow = Conv2d::new(w.clone(), Some(random(0, &[2])?), Default::default());
        assert!(narrow.forward_pooled(&x, (2, 2), (2, 2), true).is_err());
        Ok(())
    }

    #[test]
    fn threads_do_not_change_the_result() -> Result<()> {
        let (x, w) = (random(0, &[70, 2, 12, 12])?.to_dtype(DType::F32)?, random_var(1, &[3, 2, 3, 3])?);
        let layer = Conv2d::new(w.as_tensor().to_dtype(DType::F32)?, None, Default::default());
        let run = |threads: usize| -> Result<Vec<f64>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(candle_core::Error::wrap)?.install(|| {
                let y = layer.forward_pooled(&x, (2, 2), (2, 2), true)?;
                let grads = y.sqr()?.sum_all()?.backward()?;
                grads.get(&w).map_or_else(|| Ok(Vec::new()), values)
            })
        };
        let one = run(1)?;
        assert!(!one.is_empty() && one == run(3)?);
        Ok(())
    }
}
