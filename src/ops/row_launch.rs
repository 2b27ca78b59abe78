//! How kernels that go through rows are launched (`kernels/rows.cuh`).

use candle_core::{DType, Result};

use crate::gpu::Grid;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: usize = 8;

/// Whether a row of `d` elements is worth a block: longer than what a warp keeps in registers.
fn by_block(d: usize, dtype: DType) -> bool {
    d > if dtype == DType::F64 { 128 } else { 512 }
}

/// A team of threads for each row: the grid, and 1 where the teams are blocks, 0 where they are warps.
pub(super) fn a_team_each(rows: usize, d: usize, dtype: DType) -> Result<(Grid, u32)> {
    let block = by_block(d, dtype);
    let blocks = if block { rows } else { rows.div_ceil(WARPS) };
    Ok((Grid::line(blocks, THREADS)?, u32::from(block)))
}

/// Teams that share the rows: the same number on every device, so that sums over the rows do not depend on it.
pub(super) fn a_few_teams(rows: usize, d: usize, dtype: DType) -> Result<(Grid, u32)> {
    /// Two blocks for each multiprocessor of a large GPU.
    const BLOCKS: usize = 256;
    /// Rows of a warp that pay for the sums it leaves.
    const ROWS: usize = 4;
    let block = by_block(d, dtype);
    let blocks = if block { rows } else { rows.div_ceil(WARPS * ROWS) };
    Ok((Grid::line(blocks.min(BLOCKS), THREADS)?, u32::from(block)))
}
