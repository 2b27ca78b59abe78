//! The optimizer: what a user holds. `build.rs` makes it, `observe.rs` takes in the curvature, `gradients.rs` and `accumulate.rs` the
//! gradients, and `advance.rs` takes the step that `optim/step` describes.

mod accumulate;
mod advance;
mod average;
mod build;
mod constrain;
mod divergence;
mod exchange;
mod gradients;
mod inner_steps;
mod observe;
mod owned;
mod replay;
mod settle;
mod together;
mod under_way;

pub use divergence::{BlockDivergence, StepDivergence};
pub use inner_steps::Outputs;
pub use replay::Replay;

use super::numbers::scalar;
use super::params::Params;
use super::share::Share;
use super::state::pending::Workplace;
use super::state::{AdamRate, Core, Elsewhere, Resumed};
use super::step::work_space::DeviceStep;
use super::summary::{Summary, Together, check_memory, free_memory};
use crate::curvature::{Damping, Want};
use crate::parallel::Placement;
use crate::tape::Layer;
use candle_core::{Result, Tensor, Var, backprop::GradStore, bail};
use candle_nn::Optimizer;
use std::path::Path;
use std::sync::Arc;
use under_way::{Accumulated, Observed};

/// A curvature-aware optimizer: K-FAC, SO-, Q-, QE-KLD-WRM or KLD-WRM, as [`Params::wake`] says.
///
/// Each step: forward, [`observe`](Self::observe) on the outputs, then `backward_step` (or `step` with gradients of one's own).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::nn::{self, Module, VarBuilder, VarMap};
/// use kronwake::optim::{NaturalGradient, Optimizer, Params, Wake};
/// use kronwake::tape::{Likelihood, Tape};
/// # fn main() -> candle_core::Result<()> {
/// let (vars, tape) = (VarMap::new(), Tape::new());
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let model = tape.build(|| nn::linear(4, 3, vb.pp("fc")))?;
/// let chosen: Wake = "so-kld-wrm".parse()?; // from a command line, say
/// let mut optimizer = NaturalGradient::from_varmap(&vars, Params::of(chosen, &tape))?;
/// let (x, y) = (Tensor::randn(0f32, 1., (8, 4), &Device::Cpu)?, Tensor::zeros(8, DType::U32, &Device::Cpu)?);
/// let logits = model.forward(&x)?;
/// optimizer.observe(&logits, Likelihood::Categorical)?;
/// optimizer.backward_step(&nn::loss::cross_entropy(&logits, &y)?)?;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "KFac")]
#[doc(alias = "K-FAC")]
#[doc(alias = "KldWrm")]
#[doc(alias = "KLD-WRM")]
#[doc(alias = "SoKldWrm")]
#[doc(alias = "QKldWrm")]
#[doc(alias = "QeKldWrm")]
#[derive(Debug)]
pub struct NaturalGradient {
    core: Core,
    layers: Vec<Arc<Layer>>,
    /// What each layer's records are wanted for.
    wants: Vec<Option<Want>>,
    /// The curvature of the coming step, as far as it has been seen.
    observed: Option<Observed>,
    accumulated: Option<Accumulated>,
    /// The tie to the optimizers of other processes, where there are some.
    shared: Option<Share>,
    /// Where inverses are made beside the steps, once some were.
    workplace: Workplace,
    /// The step's numbers and work space on a GPU, once a step was taken there.
    device: Option<DeviceStep>,
    /// Which params have been said to take no part in a step.
    told: Vec<bool>,
    /// Whether the step under way is recorded or repeated by a [`Replay`], which counts it.
    captured: bool,
    /// Whether new inverses are moved to where the old ones are, for the kernels that a [`Replay`] has recorded.
    keep_inverses: bool,
    /// How often what recorded kernels read and write has moved.
    moves: usize,
}

impl NaturalGradient {
    /// The options, with the learning rate as it is now.
    pub fn params(&self) -> &Params {
        &self.core.params
    }

    /// Replaces the options between two steps, for schedules of anything but the rate. (For the rate there is `set_learning_rate`.) A damping
    /// takes effect at the next update of the inverses.
    ///
    /// # Errors
    /// When a value is senseless, or not for the Vars' device. When tape, groups, bias, limits, budget, sharing, ekfac or the member of the family differ from what the optimizer
    /// was built with.
    pub fn set_params(&mut self, params: Params) -> Result<()> {
        params.check()?;
        let (name, old) = (self.core.name(), &self.core.params);
        let same_tape = params.tape.layers().len() == self.layers.len()
            && params.tape.layers().iter().zip(&self.layers).all(|(a, b)| Arc::ptr_eq(a, b));
        if !same_tape
            || params.groups != old.groups
            || params.bias != old.bias
            || params.factor_limit != old.factor_limit
            || params.budget != old.budget
            || params.memory_limit != old.memory_limit
            || params.sharing != old.sharing
            || params.ekfac != old.ekfac
        {
            bail!("{name}: tape, groups, bias, limits, budget, sharing and ekfac are fixed at construction")
        }
        if params.overlap > 0
            && let Some(shared) = &self.shared
            && shared.placement != Placement::Replicated
        {
            bail!(
                "{name}: expected overlap 0 where processes divide inverses or state, got {}",
                params.overlap
            )
        }
        if !params.wake.is_same_member(&old.wake) {
            bail!("{name}: the member of the family is fixed at construction, got {}", params.wake.name())
        }
        params.check_devices(&self.core.vars)?;
        match (params.damping, old.damping) {
            // These go on from where they are; a relative one is known once the next inverses are made.
            (Damping::Adaptive(_), Damping::Adaptive(_)) | (Damping::Relative(_), _) => {}
            (Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Adaptive(_), _) => {
                self.core.damping = params.damping.initial();
            }
        }
        for param in &mut self.core.vars {
            let group = params.groups.of(&param.name);
            param.weight_decay = group.and_then(|g| g.weight_decay).unwrap_or(params.weight_decay);
        }
        if params.lr > 0.0 {
            self.core.adam_rate = AdamRate::of(&params);
        }
        self.core.params = params;
        Ok(())
    }

    /// Steps taken so far. On a GPU, steps that were left out count too.
    pub fn steps(&self) -> usize {
        self.core.steps
    }

    /// Steps left out under [`NonFinite::Skip`](super::NonFinite::Skip). On a GPU the number is that of the last [`settle`](Self::settle).
    pub fn skipped(&self) -> usize {
        self.core.skipped
    }

    /// The KL divergence that the steps aim at now, at `lr` 1. On a GPU it is that of the last [`settle`](Self::settle). `None` where a
    /// learning rate decides.
    pub fn kl_target(&self) -> Option<f64> {
        Some(self.core.params.step_rule.target()? * self.core.slopes.length.powi(2))
    }

    /// The damping as it is now.
    pub fn damping(&self) -> f64 {
        self.core.damping
    }

    /// Says which Var is in which block, with bytes and cost. Known before the first step.
    pub fn summary(&self) -> Summary {
        let alone = Summary::of(&self.core);
        let together = self.shared.as_ref().map(|share| Together::of(&self.core, share, alone.bytes()));
        Summary { together, ..alone }
    }

    /// Names of the Kronecker blocks: a layer's name, or `layer.weight` and `layer.bias` where the bias is apart.
    pub fn block_names(&self) -> Vec<&str> {
        self.core.blocks.iter().map(|b| b.name.as_str()).collect()
    }

    /// The averaged factors `A` `[groups, in, in]` and `G` `[groups, out, out]` of a block, once curvature was observed.
    ///
    /// `A` belongs to the columns of the gradient's matrix, `G` to the rows. The matrix of an embedding has a row for each row of its table:
    /// there `G` belongs to the inputs and `A` to the outputs. A factor beyond its limit has another form: block-diagonal, `[groups n, r, r]`
    /// with `n` blocks of `r` rows, the last one filled up with zeros; or of low rank, `[groups, rank + 1, d]`, its products with `rank`
    /// fixed vectors and its diagonal. Under [`Placement::Owned`](crate::parallel::Placement::Owned) its owner alone has them.
    pub fn factors(&self, block: &str) -> Option<(Tensor, Tensor)> {
        let state = &self.core.blocks.iter().find(|b| b.name == block)?.state;
        Some((state.factor_a.clone()?, state.factor_g.clone()?))
    }

    /// Whether the loss is to be measured again after the step just taken, under [`Damping::Adaptive`].
    pub fn wants_loss_after(&self) -> bool {
        self.core.predicted.is_some()
    }

    /// Adapts the damping to `loss_after`, the loss after the last step on that step's batch. No effect unless
    /// [`wants_loss_after`](Self::wants_loss_after).
    ///
    /// # Errors
    /// When the loss is not a scalar.
    pub fn adapt_damping(&mut self, loss_after: &Tensor) -> Result<()> {
        if let (Some(predicted), Some(adaptive)) = (self.core.predicted, self.core.adaptive()) {
            let actual = self.mean_loss("adapt_damping", || scalar(loss_after))? - predicted.loss;
            self.core.damping = adaptive.next(self.core.damping, actual, predicted.change);
            self.core.predicted = None;
        }
        Ok(())
    }

    /// Writes parameters and state to a safetensors file. A file that is already there is replaced at once or not at all. Of several
    /// processes all call it and rank 0 writes; any number of processes can resume the file.
    ///
    /// # Errors
    /// When a Var has no name: build with [`from_varmap`](Self::from_varmap). When micro-batches or an observation wait for their step. When
    /// the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let messages = self.gather_elsewhere()?;
        let write = || self.write(path.as_ref(), self.elsewhere(messages)?);
        self.all_did("save", if self.writes() { write() } else { Ok(()) })
    }

    fn write(&self, path: &Path, elsewhere: Elsewhere) -> Result<()> {
        self.core.check_named()?;
        if self.accumulated.is_some() || self.observed.is_some() {
            bail!("{}: save between two steps; one is under way", self.core.name())
        }
        let seen = self.seen()?;
        self.core.save(path, elsewhere, seen.slopes, seen.previous_rate, seen.skipped)
    }

    /// Restores parameters and state, the learning rate included, from a file that [`save`](Self::save) wrote with the same member on the same
    /// model. The steps that follow are those that would have followed there. Factors that are chosen by cost
    /// ([`Beyond::ByCost`](crate::curvature::Beyond::ByCost)) keep the shapes that they have in the file, whatever would be chosen here.
    ///
    /// # Errors
    /// When the file is unreadable, or does not fit: one message lists every difference, and nothing has changed.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.restore(path.as_ref(), false).map(drop)
    }

    /// Takes a file that all processes could read.
    fn restore(&mut self, path: &Path, partly: bool) -> Result<Resumed> {
        let shapes = self.core.factor_shapes();
        // Before the file's tensors lie there too, most of which the new state consists of.
        let read = free_memory(&self.core).and_then(|free| {
            let read = self.core.read_state(path, partly)?;
            if self.core.factor_shapes() != shapes {
                check_memory(&self.core, free)?;
            }
            Ok(read)
        });
        let (state, outcome) = match read {
            Ok(state) => (Some(state), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let agreed = self.all_did("resume", outcome);
        if agreed.is_err() {
            self.core.set_factor_shapes(&shapes);
        }
        agreed?;
        self.want_again();
        let Some((resumed, state)) = state else { bail!("{}: no state was read", self.core.name()) };
        let taken = self.core.take_state(state);
        self.agree_on_state(taken)?;
        self.core.keep_own();
        self.forget_with_others();
        self.device = None;
        Ok(resumed)
    }

    /// [`resume`](Self::resume) where the file was written with other Vars frozen or present, as when a model is unfrozen step by step:
    /// what the file knows is restored, and blocks that it does not know begin anew, with curvature at the next step. Returns what that
    /// is, and what of the file was not taken.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kronwake::nn::{self, Module, VarBuilder, VarMap, loss::cross_entropy};
    /// # use kronwake::optim::{Group, Groups, NaturalGradient, Optimizer, Params};
    /// # use kronwake::tape::{Likelihood, Tape};
    /// # fn main() -> candle_core::Result<()> {
    /// # let (vars, tape) = (VarMap::new(), Tape::new());
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// # let (body, head) = tape.build(|| Ok((nn::linear(4, 5, vb.pp("body"))?, nn::linear(5, 3, vb.pp("head"))?)))?;
    /// # let (x, y) = (Tensor::randn(0f32, 1., (8, 4), &Device::Cpu)?, Tensor::zeros(8, DType::U32, &Device::Cpu)?);
    /// let step = |optimizer: &mut NaturalGradient| {
    ///     let logits = head.forward(&body.forward(&x)?.tanh()?)?;
    ///     optimizer.observe(&logits, Likelihood::Categorical)?;
    ///     optimizer.backward_step(&cross_entropy(&logits, &y)?)
    /// };
    /// let groups = Groups(vec![Group { frozen: true, ..Group::named("body.*") }]);
    /// let mut first = NaturalGradient::from_varmap(&vars, Params { groups, ..Params::kld_wrm(&tape) })?;
    /// step(&mut first)?;
    /// let path = std::env::temp_dir().join("kronwake-head.safetensors");
    /// first.save(&path)?;
    /// let mut all = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?;
    /// assert_eq!(all.resume_partly(&path)?.fresh, ["body"]);
    /// step(&mut all)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the file is unreadable or holds no optimizer state, or what it does hold does not fit; nothing has changed then.
    pub fn resume_partly(&mut self, path: impl AsRef<Path>) -> Result<Resumed> {
        self.restore(path.as_ref(), true)
    }
}

impl Optimizer for NaturalGradient {
    type Config = Params;

    fn new(vars: Vec<Var>, params: Params) -> Result<Self> {
        Self::build(vars.into_iter().map(|var| (None, var)).collect(), params)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.no_closure("step")?;
        let local = match self.has_no_rows() {
            true => Ok(self.no_gradients()),
            false => self.gradients(grads).map(|grads| (None, grads)),
        };
        self.advance(local)
    }

    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        self.no_closure("backward_step")?;
        let local = self.backward(loss);
        self.advance(local)
    }

    fn learning_rate(&self) -> f64 {
        self.core.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.core.set_learning_rate(lr);
    }
}
