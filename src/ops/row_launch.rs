//! How kernels that go through rows are launched (`kernels/rows.cuh`).

use candle_core::{DType, Result};

use crate::gpu::Grid;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: usize = 8;

/// Elements of a row that a warp keeps in registers; longer ones are worth a block.
fn kept(dtype: DType) -> usize {
    if dtype == DType::F64 { 128 } else { 512 }
}

/// A team of threads for each row: the grid, and 1 where the teams are blocks, 0 where they are warps.
pub(super) fn a_team_each(rows: usize, d: usize, dtype: DType) -> Result<(Grid, u32)> {
    let block = d > kept(dtype);
    let blocks = if block { rows } else { rows.div_ceil(WARPS) };
    Ok((Grid::line(blocks, THREADS)?, u32::from(block)))
}

/// Teams that share the rows and keep twice as much of each (`kernels/norm.cu`): the same number on every device, so that sums over the
/// rows do not depend on it.
pub(super) fn a_few_teams(rows: usize, d: usize, dtype: DType) -> Result<(Grid, u32)> {
    /// Two blocks for each multiprocessor of a large GPU.
    const BLOCKS: usize = 256;
    /// Rows of a warp that pay for the sums it leaves.
    const ROWS: usize = 4;
    let block = d > 2 * kept(dtype);
    let blocks = if block { rows } else { rows.div_ceil(WARPS * ROWS) };
    Ok((Grid::line(blocks.min(BLOCKS), THREADS)?, u32::from(block)))
}
