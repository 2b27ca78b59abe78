//! The patches under a convolution's kernel on a GPU: what `kernels/patches.cu` is given.

use candle_core::{Result, Tensor, bail};

use super::patches::ConvShape;
use crate::gpu::{Gpu, Grid, Module, args, typed};

args! {
    /// A number below 2^30 that a kernel divides by.
    pub(super) struct Divisor { value: u32, factor: u32, shift: u32 }
}

impl Divisor {
    /// `name` is whose size it is.
    pub fn new(value: usize, name: &str) -> Result<Self> {
        if value == 0 || value >= 1 << 30 {
            bail!("{name}: a size of {value} found, expected 1 to {} on a GPU", (1 << 30) - 1)
        }
        let shift = value.next_power_of_two().trailing_zeros();
        let factor = (1u64 << 32) * ((1 << shift) - value as u64) / value as u64 + 1;
        Ok(Self { value: value as u32, factor: factor as u32, shift })
    }
}

args! {
    /// The argument of the kernels in `patches.cu`.
    struct PatchArgs {
        x: u64,
        out: u64,
        samples: u64,
        planes: u32,
        patches: u32,
        image: [u32; 2],
        stride: [u32; 2],
        padding: [u32; 2],
        dilation: [u32; 2],
        positions: Divisor,
        out_width: Divisor,
        kernel: Divisor,
        kernel_width: Divisor,
    }
}

/// The patches `[n, c * kh * kw, t]` by a kernel.
pub(super) fn gpu_patches(gpu: &Gpu, x: &Tensor, n: usize, shape: &ConvShape) -> Result<Tensor> {
    const THREADS: u32 = 256;
    /// Elements of a thread.
    const EACH: usize = 4;
    let x = x.detach().contiguous()?;
    let out = gpu.tensor((n, shape.features(), shape.positions()), x.dtype())?;
    let [from, target] = [gpu.operand(&x, "patches")?, gpu.operand(&out, "patches")?];
    let size = |size: usize| Ok::<_, candle_core::Error>(Divisor::new(size, "patches")?.value);
    let pair = |(y, x): (usize, usize)| [y as u32, x as u32];
    let patches = shape.features() * shape.positions();
    // An image with its padding, counted in 31 bits as the patches are.
    size((shape.input.0 + 2 * shape.padding.0) * (shape.input.1 + 2 * shape.padding.1))?;
    let args = PatchArgs {
        x: from.address(),
        out: target.address(),
        samples: n as u64,
        planes: size(shape.channels * shape.input.0 * shape.input.1)?,
        patches: size(patches)?,
        image: pair(shape.input),
        stride: pair(shape.stride),
        padding: pair(shape.padding),
        dilation: pair(shape.dilation),
        positions: Divisor::new(shape.positions(), "patches")?,
        out_width: Divisor::new(shape.output.1, "patches")?,
        kernel: Divisor::new(shape.kernel.0 * shape.kernel.1, "patches")?,
        kernel_width: Divisor::new(shape.kernel.1, "patches")?,
    };
    let blocks = [patches.div_ceil(THREADS as usize * EACH), n.min(65_535), 1];
    gpu.launch(Module::Patches, &typed("patches", x.dtype())?, Grid::new(blocks, THREADS)?, &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::patches::patches;

    #[test]
    fn patches_on_a_gpu_are_those_on_the_cpu() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups]) in [
            ([3, 2, 7, 5], [4, 2, 3, 2], [1, 0, 1, 1]),
            ([2, 4, 9, 8], [4, 2, 3, 3], [2, 1, 2, 2]),
            ([1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]),
            ([2, 3, 2, 40], [3, 1, 1, 6], [3, 4, 1, 3]),
            ([0, 1, 3, 3], [1, 1, 2, 2], [1, 0, 1, 1]),
        ] {
            let shape = ConvShape::new("test", &x, &w, (stride, 1), (0, padding), (dilation, 1), groups)?;
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                let x = Tensor::randn(0f32, 1f32, &x, &Device::Cpu)?.to_dtype(dtype)?;
                let all = |x: Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                assert_eq!(
                    all(emulate(|| patches(&x, &shape))?)?,
                    all(patches(&x, &shape)?)?,
                    "{shape:?} {dtype:?}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn divisors_divide() -> Result<()> {
        for value in [1, 2, 3, 5, 7, 64, 641, 65_537, (1 << 30) - 1] {
            let d = Divisor::new(value, "test")?;
            for n in [0, 1, value - 1, value, 2 * value - 1, 3 * value, 99_999, (1 << 31) - 1] {
                let high = (n as u64 * u64::from(d.factor)) >> 32;
                assert_eq!((high + n as u64) >> d.shift, (n / value) as u64, "{n} {value}");
            }
        }
        Ok(())
    }
}
