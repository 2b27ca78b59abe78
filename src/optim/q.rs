//! Q-KLD-WRM: a quadratic model under the wake.

use super::length::StepRule;
use super::rule::{Defaults, Model, QSolve, WakeRule, check_quadratic, check_wake};
use crate::curvature::Damping;
use crate::tape::Fisher;
use candle_core::Result;

/// `(F_bar_k + lr_k F_k) s_k = -lr_k (g_k - rho (lr_{k-1} / lr_k) (g_{k-1} + F_{k-1} s_{k-1}))` (Puiu 2022, proposition 4.2).
#[derive(Debug, Clone, Default)]
pub struct Q {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
    /// How `F_bar + lr F` is inverted.
    pub solve: QSolve,
}

/// Q-KLD-WRM.
pub type QKldWrm = super::Natural<Q>;

/// Options of [`QKldWrm`].
pub type ParamsQKldWrm = super::Params<Q>;

impl WakeRule for Q {
    const NAME: &'static str = "q-kld-wrm";

    fn model(&self) -> Model {
        Model::Quadratic(self.solve)
    }

    fn wake_decay(&self, stat_decay: f64) -> Option<f64> {
        Some(self.wake_decay.unwrap_or(stat_decay))
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            lr: 0.49,
            step_rule: StepRule::LearningRate,
            damping: Damping::Eigenvalue(0.016),
            stat_decay: 0.5,
            kl_clip: Some(0.067),
            fisher: Fisher::Sampled { draws: 1, seed: 0 },
            early_refresh: false,
            average: None,
        }
    }

    fn check(&self, damping: Damping, ekfac: bool) -> Result<()> {
        check_wake(Self::NAME, self.wake_decay)?;
        check_quadratic(Self::NAME, self.solve, damping, ekfac)
    }
}
