//! `tr F` and `tr F^2` of a Fisher matrix in Kronecker blocks.
use candle_core::{DType, Result, Tensor, bail};

use super::low_rank::low_rank;
use super::sketch::{diagonal_of, is_sketch};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

/// `(tr F^2, tr F)` of the matrix with the blocks `A (x) G` and their groups, factors `[groups, d, d]` of f32 or f64, or each group's in
/// several runs, or what sketches stand for: sums of `tr A^2 tr G^2` and of `tr A tr G` over blocks and groups. The host reads two numbers,
/// and two more of a device if there are runs or sketches.
///
/// # Errors
/// If the factors of a block differ in groups, or those of a device in dtype.
pub(crate) fn traces(blocks: &[(&Tensor, &Tensor, usize)]) -> Result<(f64, f64)> {
    let Some(gpu) = blocks.first().and_then(|(a, ..)| Gpu::of(a.device())) else {
        return composed(blocks.iter().copied());
    };
    let full = |&(a, g, groups): &(&Tensor, &Tensor, usize)| {
        [a, g].iter().all(|m| m.dims().first() == Some(&groups) && !is_sketch(m))
    };
    let in_runs = composed(blocks.iter().copied().filter(|block| !full(block)))?;
    let full: Vec<_> = blocks.iter().filter(|block| full(block)).map(|&(a, g, _)| (a, g)).collect();
    if full.is_empty() {
        return Ok(in_runs);
    }
    match gpu_traces(&gpu, &full)?.to_vec1::<f64>()?[..] {
        [squares, trace] => Ok((squares + in_runs.0, trace + in_runs.1)),
        _ => bail!("traces: expected two numbers"),
    }
}

fn composed<'a>(blocks: impl Iterator<Item = (&'a Tensor, &'a Tensor, usize)>) -> Result<(f64, f64)> {
    let mut sums = Vec::new();
    for (a, g, groups) in blocks {
        let squares = |m: &Tensor| match is_sketch(m) {
            true => low_rank(m, "traces")?.squares(),
            false => m.sqr()?.sum((1, 2))?.reshape((groups, ()))?.sum(1),
        };
        let trace = |m: &Tensor| diagonal_of(m)?.sum(1)?.reshape((groups, ()))?.sum(1);
        sums.push((squares(a)? * squares(g)?)?.sum_all()?.to_dtype(DType::F64)?);
        sums.push((trace(a)? * trace(g)?)?.sum_all()?.to_dtype(DType::F64)?);
    }
    if sums.is_empty() {
        return Ok((0.0, 0.0));
    }
    let sums = Tensor::stack(&sums, 0)?.to_vec1::<f64>()?;
    Ok((sums.iter().step_by(2).sum(), sums.iter().skip(1).step_by(2).sum()))
}

/// Matrices of one launch.
const TABLE: usize = 64;
const THREADS: u32 = 256;

args! {
    struct Entry { m: u64, partial: u64, groups: u32, dim: u32 }
}
args! {
    struct TracesArgs { entries: [Entry; TABLE], count: u32, parts: u32 }
}
args! {
    struct JoinArgs { a: u64, g: u64, out: u64, groups: u32, parts: u32 }
}

/// `[2]` f64 on the device.
fn gpu_traces(gpu: &Gpu, blocks: &[(&Tensor, &Tensor)]) -> Result<Tensor> {
    let dtype = blocks.first().map_or(DType::F32, |(a, _)| a.dtype());
    let contiguous = |t: &Tensor| t.detach().contiguous();
    let factors = [
        blocks.iter().map(|(a, _)| contiguous(a)).collect::<Result<Vec<_>>>()?,
        blocks.iter().map(|(_, g)| contiguous(g)).collect::<Result<Vec<_>>>()?,
    ];
    let (mut largest, mut groups) = (1, 0);
    for (a, g) in factors[0].iter().zip(&factors[1]) {
        let ((count, a_dim, _), (other, g_dim, _)) = (a.dims3()?, g.dims3()?);
        if count != other || a.dtype() != dtype || g.dtype() != dtype {
            bail!(
                "traces: expected factors of {dtype:?} with as many groups, got {:?} {:?} and {:?} {:?}",
                a.dtype(),
                a.dims(),
                g.dtype(),
                g.dims()
            )
        }
        groups += count;
        largest = largest.max(a_dim).max(g_dim);
    }
    let parts = (largest * largest).div_ceil(THREADS as usize * 64).clamp(1, 32);
    let mut sums: Vec<(Tensor, Operand)> = Vec::with_capacity(2);
    for factors in &factors {
        let partial = gpu.tensor((groups, parts, 2), DType::F64)?;
        let target = gpu.operand(&partial, "traces")?;
        let mut first = 0;
        for some in factors.chunks(TABLE) {
            let mut entries = [Entry { m: 0, partial: 0, groups: 0, dim: 0 }; TABLE];
            let (mut held, mut most) = (Vec::with_capacity(some.len()), 1);
            for (entry, m) in entries.iter_mut().zip(some) {
                let (operand, (count, dim, _)) = (gpu.operand(m, "traces")?, m.dims3()?);
                let partial = target.address() + (first * parts * 2 * size_of::<f64>()) as u64;
                *entry = Entry { m: operand.address(), partial, groups: count as u32, dim: dim as u32 };
                held.push(operand);
                most = most.max(count);
                first += count;
            }
            let args = TracesArgs { entries, count: some.len() as u32, parts: parts as u32 };
            let grid = Grid::new([(most * parts).min(1 << 16), some.len(), 1], THREADS)?;
            gpu.launch(Module::Traces, &typed("traces", dtype)?, grid, &args)?;
        }
        sums.push((partial, target));
    }
    let out = gpu.tensor(2, DType::F64)?;
    let target = gpu.operand(&out, "traces")?;
    let args = JoinArgs {
        a: sums[0].1.address(),
        g: sums[1].1.address(),
        out: target.address(),
        groups: groups as u32,
        parts: parts as u32,
    };
    gpu.launch(Module::Traces, "join_traces", Grid::line(1, THREADS)?, &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::linalg::testing::random_symmetric;

    #[test]
    fn agree_with_the_host() -> Result<()> {
        // More than a table holds, with grouped blocks and one of size 1.
        let shapes =
            (0..70).map(|i| (1 + i % 3, 1 + i % 7, 1 + 5 * i % 11)).chain([(1, 150, 3), (2, 40, 90)]);
        for dtype in [DType::F32, DType::F64] {
            let blocks = shapes.clone().enumerate().map(|(i, (groups, a, g))| {
                let factor = |d, seed| random_symmetric(groups, d, seed)?.to_dtype(dtype);
                Ok((factor(a, 2 * i as u64)?, factor(g, 2 * i as u64 + 1)?))
            });
            let blocks = blocks.collect::<Result<Vec<_>>>()?;
            let blocks: Vec<_> = blocks.iter().map(|(a, g)| (a, g, a.dims()[0])).collect();
            let (squares, trace) = traces(&blocks)?;
            let found = emulate(|| traces(&blocks))?;
            let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-4 };
            assert!((found.0 / squares - 1.0).abs() < tolerance, "{found:?} {squares}");
            assert!((found.1 - trace).abs() < tolerance * squares.sqrt(), "{found:?} {trace}");
        }
        Ok(())
    }
}
