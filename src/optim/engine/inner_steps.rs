//! QE's steps on the exact symmetric divergence from earlier models, which follow on Q's.

use super::NaturalGradient;
use super::divergence::symmetric_divergence;
use crate::curvature::factor_product;
use crate::ops::dense::{dot, mix};
use crate::optim::numbers::{scalar, sum};
use crate::optim::step::host::commit;
use crate::optim::step::proposal::Proposal;
use crate::optim::step::write::rms_clipped;
use crate::optim::wake::Inner;
use crate::stack::deep;
use crate::tape::{Likelihood, Terms};
use candle_core::{Result, Tensor, bail};
use candle_nn::Optimizer;

/// The model's outputs on the current batch at the current values of its Vars.
pub type Outputs<'a> = dyn FnMut() -> Result<Tensor> + 'a;

impl NaturalGradient {
    /// Takes a step of any member. QE, which evaluates the model again, has no other.
    ///
    /// `loss` is the mean over loss terms. `outputs` runs the model on the batch of `loss`, at the values that the Vars have at the moment, and
    /// returns what `likelihood` takes, with its graph. It must draw nothing at random: no dropout.
    ///
    /// # Errors
    /// As for any step, and when two calls of `outputs` differ. Parameters and state are then unchanged.
    pub fn step_with(
        &mut self,
        loss: &Tensor,
        likelihood: Likelihood,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        self.step_with_weighted(loss, likelihood, &Terms::equal(), outputs)
    }

    /// [`step_with`](Self::step_with) where the loss is a weighted mean of its terms, as `observe_weighted` was shown: the divergences from
    /// earlier models are then weighted means over terms too.
    ///
    /// # Errors
    /// As [`step_with`](Self::step_with), and when the weights do not fit the outputs.
    pub fn step_with_weighted(
        &mut self,
        loss: &Tensor,
        likelihood: Likelihood,
        terms: &Terms,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        let Some(inner) = self.core.params.wake.inner().cloned() else { return self.backward_step(loss) };
        let local = self.backward(loss);
        let incoming = match self.incoming(local) {
            Ok(incoming) => incoming,
            Err(refused) => return self.refuse(refused),
        };
        let Some((proposal, predicted)) = self.proposed(incoming)? else { return Ok(()) };
        let before = self.snapshots()?;
        let mut values = proposal.values(&self.core)?;
        let mut taken = None;
        let mut models = self.core.models.clone();
        models.push(before.clone());
        if models.len() >= inner.models && proposal.rate > 0.0 {
            let moved =
                self.inner_steps(&inner, &proposal, &models, &mut values, (likelihood, terms), outputs);
            // The Vars hold trial values now. Whatever happened, they go back first.
            for (param, value) in self.core.vars.iter().zip(&before) {
                param.show(value)?;
            }
            taken = Some(moved?);
        }
        if models.len() >= inner.models {
            models.remove(0);
        }
        commit(proposal, &mut self.core, &values, taken.as_deref())?;
        self.core.models = models;
        self.core.predicted = predicted;
        Ok(())
    }

    /// Moves `values` from Q's step along the exact objective; the blocks' whole steps in the end.
    fn inner_steps(
        &mut self,
        inner: &Inner,
        proposal: &Proposal,
        models: &[Vec<Tensor>],
        values: &mut [Tensor],
        terms: (Likelihood, &Terms),
        outputs: &mut Outputs<'_>,
    ) -> Result<Vec<Option<Tensor>>> {
        let _span = tracing::info_span!("inner").entered();
        let rho = self.core.wake_decay().unwrap_or(0.0);
        let lr = proposal.rate;
        let mut wake = vec![];
        for (index, model) in models.iter().enumerate() {
            let age = models.len() - 1 - index;
            let weight = if index == 0 { rho.powi(age as i32) } else { (1.0 - rho) * rho.powi(age as i32) };
            self.show_all(model)?;
            wake.push((weight, outputs()?.detach()));
        }
        self.check_closure(&wake, outputs)?;

        let Some(start) = models.last() else { bail!("{}: an empty wake", self.core.name()) };
        let mut steps = proposed_steps(proposal);
        let mut buffers: Vec<Option<Tensor>> = vec![None; steps.len()];
        let from_q = values.to_vec();
        let mut before = f64::INFINITY;
        for index in 0..inner.steps {
            self.show_all(values)?;
            let distance = (wake_distance(terms, &outputs()?, &wake)? * (inner.scale / lr))?;
            if index == 0 {
                before = scalar(&distance)? + self.modelled(proposal, &steps)?;
            }
            let store = deep(|| distance.backward())?;
            let grads = self.gradients(&store)?;
            for (index, (block, proposed)) in self.core.blocks.iter().zip(&proposal.blocks).enumerate() {
                let (Some(proposed), Some(step), Some(state)) =
                    (proposed, &steps[index], &proposal.states[index])
                else {
                    continue;
                };
                let (a, g) = &proposed.factors;
                let model = (&proposed.wake.gradient + factor_product(a, g, step, &block.name)?)?;
                // Of a wake's models one alone may depend on a Var that takes no part in the others.
                let of = |i: usize| match &grads[i] {
                    Some(grad) => Ok(grad.clone()),
                    None => start[i].zeros_like(),
                };
                let direction = (block.matrix(of)? + model)?;
                let direction = match &state.preconditioner {
                    Some(preconditioner) if inner.preconditioned => preconditioner.apply(&direction)?,
                    _ => direction,
                };
                let direction = rms_clipped(&self.core, direction)?;
                let buffer = match buffers[index].take() {
                    Some(buffer) => ((buffer * inner.momentum)? + direction)?,
                    None => direction,
                };
                let change = (&buffer * -(inner.lr * lr * block.lr_scale))?;
                buffers[index] = Some(buffer);
                let moved = (step + change)?;
                for (param, part) in block.split(&moved, &self.core.vars)? {
                    values[param] = (&start[param] + part)?;
                }
                steps[index] = Some(moved);
            }
        }
        if inner.steps == 0 {
            return Ok(steps);
        }
        self.show_all(values)?;
        let reached = scalar(&wake_distance(terms, &outputs()?, &wake)?)? * inner.scale / lr;
        let lower = reached + self.modelled(proposal, &steps)? <= before;
        if !lower {
            values.clone_from_slice(&from_q);
            steps = proposed_steps(proposal);
        }
        Ok(steps)
    }

    /// `<g, s> + 1/2 s^T B s`, summed over blocks.
    fn modelled(&self, proposal: &Proposal, steps: &[Option<Tensor>]) -> Result<f64> {
        let mut total = 0.0;
        for ((block, proposed), step) in self.core.blocks.iter().zip(&proposal.blocks).zip(steps) {
            let (Some(proposed), Some(step)) = (proposed, step) else { continue };
            let (a, g) = &proposed.factors;
            let slope = mix(&proposed.wake.gradient, 1.0, &factor_product(a, g, step, &block.name)?, 0.5)?;
            total += dot(&slope, step)?;
        }
        Ok(total)
    }

    pub(super) fn show_all(&self, values: &[Tensor]) -> Result<()> {
        self.core.vars.iter().zip(values).try_for_each(|(param, value)| param.show(value))
    }

    /// Calls the closure a second time at the newest model, once in the optimizer's life.
    fn check_closure(&mut self, wake: &[(f64, Tensor)], outputs: &mut Outputs<'_>) -> Result<()> {
        let (false, Some((_, first))) = (self.core.closure_checked, wake.last()) else { return Ok(()) };
        let again = outputs()?;
        if again.dims() != first.dims() || sum(&(first - again.detach())?.abs()?)? != 0.0 {
            bail!(
                "{}: two calls of the closure differ at the same parameters; dropout or sampling inside the closure?",
                self.core.name()
            )
        }
        self.core.closure_checked = true;
        Ok(())
    }
}

fn proposed_steps(proposal: &Proposal) -> Vec<Option<Tensor>> {
    proposal.blocks.iter().map(|block| block.as_ref().map(|block| block.step.clone())).collect()
}

/// `sum_j w_j D_j`, the sum of symmetric divergences from earlier models.
fn wake_distance(terms: (Likelihood, &Terms), outputs: &Tensor, wake: &[(f64, Tensor)]) -> Result<Tensor> {
    let mut total: Option<Tensor> = None;
    for (weight, old) in wake {
        let part = (symmetric_divergence(terms, outputs, old)? * *weight)?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    total.ok_or_else(|| candle_core::Error::Msg("qe-kld-wrm: an empty wake".into()))
}
