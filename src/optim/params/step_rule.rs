//! How long a step is: by a learning rate, or by the KL divergence between the models before and after it.

use candle_core::{Result, bail};

/// How long a step is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum StepRule {
    /// `s = -lr V`, `V` the direction.
    #[default]
    LearningRate,
    /// `s = -alpha V`, with the `alpha` for which the predicted KL divergence between the models before and after the step,
    /// `1/2 s^T (F_bar + la) s`, is `target lr^2`; at most the full step `alpha = 1`.
    ///
    /// So `lr` is no rate but a schedule's fraction of the step's length, 1 at most times. Weight decay, where it is a penalty, counts into
    /// the damping `la` with its own curvature. `alpha` is the `1 / lambda` of the theory. The wake takes it as constant from one step to
    /// the next, and a quadratic wake solves with the last step's.
    FixedKl {
        /// The predicted divergence in nats, a mean over loss terms; about 0.0075.
        target: f64,
    },
    /// As `FixedKl`, with a target that follows the slopes along the steps; see [`AdaptiveKl`].
    AdaptiveKl(AdaptiveKl),
}

impl StepRule {
    /// The divergence of the first step, where a divergence decides.
    pub(crate) fn target(&self) -> Option<f64> {
        match *self {
            StepRule::LearningRate => None,
            StepRule::FixedKl { target } => Some(target),
            StepRule::AdaptiveKl(AdaptiveKl { initial, .. }) => Some(initial),
        }
    }

    pub(super) fn check(&self, optimizer: &str) -> Result<()> {
        if let Some(target) = self.target()
            && !(target.is_finite() && target > 0.0)
        {
            bail!("{optimizer}: expected a positive KL target, got {target}")
        }
        if let StepRule::AdaptiveKl(AdaptiveKl { slope, pace, .. }) = self {
            if !(-1.0..=1.0).contains(slope) {
                bail!("{optimizer}: expected the slope to aim at in [-1, 1], got {slope}")
            }
            if !(0.0..=1.0).contains(pace) {
                bail!("{optimizer}: expected a pace in [0, 1], got {pace}")
            }
        }
        Ok(())
    }
}

/// Finds a step's length from the slopes before and after it.
///
/// With `g_k` the gradients and `s_k` the steps, `<s_k, g_k>` is the loss's slope along a step where it begins, and `<s_k, g_{k+1}>`,
/// on the next batch, where it ends. Their quotient
///
/// ```text
/// r = average <s_{k-1}, g_k> / average |<s_{k-1}, g_{k-1}>|
/// ```
///
/// is below 0 while steps end before the lowest point of the line, above 0 when they go beyond it, and 1 when they end as
/// high as they began. On a quadratic loss whose own curvature preconditions, `r = alpha - alpha*` in the mean, where `alpha*` is the
/// rate whose step lowers the loss most: the share of signal in the noisy gradient. After each step the length is multiplied by
/// `exp(pace (slope lr - r))`, `lr` the schedule's fraction, and the averages keep 19 of 20 parts. A `slope` above 0 goes
/// somewhat beyond the greedy length, where averaged parameters ([`Average`](super::Average)) do best. It costs two dot
/// products a step and a copy of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveKl {
    /// The divergence of the first step in nats, a mean over loss terms; 0.02 by default. From random parameters little depends on it: 0.0005
    /// to 0.2 train. A pretrained net of many layers wants less, 0.002. Its layers all change the same few outputs, which blocks do not see,
    /// and the length follows too slowly to call back a first step that was too long.
    pub initial: f64,
    /// The quotient of slopes to aim at, in [-1, 1]; 0.1 by default.
    pub slope: f64,
    /// How fast the length follows, in [0, 1]; 0.05 by default.
    pub pace: f64,
}

impl Default for AdaptiveKl {
    fn default() -> Self {
        Self { initial: 0.02, slope: 0.1, pace: 0.05 }
    }
}
