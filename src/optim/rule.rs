//! The wake rule: all in which the optimizers of this crate differ.
//!
//! A step is the minimizer of a model of the loss plus a wake of distances to all earlier iterates (Puiu 2022, equation 8):
//!
//! ```text
//! s_k = argmin_s  M_k(s) + lambda_k sum_{i<=k} kappa(i) rho^(k-i) D(theta_i, theta_k + s)
//! lambda_k = 1 / lr_k,   kappa(0) = 1,   kappa(i > 0) = 1 - rho
//! ```
//!
//! `D` is the symmetric KL divergence between the models' predictions, to second order `1/2 d^T F_i d`. So the average
//! `F_bar` appears by itself, and the linear terms fold into one *carry* from step to step:
//!
//! ```text
//! wake_gradient_k = g_k - rho (lr_{k-1} / lr_k) carry_{k-1}
//! ```
//!
//! | optimizer | model `M_k` | solve | carry |
//! |---|---|---|---|
//! | K-FAC | linear | `F_bar s = -lr g` | none |
//! | SO | linear | `F_bar s = -lr wake_gradient` | `g` |
//! | Q | `g, B = F` | `(F_bar + lr F) s = -lr wake_gradient` | `g + B s` |
//! | QE | Q's step, then steps on the exact symmetric KL | as Q | `g + B s` |
//! | KLD-WRM | averages of either, see [`super::TwoRate`] | as SO or Q | the averaged models' gradient |
//!
//! The carry holds the step that was really taken, clips and all; [`Carry`] says how.

use super::average::Average;
use super::length::StepRule;
use crate::curvature::{Damping, DampingKind};
use crate::tape::Fisher;
use candle_core::{Result, bail};

/// The quadratic wake's matrix `F_bar + lr F`, Kronecker products both, in a form that can be inverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QSolve {
    /// `(A_bar + lr A) (x) (G_bar + lr G)`: as cheap as `F_bar`, but it scales by `(1 + lr)^2` where `1 + lr` is right.
    #[default]
    Factor,
    /// The sum itself, with pi-damped averages, by two generalized eigenproblems; needs [`DampingKind::Pi`].
    Exact,
}

/// What the next wake gradient looks back at.
///
/// The objective's linear terms add up to `-lambda (M + F_bar s)`, `M` the earlier distances' part. Where `s` minimizes the
/// objective that equals `g + B s`, which is all that the published recursions keep. A clip, momentum, or QE's inner steps
/// end elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carry {
    /// `g + B s` (SO: `g`), with the step really taken: the published form.
    #[default]
    Gradient,
    /// `g - wake_gradient - lambda F_bar s` with the damped average: what the objective says for any step `s`. Costs a
    /// product with both factors a step.
    Literal,
}

/// The model of the loss that a rule minimizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// `<g, s>`
    Linear,
    /// `<g, s> + 1/2 s^T F s`
    Quadratic(QSolve),
}

/// Default options that differ from optimizer to optimizer.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// See [`super::Params::lr`].
    pub lr: f64,
    /// See [`super::Params::step_rule`].
    pub step_rule: StepRule,
    /// See [`super::Params::damping`].
    pub damping: Damping,
    /// See [`super::Params::stat_decay`].
    pub stat_decay: f64,
    /// See [`super::Params::kl_clip`].
    pub kl_clip: Option<f64>,
    /// See [`super::Params::fisher`].
    pub fisher: Fisher,
    /// See [`super::Params::early_refresh`].
    pub early_refresh: bool,
    /// See [`super::Params::average`].
    pub average: Option<Average>,
}

/// One optimizer's wake. This trait is sealed in effect: the engine knows the models above and no others.
pub trait WakeRule: Default + Clone + std::fmt::Debug {
    /// The optimizer's name in messages and in saved state.
    const NAME: &'static str;

    /// The model that is minimized.
    fn model(&self) -> Model;

    /// `rho_d` of the wake of distances when the statistics decay with `stat_decay`; `None` without a wake.
    fn wake_decay(&self, stat_decay: f64) -> Option<f64>;

    /// `rho_m` of the wake of models; 0 keeps the newest model alone.
    fn model_decay(&self) -> f64 {
        0.0
    }

    /// What the rate is multiplied by before it is used; `1 / (1 - rho_d)` makes the steady-state step independent of `rho_d`.
    fn rate_scale(&self, _stat_decay: f64) -> f64 {
        1.0
    }

    /// The steps on the exact divergence that follow, for QE.
    fn inner(&self) -> Option<&super::qe::Inner> {
        None
    }

    /// The optimizer's default options.
    fn defaults(&self) -> Defaults;

    /// Whether the rule's own options make sense, also with the damping.
    fn check(&self, damping: Damping, ekfac: bool) -> Result<()>;
}

/// Shared checks of the rules with a wake.
pub(super) fn check_wake(name: &str, wake_decay: Option<f64>) -> Result<()> {
    match wake_decay {
        Some(rho) if !(0.0..1.0).contains(&rho) => bail!("{name}: expected wake_decay in [0, 1), got {rho}"),
        _ => Ok(()),
    }
}

pub(super) fn check_quadratic(name: &str, solve: QSolve, damping: Damping, ekfac: bool) -> Result<()> {
    if solve == QSolve::Exact && damping.kind() != DampingKind::Pi {
        bail!("{name}: the exact solve needs pi damping, got {damping:?}")
    }
    if ekfac {
        bail!("{name}: ekfac corrects the scaling of one Kronecker product; it works with K-FAC and SO")
    }
    Ok(())
}
