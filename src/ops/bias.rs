//! The bias of a linear layer on a GPU, and its gradient.

use candle_core::{DType, Result, Tensor, bail};

use super::row_launch::THREADS;
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

const NAME: &str = "linear layer";

args! {
    /// The argument of `bias_add` in `bias.cu`.
    struct AddArgs { y: u64, bias: u64, len: u64, d: u64 }
}

args! {
    /// The argument of `bias_sum` and `bias_total` in `bias.cu`.
    struct SumArgs { gy: u64, sums: u64, gb: u64, rows: u64, d: u64, tiles: u32, parts: u32 }
}

/// Adds `bias [d]` to every row of `y [.., d]`, in place.
pub(crate) fn gpu_add(gpu: &Gpu, y: &Operand, bias: &Operand) -> Result<()> {
    if y.dtype != bias.dtype
        || bias.len == 0
        || !y.len.is_multiple_of(bias.len)
        || bias.len > u32::MAX as usize
    {
        bail!(
            "{NAME}: {} outputs of {:?} found for a bias of {} elements of {:?}",
            y.len,
            y.dtype,
            bias.len,
            bias.dtype
        )
    }
    let args = AddArgs { y: y.address(), bias: bias.address(), len: y.len as u64, d: bias.len as u64 };
    // A thread has 16 bytes.
    let threads = y.len.div_ceil(16 / y.dtype.size_in_bytes());
    let grid = Grid::line(threads.div_ceil(THREADS as usize), THREADS)?;
    gpu.launch(Module::Bias, &typed("bias_add", y.dtype)?, grid, &args)
}

/// The sum of the rows of `gy [rows, d]`: `[d]`.
pub(crate) fn gpu_sum(gpu: &Gpu, gy: &Tensor) -> Result<Tensor> {
    /// Blocks that fill a GPU, and rows that pay for a part of their own.
    const BLOCKS: usize = 512;
    const ROWS: usize = 64;
    let gy = gy.detach().contiguous()?;
    let (rows, d) = gy.dims2()?;
    let wide = if gy.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let tiles = d.div_ceil(32).max(1);
    let parts = BLOCKS.div_ceil(tiles).min(rows.div_ceil(ROWS)).max(1);
    // A single part is the result.
    let sums = if parts > 1 { Some(gpu.tensor((parts, d), wide)?) } else { None };
    let gb = gpu.tensor(d, gy.dtype())?;
    let [of_gy, of_gb] = [gpu.operand(&gy, NAME)?, gpu.operand(&gb, NAME)?];
    let of_sums = sums.as_ref().map(|sums| gpu.operand(sums, NAME)).transpose()?;
    let args = SumArgs {
        gy: of_gy.address(),
        sums: of_sums.as_ref().map_or(0, Operand::address),
        gb: of_gb.address(),
        rows: rows as u64,
        d: d as u64,
        tiles: tiles as u32,
        parts: parts as u32,
    };
    gpu.launch(Module::Bias, &typed("bias_sum", gy.dtype())?, Grid::line(tiles * parts, THREADS)?, &args)?;
    if parts > 1 {
        let grid = Grid::line(d.div_ceil(THREADS as usize), THREADS)?;
        gpu.launch(Module::Bias, &typed("bias_total", gy.dtype())?, grid, &args)?;
    }
    Ok(gb)
}

#[cfg(test)]
mod tests {
    use candle_core::{Module as _, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::nn::Linear;
    use crate::ops::testing::{assert_close, random, values};

    #[test]
    fn linear_layers_agree_with_the_cpu() -> Result<()> {
        for (dtype, tolerance) in
            [(DType::F64, 1e-13), (DType::F32, 2e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)]
        {
            for dims in [[0, 2, 3], [1, 1, 1], [3, 2, 33], [2, 17, 10], [400, 1, 31], [5, 1, 300]] {
                let make = |stream, dims: &[usize]| Var::from_tensor(&random(stream, dims)?.to_dtype(dtype)?);
                let (x, w, b) =
                    (make(0, &[dims[0], dims[1], 4])?, make(1, &[dims[2], 4])?, make(2, &dims[2..])?);
                let layer = Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
                let run = || -> Result<Vec<Tensor>> {
                    let y = layer.forward(&x)?;
                    let grads = y.mul(&random(3, y.dims())?.to_dtype(dtype)?)?.sum_all()?.backward()?;
                    Ok([y]
                        .into_iter()
                        .chain([&x, &w, &b].iter().filter_map(|v| grads.get(v).cloned()))
                        .collect())
                };
                let (found, expected) = (emulate(run)?, run()?);
                assert_eq!((found.len(), expected.len()), (4, 4));
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.dims(), expected.dims());
                    assert_close(found, &values(expected)?, tolerance);
                }
            }
        }
        Ok(())
    }
}
