//! SO-KLD-WRM: the smallest-order member of the family.

use super::length::StepRule;
use super::rule::{Defaults, Model, WakeRule, check_wake};
use crate::curvature::Damping;
use crate::tape::Fisher;
use candle_core::Result;

/// `F_bar_k s_k = -lr_k (g_k - rho (lr_{k-1} / lr_k) g_{k-1})` (Puiu 2022, proposition 4.1).
///
/// In a steady state the mean step is `lr (1 - rho)` times the natural gradient: compare K-FAC at `lr (1 - rho)`.
#[derive(Debug, Clone, Default)]
pub struct So {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
}

/// SO-KLD-WRM.
pub type SoKldWrm = super::Natural<So>;

/// Options of [`SoKldWrm`].
pub type ParamsSoKldWrm = super::Params<So>;

impl WakeRule for So {
    const NAME: &'static str = "so-kld-wrm";

    fn model(&self) -> Model {
        Model::Linear
    }

    fn wake_decay(&self, stat_decay: f64) -> Option<f64> {
        Some(self.wake_decay.unwrap_or(stat_decay))
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            lr: 0.37,
            step_rule: StepRule::LearningRate,
            damping: Damping::Eigenvalue(0.0033),
            stat_decay: 0.5,
            kl_clip: Some(0.017),
            fisher: Fisher::Empirical,
            early_refresh: false,
            average: None,
        }
    }

    fn check(&self, _damping: Damping, _ekfac: bool) -> Result<()> {
        check_wake(Self::NAME, self.wake_decay)
    }
}
