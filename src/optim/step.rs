//! One step, in two halves: `propose` computes everything and changes nothing, `commit` writes it. So a step that fails
//! leaves parameters and state as they were.

use super::block::{Block, BlockState};
use super::direction::Direction;
use super::length::{Slopes, StepRule};
use super::natural::{Natural, Predicted};
use super::overlap::{Ahead, Overlapped};
use super::params::{Decay, NonFinite};
use super::rest::Adam;
use super::rule::{Carry, Model, WakeRule};
use crate::curvature::{Counts, LayerFactors, damped_product, factor_product, wide};
use crate::ops::dense::{dot, mix};
use candle_core::{DType, Result, Tensor, bail};

/// What a step would do.
pub(super) struct Proposal {
    pub blocks: Vec<BlockProposal>,
    /// Adam's state with the value that it leads to.
    pub rest: Vec<(Adam, Tensor)>,
    /// `1 / lambda`, which multiplied the directions before any clip.
    pub rate: f64,
    /// The damping of the step's inverses.
    pub damping: f64,
    /// With the slope where the last step ended.
    pub slopes: Slopes,
    /// Inverses that the step does not use yet.
    pub ahead: Option<Ahead>,
}

/// What a step would do to one block.
pub(super) struct BlockProposal {
    pub state: BlockState,
    /// The gradient of the loss, `[groups, out, columns]`.
    pub gradient: Tensor,
    /// The gradient of the models that the rule averages; of the newest alone, `gradient` itself.
    pub model_gradient: Tensor,
    /// The model gradient less what the wake looks back at.
    pub wake_gradient: Tensor,
    /// A quadratic model's curvature at this step: the factors of this batch where it refreshed them, else the averages.
    pub factors: (Tensor, Tensor),
    /// The change of the parameters.
    pub step: Tensor,
}

/// What a step leaves for the next one to look back at.
#[derive(Default)]
pub(super) struct Carried {
    /// Of the distances.
    carry: Option<Tensor>,
    /// Of the models.
    mean: Option<Tensor>,
    /// The step itself, and the loss's slope along it, where slopes are measured.
    step: Option<Tensor>,
    slope: f64,
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

/// What a refresh has seen of a batch.
pub(super) struct Refresh {
    /// A set of factors a layer.
    pub layers: Vec<LayerFactors>,
    /// Whether they are the averages with the batch's in them, and not those of the batch alone.
    pub averaged: bool,
    /// What its sums over loss terms were divided by.
    pub counts: Counts,
    /// For each pass with labels of its own, the gradients of the summed loss of the blocks without a layer. Without such passes these
    /// blocks take the step's gradients.
    pub drawn: Vec<Vec<Tensor>>,
}

impl<R: WakeRule> Natural<R> {
    /// A whole step on gradients in the order of `vars`.
    pub(super) fn advance(&mut self, grads: Vec<Tensor>, loss: Option<f64>) -> Result<()> {
        if let Some(gpu) = self.gpu() {
            return self.advance_on(gpu, &grads, loss);
        }
        self.settle()?;
        self.device = None;
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
        self.check_rate()?;
        let proposal = match loss {
            Some(loss) if !loss.is_finite() => Err(Refusal::NonFinite(format!("the loss is {loss}"))),
            _ => self.take_factors().and_then(|refresh| self.propose(&grads, refresh)),
        };
        self.forget();
        match proposal {
            Ok(proposal) => {
                let predicted = self.predict(&proposal, loss)?;
                Ok(Some((proposal, predicted)))
            }
            Err(refused) => self.refuse(refused).map(|()| None),
        }
    }

    /// Refuses a rate that makes no sense.
    pub(super) fn check_rate(&mut self) -> Result<()> {
        if !(self.params.lr.is_finite() && self.params.lr >= 0.0) {
            self.forget();
            bail!("{}: expected a learning rate of zero or more, got {}", R::NAME, self.params.lr)
        }
        Ok(())
    }

    /// Leaves a step out, or says why it cannot be taken.
    pub(super) fn refuse(&mut self, refused: Refusal) -> Result<()> {
        match refused {
            Refusal::NonFinite(_) if self.params.non_finite == NonFinite::Skip => {
                self.skipped += 1;
                Ok(())
            }
            Refusal::NonFinite(what) => {
                bail!("{}: step {}: {what}; parameters and state are unchanged", R::NAME, self.steps)
            }
            Refusal::Failed(error) => Err(error),
        }
    }

    fn propose(&self, grads: &[Tensor], refresh: Option<Refresh>) -> std::result::Result<Proposal, Refusal> {
        let mut renewed = self.renew(refresh.as_ref(), grads)?;
        let due = self.damping_due(&renewed)?;
        let Overlapped { ahead, damping, .. } = self.overlapped(&mut renewed, due)?;
        let mut directions = Vec::with_capacity(self.blocks.len());
        for (block, renewed) in self.blocks.iter().zip(renewed) {
            directions.push(self.direction(block, renewed, grads, damping)?);
        }
        let rest = self.rest_steps(grads)?;

        let squared: f64 =
            self.blocks.iter().zip(&directions).map(|(b, d)| b.lr_scale.powi(2) * d.length).sum();
        let slopes = self.slopes_after(&directions)?;
        let overall = self.rate(squared, slopes.length);
        let rate = |block: &Block| overall * block.lr_scale;
        let kl = overall.powi(2) * squared;
        let clip = match self.params.kl_clip {
            Some(limit) if kl > limit => (limit / kl).sqrt(),
            _ => 1.0,
        };
        let mut blocks = Vec::with_capacity(directions.len());
        for (block, found) in self.blocks.iter().zip(directions) {
            let Direction { mut state, gradient, model_gradient, wake_gradient, factors, direction, .. } =
                found;
            // Both clips measure the direction as it was solved for.
            let direction = self.rms_clipped(direction)?;
            let mut step = match (self.params.momentum > 0.0, &state.velocity) {
                (false, _) => (direction * (-rate(block) * clip))?,
                (true, velocity) => {
                    let moved = match velocity {
                        Some(velocity) => mix(velocity, self.params.momentum, &direction, clip)?,
                        None => (direction * clip)?,
                    };
                    let step = (&moved * -rate(block))?;
                    state.velocity = Some(moved);
                    step
                }
            };
            if self.params.decay == Decay::Decoupled
                && let Some(decay) = self.decayed(block)?
            {
                step = mix(&step, 1.0, &decay, -rate(block))?;
            }
            blocks.push(BlockProposal { state, gradient, model_gradient, wake_gradient, factors, step });
        }
        Ok(Proposal { blocks, rest, rate: overall, damping, slopes, ahead })
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
        for (described, block) in self.blocks.iter().zip(&proposal.blocks) {
            let (Some(a), Some(g)) = (&block.state.factor_a, &block.state.factor_g) else { continue };
            let curved = factor_product(a, g, &block.step, &described.name)?;
            let damping = self.damping_of(described, proposal.damping);
            let quadratic = dot(&block.step, &mix(&curved, 1.0, &block.step, damping)?)?;
            change += dot(&block.gradient, &block.step)? + 0.5 * quadratic;
        }
        Ok(Some(Predicted { loss, change }))
    }

    /// What the next step looks back at, from the steps really taken: `taken` where later inner steps changed them.
    pub(super) fn carries(&self, proposal: &Proposal, taken: Option<&[Tensor]>) -> Result<Vec<Carried>> {
        let carry = |(index, proposed): (usize, &BlockProposal)| -> Result<Carried> {
            let averaged = self.params.wake.model_decay() > 0.0;
            let waked = self.params.wake.wake_decay(self.params.stat_decay).is_some();
            let (block, step) = (&self.blocks[index], taken.map_or(&proposed.step, |taken| &taken[index]));
            let (kept, slope) = match self.params.step_rule {
                StepRule::AdaptiveKl(_) => (Some(step.clone()), dot(step, &proposed.gradient)?),
                _ => (None, 0.0),
            };
            if !(averaged || waked) {
                return Ok(Carried { step: kept, slope, ..Carried::default() });
            }
            let model = match self.params.wake.model() {
                Model::Linear => proposed.model_gradient.clone(),
                Model::Quadratic(_) => {
                    let (a, g) = &proposed.factors;
                    mix(&proposed.model_gradient, 1.0, &factor_product(a, g, step, &block.name)?, 1.0)?
                }
            };
            let rate = proposal.rate * block.lr_scale;
            let distances = match (self.params.carry, &proposed.state.factor_a, &proposed.state.factor_g) {
                // At a rate of 0 there was no step, and the next one looks back at nothing.
                (Carry::Literal, Some(a), Some(g)) if rate > 0.0 => {
                    let (kind, damping) =
                        (self.params.damping.kind(), self.damping_of(block, proposal.damping));
                    let curved = damped_product(a, g, kind, damping, step, &block.name)?;
                    mix(&(&proposed.model_gradient - &proposed.wake_gradient)?, 1.0, &curved, -1.0 / rate)?
                }
                _ => model.clone(),
            };
            let (carry, mean) = (waked.then_some(distances), averaged.then_some(model));
            Ok(Carried { carry, mean, step: kept, slope })
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
        carries: Vec<Carried>,
        values: &[Tensor],
    ) -> Result<()> {
        let averages = self.next_averages(values)?;
        let last = carries.iter().map(|carried| carried.slope).sum::<f64>().abs();
        self.slopes = Slopes { last, ..proposal.slopes };
        for (param, value) in self.vars.iter_mut().zip(values) {
            param.write(value)?;
        }
        self.averages = averages;
        for ((block, proposed), carried) in self.blocks.iter_mut().zip(proposal.blocks).zip(carries) {
            let Carried { carry, mean, step, slope: _ } = carried;
            block.state = BlockState { carry, mean, step, ..proposed.state };
        }
        self.rest = proposal.rest.into_iter().map(|(adam, _)| adam).collect();
        self.previous_rate = Some(proposal.rate);
        self.damping = proposal.damping;
        self.ahead = proposal.ahead;
        self.steps += 1;
        Ok(())
    }
}

/// Scalars as numbers, read from their device at once.
pub(super) fn numbers(scalars: &[Tensor]) -> Result<Vec<f64>> {
    match scalars {
        [] => Ok(vec![]),
        scalars => Tensor::stack(scalars, 0)?.to_dtype(DType::F64)?.to_vec1(),
    }
}

/// The sum of all elements, in f64; half types are widened first, or a sum of small numbers could overflow.
pub(super) fn sum(t: &Tensor) -> Result<f64> {
    wide(t)?.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}
