//! The options that every optimizer of the crate has.

use super::average::Average;
use super::groups::Groups;
use super::length::{AdaptiveKl, StepRule};
use super::rule::{Carry, Model, WakeRule};
use crate::curvature::{Damping, DampingKind, FactorLimit, Inverse, Sharing};
use crate::tape::{Fisher, Tape};
use candle_core::{Result, bail};
use candle_nn::ParamsAdamW;

/// How often the curvature is renewed, in steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Every {
    /// The factors enter their averages at steps `0, factors, 2 factors, ..`.
    pub factors: usize,
    /// The damped inverses are made at steps `0, inverses, 2 inverses, ..` (Q and QE also one step later, where the
    /// factors of the step have become the averages).
    pub inverses: usize,
}

/// Whether a layer's bias shares the block of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// One block `[W | b]` whose inputs carry a homogeneous 1.
    #[default]
    Folded,
    /// The bias is a block of its own, with `A = [[1]]`.
    Split,
}

/// Where weight decay `wd theta` enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decay {
    /// Added to the wake gradient, after the recursion: preconditioned, but not looked back at. The wake subtracts a part of
    /// the mean gradient and none of the decay, so the fixed point is that of an L2 penalty of `wd / (1 - wake_decay)`.
    #[default]
    AfterWake,
    /// Added to the gradient of the loss, as an L2 penalty is: it passes through the wake.
    Loss,
    /// Subtracted from the parameters as `lr wd theta`, past curvature and clips (Loshchilov & Hutter 2019).
    Decoupled,
}

/// What a step does on NaN or infinite gradients, factors or loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NonFinite {
    /// An error that names the tensor; parameters and state stay as they were.
    #[default]
    Error,
    /// The step is left out and counted, see `Natural::skipped`.
    Skip,
}

/// Options of an optimizer with the wake rule `R`; [`Params::on`] has the defaults.
#[derive(Debug, Clone)]
pub struct Params<R> {
    /// The tape on which the model was built.
    pub tape: Tape,
    /// Learning rate; `1 / lr` is the weight `lambda` of the wake. Under [`StepRule::FixedKl`] a fraction of the step's length.
    pub lr: f64,
    /// How long a step is.
    pub step_rule: StepRule,
    /// What is added to the curvature before it is inverted.
    pub damping: Damping,
    /// How the damped factors are inverted.
    pub inverse: Inverse,
    /// Whether the eigenbasis scaling is corrected with the second moments of the per-example gradients (EKFAC); needs
    /// [`DampingKind::Eigenvalue`]. Keeps the records of a refresh in memory until its step. Tables keep the
    /// scaling of their product.
    pub ekfac: bool,
    /// Eigenvalues of the factors at or below this count as 0, under [`DampingKind::Eigenvalue`].
    pub eigenvalue_floor: f64,
    /// `rho` of the factors' exponential averages, once a refresh: `bar <- rho bar + (1 - rho) current`.
    pub stat_decay: f64,
    /// Periods of factors and inverses.
    pub every: Every,
    /// Whether factors and inverses are also renewed at the steps 1, 2, 4, 8, .. until their periods take over. In its first
    /// steps a net's curvature grows many times over, and a step that trusts an old one is many times too long.
    pub early_refresh: bool,
    /// Steps that an update of the inverses may take beside the training: on a thread of its own, on a GPU on a second stream. The inverses of
    /// the factors of step `k` are used from step `k + overlap` on, or from where the next ones are due if that is sooner, so those that a
    /// step uses are up to `every.inverses + overlap - 1` steps old. What is used when does not depend on how long they took: a step waits for
    /// inverses that are not ready. With 0, the default, each update is waited for; so are the first ones always. Q and QE, whose
    /// inverses hold the factors of the very step, take 0 alone.
    pub overlap: usize,
    /// The labels of the Fisher matrix.
    pub fisher: Fisher,
    /// How positions that share a weight enter the factors.
    pub sharing: Sharing,
    /// Whether biases share the block of their weight.
    pub bias: Bias,
    /// What becomes of large factors, where a group of [`Params::groups`] says nothing else: of those with more than 4096 rows,
    /// blocks on the diagonal. Of a table that is a linear layer's weight too, the rows' factor is diagonal beyond the limit.
    pub factor_limit: FactorLimit,
    /// Bytes that state and work space may take ([`Summary::peak_bytes`](super::Summary::peak_bytes)): an optimizer that needs more is
    /// refused before its first step. On a GPU its free memory is such a limit in any case.
    pub memory_limit: Option<usize>,
    /// Heavy-ball momentum on the preconditioned direction: `v <- momentum v + V`; 0 is none.
    pub momentum: f64,
    /// Weight decay, and where it enters.
    pub weight_decay: f64,
    /// Where the weight decay enters.
    pub decay: Decay,
    /// Scales the step by `min(1, sqrt(kl_clip / sum_blocks lr^2 <V, g>))`, `g` the wake gradient.
    pub kl_clip: Option<f64>,
    /// Scales a block's direction by `min(1, rms_clip / rms(V))`. Both clips measure `V` before either.
    pub rms_clip: Option<f64>,
    /// What happens on NaN or infinity.
    pub non_finite: NonFinite,
    /// Rates, decay, freezing and rules by name pattern.
    pub groups: Groups,
    /// Adam, for Vars that have no Kronecker block. Its rate keeps its ratio to `lr` when that is changed.
    pub rest: ParamsAdamW,
    /// What the wake looks back at, where a step is not the objective's minimizer.
    pub carry: Carry,
    /// Whether averaged parameters are kept beside the ones that are stepped; see [`Average`].
    pub average: Option<Average>,
    /// What is this optimizer's own.
    pub wake: R,
}

impl<R: WakeRule> Params<R> {
    /// The defaults for a model that was built on `tape`.
    pub fn on(tape: &Tape) -> Self {
        let wake = R::default();
        let defaults = wake.defaults();
        Self {
            tape: tape.clone(),
            lr: defaults.lr,
            step_rule: defaults.step_rule,
            damping: defaults.damping,
            inverse: Inverse::Eigen,
            ekfac: false,
            eigenvalue_floor: 0.0,
            stat_decay: defaults.stat_decay,
            every: Every { factors: 10, inverses: 10 },
            early_refresh: defaults.early_refresh,
            overlap: 0,
            fisher: defaults.fisher,
            sharing: Sharing::Expand,
            bias: Bias::Folded,
            factor_limit: FactorLimit::default(),
            memory_limit: None,
            momentum: 0.0,
            weight_decay: 0.0,
            decay: Decay::AfterWake,
            kl_clip: defaults.kl_clip,
            rms_clip: None,
            non_finite: NonFinite::Error,
            groups: Groups::default(),
            rest: ParamsAdamW { weight_decay: 0.0, ..ParamsAdamW::default() },
            carry: Carry::Gradient,
            average: defaults.average,
            wake,
        }
    }

    /// The same options with steps of fixed KL, at full length and without a clip; see [`StepRule::FixedKl`].
    pub fn fixed_kl(self, target: f64) -> Self {
        Self { lr: 1.0, step_rule: StepRule::FixedKl { target }, kl_clip: None, ..self }
    }

    /// The same options with steps whose KL finds itself, at full length and without a clip; see [`AdaptiveKl`].
    pub fn adaptive_kl(self, rule: AdaptiveKl) -> Self {
        Self { lr: 1.0, step_rule: StepRule::AdaptiveKl(rule), kl_clip: None, ..self }
    }

    /// Everything that can be said to be wrong without a model.
    pub(crate) fn check(&self) -> Result<()> {
        let optimizer = R::NAME;
        let fraction = |name: &str, value: f64| {
            if (0.0..1.0).contains(&value) {
                Ok(())
            } else {
                bail!("{optimizer}: expected {name} in [0, 1), got {value}")
            }
        };
        let non_negative = |name: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                bail!("{optimizer}: expected {name} to be zero or more, got {value}")
            }
        };
        self.damping.check()?;
        self.factor_limit.check()?;
        non_negative("lr", self.lr)?;
        fraction("stat_decay", self.stat_decay)?;
        fraction("momentum", self.momentum)?;
        non_negative("weight_decay", self.weight_decay)?;
        non_negative("eigenvalue_floor", self.eigenvalue_floor)?;
        for (name, clip) in [("kl_clip", self.kl_clip), ("rms_clip", self.rms_clip)] {
            if let Some(clip) = clip
                && !(clip.is_finite() && clip > 0.0)
            {
                bail!("{optimizer}: expected {name} to be positive, got {clip}")
            }
        }
        self.step_rule.check(optimizer)?;
        if let (Some(target), Some(clip)) = (self.step_rule.target(), self.kl_clip) {
            bail!("{optimizer}: a step of KL {target} has no use for kl_clip, got {clip}; set it to None")
        }
        if self.every.factors == 0 || self.every.inverses == 0 {
            bail!("{optimizer}: expected periods of at least one step, got {:?}", self.every)
        }
        if self.overlap > 0 && matches!(self.wake.model(), Model::Quadratic(_)) {
            bail!(
                "{optimizer}: the inverses of a quadratic wake hold the factors of their own step and cannot be late; expected \
                 overlap 0, got {}",
                self.overlap
            )
        }
        if let Fisher::Sampled { draws: 0, .. } = self.fisher {
            bail!("{optimizer}: expected at least one draw of the sampled Fisher, got 0")
        }
        let eigenvalue = self.damping.kind() == DampingKind::Eigenvalue;
        if eigenvalue && self.inverse != Inverse::Eigen {
            bail!(
                "{optimizer}: eigenvalue damping needs Inverse::Eigen, got Inverse::{:?}; it works with Damping::Pi",
                self.inverse
            )
        }
        if self.eigenvalue_floor > 0.0 && !eigenvalue {
            bail!("{optimizer}: eigenvalue_floor applies to eigenvalue damping alone, got {:?}", self.damping)
        }
        if self.ekfac && !eigenvalue {
            bail!("{optimizer}: ekfac needs eigenvalue damping, got {:?}", self.damping)
        }
        if self.ekfac && self.sharing == Sharing::Reduce {
            bail!(
                "{optimizer}: ekfac takes the true per-example gradients, so it needs Sharing::Expand, got Reduce"
            )
        }
        if self.carry == Carry::Literal && self.wake.wake_decay(self.stat_decay).is_none() {
            bail!("{optimizer}: Carry::Literal is a wake's, and {optimizer} has none")
        }
        if self.carry == Carry::Literal && self.ekfac {
            bail!("{optimizer}: Carry::Literal needs the Kronecker average itself, which ekfac replaces")
        }
        if let Some(average) = self.average {
            non_negative("average.power", average.power)?;
        }
        self.wake.check(self.damping, self.ekfac)
    }
}
