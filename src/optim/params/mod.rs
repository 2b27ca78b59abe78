//! The options of an optimizer; `defaults.rs` has each member's.

mod budget;
mod check;
mod defaults;
mod orthogonal;
mod step_rule;

pub use budget::Budget;
pub use orthogonal::Orthogonal;
pub use step_rule::{AdaptiveKl, StepRule};

use super::groups::Groups;
use super::wake::{Carry, Wake};
use crate::curvature::{Damping, FactorLimit, Inverse, Sharing};
use crate::tape::{Fisher, Tape};
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
    /// Added to the wake gradient, after the recursion: it is preconditioned, but not looked back at. The wake subtracts a part of the mean
    /// gradient and none of the decay, so the fixed point is that of an L2 penalty of `wd / (1 - wake_decay)`.
    #[default]
    AfterWake,
    /// Added to the gradient of the loss, as an L2 penalty is. It passes through the wake.
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
    /// The step is left out and counted: [`NaturalGradient::skipped`](super::NaturalGradient::skipped).
    Skip,
}

/// The arithmetic of f32 products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// f32 throughout.
    Exact,
    /// Operands are rounded to TF32, with the 11 significant bits of f16, and sums are f32: on the tensor cores of an NVIDIA GPU several times as
    /// fast.
    Tf32,
}

/// The rate of [`Params::fallback_adam`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum FallbackRate {
    /// The `lr` of its options. It keeps its ratio to [`Params::lr`] when that changes; where an optimizer begins with `lr` 0, for a warm-up, it
    /// is the rate at the largest `lr` so far.
    #[default]
    Own,
    /// This many times the rate `1 / lambda` of the blocks' step. Orthogonalized directions are as long as Adam's
    /// ([`Orthogonal`]), so one length that the step rule finds serves both. In a step in which no block takes part it is the options' `lr`.
    OfStep(f64),
}

/// Options of a [`NaturalGradient`](super::NaturalGradient). [`Params::of`] has the defaults of a member; [`Params::kld_wrm`],
/// [`Params::k_fac`], [`Params::so_kld_wrm`], [`Params::q_kld_wrm`] and [`Params::qe_kld_wrm`] name it.
///
/// The defaults that differ from member to member:
///
/// | member | `lr` | `step_rule` | `damping` | `stat_decay` | `kl_clip` | `fisher` | `early_refresh` | `average` | `orthogonal` |
/// |---|---|---|---|---|---|---|---|---|---|
/// | `kfac` | 0.075 | learning rate | eigenvalue 0.011 | 0.95 | 0.0125 | sampled, draws: 1 | no | no | no |
/// | `so-kld-wrm` | 0.37 | learning rate | eigenvalue 0.0033 | 0.5 | 0.017 | empirical | no | no | no |
/// | `q-kld-wrm` | 0.49 | learning rate | eigenvalue 0.016 | 0.5 | 0.067 | sampled, draws: 1 | no | no | no |
/// | `qe-kld-wrm` | 0.076 | learning rate | eigenvalue 0.0013 | 0.5 | 0.01 | empirical | no | no | no |
/// | `kld-wrm` | 1 | adaptive KL | relative | 0.5 | none | sampled, draws: 1 | yes | yes | yes |
///
/// The defaults that all members share stand at the fields.
#[derive(Debug, Clone)]
pub struct Params {
    /// The tape on which the model was built.
    pub tape: Tape,
    /// Learning rate; `1 / lr` is the weight `lambda` of the wake. Under [`StepRule::FixedKl`] and [`StepRule::AdaptiveKl`] it is a fraction of
    /// the step's length.
    pub lr: f64,
    /// How long a step is.
    pub step_rule: StepRule,
    /// What is added to the curvature before it is inverted.
    pub damping: Damping,
    /// How the damped factors are inverted; [`Inverse::Eigen`] by default.
    pub inverse: Inverse,
    /// Whether the scaling in the eigenbasis comes from the second moments of the per-example gradients (EKFAC); not by default. Needs
    /// [`DampingKind::Eigenvalue`](crate::curvature::DampingKind::Eigenvalue). Keeps the records of a refresh in memory until its step.
    /// Embeddings keep the scaling of their Kronecker product.
    pub ekfac: bool,
    /// Eigenvalues of the factors at or below this count as 0, under
    /// [`DampingKind::Eigenvalue`](crate::curvature::DampingKind::Eigenvalue); 0 by default.
    pub eigenvalue_floor: f64,
    /// `rho` of the factors' exponential averages, once a refresh: `bar <- rho bar + (1 - rho) current`.
    pub stat_decay: f64,
    /// Periods of factors and inverses; 10 steps both by default.
    pub every: Every,
    /// Whether factors and inverses are also renewed at the steps 1, 2, 4, 8, .. until their periods take over. In its first
    /// steps a net's curvature grows many times over, and a step that trusts an old one is many times too long.
    pub early_refresh: bool,
    /// Steps that an update of the inverses may take in the background: on a thread of its own, on a GPU on a second stream. With 0, the
    /// default, each update is waited for; the first ones always are.
    ///
    /// The inverses of the factors of step `k` are used from step `k + overlap` on, or from where the next ones are due if that is sooner. So
    /// a step uses inverses that are up to `every.inverses + overlap - 1` steps old. Which ones it uses does not depend on how long they
    /// took: a step waits for inverses that are not ready. Q and QE take 0 alone, since their inverses hold the factors of the very step.
    pub overlap: usize,
    /// The labels of the Fisher matrix.
    pub fisher: Fisher,
    /// How positions that share a weight enter the factors; [`Sharing::Expand`] by default.
    pub sharing: Sharing,
    /// Whether biases share the block of their weight; [`Bias::Folded`] by default.
    pub bias: Bias,
    /// What becomes of large factors, where a group of [`Params::groups`] says nothing else. By default they are full where that is
    /// affordable and else of low rank, [`Beyond::ByCost`](crate::curvature::Beyond::ByCost). Where an embedding's table is a linear
    /// layer's weight too, the factor of its rows is diagonal beyond the limit.
    pub factor_limit: FactorLimit,
    /// What is affordable; a fifth of the time by default.
    pub budget: Budget,
    /// Bytes that state and work space may take, [`Summary::peak_bytes`](super::Summary::peak_bytes); no limit by default. An optimizer that
    /// needs more is refused when it is built. On a GPU its free memory is such a limit in any case.
    pub memory_limit: Option<usize>,
    /// Heavy-ball momentum on the preconditioned direction: `v <- momentum v + V`; 0, none, by default.
    pub momentum: f64,
    /// Weight decay `wd`; 0 by default.
    pub weight_decay: f64,
    /// Where the weight decay enters; [`Decay::AfterWake`] by default.
    pub decay: Decay,
    /// Scales the step by `min(1, sqrt(kl_clip / sum_blocks lr^2 <V, g>))`, `g` the wake gradient.
    pub kl_clip: Option<f64>,
    /// Scales a block's direction by `min(1, rms_clip / rms(V))`. Both clips measure `V` before either. None by default.
    pub rms_clip: Option<f64>,
    /// What happens on NaN or infinity; [`NonFinite::Error`] by default.
    pub non_finite: NonFinite,
    /// Rates, decay, freezing and rules by name pattern; none by default.
    pub groups: Groups,
    /// Whether directions are made orthogonal, see [`Orthogonal`]; of the members KLD-WRM alone does so by default.
    pub orthogonal: Option<Orthogonal>,
    /// The longest smaller side of a direction that is made orthogonal as a whole; 256 by default, at least 1. Of a larger one parts of at most so many
    /// rows, or columns where it has more rows than columns, are each made orthogonal. The parts are as large as each other, but that the last may
    /// be smaller. With `p` of them products with the direction take `1 / p` of the operations, and inverses and products of its smaller side alone `1 / p^2`.
    /// `usize::MAX` makes no parts.
    pub orthogonal_side: usize,
    /// Adam's options for Vars that have no Kronecker block: candle's defaults without weight decay.
    pub fallback_adam: ParamsAdamW,
    /// Adam's rate there: [`FallbackRate::Own`] by default, but of KLD-WRM [`FallbackRate::OfStep`]`(2.0)`.
    pub fallback_rate: FallbackRate,
    /// What the wake looks back at, where a step is not the objective's minimizer; [`Carry::Gradient`] by default.
    pub carry: Carry,
    /// Whether averaged parameters are kept beside the ones that are stepped; see [`Average`].
    pub average: Option<Average>,
    /// How the wake gradients of large blocks, or of block-diagonal ones, are multiplied with the inverses on an NVIDIA GPU, and directions
    /// made orthogonal. By default [`Products::Tf32`] where the first trained Var is of half precision, and else [`Products::Exact`]. Small
    /// blocks, whose products share launches, inverses, and everything on a CPU or in f64 are exact in any case.
    pub products: Option<Products>,
    /// Which member of the family it is, with the options of its own.
    pub wake: Wake,
}

/// An average of the parameters over the steps, `theta_bar_k = sum_i w_i theta_i / sum_i w_i` with `w_i ~ i^power`.
///
/// It is where a wake without a model leads: `theta_bar` minimizes `sum_i w_i D(theta_i, theta)` as far as `D` is quadratic with one
/// curvature. The noise of single steps cancels in it. So it is the better model to evaluate and to keep, most of all while steps are long.
///
/// The weights (polynomial-decay averaging, Shamir & Zhang 2013) reach back over about the last `1 / power` of all steps, so there is no time
/// constant to choose. It costs a copy of the parameters and an addition a step. Training itself is not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Average {
    /// The exponent of the weights, 8 by default; 0 weighs all steps alike.
    pub power: f64,
}

impl Default for Average {
    fn default() -> Self {
        Self { power: 8.0 }
    }
}
