//! Gradients as the step takes them, from a loss or a store.

use super::NaturalGradient;
use super::under_way::lock;
use crate::curvature::wide;
use crate::optim::LossScale;
use crate::optim::numbers::scalar;
use crate::optim::params::NonFinite;
use crate::stack::deep;
use candle_core::{Result, Tensor, backprop::GradStore, bail};

/// A loss's value, where it was read, and gradients.
pub(super) type Backward = (Option<f64>, Vec<Option<Tensor>>);

impl NaturalGradient {
    /// Does as [`backward_step`](super::Optimizer::backward_step), by way of the scaled loss: for models in f16. Returns whether there was a
    /// step. Where a gradient overflows none is taken, and what was observed for it is forgotten.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kronwake::nn::{self, Module, VarBuilder, VarMap, loss};
    /// use kronwake::optim::{LossScale, NaturalGradient, Params};
    /// use kronwake::tape::{Likelihood, Tape};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let (vars, tape) = (VarMap::new(), Tape::new());
    /// let vb = VarBuilder::from_varmap(&vars, DType::F16, &Device::Cpu);
    /// let model = tape.build(|| nn::linear(3, 2, vb.pp("fc")))?;
    /// let mut kfac = NaturalGradient::from_varmap(&vars, Params::k_fac(&tape))?;
    /// let mut scale = LossScale::default();
    /// let x = Tensor::randn(0f32, 1., (8, 3), &Device::Cpu)?.to_dtype(DType::F16)?;
    /// let y = Tensor::from_iter((0..8).map(|i| i % 2u32), &Device::Cpu)?;
    /// let logits = model.forward(&x)?.to_dtype(DType::F32)?;
    /// kfac.observe(&logits, Likelihood::Categorical)?;
    /// assert!(kfac.backward_step_scaled(&loss::cross_entropy(&logits, &y)?, &mut scale)?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As `backward_step`, and if the scale is not a finite number above 0.
    pub fn backward_step_scaled(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<bool> {
        self.no_closure("backward_step_scaled")?;
        let local = self.scaled_gradients(loss, scale);
        match self.all_finite(local, scale.scale) {
            Ok((local, finite)) => {
                scale.follow(finite);
                if finite {
                    return self.advance(Ok(local)).map(|()| true);
                }
                self.forget_with_others();
                Ok(false)
            }
            Err(error) => {
                self.forget_with_others();
                Err(error)
            }
        }
    }

    fn scaled_gradients(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<(Backward, bool)> {
        if self.has_no_rows() {
            return Ok((self.no_gradients(), true));
        }
        let value = scalar(loss)?;
        self.check_loss(value)?;
        let scaled = scale.scaled(loss)?;
        if let Some(observed) = self.observed.as_ref().filter(|observed| observed.armed) {
            lock(&observed.sums).divide(scale.scale);
        }
        let grads = self.gradients(&deep(|| scaled.backward())?)?;
        let found: Vec<Tensor> = grads.iter().flatten().cloned().collect();
        let (unscaled, finite) = scale.divided(found)?;
        let mut unscaled = unscaled.into_iter();
        let grads = grads.into_iter().map(|grad| grad.and_then(|_| unscaled.next())).collect();
        Ok(((Some(value), grads), finite))
    }

    /// The loss's value and gradients, one a param. A step on a GPU has no use for the value, and does not wait for it.
    pub(super) fn backward(&mut self, loss: &Tensor) -> Result<Backward> {
        let _span = tracing::info_span!("backward").entered();
        if self.has_no_rows() {
            return Ok(self.no_gradients());
        }
        if self.gpu().is_some() {
            return Ok((None, self.gradients(&deep(|| loss.backward())?)?));
        }
        let value = scalar(loss)?;
        self.check_loss(value)?;
        let grads = deep(|| loss.backward())?;
        Ok((Some(value), self.gradients(&grads)?))
    }

    /// Refuses a loss that is no number, unless such steps are left out.
    pub(super) fn check_loss(&self, loss: f64) -> Result<()> {
        let core = &self.core;
        // With several processes all hear of it at the step.
        if !loss.is_finite() && core.params.non_finite == NonFinite::Error && self.shared.is_none() {
            bail!(
                "{}: step {}: the loss is {loss}; parameters and state are unchanged",
                core.name(),
                core.steps
            )
        }
        Ok(())
    }

    /// Picks the gradient of every param out of a store: in the dtype of the state, but on a GPU, whose kernels widen what they
    /// read.
    pub(super) fn gradients(&mut self, grads: &GradStore) -> Result<Vec<Option<Tensor>>> {
        let core = &self.core;
        let missing: Vec<&str> = core
            .vars
            .iter()
            .filter(|param| !param.optional && grads.get(&param.var).is_none())
            .map(|param| param.name.as_str())
            .collect();
        if !missing.is_empty() {
            bail!(
                "{}: no gradient for {}. Either the loss does not depend on them (freeze them by name: \
                 Group {{ frozen: true, .. }}; a BatchNorm's running statistics are such Vars), or not in every step (experts \
                 without a token, skipped layers: Group {{ optional: true, .. }}), or an operation cuts the \
                 graph: candle's fused layer_norm, rms_norm, softmax_last_dim and rope have no gradient, kronwake::nn's \
                 have",
                core.name(),
                missing.join(", ")
            )
        }
        let on_gpu = self.gpu().is_some();
        let state = |grad: &Tensor| if on_gpu { Ok(grad.clone()) } else { wide(grad) };
        let pick = |param: &super::super::state::param::Param| grads.get(&param.var).map(state).transpose();
        let mut found = core.vars.iter().map(pick).collect::<Result<Vec<_>>>()?;
        if self.shared.is_none() {
            self.sit_out(&mut found)?;
        }
        Ok(found)
    }

    /// Takes out of `grads` what cannot take part, of the params that need not, and says once what does not.
    pub(super) fn sit_out<T>(&mut self, grads: &mut [Option<T>]) -> Result<()> {
        let core = &self.core;
        if core.vars.iter().all(|param| !param.optional) {
            return Ok(());
        }
        for (nth, block) in core.blocks.iter().enumerate() {
            let absent: Vec<usize> = block.params.iter().copied().filter(|&i| grads[i].is_none()).collect();
            if !absent.is_empty() && absent.len() < block.params.len() {
                bail!(
                    "{}: no gradient for {}, but for the rest of its block {}; Bias::Split gives each a block of its own",
                    core.name(),
                    core.vars[absent[0]].name,
                    block.name
                )
            }
            // A block that was never seen when curvature was due waits for the next time.
            if !core.has_curvature(nth) && !core.curvature_due() {
                for &index in &block.params {
                    if core.vars[index].optional {
                        grads[index] = None;
                    }
                }
            }
        }
        for (index, (param, grad)) in core.vars.iter().zip(grads).enumerate() {
            if grad.is_none() && !std::mem::replace(&mut self.told[index], true) {
                let (name, step) = (core.name(), core.steps);
                tracing::info!("{name}: {} takes no part in step {step}; this is said once", param.name);
            }
        }
        Ok(())
    }

    /// QE steps through `step_with` alone.
    pub(super) fn no_closure(&self, called: &str) -> Result<()> {
        if self.core.params.wake.inner().is_some() {
            bail!(
                "{}: {called} cannot evaluate the model again; call step_with(&loss, likelihood, closure)",
                self.core.name()
            )
        }
        Ok(())
    }
}
