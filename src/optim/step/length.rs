//! A step's rate `1 / lambda` and its clip: of a learning rate, or of the KL divergence between the models before and after it. On a GPU
//! the kernel `rate` of `kernels/update.cu`.

use super::precondition::Direction;
use super::wake_gradient::WakeGradient;
use super::work_space::DeviceStep;
use crate::ops::dense::dot;
use crate::ops::update::{self, RateArgs};
use crate::ops::wake::StepScalars;
use crate::optim::params::{FallbackRate, NonFinite, Orthogonal, Params, StepRule};
use crate::optim::state::block::Block;
use crate::optim::state::{Core, Slopes};
use candle_core::Result;

/// How long a step is.
pub(crate) struct Length {
    /// `1 / lambda`, which multiplies the directions before any clip.
    pub rate: f64,
    /// What `kl_clip` multiplies them by.
    pub clip: f64,
    /// The rate of Adam for the rest.
    pub rest: f64,
    /// With the slope where the last step ended.
    pub slopes: Slopes,
}

/// The share of the newest slope in the average.
const SLOPE_SHARE: f64 = 0.05;

/// What the length follows from, of the blocks that are here: the squared length of the directions, and the slope where the last step ended.
pub(super) fn sums(
    core: &Core,
    wakes: &[Option<WakeGradient>],
    directions: &[Option<Direction>],
) -> Result<Vec<f64>> {
    let pairs = core.blocks.iter().zip(directions).filter_map(|(b, d)| Some((b, d.as_ref()?)));
    let squared: f64 = pairs.map(|(block, found)| block.lr_scale.powi(2) * found.length).sum();
    let mut after = 0.0;
    if core.measures_slopes() {
        for (block, wake) in core.blocks.iter().zip(wakes) {
            if let (Some(step), Some(wake)) = (&block.state.step, wake) {
                after += dot(step, &wake.gradient)?;
            }
        }
    }
    Ok(vec![squared, after])
}

/// From the [`sums`] of all blocks.
pub(super) fn host(core: &Core, sums: &[f64]) -> Length {
    let of = |index: usize| sums.get(index).copied().unwrap_or(0.0);
    let (squared, mut slopes) = (of(0), slopes_after(core, of(1)));
    let rate = rate(core, squared, slopes.length);
    slopes.length = slopes.length.min(longest_length(core, squared));
    let kl = rate.powi(2) * squared;
    let clip = match core.params.kl_clip {
        Some(limit) if kl > limit => (limit / kl).sqrt(),
        _ => 1.0,
    };
    Length { rate, clip, rest: rest_rate(core, rate, squared), slopes }
}

/// `1 / lambda` of a step whose directions, not yet scaled, have the squared length `squared`.
fn rate(core: &Core, squared: f64, length: f64) -> f64 {
    let (lr, scale) = (core.params.lr, core.params.wake.rate_scale());
    match core.params.step_rule.target() {
        None => lr * scale,
        Some(target) => {
            let Longest { rate, by_lr } = longest(core);
            rate.min(by_lr * lr).min(lr * length * (2.0 * target / squared.max(0.0)).sqrt())
        }
    }
}

/// The largest rates where a divergence decides.
struct Longest {
    /// Whatever the learning rate is: that of the full step. An orthogonal direction is no step that could be full, and only has to be finite where
    /// there is no curvature at all.
    rate: f64,
    /// At a learning rate of 1, and in proportion to it: [`AdaptiveKl::longest`](crate::optim::AdaptiveKl::longest).
    by_lr: f64,
}

fn longest(core: &Core) -> Longest {
    let Params { orthogonal, step_rule, wake, .. } = &core.params;
    let rate = if orthogonal.is_some() { 1.0 / Orthogonal::RMS } else { wake.rate_scale() };
    let by_lr = match (orthogonal, step_rule) {
        (Some(_), StepRule::AdaptiveKl(rule)) => {
            // The squared change at a rate of 1, in units of that of one input. Without blocks there is no bound.
            let change = |block: &Block| block.lr_scale.powi(2) * block.inputs() as f64;
            let most = core.blocks.iter().map(change).fold(0.0, f64::max);
            rule.longest / (Orthogonal::RMS * most.sqrt())
        }
        (Some(_), StepRule::LearningRate | StepRule::FixedKl { .. }) | (None, _) => f64::INFINITY,
    };
    Longest { rate, by_lr }
}

/// How far the length by the slopes may go beyond the longest step.
const BEYOND: f64 = 2.0;

/// The greatest length that is kept after a step whose directions have the squared length `squared`.
fn longest_length(core: &Core, squared: f64) -> f64 {
    match core.params.step_rule.target() {
        Some(target) if squared > 0.0 => BEYOND * longest(core).by_lr / (2.0 * target / squared).sqrt(),
        _ => f64::INFINITY,
    }
}

/// The rate of Adam for the parameters without a block.
fn rest_rate(core: &Core, rate: f64, squared: f64) -> f64 {
    match core.params.fallback_rate {
        FallbackRate::OfStep(share) if squared > 0.0 => share * rate,
        FallbackRate::OfStep(_) | FallbackRate::Own => core.fallback_adam().lr,
    }
}

/// The slopes once that is known where the last step ended, with the length that follows.
fn slopes_after(core: &Core, after: f64) -> Slopes {
    let last = core.slopes;
    let rule = match core.params.step_rule {
        StepRule::AdaptiveKl(rule) => rule,
        StepRule::LearningRate | StepRule::FixedKl { .. } => return last,
    };
    let average = |old: f64, new: f64| old + SLOPE_SHARE * (new - old);
    let (after, before) = (average(last.after, after), average(last.before, last.last));
    let quotient = after / before;
    // Without a step, or where it did not change the loss at all, there is nothing to learn.
    let length = if before > 0.0 && quotient.is_finite() {
        last.length * (rule.pace * (core.slope_aim(rule) * core.params.lr - quotient.clamp(-1.0, 1.0))).exp()
    } else {
        last.length
    };
    Slopes { after, before, length, ..last }
}

/// The same from the totals of `device`, and whether the step is taken.
pub(super) fn device(core: &Core, device: &DeviceStep, board: &StepScalars) -> Result<()> {
    let totals = device.gpu.operand(&device.totals, "totals")?;
    let lr_scales = device.gpu.operand(&device.lr_scales, "lr_scales")?;
    let blocks = core.blocks.len();
    let (slope_aim, pace) = match core.params.step_rule {
        StepRule::AdaptiveKl(rule) => (core.slope_aim(rule), rule.pace),
        StepRule::LearningRate | StepRule::FixedKl { .. } => (0.0, -1.0),
    };
    let args = RateArgs {
        flags: board.flags.address(),
        numbers: board.numbers.address(),
        products: totals.address(),
        lr_scales: lr_scales.address(),
        slope: totals.at(2 * blocks),
        last_slope: totals.at(2 * blocks + 1),
        blocks: blocks as u64,
        scale: core.params.wake.rate_scale(),
        longest: longest(core).rate,
        longest_by_lr: longest(core).by_lr,
        beyond: BEYOND,
        rest_share: match core.params.fallback_rate {
            FallbackRate::OfStep(share) => share,
            FallbackRate::Own => -1.0,
        },
        target: core.params.step_rule.target().unwrap_or(-1.0),
        slope_aim,
        pace,
        kl_clip: core.params.kl_clip.unwrap_or(-1.0),
        skips: (core.params.non_finite == NonFinite::Skip).into(),
    };
    update::rate(&device.gpu, &args)
}
