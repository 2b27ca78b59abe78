//! How long a step is: by a learning rate, or by the KL divergence between the models before and after it.

use candle_core::{Result, bail};

/// How long a step is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum StepRule {
    /// `s = -lr V`, `V` the direction.
    #[default]
    LearningRate,
    /// `s = -alpha V`, with the `alpha` for which the predicted KL divergence between the models before and after the step,
    /// `1/2 s^T (F_bar + la) s`, is `target lr^2`; at most the full step `alpha = 1`, where directions are not made orthogonal.
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
    /// The divergence of a step at length 1, where a divergence decides.
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
        if let StepRule::AdaptiveKl(AdaptiveKl { slope, noise, pace, longest, initial: _ }) = self {
            if !(-1.0..=1.0).contains(slope) {
                bail!("{optimizer}: expected the slope to aim at in [-1, 1], got {slope}")
            }
            if !(noise.is_finite() && *noise >= 0.0) {
                bail!("{optimizer}: expected the loss terms of the noise to be 0 or more, got {noise}")
            }
            if !(0.0..=1.0).contains(pace) {
                bail!("{optimizer}: expected a pace in [0, 1], got {pace}")
            }
            if longest.is_nan() || *longest <= 0.0 {
                bail!("{optimizer}: expected a longest step above 0, got {longest}")
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
/// `exp(pace (slope share lr - r))`, `lr` the schedule's fraction, and the averages keep 19 of 20 parts. A `slope` above 0 goes
/// somewhat beyond the greedy length, where averaged parameters ([`Average`](super::Average)) do best. It costs two dot
/// products a step and a copy of it.
///
/// The slope where a step begins is that of its own batch, and so has the batch's noise in it: it is larger than the loss's own, many times
/// where few examples meet many parameters. Of that the rule must not go beyond the greedy length by a share, or steps become too long
/// without end. So the slope is multiplied by an estimate of the signal's `share` of it, for `n` loss terms a step
///
/// ```text
/// share = n / (n + noise)
/// ```
///
/// This is a rule of thumb, not a theorem, found on nets of 5,000 to 900,000 parameters with 32 to 1,024 terms a step.
///
/// Where directions are made orthogonal ([`Orthogonal`](super::Orthogonal)), no step is longer than [`longest`](Self::longest) allows: where
/// hardly any example is wrong any more, slopes are those of a few, and would lead to steps many times too long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveKl {
    /// The divergence of the first step in nats, a mean over loss terms, were there [`AdaptiveKl::TERMS`] of them; 0.02 by default. With `n` loss
    /// terms in the first step it is `initial sqrt(n / TERMS)`: the more a gradient is a mean of, the further it can be trusted. (Of a step of
    /// pure noise the best divergence grows with `n`, of one without noise it does not depend on `n`; the root lies between.) Four times as much or
    /// as little changes what is reached by a few percent.
    pub initial: f64,
    /// The quotient of slopes to aim at were there no noise, in [-1, 1]; 0.6 by default.
    pub slope: f64,
    /// The loss terms of a step at which signal and noise are level, 0 or more; 512 by default. With 0 the share of the signal counts as 1, as
    /// where every step sees all examples.
    pub noise: f64,
    /// How fast the length follows, in [0, 1]; 0.05 by default.
    pub pace: f64,
    /// How far an orthogonal step may change the outputs of a layer, above 0; 0.125 by default, infinity for no bound. It is the root mean square of
    /// the change of one output, for inputs of the mean square 1 whose direction has nothing to do with the step's. With the schedule's
    /// fraction `lr`, the rate is at most
    ///
    /// ```text
    /// lr longest / (0.18 sqrt(n))
    /// ```
    ///
    /// where `n` is the largest number of inputs that a layer has, the bias among them, times the square of its group's `lr_scale`; those of a
    /// table count as one. So wide layers take
    /// shorter steps, as the spectral condition has it (Yang, Simon & Bernstein 2023). While the bound holds, the length by the slopes is kept
    /// at twice the bound at most, so that it is soon back.
    pub longest: f64,
}

impl AdaptiveKl {
    /// The loss terms of a step to which [`initial`](Self::initial) refers.
    pub const TERMS: f64 = 1024.0;
    /// About the share of the loss's own slope in that of a step's batch, of `terms` loss terms.
    pub(crate) fn signal_share(&self, terms: f64) -> f64 {
        if self.noise > 0.0 { terms / (terms + self.noise) } else { 1.0 }
    }

    /// What multiplies the length of a first step of `terms` loss terms.
    pub(crate) fn first_length(terms: f64) -> f64 {
        (terms / Self::TERMS).powf(0.25)
    }
}

impl Default for AdaptiveKl {
    fn default() -> Self {
        Self { initial: 0.02, slope: 0.6, noise: 512.0, pace: 0.05, longest: 0.125 }
    }
}
