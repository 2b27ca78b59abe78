//! The penalties of `group.rs` on a GPU.

use super::{Map, Norms, Tiles, value_dtype};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};
use candle_core::{DType, Result, Shape, Storage, Tensor};

/// Threads of a block, as in `group.cu`.
const THREADS: u32 = 256;

args! {
    struct TileArgs { m: u64, n: u64, rows: u64, columns: u64, across: u64, run: u64 }
}

impl From<Tiles> for TileArgs {
    fn from(t: Tiles) -> Self {
        let [m, n, rows, columns, across, run] =
            [t.m, t.n, t.rows, t.columns, t.across(), t.run()].map(|v| v as u64);
        Self { m, n, rows, columns, across, run }
    }
}

args! {
    /// The argument of `group_sums` and `group_column_sums`.
    struct SumArgs { w: u64, partial: u64, tiles: TileArgs, groups: u64, parts: u64, part: u64, threshold: f64, block: u64 }
}

args! {
    struct FinishArgs { partial: u64, sums: u64, tiles: TileArgs, groups: u64, parts: u64, by_column: u64 }
}

args! {
    struct ValueArgs { sums: u64, out: u64, tiles: TileArgs, extra: u64, l1: f64, l2: f64, group: f64, sized: u64 }
}

args! {
    struct FactorArgs { sums: u64, factors: u64, tiles: TileArgs, extra: u64, group: f64, step: f64, sized: u64, prox: u64 }
}

args! {
    struct MapArgs {
        w: u64, out: u64, factors: u64, scale: u64, tiles: TileArgs, threshold: f64, shrink: f64, l1: f64, l2: f64, prox: u64
    }
}

args! {
    struct ScaledArgs {
        w: u64, diagonal: u64, out: u64, tiles: TileArgs, step: f64, threshold: f64, bend: f64, group: f64, sized: u64
    }
}

impl MapArgs {
    /// The proximal step of no penalty.
    fn of(tiles: Tiles) -> Self {
        let (shrink, tiles) = (1., tiles.into());
        Self { w: 0, out: 0, factors: 0, scale: 0, tiles, threshold: 0., shrink, l1: 0., l2: 0., prox: 0 }
    }
}

/// [`super::sums`].
pub(super) fn sums(gpu: &Gpu, w: &Tensor, tiles: Tiles, threshold: f64) -> Result<Tensor> {
    const NAME: &str = "group_sums";
    /// Elements of a block's part of a group, and rows of its part of a column.
    const PART: usize = 16_384;
    const ROWS: usize = 128;
    /// Elements of a group that a block is worth starting for, rather than a warp.
    const BLOCK: usize = 512;
    const WARPS: usize = 8;
    let groups = tiles.count();
    // Narrow and high blocks are summed column by column, so that neighbouring threads read neighbouring weights.
    let by_column = tiles.run() < 32 && tiles.rows >= 32;
    let size = tiles.rows * tiles.columns;
    let parts = if by_column { tiles.rows.div_ceil(ROWS) } else { size.div_ceil(PART) };
    let (partials, blocks) = if by_column {
        let above = tiles.m.div_ceil(tiles.rows);
        (above * parts * tiles.n, above * parts * tiles.n.div_ceil(32))
    } else if size > BLOCK {
        (groups * parts, groups * parts)
    } else {
        (groups * parts, (groups * parts).div_ceil(WARPS))
    };
    let partial = gpu.tensor(Shape::from((partials, 2)), DType::F64)?;
    let sums = gpu.tensor((groups, 2), DType::F64)?;
    let [weights, between, to] = [w, &partial, &sums].map(|t| gpu.operand(t, NAME));
    let (weights, between, to) = (weights?, between?, to?);
    let args = SumArgs {
        w: weights.address(),
        partial: between.address(),
        tiles: tiles.into(),
        groups: groups as u64,
        parts: parts as u64,
        part: if by_column { ROWS } else { PART } as u64,
        threshold,
        block: u64::from(size > BLOCK),
    };
    let kernel = if by_column { "group_column_sums" } else { NAME };
    gpu.launch(Module::Group, &typed(kernel, w.dtype())?, Grid::line(blocks, THREADS)?, &args)?;
    let args = FinishArgs {
        partial: between.address(),
        sums: to.address(),
        tiles: tiles.into(),
        groups: groups as u64,
        parts: parts as u64,
        by_column: u64::from(by_column),
    };
    gpu.launch(Module::Group, "group_finish", Grid::line(groups.div_ceil(WARPS), THREADS)?, &args)?;
    Ok(sums)
}

/// [`Norms::value_of`].
pub(super) fn value(
    norms: &Norms,
    gpu: &Gpu,
    sums: &Tensor,
    tiles: Tiles,
    extra: usize,
    dtype: DType,
) -> Result<Storage> {
    let out = gpu.storage((), value_dtype(dtype))?;
    let to = gpu.of_storage(&out, 1, norms.name)?;
    let sums = gpu.operand(sums, norms.name)?;
    let args = ValueArgs {
        sums: sums.address(),
        out: to.address(),
        tiles: tiles.into(),
        extra: extra as u64,
        l1: norms.l1,
        l2: norms.l2,
        group: norms.group,
        sized: u64::from(norms.sized),
    };
    gpu.launch(Module::Group, &typed("group_value", to.dtype)?, Grid::line(1, THREADS)?, &args)?;
    Ok(out)
}

/// [`Norms::map`].
pub(super) fn map(
    norms: &Norms,
    gpu: &Gpu,
    w: &Tensor,
    tiles: Tiles,
    sums: Option<(&Tensor, usize)>,
    map: Map<'_>,
) -> Result<Tensor> {
    let (scale, step, prox) = match map {
        Map::Gradient(scale) => (scale.map(Tensor::contiguous).transpose()?, 0., 0),
        Map::Prox { step } => (None, step, 1),
    };
    let factors = match sums.filter(|_| norms.group > 0.) {
        Some((sums, extra)) => {
            let factors = gpu.tensor(tiles.count(), DType::F64)?;
            let (from, to) = (gpu.operand(sums, norms.name)?, gpu.operand(&factors, norms.name)?);
            let args = FactorArgs {
                sums: from.address(),
                factors: to.address(),
                tiles: tiles.into(),
                extra: extra as u64,
                group: norms.group,
                step,
                sized: u64::from(norms.sized),
                prox,
            };
            let grid = Grid::line(tiles.count().div_ceil(THREADS as usize), THREADS)?;
            gpu.launch(Module::Group, "group_factors", grid, &args)?;
            Some(factors)
        }
        None => None,
    };
    let scale = scale.as_ref().map(|scale| gpu.operand(scale, norms.name)).transpose()?;
    let args = MapArgs {
        scale: scale.as_ref().map_or(0, Operand::address),
        threshold: step * norms.l1,
        shrink: 1. / (1. + 2. * step * norms.l2),
        l1: norms.l1,
        l2: 2. * norms.l2,
        prox,
        ..MapArgs::of(tiles)
    };
    mapped(gpu, norms.name, w, factors.as_ref(), args)
}

/// [`super::scaled`].
pub(super) fn scaled(
    gpu: &Gpu,
    name: &str,
    w: &Tensor,
    tiles: Tiles,
    threshold: f64,
    factors: &Tensor,
) -> Result<Tensor> {
    mapped(gpu, name, w, Some(factors), MapArgs { threshold, prox: 1, ..MapArgs::of(tiles) })
}

/// Contiguous weights by `group_map`, with factors of their groups or without.
fn mapped(gpu: &Gpu, name: &str, w: &Tensor, factors: Option<&Tensor>, args: MapArgs) -> Result<Tensor> {
    /// Elements of a thread.
    const EACH: usize = 4;
    let out = gpu.tensor(w.shape(), w.dtype())?;
    let [from, to] = [gpu.operand(w, name)?, gpu.operand(&out, name)?];
    let factors = factors.map(|factors| gpu.operand(factors, name)).transpose()?;
    let args = MapArgs {
        w: from.address(),
        out: to.address(),
        factors: factors.as_ref().map_or(0, Operand::address),
        ..args
    };
    let grid = Grid::line(w.elem_count().div_ceil(THREADS as usize * EACH), THREADS)?;
    gpu.launch(Module::Group, &typed("group_map", w.dtype())?, grid, &args)?;
    Ok(out)
}

/// [`Norms::scaled_prox`].
pub(super) fn scaled_prox(
    norms: &Norms,
    gpu: &Gpu,
    tiles: Tiles,
    [w, diagonal]: [&Tensor; 2],
    step: f64,
) -> Result<Tensor> {
    /// Elements of a block where there are no groups.
    const PART: usize = 4096;
    let count = w.elem_count();
    let tiles = if norms.group > 0. { tiles } else { Tiles::new([1, count], [1, PART]) };
    let out = gpu.tensor(w.shape(), DType::F64)?;
    let [from, by, to] = [w, diagonal, &out].map(|t| gpu.operand(t, norms.name));
    let (from, by, to) = (from?, by?, to?);
    let args = ScaledArgs {
        w: from.address(),
        diagonal: by.address(),
        out: to.address(),
        tiles: tiles.into(),
        step,
        threshold: step * norms.l1,
        bend: 2. * step * norms.l2,
        group: norms.group,
        sized: u64::from(norms.sized),
    };
    gpu.launch(Module::Group, "group_scaled_prox", Grid::line(tiles.count(), THREADS)?, &args)?;
    Ok(out)
}
