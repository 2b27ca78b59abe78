//! A convolution whose outputs are pooled, on a GPU (`kernels/conv_pool.cu`): one kernel after the product forward, one before the products
//! backward. The layer's own outputs exist as the product alone, and only until they are pooled.

use std::ops::Range;

use candle_core::{DType, Result, Storage, Tensor, bail};

use super::conv_device::{OutputGradient, bias_gradient, check_bias, one_each, pair, small};
use super::conv_pool::PooledShape;
use super::patches::ConvShape;
use crate::gpu::{Gpu, Module, Operand, args, typed};

const NAME: &str = "pooled conv2d";

args! {
    /// The sizes of `PooledArgs` and `UnpoolArgs`.
    struct PooledSizes {
        n: u32,
        o: u32,
        output: [u32; 2],
        pooled: [u32; 2],
        kernel: [u32; 2],
        stride: [u32; 2],
    }
}

args! {
    /// The argument of `conv_pooled` in `conv_pool.cu`.
    struct PooledArgs { product: u64, bias: u64, y: u64, at: u64, len: u64, sizes: PooledSizes, relu: u64 }
}

args! {
    /// The argument of `conv_unpool` in `conv_pool.cu`.
    struct UnpoolArgs { gy: u64, at: u64, wide: u64, len: u64, sizes: PooledSizes }
}

impl PooledSizes {
    fn new(shape: &PooledShape, n: usize) -> Result<Self> {
        Ok(Self {
            n: small(n)?,
            o: small(shape.conv.out_channels)?,
            output: pair(shape.conv.output)?,
            pooled: pair(shape.output)?,
            kernel: pair(shape.kernel)?,
            stride: pair(shape.stride)?,
        })
    }
}

/// The pooled outputs `[n, o, ph, pw]`, in the products' `dtype`, and the byte of each, from
/// [`products`](super::conv_device::products).
pub(crate) fn pooled_outputs(
    gpu: &Gpu,
    products: &[Tensor],
    bias: Option<&Operand>,
    shape: &PooledShape,
    relu: bool,
    n: usize,
    dtype: DType,
) -> Result<(Storage, Tensor)> {
    check_bias(bias, dtype, &shape.conv)?;
    let (o, (ph, pw)) = (shape.conv.out_channels, shape.output);
    let sample = o * ph * pw;
    let out = gpu.storage(n * sample, dtype)?;
    let at = gpu.tensor((n, o, ph, pw), DType::U8)?;
    let (y, of_at) = (gpu.of_storage(&out, n * sample, NAME)?, gpu.operand(&at, NAME)?);
    let mut first = 0;
    for product in products {
        let samples = product.dim(1)?;
        let of_product = gpu.operand(product, NAME)?;
        let args = PooledArgs {
            product: of_product.address(),
            bias: bias.map_or(0, Operand::address),
            y: y.address() + (first * sample * dtype.size_in_bytes()) as u64,
            at: of_at.address() + (first * sample) as u64,
            len: (samples * sample) as u64,
            sizes: PooledSizes::new(shape, samples)?,
            relu: relu.into(),
        };
        let grid = one_each(samples * sample)?;
        gpu.launch(Module::ConvPool, &typed("conv_pooled", dtype)?, grid, &args)?;
        first += samples;
    }
    Ok((out, at))
}

/// The gradient `gy [n, o, ph, pw]` of pooled outputs with their bytes `at`.
pub(crate) struct Unpooled<'a> {
    gy: Tensor,
    at: &'a Tensor,
    shape: &'a PooledShape,
}

impl<'a> Unpooled<'a> {
    pub(crate) fn new(gy: &Tensor, at: &'a Tensor, shape: &'a PooledShape) -> Result<Self> {
        if gy.dims() != at.dims() {
            bail!("{NAME}: expected the gradient of {:?} pooled outputs, got {:?}", at.dims(), gy.dims())
        }
        Ok(Self { gy: gy.detach().contiguous()?, at, shape })
    }

    /// That of the convolution's own outputs, a view `[n, t, o]`.
    pub(crate) fn record(&self, gpu: &Gpu) -> Result<Tensor> {
        self.part(gpu, &(0..self.gy.dim(0)?), &self.shape.conv)?.permute((1, 2, 0))
    }

    /// `dL/db [o]`.
    pub(crate) fn bias(&self, gpu: &Gpu) -> Result<Tensor> {
        bias_gradient(gpu, &self.gy, Some(self.at))
    }
}

impl OutputGradient for Unpooled<'_> {
    fn part(&self, gpu: &Gpu, part: &Range<usize>, shape: &ConvShape) -> Result<Tensor> {
        let [gy, at] = [&self.gy, self.at].map(|t| t.narrow(0, part.start, part.len()));
        let (gy, at) = (gy?, at?);
        let wide = gpu.tensor((shape.out_channels, part.len(), shape.positions()), gy.dtype())?;
        let (of_gy, of_at, of_wide) =
            (gpu.operand(&gy, NAME)?, gpu.operand(&at, NAME)?, gpu.operand(&wide, NAME)?);
        let args = UnpoolArgs {
            gy: of_gy.address(),
            at: of_at.address(),
            wide: of_wide.address(),
            len: of_wide.len as u64,
            sizes: PooledSizes::new(self.shape, part.len())?,
        };
        gpu.launch(Module::ConvPool, &typed("conv_unpool", gy.dtype())?, one_each(of_wide.len)?, &args)?;
        Ok(wide)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use candle_nn::Conv2dConfig;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::nn::Conv2d;
    use crate::ops::conv_pool::tests::CASES;
    use crate::ops::testing::{assert_close, assert_emulated, random, values};
    use crate::tape::{Keep, Tape};

    #[test]
    fn agrees_with_the_cpu() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups], kernel, step) in CASES {
            for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
                for (with_bias, rectify) in [(true, true), (false, true), (true, false)] {
                    if dtype == DType::F32 && x[2] > 16 {
                        continue;
                    }
                    let make =
                        |stream, dims: &[usize]| Var::from_tensor(&random(stream, dims)?.to_dtype(dtype)?);
                    let (x, w, b) = (make(0, &x)?, make(1, &w)?, make(2, &w[..1])?);
                    let config = Conv2dConfig { stride, padding, dilation, groups, ..Default::default() };
                    let bias = with_bias.then(|| b.as_tensor().clone());
                    let tape = Tape::new();
                    let layer = tape.build(|| Ok(Conv2d::new(w.as_tensor().clone(), bias, config)))?;
                    let run = || -> Result<Vec<Tensor>> {
                        let y = layer.forward_pooled(&x, kernel, step, rectify)?;
                        let c = random(3, y.dims())?.to_dtype(dtype)?;
                        let grads = y.mul(&c)?.sum_all()?.backward()?;
                        let of_vars = [&x, &w, &b].into_iter().filter_map(|var| grads.get(var).cloned());
                        let mut all: Vec<Tensor> = [y.clone()].into_iter().chain(of_vars).collect();
                        if y.elem_count() > 0 {
                            let kept = tape.reduce(&y, &c, Keep::default())?;
                            all.extend(kept.0.into_iter().map(|(_, record)| record.grads));
                        }
                        Ok(all)
                    };
                    assert_emulated(run, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn half_types() -> Result<()> {
        let (x, w, b) = (random(0, &[2, 2, 9, 9])?, random(1, &[3, 2, 3, 3])?, random(2, &[3])?);
        for (dtype, tolerance) in [(DType::F16, 1e-2), (DType::BF16, 5e-2)] {
            let layer = Conv2d::new(w.to_dtype(dtype)?, Some(b.to_dtype(dtype)?), Default::default());
            let x = x.to_dtype(dtype)?;
            let run = || layer.forward_pooled(&x, (2, 2), (2, 2), true);
            assert_close(&emulate(run)?, &values(&run()?)?, tolerance);
        }
        Ok(())
    }
}
