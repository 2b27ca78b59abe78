//! K-FAC, the baseline: no wake.

use super::length::StepRule;
use super::rule::{Defaults, Model, WakeRule};
use crate::curvature::Damping;
use crate::tape::Fisher;
use candle_core::Result;

/// `F_bar_k s_k = -lr_k g_k` (Martens & Grosse 2015).
#[derive(Debug, Clone, Default)]
pub struct KFacRule;

/// K-FAC: the gradient, preconditioned with the averaged Fisher.
pub type KFac = super::Natural<KFacRule>;

/// Options of [`KFac`].
pub type ParamsKFac = super::Params<KFacRule>;

impl WakeRule for KFacRule {
    const NAME: &'static str = "kfac";

    fn model(&self) -> Model {
        Model::Linear
    }

    fn wake_decay(&self, _stat_decay: f64) -> Option<f64> {
        None
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            lr: 0.075,
            step_rule: StepRule::LearningRate,
            damping: Damping::Eigenvalue(0.011),
            stat_decay: 0.95,
            kl_clip: Some(0.0125),
            fisher: Fisher::Sampled { draws: 1, seed: 0 },
            early_refresh: false,
            average: None,
        }
    }

    fn check(&self, _damping: Damping, _ekfac: bool) -> Result<()> {
        Ok(())
    }
}
