//! KLD-WRM with a wake of models and a wake of distances, each with a rate of its own.

use super::average::Average;
use super::length::{AdaptiveKl, StepRule};
use super::rule::{Defaults, Model, WakeRule, check_quadratic, check_wake};
use crate::curvature::{Damping, Relative};
use crate::tape::Fisher;
use candle_core::{Result, bail};

/// The wake objective with earlier models beside earlier distances,
///
/// ```text
/// s_k = argmin_s  sum_i kappa_m(i) rho_m^(k-i) M_i(theta_k + s) + lambda_k sum_i kappa_d(i) rho_d^(k-i) D(theta_i, theta_k + s)
/// kappa(0) = 1,  kappa(i > 0) = 1 - rho
/// ```
///
/// where `M_i` is the model of the loss made at step `i`. With linear models their gradients are averaged, and the distances'
/// linear terms fold into that average one step earlier:
///
/// ```text
/// m_k = rho_m m_{k-1} + kappa_m g_k
/// F_bar_k s_k = -(1 / lambda_k) (m_k - rho_d (lambda_k / lambda_{k-1}) m_{k-1})
/// ```
///
/// With quadratic models of curvature `B_i = F_i`, and `C_k` their average at the rate `rho_m`:
///
/// ```text
/// w_k = kappa_m g_k + rho_m m_{k-1}
/// (lambda_k F_bar_k + C_k) s_k = -(w_k - rho_d (lambda_k / lambda_{k-1}) m_{k-1})
/// m_k = w_k + C_k s_k
/// ```
///
/// Its corners are known methods:
///
/// | models' `rho_m` | distances' `rho_d` | is | by name |
/// |---|---|---|---|
/// | 0 | 0 | K-FAC | [`TwoRate::k_fac`] |
/// | `mu` | 0 | K-FAC with averaged gradients as momentum | [`TwoRate::k_fac_momentum`] |
/// | `mu` | `mu / (1 + mu)` | K-FAC with Nesterov's filter | [`TwoRate::nesterov`] |
/// | 0 | `rho` | SO, or Q with quadratic models | [`TwoRate::so`], [`TwoRate::q`] |
/// | `rho` | `rho` | plain K-FAC again, at a constant rate and with linear models | |
///
/// Sources: the objective generalizes Puiu 2022, equation 8; the recursions are its stationarity conditions.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoRate {
    /// `rho_m`, the decay of the wake of models, in [0, 1).
    pub model_decay: f64,
    /// `rho_d`, the decay of the wake of distances, in [0, 1). Apart from the averages' `stat_decay`.
    pub wake_decay: f64,
    /// The models of the loss.
    pub model: Model,
    /// Whether rates are multiplied by `1 / (1 - wake_decay)`, so that the mean step in a steady state does not depend on
    /// the decays: it is then that of K-FAC at the same rate.
    pub steady: bool,
}

impl Default for TwoRate {
    /// The recommended member: `rho_m = 0.8`, `rho_d = 0.5`, linear models, steady rates.
    fn default() -> Self {
        Self { model_decay: 0.8, wake_decay: 0.5, model: Model::Linear, steady: true }
    }
}

impl TwoRate {
    fn corner(model_decay: f64, wake_decay: f64, model: Model, steady: bool) -> Self {
        Self { model_decay, wake_decay, model, steady }
    }

    /// K-FAC: neither wake.
    pub fn k_fac() -> Self {
        Self::corner(0.0, 0.0, Model::Linear, true)
    }

    /// K-FAC whose gradient is an exponential average with the decay `mu`.
    pub fn k_fac_momentum(mu: f64) -> Self {
        Self::corner(mu, 0.0, Model::Linear, true)
    }

    /// K-FAC with Nesterov's momentum `mu`, as a filter of the gradients: `(1 - mu^2) g_k + mu^2 m_{k-1}` in a steady state's
    /// scale.
    pub fn nesterov(mu: f64) -> Self {
        Self::corner(mu, mu / (1.0 + mu), Model::Linear, true)
    }

    /// SO-KLD-WRM, as [`super::So`] with that `wake_decay`.
    pub fn so(rho: f64) -> Self {
        Self::corner(0.0, rho, Model::Linear, false)
    }

    /// Q-KLD-WRM, as [`super::Q`] with that `wake_decay`.
    pub fn q(rho: f64, solve: super::QSolve) -> Self {
        Self::corner(0.0, rho, Model::Quadratic(solve), false)
    }
}

/// KLD-WRM with two rates.
pub type KldWrm = super::Natural<TwoRate>;

/// Options of [`KldWrm`].
pub type ParamsKldWrm = super::Params<TwoRate>;

impl WakeRule for TwoRate {
    const NAME: &'static str = "kld-wrm";

    fn model(&self) -> Model {
        self.model
    }

    fn wake_decay(&self, _stat_decay: f64) -> Option<f64> {
        Some(self.wake_decay)
    }

    fn model_decay(&self) -> f64 {
        self.model_decay
    }

    fn rate_scale(&self, _stat_decay: f64) -> f64 {
        if self.steady { 1.0 / (1.0 - self.wake_decay) } else { 1.0 }
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            lr: 1.0,
            step_rule: StepRule::AdaptiveKl(AdaptiveKl::default()),
            damping: Damping::Relative(Relative::default()),
            stat_decay: 0.5,
            kl_clip: None,
            fisher: Fisher::Sampled { draws: 1, seed: 0 },
            early_refresh: true,
            average: Some(Average::default()),
        }
    }

    fn check(&self, damping: Damping, ekfac: bool) -> Result<()> {
        check_wake(Self::NAME, Some(self.wake_decay))?;
        if !(0.0..1.0).contains(&self.model_decay) {
            bail!("{}: expected model_decay in [0, 1), got {}", Self::NAME, self.model_decay)
        }
        match self.model {
            Model::Linear => Ok(()),
            Model::Quadratic(solve) => check_quadratic(Self::NAME, solve, damping, ekfac),
        }
    }
}
