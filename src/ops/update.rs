//! A step's length and the writing of all parameters, on a GPU: a launch each, whatever the number of parameters.

use super::wake::{Place, StepScalars};
use crate::gpu::table::{Part, TABLE, THREADS, item, parts};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};
use candle_core::{DType, Result};

/// Elements of [`StepScalars::flags`] and [`StepScalars::numbers`], and the places of those that the host reads; as in `kernels/step.cuh`.
pub(crate) const FLAGS: usize = 5;
pub(crate) const BLAMED: usize = 1;
pub(crate) const FAILED_AT: usize = 2;
pub(crate) const SKIPPED: usize = 3;
pub(crate) const NUMBERS: usize = 14;
pub(crate) const PREVIOUS: usize = 4;
pub(crate) const DONE: usize = 6;
pub(crate) const AFTER: usize = 8;
pub(crate) const BEFORE: usize = 9;
pub(crate) const LENGTH: usize = 11;
/// Nobody to blame, and the first number that stands for a block and not for a parameter.
pub(crate) const NOBODY: u32 = u32::MAX;
pub(crate) const FIRST_BLOCK: u32 = 1 << 31;

args! {
    /// What the options say of a step's numbers. Absent: below 0.
    pub(crate) struct BeginArgs {
        pub flags: u64,
        pub numbers: u64,
        pub lr: f64,
        /// `1 / lambda`, absent where a divergence decides.
        pub given: f64,
        /// `rho_d`
        pub wake_decay: f64,
        /// Of the weights of averaged parameters, absent without them.
        pub power: f64,
        /// The learning rate of parameters without a block.
        pub rest_lr: f64,
        pub step: u64,
    }
}

/// Puts down what the options say.
pub(crate) fn begin(gpu: &Gpu, args: &BeginArgs) -> Result<()> {
    gpu.launch(Module::Update, "begin", Grid::line(1, 32)?, args)
}

args! {
    /// What decides a step's length. Absent: below 0.
    pub(crate) struct RateArgs {
        pub flags: u64,
        pub numbers: u64,
        /// `<V, w>`, one a block.
        pub products: u64,
        /// The learning rates' scales, one a block.
        pub lr_scales: u64,
        /// `<last step, g>`
        pub slope: u64,
        /// `<last step, its own gradient>`
        pub last_slope: u64,
        pub blocks: u64,
        /// What rates are multiplied by.
        pub scale: f64,
        /// The largest rate where a divergence decides.
        pub longest: f64,
        /// The same at a learning rate of 1, in proportion to it.
        pub longest_by_lr: f64,
        /// How far the length that is kept may lead beyond that.
        pub beyond: f64,
        /// Adam's rate for the rest, times the rate; absent where it has one of its own.
        pub rest_share: f64,
        /// The divergence at length 1, absent where a rate decides.
        pub target: f64,
        pub slope_aim: f64,
        /// Absent where slopes are not measured.
        pub pace: f64,
        pub kl_clip: f64,
        /// 1 if a step that is not finite is left out without more ado.
        pub skips: u64,
    }
}

/// The rate, the clip, and whether the step is taken at all.
pub(crate) fn rate(gpu: &Gpu, args: &RateArgs) -> Result<()> {
    gpu.launch(Module::Update, "rate", Grid::line(1, THREADS)?, args)
}

item! {
    /// One parameter of a block; addresses of what is absent are 0. `kernels/update.cu` says what each is.
    struct UpdateItem {
        direction: u64,
        gradient: u64,
        model: u64,
        velocity: u64,
        step: u64,
        carry: u64,
        /// Absent also where it is the carry.
        mean: u64,
        value: u64,
        /// Absent where `value` is the Var itself.
        var: u64,
        average: u64,
        /// `sum V^2`, where the root mean square is clipped.
        squares: u64,
        len: u64,
        block_len: u64,
        lr_scale: f64,
        decay: f64,
        place: Place,
        first: u32,
        dtype: u32,
    }
}

item! {
    /// A block whose next wake looks back at `model + curved`.
    struct CarryItem { model: u64, curved: u64, carry: u64, mean: u64, len: u64, first: u32, pad: u32 }
}

item! {
    /// One parameter without a block.
    struct AdamItem {
        gradient: u64,
        first_moment: u64,
        second_moment: u64,
        value: u64,
        var: u64,
        average: u64,
        len: u64,
        lr_scale: f64,
        decay: f64,
        steps_before: f64,
        first: u32,
        dtype: u32,
        gradient_dtype: u32,
        pad: u32,
    }
}

args! {
    struct UpdateArgs {
        items: [UpdateItem; TABLE],
        flags: u64,
        numbers: u64,
        slopes: u64,
        momentum: f64,
        rms_clip: f64,
        count: u32,
        pad: u32,
    }
}
args! {
    struct CarryArgs { items: [CarryItem; TABLE], flags: u64, count: u32, pad: u32 }
}
args! {
    struct AdamArgs {
        items: [AdamItem; TABLE],
        flags: u64,
        numbers: u64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        count: u32,
        pad: u32,
    }
}

/// Writes the parameters of all blocks, and what the next step looks back at. With `slopes`, partial sums of `<step, gradient>`.
pub(crate) fn updates(
    gpu: &Gpu,
    dtype: DType,
    items: &[UpdateItem],
    board: &StepScalars,
    slopes: Option<&Operand>,
    (momentum, rms_clip): (f64, f64),
) -> Result<()> {
    for Part { items, count, blocks, before } in parts(items) {
        let args = UpdateArgs {
            items,
            flags: board.flags.address(),
            numbers: board.numbers.address(),
            slopes: slopes.map_or(0, |slopes| slopes.at(before)),
            momentum,
            rms_clip,
            count,
            pad: 0,
        };
        gpu.launch(Module::Update, &typed("update", dtype)?, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(())
}

/// Writes what a quadratic wake looks back at.
pub(crate) fn carries(gpu: &Gpu, dtype: DType, items: &[CarryItem], board: &StepScalars) -> Result<()> {
    for Part { items, count, blocks, .. } in parts(items) {
        let args = CarryArgs { items, flags: board.flags.address(), count, pad: 0 };
        gpu.launch(Module::Update, &typed("carries", dtype)?, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(())
}

/// Adam's options, as in [`candle_nn::ParamsAdamW`]; the rate is [`Begin::rest_lr`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
}

/// A step of Adam on all parameters without a block.
pub(crate) fn adams(
    gpu: &Gpu,
    dtype: DType,
    items: &[AdamItem],
    board: &StepScalars,
    options: AdamOptions,
) -> Result<()> {
    let AdamOptions { beta1, beta2, eps } = options;
    for Part { items, count, blocks, .. } in parts(items) {
        let (flags, numbers) = (board.flags.address(), board.numbers.address());
        let args = AdamArgs { items, flags, numbers, beta1, beta2, eps, count, pad: 0 };
        gpu.launch(Module::Update, &typed("adam", dtype)?, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(())
}
