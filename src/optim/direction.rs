//! One block's direction: its curvature renewed, its wake gradient preconditioned.

use super::block::{Block, BlockState, Part};
use super::length::StepRule;
use super::natural::Natural;
use super::observe::Current;
use super::params::Decay;
use super::rule::{Model, QSolve, WakeRule};
use super::step::{Refresh, Refusal, sum};
use crate::curvature::{
    Damping, Inverse, LayerFactors, Preconditioner, Recipe, Task, average_product, damped_inverses,
    damped_product, sum_inverse,
};
use crate::linalg::traces::traces;
use crate::ops::dense::{dot, mix};
use crate::ops::factor::ema;
use candle_core::{Result, Tensor};

/// A block's direction before the scaling that all blocks share.
pub(super) struct Direction {
    pub state: BlockState,
    pub gradient: Tensor,
    pub model_gradient: Tensor,
    pub wake_gradient: Tensor,
    pub factors: (Tensor, Tensor),
    pub direction: Tensor,
    /// The squared length of the direction `V` in the damped metric: `<V, g>`, where that is what was solved with.
    pub length: f64,
}

pub(super) type Factors = (Tensor, Tensor);

/// A block's curvature as a step sees it.
pub(super) struct Renewed<'a> {
    pub state: BlockState,
    pub average: Factors,
    /// A quadratic model's: those of this batch where there are any, else the averages.
    pub factors: Factors,
    /// What was recorded for this step, with what sums over loss terms are divided by.
    records: Option<(&'a LayerFactors, f64)>,
    /// Whether this step is the first with the inverse.
    pub fresh: bool,
}

impl<R: WakeRule> Natural<R> {
    /// The blocks' curvature with the factors of this step, where there are any, in their averages.
    pub(super) fn renew<'a>(
        &self,
        refresh: Option<&'a Refresh>,
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Renewed<'a>>, Refusal> {
        let Some(refresh) = refresh else {
            return self.blocks.iter().map(|block| self.renewed(block, None, None)).collect();
        };
        let current = self.current_factors(refresh, grads)?;
        let records = |block: &Block| Some((refresh.layers.get(block.layer?)?, refresh.counts.total));
        let pairs = self.blocks.iter().zip(current);
        pairs.map(|(block, current)| self.renewed(block, records(block), Some(current))).collect()
    }

    fn renewed<'a>(
        &self,
        block: &Block,
        records: Option<(&'a LayerFactors, f64)>,
        current: Option<Current>,
    ) -> std::result::Result<Renewed<'a>, Refusal> {
        let mut state = block.state.clone();
        if let Some(Current { factors, averaged }) = &current {
            let last = (state.factor_a.as_ref(), state.factor_g.as_ref());
            let (a, g) = match averaged {
                true => factors.clone(),
                false => average_of(block, last, factors, self.params.stat_decay)?,
            };
            (state.factor_a, state.factor_g) = (Some(a), Some(g));
        }
        let (Some(a), Some(g)) = (&state.factor_a, &state.factor_g) else {
            return Err(Refusal::Failed(missing::<R>(block, "curvature")));
        };
        let average = (a.clone(), g.clone());
        let current = current.map_or_else(|| average.clone(), |current| current.factors);
        let factors = self.model_factors(block, &mut state, current)?;
        Ok(Renewed { state, average, factors, records, fresh: false })
    }

    /// The damping of this step's inverses; the last one's where there are no new ones.
    pub(super) fn damping_due(&self, renewed: &[Renewed<'_>]) -> Result<f64> {
        let Damping::Relative(relative) = self.params.damping else { return Ok(self.damping) };
        if !self.inverses_due() {
            return Ok(self.damping);
        }
        let factors = renewed.iter().map(|Renewed { average: (a, g), .. }| (a, g));
        let factors = factors.zip(&self.blocks).map(|((a, g), block)| (a, g, block.groups));
        let (squares, trace) = traces(&factors.collect::<Vec<_>>())?;
        Ok(relative.of(squares, trace))
    }

    /// The inverses of `blocks`, made anew where they are due and not made beside the steps, in the state of `renewed`. On a GPU the
    /// host waits for all of them at once. `damping` is the one that all blocks share.
    pub(super) fn prepare(
        &self,
        blocks: &[Block],
        renewed: &mut [Renewed<'_>],
        damping: f64,
    ) -> std::result::Result<(), Refusal> {
        if self.inverses_due() && !self.overlaps() {
            let _span = tracing::info_span!("inverse").entered();
            let found = self.invert(blocks, renewed, damping);
            for ((block, Renewed { state, fresh, .. }), found) in blocks.iter().zip(&mut *renewed).zip(found)
            {
                *fresh = true;
                match found {
                    Ok(new) => state.preconditioner = Some(new),
                    Err(error) if state.preconditioner.is_some() => {
                        tracing::warn!("block {}: {error}; the last inverse stays", block.name)
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        for (block, Renewed { state, records, fresh, .. }) in blocks.iter().zip(renewed) {
            // A new inverse has the scaling of one Kronecker product, and new records change the moments.
            if self.params.ekfac && (records.is_some() || *fresh) {
                self.correct(block, state, *records, self.damping_of(block, damping))?;
            }
            if state.preconditioner.is_none() {
                return Err(Refusal::Failed(missing::<R>(block, "inverse")));
            }
        }
        Ok(())
    }

    /// Turns a block's wake gradient into a direction.
    pub(super) fn direction(
        &self,
        block: &Block,
        mut renewed: Renewed<'_>,
        grads: &[Tensor],
        damping: f64,
    ) -> std::result::Result<Direction, Refusal> {
        self.prepare(std::slice::from_ref(block), std::slice::from_mut(&mut renewed), damping)?;
        let damping = self.damping_of(block, damping);
        let Renewed { state, average, factors, .. } = renewed;
        let gradient = block.matrix(|i| Ok(grads[i].clone()))?;
        let decay = self.decayed(block)?;
        let gradient = match (&decay, self.params.decay) {
            (Some(decay), Decay::Loss) => (gradient + decay)?,
            _ => gradient,
        };
        let model_gradient = self.model_gradient(&state, &gradient)?;
        let wake_gradient = self.wake_gradient(&state, &model_gradient)?;
        let decayed = match (&decay, self.params.decay) {
            (Some(decay), Decay::AfterWake) => {
                // A wake that is scaled to the steady state's step takes the decay's share of the scale out again.
                mix(&wake_gradient, 1.0, decay, 1.0 / self.rate_scale())?
            }
            _ => wake_gradient.clone(),
        };
        let Some(preconditioner) = &state.preconditioner else {
            return Err(Refusal::Failed(missing::<R>(block, "inverse")));
        };
        let direction = preconditioner.apply(&decayed)?;
        let metric = match (self.params.step_rule, self.params.wake.model()) {
            (StepRule::LearningRate, _) | (_, Model::Linear) => decayed,
            // A quadratic wake solves with more than the divergence's curvature.
            (_, Model::Quadratic(_)) => {
                let (a, g) = &average;
                damped_product(a, g, self.params.damping.kind(), damping, &direction, &block.name)?
            }
        };
        let length = dot(&direction, &metric)?;
        if !length.is_finite() {
            return Err(Refusal::NonFinite(self.culprit(block, grads)?));
        }
        Ok(Direction { state, gradient, model_gradient, wake_gradient, factors, direction, length })
    }

    /// The factors of the averaged quadratic models, the newest of which has the factors `current`.
    fn model_factors(&self, block: &Block, state: &mut BlockState, current: Factors) -> Result<Factors> {
        let decay = self.params.wake.model_decay();
        if decay == 0.0 || self.params.wake.model() == Model::Linear {
            return Ok(current);
        }
        let (a, g) = average_of(block, (state.model_a.as_ref(), state.model_g.as_ref()), &current, decay)?;
        (state.model_a, state.model_g) = (Some(a.clone()), Some(g.clone()));
        Ok((a, g))
    }

    /// The gradient of the averaged models at the parameters as they are: the newest one's, and what the last step left of the
    /// earlier ones'.
    fn model_gradient(&self, state: &BlockState, gradient: &Tensor) -> Result<Tensor> {
        let decay = self.params.wake.model_decay();
        match &state.mean {
            Some(mean) if decay > 0.0 => mix(gradient, 1.0 - decay, mean, decay),
            _ => Ok(gradient.clone()),
        }
    }

    /// The model gradient less what the distances look back at.
    fn wake_gradient(&self, state: &BlockState, model_gradient: &Tensor) -> Result<Tensor> {
        match (self.params.wake.wake_decay(self.params.stat_decay), &state.carry) {
            (Some(rho), Some(carry)) if rho > 0.0 => {
                mix(model_gradient, 1.0, carry, -rho * self.rate_ratio())
            }
            _ => Ok(model_gradient.clone()),
        }
    }

    /// `lambda_k / lambda_{k-1}`.
    fn rate_ratio(&self) -> f64 {
        match (self.given_rate(), self.previous_rate) {
            // This step's rate follows from the wake gradient, so it is not known yet.
            (None, _) => 1.0,
            (Some(rate), Some(previous)) if rate > 0.0 => previous / rate,
            (Some(rate), None) if rate > 0.0 => 1.0,
            // At a rate of 0 nothing moves, whatever is looked back at.
            _ => 0.0,
        }
    }

    /// See [`WakeRule::rate_scale`].
    pub(super) fn rate_scale(&self) -> f64 {
        self.params.wake.rate_scale(self.params.stat_decay)
    }

    /// Inverses are renewed every `inverses` steps. A quadratic wake's matrix holds the factors of the step itself, which
    /// one step later are the averages again: it is renewed then too.
    pub(super) fn inverses_due(&self) -> bool {
        let (period, quadratic) =
            (self.params.every.inverses, matches!(self.params.wake.model(), Model::Quadratic(_)));
        self.due(period, self.steps) || (quadratic && self.steps > 0 && self.due(period, self.steps - 1))
    }

    fn invert(&self, blocks: &[Block], renewed: &[Renewed<'_>], damping: f64) -> Vec<Result<Preconditioner>> {
        let rate = |block: &Block| {
            block.lr_scale * self.given_rate().or(self.previous_rate).unwrap_or(self.rate_scale())
        };
        let tasks = |factors: &mut dyn Iterator<Item = (&Tensor, &Tensor)>| -> Vec<_> {
            let task = |(block, factors): (&Block, _)| {
                self.task(block, factors, block.state.preconditioner.as_ref(), damping)
            };
            damped_inverses(&blocks.iter().zip(factors).map(task).collect::<Vec<_>>())
        };
        match self.params.wake.model() {
            Model::Linear => tasks(&mut renewed.iter().map(|r| (&r.average.0, &r.average.1))),
            Model::Quadratic(QSolve::Factor) => {
                let sum = |(block, r): (&Block, &Renewed<'_>)| -> Result<Factors> {
                    let (bar, current) = (&r.average, &r.factors);
                    let a = mix(&bar.0, 1.0, &current.0, rate(block))?;
                    Ok((a, mix(&bar.1, 1.0, &current.1, rate(block))?))
                };
                match blocks.iter().zip(renewed).map(sum).collect::<Result<Vec<_>>>() {
                    Ok(sums) => tasks(&mut sums.iter().map(|(a, g)| (a, g))),
                    Err(error) => vec![Err(error)],
                }
            }
            Model::Quadratic(QSolve::Exact) => {
                let solve = |(block, r): (&Block, &Renewed<'_>)| {
                    let (bar, current) = ((&r.average.0, &r.average.1), (&r.factors.0, &r.factors.1));
                    let damping = self.damping_of(block, damping);
                    sum_inverse(bar, current, block.shape(), rate(block), damping, &block.name)
                };
                blocks.iter().zip(renewed).map(solve).collect()
            }
        }
    }

    /// The inverse of factors `A` and `G`; `last` is the one before it.
    pub(super) fn task(
        &self,
        block: &Block,
        (a, g): (&Tensor, &Tensor),
        last: Option<&Preconditioner>,
        damping: f64,
    ) -> Task {
        let recipe = Recipe {
            kind: self.params.damping.kind(),
            damping: self.damping_of(block, damping),
            // A 1 x 1 factor has no use for an iteration.
            inverse: if block.columns.dim * block.rows.dim == 1 {
                Inverse::Eigen
            } else {
                self.params.inverse
            },
            floor: self.params.eigenvalue_floor,
        };
        Task {
            a: a.clone(),
            g: g.clone(),
            shape: block.shape(),
            last: last.filter(|_| recipe.method() == Inverse::Newton).cloned(),
            recipe,
            name: block.name.clone(),
        }
    }

    /// The damping of a block. A step of fixed KL counts the curvature of the weight decay in, which is a penalty's Hessian.
    pub(super) fn damping_of(&self, block: &Block, damping: f64) -> f64 {
        let penalty = |&i: &usize| self.vars[i].weight_decay;
        match (self.params.step_rule, self.params.decay) {
            (StepRule::LearningRate, _) | (_, Decay::Decoupled) => damping,
            _ => damping + block.params.iter().map(penalty).fold(0.0, f64::max),
        }
    }

    /// `V min(1, rms_clip / rms(V))`.
    pub(super) fn rms_clipped(&self, direction: Tensor) -> Result<Tensor> {
        let Some(limit) = self.params.rms_clip else { return Ok(direction) };
        let rms = (dot(&direction, &direction)? / direction.elem_count().max(1) as f64).sqrt();
        if rms > limit { direction * (limit / rms) } else { Ok(direction) }
    }

    /// `wd theta` of a block, where it has any decay.
    pub(super) fn decayed(&self, block: &Block) -> Result<Option<Tensor>> {
        if block.params.iter().all(|&i| self.vars[i].weight_decay == 0.0) {
            return Ok(None);
        }
        block.matrix(|i| self.vars[i].value() * self.vars[i].weight_decay).map(Some)
    }

    /// Names the tensor that made a direction NaN or infinite.
    fn culprit(&self, block: &Block, grads: &[Tensor]) -> Result<String> {
        for &index in &block.params {
            if !sum(&grads[index])?.is_finite() {
                return Ok(format!("the gradient of {} has NaN or infinite elements", self.vars[index].name));
            }
        }
        Ok(format!("the direction of block {} overflows; a larger damping would bound it", block.name))
    }
}

/// The exponential averages of a block's factors.
fn average_of(
    block: &Block,
    (last_a, last_g): (Option<&Tensor>, Option<&Tensor>),
    (a, g): &Factors,
    decay: f64,
) -> Result<Factors> {
    match block.part {
        Part::Gradient => average_product(last_a.zip(last_g), (a, g), decay),
        _ => Ok((ema(last_a, a, decay)?, ema(last_g, g, decay)?)),
    }
}

fn missing<R: WakeRule>(block: &Block, what: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{}: block {} has no {what} yet", R::NAME, block.name))
}
