//! The optimizer that all members of the family are: construction, observation of the curvature, and the public face.
//! The step itself is in `step.rs`, its wake in `rule.rs`.

use super::block::{Block, BlockState, Param, Part, master, parts};
use super::groups::Rule;
use super::params::{NonFinite, Params};
use super::rest::Adam;
use super::rule::WakeRule;
use super::step::{Refresh, Refusal, sum};
use crate::curvature::{Adaptive, Damping, FactorSums, Want};
use crate::ops::sample::DrawKey;
use crate::tape::{Fisher, Layer, Likelihood};
use candle_core::{Result, Tensor, Var, backprop::GradStore, bail};
use candle_nn::{Optimizer, VarMap};
use std::sync::{Arc, Mutex};

/// A curvature-aware optimizer with the wake rule `R`; see [`super::KFac`], [`super::SoKldWrm`], [`super::QKldWrm`] and
/// [`super::QeKldWrm`].
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
    pub(super) previous_lr: Option<f64>,
    pub(super) damping: f64,
    /// The rate of `rest` at `lr = 1`.
    pub(super) rest_ratio: f64,
    /// The curvature of the coming step, as far as it has been seen.
    pub(super) observed: Option<Observed>,
    pub(super) accumulated: Option<Accumulated>,
    /// A prediction of the loss change that waits for the measured one.
    pub(super) predicted: Option<Predicted>,
    /// QE's stored models, oldest first: a tensor for each of `vars`.
    pub(super) models: Vec<Vec<Tensor>>,
    /// Whether QE's closure has been seen to give the same outputs twice.
    pub(super) closure_checked: bool,
}

/// Factor sums of the coming step.
pub(super) struct Observed {
    pub sums: Arc<Mutex<FactorSums>>,
    /// The tape listens to the user's backward pass (empirical Fisher).
    pub armed: bool,
    /// Why the step has to be left out, under [`NonFinite::Skip`].
    pub unusable: Option<String>,
}

impl std::fmt::Debug for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observed").field("armed", &self.armed).finish_non_exhaustive()
    }
}

/// Gradients of micro-batches, each times its number of loss terms.
#[derive(Debug)]
pub(super) struct Accumulated {
    pub grads: Vec<Tensor>,
    pub loss: f64,
    pub terms: usize,
}

/// A step whose effect on the loss is to be compared with the quadratic model's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Predicted {
    pub loss: f64,
    pub change: f64,
}

impl<R: WakeRule> Natural<R> {
    /// An optimizer of every float Var of `varmap`, which also gives their names. Prefer this to `new`: state is saved and
    /// groups are matched by name, and a `Vec<Var>` has none for Vars outside tapped layers.
    pub fn from_varmap(varmap: &VarMap, params: Params<R>) -> Result<Self> {
        let mut vars: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("{}: the VarMap's lock is poisoned", R::NAME),
        };
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        Self::build(vars.into_iter().map(|(name, var)| (Some(name), var)).collect(), params)
    }

    fn build(vars: Vec<(Option<String>, Var)>, params: Params<R>) -> Result<Self> {
        params.check()?;
        let layers = params.tape.layers();
        let layer_name = |var: &Var| {
            layers.iter().find_map(|layer| {
                let is = |t: &Tensor| t.id() == var.id();
                (is(&layer.weight).then(|| format!("{}.weight", layer.name)))
                    .or_else(|| layer.bias.as_ref().is_some_and(is).then(|| format!("{}.bias", layer.name)))
            })
        };
        let mut all: Vec<(String, bool, Var)> = vec![];
        for (index, (name, var)) in vars.into_iter().enumerate() {
            if !var.dtype().is_float() || all.iter().any(|(_, _, seen)| seen.id() == var.id()) {
                continue;
            }
            let name = name.or_else(|| layer_name(&var));
            all.push((name.clone().unwrap_or_else(|| format!("var{index}")), name.is_some(), var));
        }
        let names: Vec<&str> = all.iter().map(|(name, _, _)| name.as_str()).collect();
        params.groups.check(&names)?;

        let mut trained = vec![];
        let mut frozen = vec![];
        let mut adam_only = vec![];
        for (name, named, var) in all {
            let group = params.groups.of(&name);
            if group.is_some_and(|g| g.frozen) {
                frozen.push((name, var));
                continue;
            }
            adam_only.push(group.and_then(|g| g.rule) == Some(Rule::Adam));
            trained.push(Param {
                master: master(&var)?,
                lr_scale: group.map_or(1.0, |g| g.lr_scale),
                weight_decay: group.and_then(|g| g.weight_decay).unwrap_or(params.weight_decay),
                name,
                named,
                var,
            });
        }
        let find = |t: &Tensor| (0..trained.len()).find(|&i| trained[i].var.id() == t.id() && !adam_only[i]);
        let mut blocks = vec![];
        let mut wants = vec![];
        for layer in &layers {
            let weight = find(&layer.weight);
            let bias = layer.bias.as_ref().and_then(find);
            let parts = parts(weight.map(|i| &trained[i]), bias.map(|i| &trained[i]), params.bias);
            wants.push((!parts.is_empty()).then(|| Want {
                weight: weight.is_some(),
                folded: parts.contains(&Part::Folded),
                bias: parts.contains(&Part::Bias),
                keep: params.ekfac,
            }));
            for part in parts {
                blocks.push(block(layer, part, weight, bias, &trained)?);
            }
        }
        for (index, param) in trained.iter().enumerate() {
            let rule = params.groups.of(&param.name).and_then(|g| g.rule);
            if rule == Some(Rule::Kronecker) && !blocks.iter().any(|b| b.params.contains(&index)) {
                bail!(
                    "{}: group asks for a Kronecker block, but {} belongs to no tapped layer",
                    R::NAME,
                    param.name
                )
            }
        }
        let rest = (0..trained.len())
            .filter(|i| !blocks.iter().any(|b| b.params.contains(i)))
            .map(|param| Adam { param, steps: 0, moments: None })
            .collect();
        let rest_ratio = if params.lr > 0.0 { params.rest.lr / params.lr } else { 1.0 };
        Ok(Self {
            damping: params.damping.initial(),
            params,
            vars: trained,
            frozen,
            blocks,
            rest,
            layers,
            wants,
            steps: 0,
            skipped: 0,
            previous_lr: None,
            rest_ratio,
            observed: None,
            accumulated: None,
            predicted: None,
            models: vec![],
            closure_checked: false,
        })
    }

    /// The options, with the learning rate as it is now.
    pub fn params(&self) -> &Params<R> {
        &self.params
    }

    /// Replaces the options between two steps, for schedules of anything but the rate (for that see
    /// `set_learning_rate`). A fixed damping takes effect at the next update of the inverses.
    ///
    /// # Errors
    /// When a value is senseless, or when tape, groups, bias, sharing or ekfac change: they made the blocks.
    pub fn set_params(&mut self, params: Params<R>) -> Result<()> {
        params.check()?;
        let old = &self.params;
        let same_tape = params.tape.layers().len() == self.layers.len()
            && params.tape.layers().iter().zip(&self.layers).all(|(a, b)| Arc::ptr_eq(a, b));
        if !same_tape
            || params.groups != old.groups
            || params.bias != old.bias
            || params.sharing != old.sharing
            || params.ekfac != old.ekfac
        {
            bail!("{}: tape, groups, bias, sharing and ekfac are fixed at construction", R::NAME)
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

    /// Steps taken so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Steps left out under [`NonFinite::Skip`].
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// The damping as it is now.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Names of the Kronecker blocks: a layer's name, or `layer.weight` and `layer.bias` where the bias is apart.
    pub fn block_names(&self) -> Vec<&str> {
        self.blocks.iter().map(|b| b.name.as_str()).collect()
    }

    /// The averaged factors `A` `[groups, in, in]` and `G` `[groups, out, out]` of a block, once observed.
    pub fn factors(&self, block: &str) -> Option<(Tensor, Tensor)> {
        let state = &self.blocks.iter().find(|b| b.name == block)?.state;
        Some((state.factor_a.clone()?, state.factor_g.clone()?))
    }

    /// Whether the coming step needs [`Natural::observe`].
    pub fn curvature_due(&self) -> bool {
        self.steps.is_multiple_of(self.params.every.factors) && !self.blocks.is_empty()
    }

    /// Shows the optimizer the outputs of the forward pass whose step comes next. No work unless curvature is due.
    ///
    /// `outputs` are what the likelihood takes, `[.., classes]`, with their graph. With the empirical Fisher the
    /// backward pass that follows is listened to; its loss must be the mean over loss terms. Otherwise the passes for
    /// the curvature run here.
    ///
    /// # Errors
    /// When the batch is empty, the outputs hold no graph to a tapped layer, or are not finite.
    pub fn observe(&mut self, outputs: &Tensor, likelihood: Likelihood) -> Result<()> {
        self.observe_pass(outputs, likelihood, None)
    }

    /// [`Natural::observe`] with given labels in place of drawn ones: one pass, whatever [`Params::fisher`] says.
    ///
    /// `labels`: class numbers `[..]` for a categorical likelihood, targets in the outputs' shape for the others.
    pub fn observe_labels(
        &mut self,
        outputs: &Tensor,
        likelihood: Likelihood,
        labels: &Tensor,
    ) -> Result<()> {
        self.observe_pass(outputs, likelihood, Some(labels))
    }

    fn observe_pass(
        &mut self,
        outputs: &Tensor,
        likelihood: Likelihood,
        labels: Option<&Tensor>,
    ) -> Result<()> {
        let terms = likelihood.terms(outputs)?;
        if !self.curvature_due() {
            return Ok(());
        }
        let _span = tracing::info_span!("factors").entered();
        let sums = match &self.observed {
            Some(observed) if observed.armed => {
                bail!("{}: observe was called twice before a backward pass", R::NAME)
            }
            Some(observed) => observed.sums.clone(),
            None => Arc::new(Mutex::new(FactorSums::new(self.wants.clone(), self.params.sharing))),
        };
        if !sum(&outputs.detach())?.is_finite() {
            let what = format!("the observed outputs {:?} have NaN or infinite elements", outputs.dims());
            if self.params.non_finite == NonFinite::Error {
                bail!("{}: step {}: {what}; parameters and state are unchanged", R::NAME, self.steps)
            }
            self.observed = Some(Observed { sums, armed: false, unusable: Some(what) });
            return Ok(());
        }
        let first = lock(&sums).terms() as u64;
        let tape = self.params.tape.clone();
        let step = self.steps as u64;
        let pass = |cotangent: &Tensor, scale: f64, fresh: bool| -> Result<()> {
            lock(&sums).begin(terms, scale, fresh);
            tape.reduce_into(outputs, cotangent, sums.clone())?;
            lock(&sums).end()
        };
        let mut armed = false;
        let passes: Box<dyn Iterator<Item = Result<Tensor>>> = match (labels, self.params.fisher) {
            (Some(labels), _) => Box::new([likelihood.label_cotangent(outputs, labels)].into_iter()),
            (None, Fisher::Empirical) => {
                lock(&sums).begin(terms, terms as f64, true);
                tape.arm(sums.clone(), true)?;
                armed = true;
                Box::new(std::iter::empty())
            }
            (None, Fisher::Sampled { draws, seed }) => Box::new((0..draws as u64).map(move |draw| {
                likelihood.sampled_cotangent(outputs, DrawKey { seed, step, draw, first_row: first })
            })),
            (None, Fisher::Exact) => Box::new(likelihood.exact_cotangents(outputs)?),
        };
        // Draws are averaged, the columns of an exact square root add up.
        let scale = match self.params.fisher {
            Fisher::Sampled { draws, .. } if labels.is_none() => 1.0 / (draws as f64).sqrt(),
            _ => 1.0,
        };
        for (index, cotangent) in passes.enumerate() {
            pass(&cotangent?, scale, index == 0)?;
        }
        let unusable = self.observed.take().and_then(|observed| observed.unusable);
        self.observed = Some(Observed { sums, armed, unusable });
        Ok(())
    }

    /// Stops listening and closes the pass, if the tape was armed.
    pub(super) fn close_pass(&mut self) -> Result<()> {
        let Some(observed) = &mut self.observed else { return Ok(()) };
        if std::mem::take(&mut observed.armed) {
            self.params.tape.disarm();
            lock(&observed.sums).end()?;
        }
        Ok(())
    }

    /// Forgets what was observed; the state of a step that failed or is left out.
    pub(super) fn forget(&mut self) {
        if let Some(observed) = self.observed.take()
            && observed.armed
        {
            self.params.tape.disarm();
        }
        self.accumulated = None;
    }

    /// The factors of the coming step with their number of loss terms, when they are due.
    pub(super) fn take_factors(&mut self) -> std::result::Result<Refresh, Refusal> {
        self.close_pass()?;
        let observed = self.observed.take();
        if !self.curvature_due() {
            return Ok(None);
        }
        let failed = |what: String| Refusal::Failed(candle_core::Error::Msg(format!("{}: {what}", R::NAME)));
        let Some(observed) = observed else {
            return Err(failed(format!(
                "step {} needs the curvature; call observe(&outputs, likelihood) between the forward pass and the step",
                self.steps
            )));
        };
        if let Some(what) = observed.unusable {
            return Err(Refusal::NonFinite(what));
        }
        let Ok(sums) =
            Arc::try_unwrap(observed.sums).map(|m| m.into_inner().unwrap_or_else(|p| p.into_inner()))
        else {
            return Err(failed("the observed curvature is still in use".into()));
        };
        let terms = sums.terms();
        Ok(Some((sums.finish(&self.layers)?, terms)))
    }

    /// The gradients of a micro-batch, added up for [`Natural::step_accumulated`]. `loss` is the mean over its `terms` loss
    /// terms (examples, for a classifier). Call `observe` before, as for a step.
    pub fn accumulate(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        self.no_closure("accumulate")?;
        if terms == 0 {
            bail!("{}: a micro-batch without loss terms", R::NAME)
        }
        let result = self.add_micro_batch(loss, terms);
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn add_micro_batch(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        let (value, grads) = self.backward(loss)?;
        self.close_pass()?;
        let weight = terms as f64;
        let grads = grads.into_iter().map(|g| g * weight).collect::<Result<Vec<_>>>()?;
        let (grads, loss, terms) = match self.accumulated.take() {
            None => (grads, value * weight, terms),
            Some(sum) => {
                let grads = sum.grads.iter().zip(&grads).map(|(a, b)| a + b).collect::<Result<_>>()?;
                (grads, sum.loss + value * weight, sum.terms + terms)
            }
        };
        self.accumulated = Some(Accumulated { grads, loss, terms });
        Ok(())
    }

    /// The step on the accumulated micro-batches: the one that their union would give.
    pub fn step_accumulated(&mut self) -> Result<()> {
        let Some(Accumulated { grads, loss, terms }) = self.accumulated.take() else {
            bail!("{}: nothing was accumulated", R::NAME)
        };
        let grads = grads.into_iter().map(|g| g / terms as f64).collect::<Result<Vec<_>>>()?;
        self.advance(grads, Some(loss / terms as f64))
    }

    /// The loss's value and gradients, one a param, in the dtype of the state.
    pub(super) fn backward(&mut self, loss: &Tensor) -> Result<(f64, Vec<Tensor>)> {
        let _span = tracing::info_span!("backward").entered();
        let value = scalar(loss)?;
        if !value.is_finite() && self.params.non_finite == NonFinite::Error {
            bail!("{}: step {}: the loss is {value}; parameters and state are unchanged", R::NAME, self.steps)
        }
        let grads = loss.backward()?;
        Ok((value, self.gradients(&grads)?))
    }

    /// Picks the gradient of every param out of a store.
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
        let mut found = Vec::with_capacity(self.vars.len());
        for param in &self.vars {
            if let Some(grad) = grads.get(&param.var) {
                found.push(crate::curvature::wide(grad)?);
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
            Ok((value, grads)) => self.advance(grads, Some(value)),
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

/// One block of a layer.
fn block(
    layer: &Layer,
    part: Part,
    weight: Option<usize>,
    bias: Option<usize>,
    params: &[Param],
) -> Result<Block> {
    let (out, columns, groups) = (layer.out_features(), layer.in_features(), layer.groups.max(1));
    let base = match weight {
        Some(w) => params[w].name.strip_suffix(".weight").unwrap_or(&params[w].name).to_string(),
        None => layer.name.clone(),
    };
    let (indices, name, groups, columns) = match part {
        Part::Folded => (vec![weight, bias], base, groups, columns + 1),
        Part::Weight if layer.bias.is_none() => (vec![weight], base, groups, columns),
        Part::Weight => (vec![weight], format!("{base}.weight"), groups, columns),
        Part::Bias => (vec![bias], format!("{base}.bias"), 1, 1),
    };
    let indices: Vec<usize> = indices.into_iter().flatten().collect();
    let lr_scale = indices.first().map_or(1.0, |&i| params[i].lr_scale);
    let state = BlockState::default();
    Ok(Block {
        name,
        layer: layer.index,
        part,
        groups,
        out: out / groups,
        columns,
        params: indices,
        lr_scale,
        state,
    })
}

/// A loss as a number.
pub(super) fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        bail!("loss: expected a scalar, got shape {:?}", loss.dims())
    }
    loss.detach().flatten_all()?.to_dtype(candle_core::DType::F64)?.get(0)?.to_scalar()
}

pub(super) fn lock(sums: &Mutex<FactorSums>) -> std::sync::MutexGuard<'_, FactorSums> {
    sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
