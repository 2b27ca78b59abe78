//! The optimizer that all members of the family are, and its public face. `build.rs` constructs it, `observe.rs` takes in the
//! curvature, `direction.rs` and `step.rs` step, and what the members differ in is `rule.rs`.

use super::block::{Block, Param};
use super::device::DeviceStep;
use super::length::Slopes;
use super::observe::Observed;
use super::overlap::Ahead;
use super::params::{NonFinite, Params};
use super::rest::Adam;
use super::rule::WakeRule;
use crate::curvature::{Adaptive, Damping, Want};
use crate::gpu::beside::Beside;
use crate::tape::Layer;
use candle_core::{Result, Tensor, Var, backprop::GradStore, bail};
use candle_nn::Optimizer;
use std::sync::{Arc, OnceLock};

/// A curvature-aware optimizer with the wake rule `R`; see [`super::KFac`], [`super::SoKldWrm`], [`super::QKldWrm`],
/// [`super::QeKldWrm`] and [`super::KldWrm`].
///
/// Each step: forward, [`Natural::observe`] on the outputs, then `backward_step` (or `step` with gradients of one's own).
#[derive(Debug)]
pub struct Natural<R> {
    pub(super) params: Params<R>,
    pub(super) vars: Vec<Param>,
    /// Vars that are not trained; listed in the summary.
    pub(super) frozen: Vec<(String, Var)>,
    pub(super) blocks: Vec<Block>,
    pub(super) rest: Vec<Adam>,
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) wants: Vec<Option<Want>>,
    /// Steps taken.
    pub(super) steps: usize,
    pub(super) skipped: usize,
    /// `1 / lambda` of the last step.
    pub(super) previous_rate: Option<f64>,
    pub(super) damping: f64,
    /// What the lengths of steps have led to, under [`StepRule::AdaptiveKl`].
    pub(super) slopes: Slopes,
    /// The rate of `rest` at `lr = 1`.
    pub(super) rest_ratio: f64,
    /// The curvature of the coming step, as far as it has been seen.
    pub(super) observed: Option<Observed>,
    pub(super) accumulated: Option<Accumulated>,
    /// A prediction of the loss change that waits for the measured one.
    pub(super) predicted: Option<Predicted>,
    /// The averaged parameters, one a param, under [`Params::average`] and after the first step.
    pub(super) averages: Vec<Tensor>,
    /// QE's stored models, oldest first: a tensor for each of `vars`.
    pub(super) models: Vec<Vec<Tensor>>,
    /// Inverses that are made beside the steps, or wait to be used, under [`Params::overlap`].
    pub(super) ahead: Option<Ahead>,
    /// Where they are made, once some were.
    pub(super) beside: OnceLock<Beside>,
    /// The step's numbers and work space on a GPU, once a step was taken there.
    pub(super) device: Option<DeviceStep>,
    /// Whether the step under way is recorded or repeated by a [`super::Replay`], which counts it.
    pub(super) captured: bool,
    /// Whether new inverses are moved to where the old ones are, for the kernels that a [`super::Replay`] has recorded.
    pub(super) keep_inverses: bool,
    /// How often what recorded kernels read and write has moved.
    pub(super) moves: usize,
    /// Whether QE's closure has been seen to give the same outputs twice.
    pub(super) closure_checked: bool,
}

/// Gradients of micro-batches, each times its total of loss terms.
#[derive(Debug)]
pub(super) struct Accumulated {
    pub grads: Vec<Tensor>,
    /// Where it is read.
    pub loss: Option<f64>,
    pub total: f64,
}

/// A step whose effect on the loss is to be compared with the quadratic model's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Predicted {
    pub loss: f64,
    pub change: f64,
}

impl<R: WakeRule> Natural<R> {
    /// The options, with the learning rate as it is now.
    pub fn params(&self) -> &Params<R> {
        &self.params
    }

    /// Replaces the options between two steps, for schedules of anything but the rate (for that see
    /// `set_learning_rate`). A fixed damping takes effect at the next update of the inverses.
    ///
    /// # Errors
    /// When a value is senseless, or when tape, groups, bias, limits, sharing or ekfac change: they made the blocks.
    pub fn set_params(&mut self, params: Params<R>) -> Result<()> {
        params.check()?;
        let old = &self.params;
        let same_tape = params.tape.layers().len() == self.layers.len()
            && params.tape.layers().iter().zip(&self.layers).all(|(a, b)| Arc::ptr_eq(a, b));
        if !same_tape
            || params.groups != old.groups
            || params.bias != old.bias
            || params.factor_limit != old.factor_limit
            || params.memory_limit != old.memory_limit
            || params.sharing != old.sharing
            || params.ekfac != old.ekfac
        {
            bail!("{}: tape, groups, bias, limits, sharing and ekfac are fixed at construction", R::NAME)
        }
        if !matches!((params.damping, old.damping), (Damping::Adaptive(_), Damping::Adaptive(_))) {
            self.damping = params.damping.initial();
        }
        for param in &mut self.vars {
            let group = params.groups.of(&param.name);
            param.weight_decay = group.and_then(|g| g.weight_decay).unwrap_or(params.weight_decay);
        }
        if params.lr > 0.0 {
            self.rest_ratio = params.rest.lr / params.lr;
        }
        self.params = params;
        Ok(())
    }

    /// Steps taken so far; on a GPU those left out count too.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Steps left out under [`NonFinite::Skip`]; on a GPU as far as [`Natural::settle`] has seen.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// The KL divergence that the steps aim at as it is now (on a GPU, as [`Natural::settle`] saw it), at `lr` 1; `None` where a
    /// learning rate decides.
    pub fn kl_target(&self) -> Option<f64> {
        Some(self.params.step_rule.target()? * self.slopes.length.powi(2))
    }

    /// The damping as it is now.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Names of the Kronecker blocks: a layer's name, or `layer.weight` and `layer.bias` where the bias is apart.
    pub fn block_names(&self) -> Vec<&str> {
        self.blocks.iter().map(|b| b.name.as_str()).collect()
    }

    /// The averaged factors `A` `[groups, in, in]` and `G` `[groups, out, out]` of a block, once observed: `A` of the columns of its
    /// gradient's matrix, `G` of the rows. An embedding's table has a row for each of its own, so there `G` belongs to the inputs and
    /// `A` to the outputs. A factor beyond its limit is `[groups n, r, r]`, `n` runs of `r` rows, the last one filled up with zeros,
    /// or its sketch `[groups, rank + 1, d]` (see [`crate::linalg::sketch`]).
    pub fn factors(&self, block: &str) -> Option<(Tensor, Tensor)> {
        let state = &self.blocks.iter().find(|b| b.name == block)?.state;
        Some((state.factor_a.clone()?, state.factor_g.clone()?))
    }

    /// The gradients of a micro-batch, added up for [`Natural::step_accumulated`]. `loss` is the mean over its `terms` loss
    /// terms (examples, for a classifier). Call `observe` before, as for a step.
    pub fn accumulate(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        if terms == 0 {
            bail!("{}: a micro-batch without loss terms", R::NAME)
        }
        self.accumulate_weighted(loss, terms as f64)
    }

    /// [`Natural::accumulate`] of a weighted loss, `sum_n w_n l_n / total` with that `total`: [`crate::tape::Terms::total`] of what
    /// `observe_weighted` was shown. Over all micro-batches the loss is then the sum of all `w_n l_n` over the sum of the totals.
    ///
    /// # Errors
    /// When the total is not positive and finite, and as for a step.
    pub fn accumulate_weighted(&mut self, loss: &Tensor, total: f64) -> Result<()> {
        self.no_closure("accumulate")?;
        if !(total.is_finite() && total > 0.0) {
            bail!("{}: expected a micro-batch with a positive total of loss terms, got {total}", R::NAME)
        }
        let result = self.add_micro_batch(loss, total);
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn add_micro_batch(&mut self, loss: &Tensor, weight: f64) -> Result<()> {
        let (value, grads) = self.backward(loss)?;
        self.close_pass()?;
        let weighted = |g: &Tensor| crate::curvature::wide(g)? * weight;
        let grads = grads.iter().map(weighted).collect::<Result<Vec<_>>>()?;
        let value = value.map(|value| value * weight);
        let (grads, loss, total) = match self.accumulated.take() {
            None => (grads, value, weight),
            Some(sum) => {
                let grads = sum.grads.iter().zip(&grads).map(|(a, b)| a + b).collect::<Result<_>>()?;
                let loss = sum.loss.zip(value).map(|(sum, value)| sum + value);
                (grads, loss, sum.total + weight)
            }
        };
        self.accumulated = Some(Accumulated { grads, loss, total });
        Ok(())
    }

    /// The step on the accumulated micro-batches: the one that their union would give.
    pub fn step_accumulated(&mut self) -> Result<()> {
        let Some(Accumulated { grads, loss, total }) = self.accumulated.take() else {
            bail!("{}: nothing was accumulated", R::NAME)
        };
        let grads = grads.into_iter().map(|g| g / total).collect::<Result<Vec<_>>>()?;
        self.advance(grads, loss.map(|loss| loss / total))
    }

    /// The loss's value and gradients, one a param. A step on a GPU has no use for the value, and does not wait for it.
    pub(super) fn backward(&mut self, loss: &Tensor) -> Result<(Option<f64>, Vec<Tensor>)> {
        let _span = tracing::info_span!("backward").entered();
        if self.gpu().is_some() {
            return Ok((None, self.gradients(&loss.backward()?)?));
        }
        let value = scalar(loss)?;
        self.check_loss(value)?;
        let grads = loss.backward()?;
        Ok((Some(value), self.gradients(&grads)?))
    }

    /// Refuses a loss that is no number, unless such steps are left out.
    pub(super) fn check_loss(&self, loss: f64) -> Result<()> {
        if !loss.is_finite() && self.params.non_finite == NonFinite::Error {
            bail!("{}: step {}: the loss is {loss}; parameters and state are unchanged", R::NAME, self.steps)
        }
        Ok(())
    }

    /// Picks the gradient of every param out of a store: in the dtype of the state, but on a GPU, whose kernels widen what they
    /// read.
    pub(super) fn gradients(&self, grads: &GradStore) -> Result<Vec<Tensor>> {
        let missing: Vec<&str> =
            self.vars.iter().filter(|p| grads.get(&p.var).is_none()).map(|p| p.name.as_str()).collect();
        if !missing.is_empty() {
            bail!(
                "{}: no gradient for {}. Either the loss does not depend on them (freeze them by name: \
                 Group {{ frozen: true, .. }}; a BatchNorm's running statistics are such Vars), or an operation cuts the \
                 graph: candle's fused layer_norm, rms_norm, softmax_last_dim and rope have no gradient, kronwake::nn's \
                 have",
                R::NAME,
                missing.join(", ")
            )
        }
        let on_gpu = self.gpu().is_some();
        let mut found = Vec::with_capacity(self.vars.len());
        for param in &self.vars {
            if let Some(grad) = grads.get(&param.var) {
                found.push(if on_gpu { grad.clone() } else { crate::curvature::wide(grad)? });
            }
        }
        Ok(found)
    }

    /// QE steps through `step_with` alone.
    pub(super) fn no_closure(&self, called: &str) -> Result<()> {
        if self.params.wake.inner().is_some() {
            bail!("{}: {called} cannot evaluate the model again; call step_with(&loss, closure)", R::NAME)
        }
        Ok(())
    }

    /// Whether the step just taken is one whose loss is to be measured again, under [`Damping::Adaptive`].
    pub fn wants_loss_after(&self) -> bool {
        self.predicted.is_some()
    }

    /// Takes the loss after the last step, on that step's batch, and adapts the damping. No effect unless
    /// [`Natural::wants_loss_after`].
    pub fn adapt_damping(&mut self, loss_after: &Tensor) -> Result<()> {
        if let (Some(predicted), Some(adaptive)) = (self.predicted, self.adaptive()) {
            let actual = scalar(loss_after)? - predicted.loss;
            self.damping = adaptive.next(self.damping, actual, predicted.change);
            self.predicted = None;
        }
        Ok(())
    }

    pub(super) fn adaptive(&self) -> Option<Adaptive> {
        match self.params.damping {
            Damping::Adaptive(adaptive) => Some(adaptive),
            _ => None,
        }
    }
}

impl<R: WakeRule> Optimizer for Natural<R> {
    type Config = Params<R>;

    fn new(vars: Vec<Var>, params: Params<R>) -> Result<Self> {
        Self::build(vars.into_iter().map(|var| (None, var)).collect(), params)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.no_closure("step")?;
        let grads = match self.gradients(grads) {
            Ok(grads) => grads,
            Err(error) => {
                self.forget();
                return Err(error);
            }
        };
        self.advance(grads, None)
    }

    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        self.no_closure("backward_step")?;
        match self.backward(loss) {
            Ok((value, grads)) => self.advance(grads, value),
            Err(error) => {
                self.forget();
                Err(error)
            }
        }
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
        self.params.rest.lr = self.rest_ratio * lr;
    }
}

/// A loss as a number.
pub(super) fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        bail!("loss: expected a scalar, got shape {:?}", loss.dims())
    }
    loss.detach().flatten_all()?.to_dtype(candle_core::DType::F64)?.get(0)?.to_scalar()
}
