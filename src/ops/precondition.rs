//! The scaling in the eigenbasis and inner products of all blocks in one launch, on a GPU.

use crate::gpu::table::{Part, TABLE, THREADS, item, parts};
use crate::gpu::{Gpu, Grid, Module, args, typed};
use candle_core::{DType, Result};

item! {
    /// `inside`, which becomes `scale inside`, of one block.
    struct ScaleItem { inside: u64, scale: u64, len: u64, first: u32, pad: u32 }
}

item! {
    /// Two tensors whose inner product is wanted.
    struct DotItem { a: u64, b: u64, len: u64, first: u32, pad: u32 }
}

/// Partial sums and where their total goes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct TotalItem {
    pub parts: u64,
    pub total: u64,
    pub len: u64,
}

args! {
    struct ScaleArgs { items: [ScaleItem; TABLE], products: u64, count: u32, pad: u32 }
}
args! {
    struct DotArgs { items: [DotItem; TABLE], products: u64, count: u32, pad: u32 }
}
args! {
    struct TotalArgs { items: [TotalItem; TABLE] }
}

/// Multiplies `inside` by `scale` in every block, with partial sums of `sum scale inside^2`, in f64 from the
/// address `products` on.
pub(crate) fn scales(gpu: &Gpu, dtype: DType, items: &[ScaleItem], products: u64) -> Result<()> {
    for Part { items, count, blocks, before } in parts(items) {
        let args =
            ScaleArgs { items, products: products + (before * size_of::<f64>()) as u64, count, pad: 0 };
        gpu.launch(
            Module::Precondition,
            &typed("precondition", dtype)?,
            Grid::line(blocks, THREADS)?,
            &args,
        )?;
    }
    Ok(())
}

/// Partial sums of the inner products of pairs of tensors, in f64 from the address `products` on.
pub(crate) fn dots(gpu: &Gpu, dtype: DType, items: &[DotItem], products: u64) -> Result<()> {
    for Part { items, count, blocks, before } in parts(items) {
        let args = DotArgs { items, products: products + (before * size_of::<f64>()) as u64, count, pad: 0 };
        gpu.launch(Module::Precondition, &typed("dots", dtype)?, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(())
}

/// Adds up partial sums.
pub(crate) fn totals(gpu: &Gpu, items: &[TotalItem]) -> Result<()> {
    for rows in items.chunks(TABLE) {
        let mut table = [rows[0]; TABLE];
        table[..rows.len()].copy_from_slice(rows);
        gpu.launch(
            Module::Precondition,
            "totals",
            Grid::line(rows.len(), THREADS)?,
            &TotalArgs { items: table },
        )?;
    }
    Ok(())
}
