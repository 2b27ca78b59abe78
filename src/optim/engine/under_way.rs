//! What has been seen of the coming step.

use crate::curvature::FactorSums;
use candle_core::Tensor;
use std::sync::{Arc, Mutex};

/// Factor sums of the coming step.
pub(super) struct Observed {
    pub sums: Arc<Mutex<FactorSums>>,
    /// The tape listens to the user's backward pass (empirical Fisher).
    pub armed: bool,
    /// See [`Refresh`].
    pub drawn: Vec<Vec<Tensor>>,
    /// Why the step has to be left out, under [`NonFinite::Skip`].
    pub unusable: Option<String>,
}

impl std::fmt::Debug for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observed").field("armed", &self.armed).finish_non_exhaustive()
    }
}

/// Gradients of micro-batches, each times its total of loss terms.
#[derive(Debug)]
pub(super) struct Accumulated {
    pub grads: Vec<Option<Tensor>>,
    /// Where it is read.
    pub loss: Option<f64>,
    pub total: f64,
}

pub(super) fn lock(sums: &Mutex<FactorSums>) -> std::sync::MutexGuard<'_, FactorSums> {
    sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
