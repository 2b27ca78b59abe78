//! The wake as a value: all in which the members of the family differ, and its mathematics.
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
//! | member | model `M_k` | solve | carry |
//! |---|---|---|---|
//! | K-FAC | linear | `F_bar s = -lr g` | none |
//! | SO | linear | `F_bar s = -lr wake_gradient` | `g` |
//! | Q | `g, B = F` | `(F_bar + lr F) s = -lr wake_gradient` | `g + B s` |
//! | QE | Q's step, then steps on the exact symmetric KL | as Q | `g + B s` |
//! | KLD-WRM | averages of either, see [`TwoRate`] | as SO or Q | the averaged models' gradient |
//!
//! The carry holds the step that was really taken, clips and all; [`Carry`] says how.

use crate::curvature::{Damping, DampingKind};
use candle_core::{Error, Result, bail};
use std::str::FromStr;

/// Says which member of the family an optimizer is, with the options that are that member's own.
///
/// ```
/// use kronwake::optim::{So, TwoRate, Wake};
/// let chosen: Wake = "kld-wrm".parse()?; // at run time
/// assert_eq!(chosen, Wake::KldWrm(TwoRate::default()));
/// assert_eq!(Wake::from(So { wake_decay: Some(0.5) }).name(), "so-kld-wrm");
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Wake {
    /// No wake, the baseline: `F_bar_k s_k = -lr_k g_k` (Martens & Grosse 2015). Its name is `kfac`.
    #[doc(alias = "K-FAC")]
    KFac,
    /// SO-KLD-WRM, the smallest-order member. Its name is `so-kld-wrm`.
    #[doc(alias = "SO-KLD-WRM")]
    So(So),
    /// Q-KLD-WRM, a quadratic model under the wake. Its name is `q-kld-wrm`.
    #[doc(alias = "Q-KLD-WRM")]
    Q(Q),
    /// QE-KLD-WRM, Q's step and then steps on the exact divergence. Its name is `qe-kld-wrm`.
    #[doc(alias = "QE-KLD-WRM")]
    Qe(Qe),
    /// KLD-WRM with a wake of models beside that of distances. Its name is `kld-wrm`.
    #[doc(alias = "KLD-WRM")]
    KldWrm(TwoRate),
}

/// SO-KLD-WRM: `F_bar_k s_k = -lr_k (g_k - rho (lr_{k-1} / lr_k) g_{k-1})` (Puiu 2022, proposition 4.1).
///
/// In a steady state the mean step is `lr (1 - rho)` times the natural gradient: compare K-FAC at `lr (1 - rho)`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct So {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
}

/// Q-KLD-WRM: `(F_bar_k + lr_k F_k) s_k = -lr_k (g_k - rho (lr_{k-1} / lr_k) (g_{k-1} + F_{k-1} s_{k-1}))` (Puiu 2022, proposition 4.2).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Q {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
    /// How `F_bar + lr F` is inverted.
    pub solve: QSolve,
}

/// QE-KLD-WRM: Q's step, then [`Inner::steps`] of momentum SGD on
/// `<g, s> + 1/2 s^T B s + lambda sum_j w_j D_j` with the exact symmetric KL divergences `D_j` on the current batch
/// (Puiu 2022, section 4.3). Inner steps that end higher than they began, at too high a rate, are dropped: Q's step holds.
///
/// It evaluates the model again: step it with [`NaturalGradient::step_with`](super::NaturalGradient::step_with).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Qe {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
    /// How `F_bar + lr F` is inverted in Q's step.
    pub solve: QSolve,
    /// The steps that follow.
    pub inner: Inner,
}

/// QE's steps on the exact divergence.
#[derive(Debug, Clone, PartialEq)]
pub struct Inner {
    /// Momentum-SGD steps after Q's step, 1 by default; each costs a forward and a backward pass.
    pub steps: usize,
    /// Their rate, as a multiple of the learning rate; 0.001 by default.
    pub lr: f64,
    /// Their momentum, started anew at each outer step; 0.5 by default.
    pub momentum: f64,
    /// Models in the wake, the current one included: 2 or more, 2 by default. Each of the others costs a copy of the parameters and a forward
    /// pass a step. The inner steps begin once as many have been seen.
    pub models: usize,
    /// Multiplies the divergences; 1, the default, is the theory's.
    pub scale: f64,
    /// Whether the inner directions are preconditioned as Q's is; not by default. Plain SGD (the published form) is stable only while
    /// `lr` is below two over the largest eigenvalue of the Fisher matrix.
    pub preconditioned: bool,
}

impl Default for Inner {
    fn default() -> Self {
        Self { steps: 1, lr: 0.001, momentum: 0.5, models: 2, scale: 1.0, preconditioned: false }
    }
}

/// KLD-WRM: the wake objective with earlier models beside earlier distances,
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
/// By default the direction that this solves for is then made an orthogonal matrix, [`Orthogonal`](super::Orthogonal) says what that minimizes.
/// What is proved is the recursion (tests minimize the objective literally); the orthogonal step, the two rates' values and the length are chosen
/// by experiment.
///
/// Sources: the objective generalizes Puiu 2022, equation 8; the recursions are its stationarity conditions.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoRate {
    /// `rho_m`, the decay of the wake of models, in [0, 1); 0.8 by default.
    pub model_decay: f64,
    /// `rho_d`, the decay of the wake of distances, in [0, 1); 0.5 by default. It is apart from the `stat_decay` of the factors' averages.
    pub wake_decay: f64,
    /// The models of the loss; linear by default.
    pub model: Model,
    /// Whether rates are multiplied by `1 / (1 - wake_decay)`; yes by default. The mean step in a steady state is then that of K-FAC at the
    /// same rate, whatever the decays.
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

    /// SO-KLD-WRM, as [`So`] with that `wake_decay`.
    pub fn so(rho: f64) -> Self {
        Self::corner(0.0, rho, Model::Linear, false)
    }

    /// Q-KLD-WRM, as [`Q`] with that `wake_decay`.
    pub fn q(rho: f64, solve: QSolve) -> Self {
        Self::corner(0.0, rho, Model::Quadratic(solve), false)
    }
}

/// The model of the loss that a step minimizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// `<g, s>`
    Linear,
    /// `<g, s> + 1/2 s^T F s`
    Quadratic(QSolve),
}

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
    /// `g + B s` (SO: `g`), with the step really taken. This is the published form.
    #[default]
    Gradient,
    /// `g - wake_gradient - lambda F_bar s` with the damped average. This is what the objective says for any step `s`. It costs a product with
    /// both factors a step.
    Literal,
}

impl Wake {
    /// All members, each with the default options of its own.
    pub fn members() -> [Wake; 5] {
        [
            Wake::KFac,
            Wake::So(So::default()),
            Wake::Q(Q::default()),
            Wake::Qe(Qe::default()),
            Wake::KldWrm(TwoRate::default()),
        ]
    }

    /// The member's name, in messages, in saved state, and for [`FromStr`].
    pub fn name(&self) -> &'static str {
        match self {
            Wake::KFac => "kfac",
            Wake::So(_) => "so-kld-wrm",
            Wake::Q(_) => "q-kld-wrm",
            Wake::Qe(_) => "qe-kld-wrm",
            Wake::KldWrm(_) => "kld-wrm",
        }
    }

    /// The model of the loss that is minimized.
    pub fn model(&self) -> Model {
        match self {
            Wake::KFac | Wake::So(_) => Model::Linear,
            Wake::Q(Q { solve, .. }) | Wake::Qe(Qe { solve, .. }) => Model::Quadratic(*solve),
            Wake::KldWrm(two_rate) => two_rate.model,
        }
    }

    /// `rho_d` of the wake of distances when the statistics decay with `stat_decay`; `None` without a wake.
    pub fn wake_decay(&self, stat_decay: f64) -> Option<f64> {
        match self {
            Wake::KFac => None,
            Wake::So(So { wake_decay }) | Wake::Q(Q { wake_decay, .. }) | Wake::Qe(Qe { wake_decay, .. }) => {
                Some(wake_decay.unwrap_or(stat_decay))
            }
            Wake::KldWrm(TwoRate { wake_decay, .. }) => Some(*wake_decay),
        }
    }

    /// `rho_m` of the wake of models; 0 keeps the newest model alone.
    pub fn model_decay(&self) -> f64 {
        match self {
            Wake::KFac | Wake::So(_) | Wake::Q(_) | Wake::Qe(_) => 0.0,
            Wake::KldWrm(TwoRate { model_decay, .. }) => *model_decay,
        }
    }

    /// The factor on the rate. `1 / (1 - rho_d)` makes the step in a steady state independent of `rho_d`.
    pub fn rate_scale(&self) -> f64 {
        match self {
            Wake::KFac | Wake::So(_) | Wake::Q(_) | Wake::Qe(_) => 1.0,
            Wake::KldWrm(TwoRate { steady: false, .. }) => 1.0,
            Wake::KldWrm(TwoRate { steady: true, wake_decay, .. }) => 1.0 / (1.0 - wake_decay),
        }
    }

    /// The steps on the exact divergence that follow, which only QE has.
    pub fn inner(&self) -> Option<&Inner> {
        match self {
            Wake::Qe(Qe { inner, .. }) => Some(inner),
            Wake::KFac | Wake::So(_) | Wake::Q(_) | Wake::KldWrm(_) => None,
        }
    }

    /// Whether `other` is the same member, whatever its options.
    pub(crate) fn is_same_member(&self, other: &Wake) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// Whether the options make sense, also with the damping.
    pub(crate) fn check(&self, damping: Damping, ekfac: bool) -> Result<()> {
        let name = self.name();
        let decay = match self {
            Wake::KFac => None,
            Wake::So(So { wake_decay }) | Wake::Q(Q { wake_decay, .. }) | Wake::Qe(Qe { wake_decay, .. }) => {
                *wake_decay
            }
            Wake::KldWrm(TwoRate { wake_decay, .. }) => Some(*wake_decay),
        };
        if let Some(rho) = decay.filter(|rho| !(0.0..1.0).contains(rho)) {
            bail!("{name}: expected wake_decay in [0, 1), got {rho}")
        }
        let models = self.model_decay();
        if !(0.0..1.0).contains(&models) {
            bail!("{name}: expected model_decay in [0, 1), got {models}")
        }
        match self.model() {
            Model::Linear => {}
            Model::Quadratic(QSolve::Exact) if damping.kind() != DampingKind::Pi => {
                bail!("{name}: the exact solve needs pi damping, got {damping:?}")
            }
            Model::Quadratic(_) if ekfac => {
                bail!(
                    "{name}: ekfac corrects the scaling of one Kronecker product; it works with K-FAC and SO"
                )
            }
            Model::Quadratic(_) => {}
        }
        self.inner().map_or(Ok(()), |inner| inner.check(name))
    }
}

impl Inner {
    fn check(&self, name: &str) -> Result<()> {
        let Inner { steps: _, lr, momentum, models, scale, preconditioned: _ } = *self;
        if !(lr.is_finite() && lr >= 0.0 && scale.is_finite() && scale >= 0.0) {
            bail!("{name}: expected inner lr and scale to be zero or more, got {lr} and {scale}")
        }
        if !(0.0..1.0).contains(&momentum) {
            bail!("{name}: expected an inner momentum in [0, 1), got {momentum}")
        }
        if models < 2 {
            bail!("{name}: expected 2 or more models in the wake, the current one included, got {models}")
        }
        Ok(())
    }
}

impl FromStr for Wake {
    type Err = Error;

    /// The member of that [`Wake::name`], with the default options of its own.
    fn from_str(name: &str) -> Result<Self> {
        let members = Wake::members();
        match members.iter().find(|member| member.name() == name) {
            Some(member) => Ok(member.clone()),
            None => {
                let names = members.map(|member| member.name()).join(", ");
                bail!("optimizer: expected one of {names}, got {name:?}")
            }
        }
    }
}

impl From<So> for Wake {
    fn from(so: So) -> Self {
        Wake::So(so)
    }
}

impl From<Q> for Wake {
    fn from(q: Q) -> Self {
        Wake::Q(q)
    }
}

impl From<Qe> for Wake {
    fn from(qe: Qe) -> Self {
        Wake::Qe(qe)
    }
}

impl From<TwoRate> for Wake {
    fn from(two_rate: TwoRate) -> Self {
        Wake::KldWrm(two_rate)
    }
}
