//! The wake gradients of all parameters in one launch, on a GPU.

use crate::gpu::table::{Part, TABLE, THREADS, item, parts};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};
use candle_core::{DType, Result};

/// A parameter's place in its block's matrix of `columns` columns: it fills `width` of them, from `offset` on.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Place {
    pub width: u32,
    pub columns: u32,
    pub offset: u32,
    pub pad: u32,
}

item! {
    /// One parameter; addresses of what is absent are 0. `kernels/wake.cu` says what each is.
    struct WakeItem {
        gradient: u64,
        /// Where there is decay.
        value: u64,
        mean: u64,
        carry: u64,
        last: u64,
        gradient_out: u64,
        model: u64,
        /// Absent for parameters without a block, whose gradients are only checked.
        out: u64,
        len: u64,
        decay: f64,
        place: Place,
        first: u32,
        dtype: u32,
        index: u32,
        pad: u32,
    }
}

args! {
    struct WakeArgs {
        items: [WakeItem; TABLE],
        flags: u64,
        numbers: u64,
        slopes: u64,
        model_decay: f64,
        after_wake: f64,
        count: u32,
        in_loss: u32,
    }
}

/// What the kernels of a step share.
#[derive(Debug, Clone)]
pub(crate) struct StepScalars {
    pub flags: Operand,
    pub numbers: Operand,
}

/// How the decay enters the wake gradients.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wakes {
    /// `rho_m`
    pub model_decay: f64,
    /// What `wd theta` is multiplied by where it enters after the wake.
    pub after_wake: f64,
    /// Whether it enters the loss's gradient instead.
    pub in_loss: bool,
}

/// Launches `wake.cu` for all parameters, whose state has the dtype `dtype`. `slopes` takes a partial sum for every block of
/// threads.
pub(crate) fn wakes(
    gpu: &Gpu,
    dtype: DType,
    items: &[WakeItem],
    board: &StepScalars,
    slopes: &Operand,
    how: Wakes,
) -> Result<()> {
    for Part { items, count, blocks, before } in parts(items) {
        let args = WakeArgs {
            items,
            flags: board.flags.address(),
            numbers: board.numbers.address(),
            slopes: slopes.at(before),
            model_decay: how.model_decay,
            after_wake: how.after_wake,
            count,
            in_loss: how.in_loss.into(),
        };
        gpu.launch(Module::Wake, &typed("wake", dtype)?, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(())
}
