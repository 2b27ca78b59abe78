//! What evidences decide: between models, and when to stop.

use candle_core::{Result, bail};

/// The posterior probabilities of models with these log evidences on the same examples, all as likely before:
/// `exp(e_i) / sum_j exp(e_j)`.
///
/// ```
/// let p = kronwake::evidence::model_probabilities(&[-1003.0, -1000.0]).unwrap();
/// assert!((p[1] - 1.0 / (1.0 + (-3f64).exp())).abs() < 1e-15);
/// ```
///
/// # Errors
/// When there are none, or one is not finite.
pub fn model_probabilities(log_evidences: &[f64]) -> Result<Vec<f64>> {
    if log_evidences.is_empty() || log_evidences.iter().any(|e| !e.is_finite()) {
        bail!("evidence: log evidences {log_evidences:?}, expected one or more finite numbers")
    }
    let best = log_evidences.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let weights: Vec<f64> = log_evidences.iter().map(|e| (e - best).exp()).collect();
    let sum: f64 = weights.iter().sum();
    Ok(weights.into_iter().map(|w| w / sum).collect())
}

/// What to do after an evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// The best so far: keep these parameters.
    Keep,
    /// Not the best, and too early to stop.
    GoOn,
    /// `patience` evidences in a row were not the best: stop, and go back to the parameters kept last.
    Stop,
}

/// Stops a training run when its evidence no longer grows, without a validation set.
///
/// A stochastic estimate is noisy: use the same seed every time, so that the same examples are compared.
///
/// ```
/// use kronwake::evidence::{Advice, EarlyStopping};
///
/// let mut stopping = EarlyStopping::new(2);
/// let advice: Vec<_> = [-9.0, -5.0, -6.0, -5.5].into_iter().map(|e| stopping.observe(e)).collect();
/// assert_eq!(advice, [Advice::Keep, Advice::Keep, Advice::GoOn, Advice::Stop]);
/// assert_eq!(stopping.best(), Some(-5.0));
/// ```
#[derive(Debug, Clone)]
pub struct EarlyStopping {
    patience: usize,
    best: Option<f64>,
    since: usize,
}

impl EarlyStopping {
    /// Stops after `patience` evidences that are not the best; 0 is taken as 1.
    pub fn new(patience: usize) -> Self {
        Self { patience: patience.max(1), best: None, since: 0 }
    }

    /// Takes the next log evidence; one that is NaN is not the best.
    pub fn observe(&mut self, log_evidence: f64) -> Advice {
        if self.best.is_none_or(|best| log_evidence > best) && !log_evidence.is_nan() {
            self.best = Some(log_evidence);
            self.since = 0;
            return Advice::Keep;
        }
        self.since += 1;
        if self.since >= self.patience { Advice::Stop } else { Advice::GoOn }
    }

    /// The best log evidence.
    pub fn best(&self) -> Option<f64> {
        self.best
    }
}
