//! Convolutions on a GPU: matrix products by the BLAS, and kernels for what lies around them (`kernels/conv.cu`).
//!
//! Patches and outputs are laid out as `[feature or channel, sample, position]`, so that each of the three products (values, input
//! gradient, weight gradient) is one matrix product for the whole batch. The patches are many times as large as the images:
//! a large batch is done in parts.

use std::ops::Range;

use candle_core::{DType, Result, Storage, Tensor, bail};

use super::patches::ConvShape;
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

const NAME: &str = "conv2d";
pub(super) const THREADS: u32 = 256;
/// What the patches of a part may take; little in tests, for batches of several parts.
const PART_BYTES: usize = if cfg!(test) { 32 << 10 } else { 256 << 20 };

args! {
    /// `ConvSizes` of `conv.cuh`.
    struct ConvSizes {
        channels: u32,
        features: u32,
        input: [u32; 2],
        output: [u32; 2],
        kernel: [u32; 2],
        stride: [u32; 2],
        padding: [u32; 2],
        dilation: [u32; 2],
    }
}

args! {
    /// The argument of `conv_patches` in `conv.cu`.
    struct PatchArgs { x: u64, patches: u64, columns: u64, each: u64, sizes: ConvSizes }
}

args! {
    /// The argument of `conv_fold` in `conv.cu`.
    struct FoldArgs { patches: u64, x: u64, len: u64, columns: u64, sizes: ConvSizes }
}

args! {
    /// The argument of `conv_swap` in `conv.cu`.
    struct SwapArgs { from: u64, bias: u64, to: u64, len: u64, b: u64, a: u32, t: u32 }
}

args! {
    /// The argument of `conv_bias` and `conv_bias_total` in `conv.cu`.
    struct BiasArgs { gy: u64, at: u64, sums: u64, gb: u64, n: u64, o: u32, t: u32, parts: u32, pad: u32 }
}

/// A size that kernels count in 32 bits.
pub(super) fn small(size: usize) -> Result<u32> {
    match u32::try_from(size) {
        Ok(size) if size < 1 << 31 => Ok(size),
        _ => bail!("{NAME}: a size of {size} found, expected below 2^31 on a GPU"),
    }
}

pub(super) fn pair((y, x): (usize, usize)) -> Result<[u32; 2]> {
    Ok([small(y)?, small(x)?])
}

/// A thread for each of `len` elements.
pub(super) fn one_each(len: usize) -> Result<Grid> {
    Grid::line(len.div_ceil(THREADS as usize), THREADS)
}

impl ConvSizes {
    fn new(shape: &ConvShape) -> Result<Self> {
        let padded = |axis: fn((usize, usize)) -> usize| {
            axis(shape.input) + 2 * axis(shape.padding) + axis(shape.kernel) * axis(shape.dilation)
        };
        small(shape.channels * padded(|p| p.0) * padded(|p| p.1))?;
        small(shape.positions())?;
        Ok(Self {
            channels: small(shape.channels)?,
            features: small(shape.features())?,
            input: pair(shape.input)?,
            output: pair(shape.output)?,
            kernel: pair(shape.kernel)?,
            stride: pair(shape.stride)?,
            padding: pair(shape.padding)?,
            dilation: pair(shape.dilation)?,
        })
    }
}

/// The parts that a batch of `n` is done in.
pub(super) fn parts(shape: &ConvShape, n: usize, dtype: DType) -> impl Iterator<Item = Range<usize>> + use<> {
    let sample = shape.features() * shape.positions() * dtype.size_in_bytes();
    let each = (PART_BYTES / sample.max(1)).max(1);
    (0..n).step_by(each).map(move |first| first..n.min(first + each))
}

/// The patches `[groups, c kh kw / groups, n t]` of `x [n, c, h, w]`, contiguous.
fn patches(gpu: &Gpu, x: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    /// Blocks that fill a GPU several times over.
    const BLOCKS: usize = 2048;
    let columns = x.dim(0)? * shape.positions();
    let out = gpu.tensor((shape.groups, shape.group_features(), columns), x.dtype())?;
    let (of_x, of_out) = (gpu.operand(x, NAME)?, gpu.operand(&out, NAME)?);
    let across = columns.div_ceil(THREADS as usize).max(1);
    let each = shape.features().div_ceil(BLOCKS.div_ceil(across)).max(shape.features().div_ceil(65_535));
    let args = PatchArgs {
        x: of_x.address(),
        patches: of_out.address(),
        columns: columns as u64,
        each: each as u64,
        sizes: ConvSizes::new(shape)?,
    };
    let grid = Grid::new([across, shape.features().div_ceil(each), 1], THREADS)?;
    gpu.launch(Module::Conv, &typed("conv_patches", x.dtype())?, grid, &args)?;
    Ok(out)
}

/// Adds up patch gradients `[groups, c kh kw / groups, n t]` in `x [n, c, h, w]`, of which they are those of samples from `first` on.
fn fold(gpu: &Gpu, patches: &Tensor, x: &Operand, part: &Range<usize>, shape: &ConvShape) -> Result<()> {
    let patches = patches.contiguous()?;
    let of_patches = gpu.operand(&patches, NAME)?;
    let sample = shape.channels * shape.input.0 * shape.input.1;
    let len = part.len() * sample;
    let args = FoldArgs {
        patches: of_patches.address(),
        x: x.address() + (part.start * sample * x.dtype.size_in_bytes()) as u64,
        len: len as u64,
        columns: (part.len() * shape.positions()) as u64,
        sizes: ConvSizes::new(shape)?,
    };
    gpu.launch(Module::Conv, &typed("conv_fold", x.dtype)?, one_each(len)?, &args)
}

/// `[a, b, t]` as `[b, a, t]` from `to` on, a bias `[a]` added on the way.
fn swap(gpu: &Gpu, from: &Operand, bias: Option<&Operand>, to: u64, [a, b, t]: [usize; 3]) -> Result<()> {
    let args = SwapArgs {
        from: from.address(),
        bias: bias.map_or(0, Operand::address),
        to,
        len: from.len as u64,
        b: b as u64,
        a: small(a)?,
        t: small(t)?,
    };
    gpu.launch(Module::Conv, &typed("conv_swap", from.dtype)?, one_each(from.len)?, &args)
}

fn weight_by_group(w: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    w.detach().contiguous()?.reshape((shape.groups, shape.group_outputs(), shape.group_features()))
}

/// The products `[o, n', t]` of each part of the batch, which [`outputs`] makes the convolution's values of.
pub(crate) fn products(gpu: &Gpu, x: &Tensor, w: &Tensor, shape: &ConvShape) -> Result<Vec<Tensor>> {
    let n = shape.input_batch(NAME, x.dims())?;
    shape.check_weight(NAME, w.dims())?;
    let (x, w) = (x.detach().contiguous()?, weight_by_group(w, shape)?);
    let product = |part: Range<usize>| -> Result<Tensor> {
        let patches = patches(gpu, &x.narrow(0, part.start, part.len())?, shape)?;
        w.matmul(&patches)?.reshape((shape.out_channels, part.len(), shape.positions()))
    };
    parts(shape, n, x.dtype()).map(product).collect()
}

/// A bias `[o]` for a batch's outputs.
pub(super) fn check_bias(bias: Option<&Operand>, dtype: DType, shape: &ConvShape) -> Result<()> {
    match bias {
        Some(bias) if bias.len != shape.out_channels || bias.dtype != dtype => bail!(
            "{NAME}: expected a bias [{}] of {dtype:?}, got {} elements of {:?}",
            shape.out_channels,
            bias.len,
            bias.dtype
        ),
        _ => Ok(()),
    }
}

/// The values `[n, o, oh, ow]`, in the products' `dtype`.
pub(crate) fn outputs(
    gpu: &Gpu,
    products: &[Tensor],
    bias: Option<&Operand>,
    shape: &ConvShape,
    n: usize,
    dtype: DType,
) -> Result<Storage> {
    check_bias(bias, dtype, shape)?;
    let sample = shape.out_channels * shape.positions();
    let out = gpu.storage(n * sample, dtype)?;
    let y = gpu.of_storage(&out, n * sample, NAME)?;
    let mut to = y.address();
    for product in products {
        let (o, samples, t) = product.dims3()?;
        swap(gpu, &gpu.operand(product, NAME)?, bias, to, [o, samples, t])?;
        to += (samples * sample * dtype.size_in_bytes()) as u64;
    }
    Ok(out)
}

/// The gradient of a convolution's outputs, or what stands for it.
pub(crate) trait OutputGradient {
    /// That of some samples as `[o, n', t]`, contiguous.
    fn part(&self, gpu: &Gpu, part: &Range<usize>, shape: &ConvShape) -> Result<Tensor>;
}

/// `gy [n, o, oh, ow]` itself.
impl OutputGradient for Tensor {
    fn part(&self, gpu: &Gpu, part: &Range<usize>, shape: &ConvShape) -> Result<Tensor> {
        let gy = self.narrow(0, part.start, part.len())?.contiguous()?;
        let (o, t) = (shape.out_channels, shape.positions());
        let out = gpu.tensor((o, part.len(), t), gy.dtype())?;
        let to = gpu.operand(&out, NAME)?;
        swap(gpu, &gpu.operand(&gy, NAME)?, None, to.address(), [part.len(), o, t])?;
        Ok(out)
    }
}

/// `dL/dx` if the weight is given, and `dL/dw` if the input is.
pub(crate) fn gradients(
    gpu: &Gpu,
    gy: &dyn OutputGradient,
    x: Option<&Tensor>,
    w: Option<&Tensor>,
    (n, dtype): (usize, DType),
    shape: &ConvShape,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (c, (h, width)) = (shape.channels, shape.input);
    let gx = w.map(|_| gpu.tensor((n, c, h, width), dtype)).transpose()?;
    let of_gx = gx.as_ref().map(|gx| gpu.operand(gx, NAME)).transpose()?;
    let x = x.map(|x| x.detach().contiguous()).transpose()?;
    let w = w.map(|w| weight_by_group(w, shape)).transpose()?;
    let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
    let mut gw: Option<Tensor> = None;
    for part in parts(shape, n, dtype) {
        let columns = part.len() * shape.positions();
        let gy = gy.part(gpu, &part, shape)?.reshape((shape.groups, shape.group_outputs(), columns))?;
        if let (Some(w), Some(gx)) = (&w, &of_gx) {
            fold(gpu, &w.transpose(1, 2)?.matmul(&gy)?, gx, &part, shape)?;
        }
        if let Some(x) = &x {
            let patches = patches(gpu, &x.narrow(0, part.start, part.len())?, shape)?;
            let one = gy.matmul(&patches.transpose(1, 2)?)?;
            gw = Some(match gw {
                None => one,
                Some(sum) => (sum.to_dtype(wide)? + one.to_dtype(wide)?)?,
            });
        }
    }
    let gw = match (gw, x) {
        (Some(gw), _) => Some(gw.to_dtype(dtype)?.reshape(&shape.weight_dims())?),
        (None, Some(x)) => Some(Tensor::zeros(&shape.weight_dims(), dtype, x.device())?),
        (None, None) => None,
    };
    Ok((gx, gw))
}

/// `dL/db [o]` from `gy [n, o, ..]`, without the elements whose byte in `at` says that they were cut.
pub(super) fn bias_gradient(gpu: &Gpu, gy: &Tensor, at: Option<&Tensor>) -> Result<Tensor> {
    /// Blocks that fill a GPU.
    const BLOCKS: usize = 512;
    let gy = gy.detach().flatten_from(2)?.contiguous()?;
    let (n, o, t) = gy.dims3()?;
    let wide = if gy.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let parts = BLOCKS.div_ceil(o.max(1)).min(n).max(1);
    let (sums, gb) = (gpu.tensor((parts, o), wide)?, gpu.tensor(o, gy.dtype())?);
    let (of_gy, of_sums, of_gb) =
        (gpu.operand(&gy, NAME)?, gpu.operand(&sums, NAME)?, gpu.operand(&gb, NAME)?);
    let of_at = at.map(|at| gpu.operand(at, NAME)).transpose()?;
    let args = BiasArgs {
        gy: of_gy.address(),
        at: of_at.as_ref().map_or(0, Operand::address),
        sums: of_sums.address(),
        gb: of_gb.address(),
        n: n as u64,
        o: small(o)?,
        t: small(t)?,
        parts: small(parts)?,
        pad: 0,
    };
    if o > 0 {
        let grid = Grid::line(parts * o, THREADS)?;
        gpu.launch(Module::Conv, &typed("conv_bias", gy.dtype())?, grid, &args)?;
        gpu.launch(Module::Conv, &typed("conv_bias_total", gy.dtype())?, one_each(o)?, &args)?;
    }
    Ok(gb)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Module, Var};
    use candle_nn::{Conv1dConfig, Conv2dConfig};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::nn::{Conv1d, Conv2d};
    use crate::ops::conv::{grad_bias, grad_input, grad_weight, tests::CASES};
    use crate::ops::testing::{assert_close, assert_emulated, random, values};
    use crate::tape::{Keep, Tape};

    #[test]
    fn gradients_agree_with_the_cpu() -> Result<()> {
        for (x_dims, o, kernel, stride, padding, dilation, groups) in CASES {
            let w_dims = [o, x_dims[1] / groups, kernel.0, kernel.1];
            let shape = ConvShape::new("test", &x_dims, &w_dims, stride, padding, dilation, groups)?;
            let gy_dims = [x_dims[0], o, shape.output.0, shape.output.1];
            for (dtype, tolerance) in
                [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 5e-2)]
            {
                if dtype != DType::F64 && x_dims[0] * x_dims[2] > 30 {
                    continue;
                }
                let x =
                    random(0, &x_dims)?.to_dtype(dtype)?.transpose(2, 3)?.contiguous()?.transpose(2, 3)?;
                let (w, gy) = (random(1, &w_dims)?.to_dtype(dtype)?, random(2, &gy_dims)?.to_dtype(dtype)?);
                let all = || -> Result<[Tensor; 3]> {
                    Ok([grad_input(&gy, &w, &shape)?, grad_weight(&x, &gy, &shape)?, grad_bias(&gy)?])
                };
                for (found, expected) in emulate(all)?.iter().zip(all()?) {
                    assert_eq!((found.dims(), found.dtype()), (expected.dims(), dtype));
                    assert_close(found, &values(&expected)?, tolerance);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn layers_agree_with_the_cpu() -> Result<()> {
        // Input, weight; stride, padding, dilation, groups. The first is done in parts.
        let cases = [
            ([9, 3, 13, 11], [5, 3, 3, 3], [1, 1, 1, 1]),
            ([2, 4, 9, 9], [6, 2, 3, 2], [2, 2, 2, 2]),
            ([3, 2, 5, 5], [4, 2, 5, 5], [1, 0, 1, 1]),
            ([0, 2, 5, 5], [4, 2, 3, 3], [1, 0, 1, 1]),
        ];
        for (x, w, [stride, padding, dilation, groups]) in cases {
            for (dtype, with_bias) in [(DType::F64, true), (DType::F32, false), (DType::BF16, true)] {
                let make = |stream, dims: &[usize]| Var::from_tensor(&random(stream, dims)?.to_dtype(dtype)?);
                let (x, w, b) = (make(0, &x)?, make(1, &w)?, make(2, &w[..1])?);
                let config = Conv2dConfig { stride, padding, dilation, groups, ..Default::default() };
                let bias = with_bias.then(|| b.as_tensor().clone());
                let tape = Tape::new();
                let layer = tape.build(|| Ok(Conv2d::new(w.as_tensor().clone(), bias, config)))?;
                let run = || -> Result<Vec<Tensor>> {
                    let y = layer.forward(&(x.as_tensor() * 2.)?)?;
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
                let tolerance = match dtype {
                    DType::F64 => 1e-13,
                    DType::F32 => 1e-5,
                    _ => 5e-2,
                };
                assert_emulated(run, tolerance)?;
            }
        }
        Ok(())
    }

    #[test]
    fn one_dimension_and_refusals() -> Result<()> {
        let (x, w, b) = (random(0, &[2, 3, 17])?, random(1, &[4, 3, 5])?, random(2, &[4])?);
        let config = Conv1dConfig { stride: 2, padding: 3, ..Default::default() };
        let layer = Conv1d::new(w, Some(b), config);
        assert_close(&emulate(|| layer.forward(&x))?, &values(&layer.forward(&x)?)?, 1e-13);
        let w = Tensor::ones((4, 3, 1, 1), DType::F64, &Device::Cpu)?;
        let narrow = Conv2d::new(w, Some(random(0, &[2])?), Default::default());
        assert!(emulate(|| narrow.forward(&random(0, &[2, 3, 4, 4])?)).is_err());
        Ok(())
    }
}
