//! Learning-rate schedules: pure functions of the step, for `set_learning_rate`.

use candle_core::{Result, bail};

/// A learning rate as a function of the step.
///
/// ```
/// use kronwake::optim::Schedule;
/// let schedule = Schedule::cosine(0.1, 100, 10, 0.05)?;
/// assert!((schedule.at(0) - 0.01).abs() < 1e-12); // a tenth of the warm-up
/// assert!((schedule.at(99) - 0.005).abs() < 1e-4); // the floor, 5 % of the peak
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Schedule {
    /// The same rate at every step.
    Constant(f64),
    /// A linear warm-up to `peak`, then half a cosine down to `floor * peak` at the last of `steps` steps.
    Cosine {
        /// The highest rate.
        peak: f64,
        /// Steps in all.
        steps: usize,
        /// Steps of the warm-up: step `k` of it has the rate `peak (k + 1) / warmup`.
        warmup: usize,
        /// The last rate, as a fraction of `peak`.
        floor: f64,
    },
}

impl Schedule {
    /// A checked [`Schedule::Cosine`].
    ///
    /// # Errors
    /// When `warmup` exceeds `steps`, `floor` is outside [0, 1], or `peak` is not a non-negative number.
    pub fn cosine(peak: f64, steps: usize, warmup: usize, floor: f64) -> Result<Self> {
        if !(peak.is_finite() && peak >= 0.0 && (0.0..=1.0).contains(&floor) && warmup <= steps) {
            bail!(
                "schedule: expected peak >= 0, floor in [0, 1] and warmup <= steps, got peak {peak}, floor {floor}, \
                 warmup {warmup}, steps {steps}"
            )
        }
        Ok(Self::Cosine { peak, steps, warmup, floor })
    }

    /// The rate of step `step`, counted from 0; after the last step the rate stays.
    pub fn at(&self, step: usize) -> f64 {
        match *self {
            Schedule::Constant(lr) => lr,
            Schedule::Cosine { peak, warmup, .. } if step < warmup => {
                peak * (step + 1) as f64 / warmup as f64
            }
            Schedule::Cosine { peak, steps, warmup, floor } => {
                let span = steps.saturating_sub(warmup + 1).max(1) as f64;
                let progress = ((step - warmup) as f64 / span).min(1.0);
                peak * (floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
            }
        }
    }
}
