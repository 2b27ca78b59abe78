//! One step, in two halves: `propose` computes everything and changes nothing, `commit` writes it. So a step that fails
//! leaves parameters and state as they were.

use super::block::{Block, BlockState};
use super::direction::Direction;
use super::natural::{Natural, Predicted};
use super::params::{Decay, NonFinite};
use super::rest::Adam;
use super::rule::{Carry, Model, WakeRule};
use crate::curvature::{LayerFactors, damped_product, wide};
use candle_core::{DType, Result, Tensor, bail};

/// What a step would do.
pub(super) struct Proposal {
    pub blocks: Vec<BlockProposal>,
    /// Adam's state with the value that it leads to.
    pub rest: Vec<(Adam, Tensor)>,
}

/// What a step would do to one block.
pub(super) struct BlockProposal {
    pub state: BlockState,
    /// The gradient of the loss, `[groups, out, columns]`.
    pub gradient: Tensor,
    /// The gradient less what the wake looks back at.
    pub wake_gradient: Tensor,
    /// The model's curvature at this step: the factors of this batch where it refreshed them, else the averages.
    pub factors: (Tensor, Tensor),
    /// The change of the parameters.
    pub step: Tensor,
}

/// Why there is no proposal.
pub(super) enum Refusal {
    /// NaN or infinity, and where.
    NonFinite(String),
    Failed(candle_core::Error),
}

impl From<candle_core::Error> for Refusal {
    fn from(error: candle_core::Error) -> Self {
        Refusal::Failed(error)
    }
}

/// The factors of a refresh, a set a layer, with the number of their loss terms.
pub(super) type Refresh = Option<(Vec<LayerFactors>, usize)>;

impl<R: WakeRule> Natural<R> {
    /// A whole step on gradients in the order of `vars`.
    pub(super) fn advance(&mut self, grads: Vec<Tensor>, loss: Option<f64>) -> Result<()> {
        let Some((proposal, predicted)) = self.proposed(grads, loss)? else { return Ok(()) };
        let carries = self.carries(&proposal, None)?;
        let values = self.proposed_values(&proposal)?;
        self.commit(proposal, carries, &values)?;
        self.predicted = predicted;
        Ok(())
    }

    /// The proposal, or `None` where the step is to be left out.
    pub(super) fn proposed(
        &mut self,
        grads: Vec<Tensor>,
        loss: Option<f64>,
    ) -> Result<Option<(Proposal, Option<Predicted>)>> {
        let _span = tracing::info_span!("step").entered();
        if self.predicted.is_some() {
            self.forget();
            bail!(
                "{}: adaptive damping waits for the loss after step {}; call adapt_damping(&loss) when \
                 wants_loss_after() says so",
                R::NAME,
                self.steps
            )
        }
        if !(self.params.lr.is_finite() && self.params.lr >= 0.0) {
            self.forget();
            bail!("{}: expected a learning rate of zero or more, got {}", R::NAME, self.params.lr)
        }
        let proposal = match loss {
            Some(loss) if !loss.is_finite() => Err(Refusal::NonFinite(format!("the loss is {loss}"))),
            _ => self.take_factors().and_then(|refresh| self.propose(&grads, refresh)),
        };
        self.forget();
        let refused = match proposal {
            Ok(proposal) => {
                let predicted = self.predict(&proposal, loss)?;
                return Ok(Some((proposal, predicted)));
            }
            Err(refused) => refused,
        };
        match refused {
            Refusal::NonFinite(_) if self.params.non_finite == NonFinite::Skip => {
                self.skipped += 1;
                Ok(None)
            }
            Refusal::NonFinite(what) => {
                bail!("{}: step {}: {what}; parameters and state are unchanged", R::NAME, self.steps)
            }
            Refusal::Failed(error) => Err(error),
        }
    }

    fn propose(&self, grads: &[Tensor], refresh: Refresh) -> std::result::Result<Proposal, Refusal> {
        let mut directions = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            directions.push(self.direction(block, grads, refresh.as_ref())?);
        }
        let rest = self.rest_steps(grads)?;

        let lr = self.params.lr;
        let rate = |block: &Block| lr * block.lr_scale;
        let kl: f64 = self.blocks.iter().zip(&directions).map(|(b, d)| rate(b).powi(2) * d.length).sum();
        let clip = match self.params.kl_clip {
            Some(limit) if kl > limit => (limit / kl).sqrt(),
            _ => 1.0,
        };
        let mut blocks = Vec::with_capacity(directions.len());
        for (block, found) in self.blocks.iter().zip(directions) {
            let Direction { mut state, gradient, wake_gradient, factors, direction, .. } = found;
            // Both clips measure the direction as it was solved for.
            let mut direction = self.rms_clipped(direction)?;
            if clip < 1.0 {
                direction = (direction * clip)?;
            }
            if self.params.momentum > 0.0 {
                if let Some(velocity) = &state.velocity {
                    direction = ((velocity * self.params.momentum)? + direction)?;
                }
                state.velocity = Some(direction.clone());
            }
            let mut step = (direction * -rate(block))?;
            if self.params.decay == Decay::Decoupled
                && let Some(decay) = self.decayed(block)?
            {
                step = (step - (decay * rate(block))?)?;
            }
            blocks.push(BlockProposal { state, gradient, wake_gradient, factors, step });
        }
        Ok(Proposal { blocks, rest })
    }

    fn rest_steps(&self, grads: &[Tensor]) -> std::result::Result<Vec<(Adam, Tensor)>, Refusal> {
        let mut rest = Vec::with_capacity(self.rest.len());
        for adam in &self.rest {
            let (next, value) = adam.next(&self.vars[adam.param], &grads[adam.param], &self.params.rest)?;
            if !sum(&value)?.is_finite() {
                return Err(Refusal::NonFinite(format!(
                    "the gradient of {} has NaN or infinite elements",
                    self.vars[adam.param].name
                )));
            }
            rest.push((next, value));
        }
        Ok(rest)
    }

    /// The quadratic model's change of the loss, `<g, s> + 1/2 s^T (F_bar + la) s`, when it is due to be compared.
    fn predict(&self, proposal: &Proposal, loss: Option<f64>) -> Result<Option<Predicted>> {
        let Some(adaptive) = self.adaptive() else { return Ok(None) };
        if !(self.steps + 1).is_multiple_of(adaptive.every) {
            return Ok(None);
        }
        let Some(loss) = loss else {
            bail!(
                "{}: adaptive damping needs the loss; call backward_step(&loss) in place of step(&grads)",
                R::NAME
            )
        };
        let mut change = 0.0;
        for block in &proposal.blocks {
            let (Some(a), Some(g)) = (&block.state.factor_a, &block.state.factor_g) else { continue };
            let curved = g.matmul(&block.step)?.matmul(a)?;
            let quadratic = sum(&(&block.step * (curved + (&block.step * self.damping)?)?)?)?;
            change += sum(&(&block.gradient * &block.step)?)? + 0.5 * quadratic;
        }
        Ok(Some(Predicted { loss, change }))
    }

    /// The next step's carries, from the steps really taken: `taken` where later inner steps changed them.
    pub(super) fn carries(
        &self,
        proposal: &Proposal,
        taken: Option<&[Tensor]>,
    ) -> Result<Vec<Option<Tensor>>> {
        let carry = |(index, block): (usize, &BlockProposal)| -> Result<Option<Tensor>> {
            if self.params.wake.wake_decay(self.params.stat_decay).is_none() {
                return Ok(None);
            }
            let step = taken.map_or(&block.step, |taken| &taken[index]);
            let lr = self.params.lr * self.blocks[index].lr_scale;
            match (self.params.carry, &block.state.factor_a, &block.state.factor_g) {
                // At a rate of 0 there was no step, and the next one looks back at nothing.
                (Carry::Literal, Some(a), Some(g)) if lr > 0.0 => {
                    let kind = self.params.damping.kind();
                    let curved = damped_product(a, g, kind, self.damping, step, &self.blocks[index].name)?;
                    return Ok(Some(((&block.gradient - &block.wake_gradient)? - (curved / lr)?)?));
                }
                _ => {}
            }
            match self.params.wake.model() {
                Model::Linear => Ok(Some(block.gradient.clone())),
                Model::Quadratic(_) => {
                    let (a, g) = &block.factors;
                    Ok(Some((&block.gradient + g.matmul(step)?.matmul(a)?)?))
                }
            }
        };
        proposal.blocks.iter().enumerate().map(carry).collect()
    }

    /// The parameters after the proposal, in the order of `vars`.
    pub(super) fn proposed_values(&self, proposal: &Proposal) -> Result<Vec<Tensor>> {
        let mut values: Vec<Tensor> = self.vars.iter().map(|p| p.value()).collect();
        for (block, proposed) in self.blocks.iter().zip(&proposal.blocks) {
            for (index, step) in block.split(&proposed.step, &self.vars)? {
                values[index] = (&values[index] + step)?;
            }
        }
        for (adam, value) in &proposal.rest {
            values[adam.param] = value.clone();
        }
        Ok(values)
    }

    /// Makes a proposal true: values into the Vars, state into the blocks.
    pub(super) fn commit(
        &mut self,
        proposal: Proposal,
        carries: Vec<Option<Tensor>>,
        values: &[Tensor],
    ) -> Result<()> {
        for (param, value) in self.vars.iter_mut().zip(values) {
            param.write(value)?;
        }
        for ((block, proposed), carry) in self.blocks.iter_mut().zip(proposal.blocks).zip(carries) {
            block.state = BlockState { carry, ..proposed.state };
        }
        self.rest = proposal.rest.into_iter().map(|(adam, _)| adam).collect();
        self.previous_lr = Some(self.params.lr);
        self.steps += 1;
        Ok(())
    }
}

/// The sum of all elements, in f64; half types are widened first, or a sum of small numbers could overflow.
pub(super) fn sum(t: &Tensor) -> Result<f64> {
    wide(t)?.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}
