//! One block's direction: its curvature renewed, its wake gradient preconditioned.

use super::block::{Block, BlockState, Part};
use super::natural::Natural;
use super::params::Decay;
use super::rule::{Model, QSolve, WakeRule};
use super::step::{Refusal, sum};
use crate::curvature::{
    Inverse, LayerFactors, Preconditioner, Recipe, damped_inverse, moments, sum_inverse, turned_moments,
};
use crate::ops::factor::ema;
use candle_core::{Result, Tensor};

/// A block's direction before the clip that all blocks share.
pub(super) struct Direction {
    pub state: BlockState,
    pub gradient: Tensor,
    pub wake_gradient: Tensor,
    pub factors: (Tensor, Tensor),
    pub direction: Tensor,
    /// `<V, g>`, the squared length of the direction in the damped metric.
    pub length: f64,
}

impl<R: WakeRule> Natural<R> {
    /// Refreshes a block's curvature and turns its wake gradient into a direction.
    pub(super) fn direction(
        &self,
        block: &Block,
        grads: &[Tensor],
        refresh: Option<&(Vec<LayerFactors>, usize)>,
    ) -> std::result::Result<Direction, Refusal> {
        let mut state = block.state.clone();
        let current = match refresh {
            None => None,
            Some((layers, terms)) => {
                let layer = &layers[block.layer];
                let current = block.refreshed(layer)?;
                for (factor, name) in [(&current.0, "A"), (&current.1, "G")] {
                    if !sum(factor)?.is_finite() {
                        return Err(Refusal::NonFinite(format!(
                            "factor {name} of block {} has NaN or infinite elements",
                            block.name
                        )));
                    }
                }
                state.factor_a = Some(ema(state.factor_a.as_ref(), &current.0, self.params.stat_decay)?);
                state.factor_g = Some(ema(state.factor_g.as_ref(), &current.1, self.params.stat_decay)?);
                Some((current, layer, *terms))
            }
        };
        let (Some(bar_a), Some(bar_g)) = (&state.factor_a, &state.factor_g) else {
            return Err(Refusal::Failed(candle_core::Error::Msg(format!(
                "{}: block {} has no curvature yet",
                R::NAME,
                block.name
            ))));
        };
        let bar = (bar_a.clone(), bar_g.clone());
        let factors = current.as_ref().map_or_else(|| bar.clone(), |(current, ..)| current.clone());

        if self.inverses_due() {
            let _span = tracing::info_span!("inverse").entered();
            match self.invert(block, &bar, &factors) {
                Ok(new) => state.preconditioner = Some(new),
                Err(error) if state.preconditioner.is_some() => {
                    tracing::warn!("block {}: {error}; the last inverse stays", block.name)
                }
                Err(error) => return Err(error.into()),
            }
        }
        // A new inverse has the scaling of one Kronecker product, and new records change the moments.
        if self.params.ekfac && (current.is_some() || self.inverses_due()) {
            self.correct(block, &mut state, current.map(|(_, layer, terms)| (layer, terms)))?;
        }

        let gradient = block.matrix(|i| Ok(grads[i].clone()))?;
        let decay = self.decayed(block)?;
        let gradient = match (&decay, self.params.decay) {
            (Some(decay), Decay::Loss) => (gradient + decay)?,
            _ => gradient,
        };
        let wake_gradient = match (self.params.wake.wake_decay(self.params.stat_decay), &state.carry) {
            (Some(rho), Some(carry)) if rho > 0.0 => {
                // At a rate of 0 nothing moves, whatever is looked back at.
                let lr = self.params.lr;
                let ratio =
                    if lr > 0.0 { self.previous_lr.map_or(1.0, |previous| previous / lr) } else { 0.0 };
                (&gradient - (carry * (rho * ratio))?)?
            }
            _ => gradient.clone(),
        };
        let decayed = match (&decay, self.params.decay) {
            (Some(decay), Decay::AfterWake) => (&wake_gradient + decay)?,
            _ => wake_gradient.clone(),
        };
        let Some(preconditioner) = &state.preconditioner else {
            return Err(Refusal::Failed(candle_core::Error::Msg(format!(
                "{}: block {} has no inverse yet",
                R::NAME,
                block.name
            ))));
        };
        let direction = preconditioner.apply(&decayed)?;
        let length = sum(&(&direction * &decayed)?)?;
        if !length.is_finite() {
            return Err(Refusal::NonFinite(self.culprit(block, grads)?));
        }
        Ok(Direction { state, gradient, wake_gradient, factors, direction, length })
    }

    /// Inverses are renewed every `inverses` steps. A quadratic wake's matrix holds the factors of the step itself, which
    /// one step later are the averages again: it is renewed then too.
    fn inverses_due(&self) -> bool {
        let phase = self.steps % self.params.every.inverses;
        phase == 0 || (phase == 1 && matches!(self.params.wake.model(), Model::Quadratic(_)))
    }

    fn invert(
        &self,
        block: &Block,
        bar: &(Tensor, Tensor),
        current: &(Tensor, Tensor),
    ) -> Result<Preconditioner> {
        let recipe = Recipe {
            kind: self.params.damping.kind(),
            damping: self.damping,
            // A 1 x 1 factor has no use for an iteration.
            inverse: if block.columns * block.out == 1 { Inverse::Eigen } else { self.params.inverse },
            floor: self.params.eigenvalue_floor,
        };
        let lr = self.params.lr * block.lr_scale;
        let last = block.state.preconditioner.as_ref();
        match self.params.wake.model() {
            Model::Linear => damped_inverse(&bar.0, &bar.1, recipe, last, &block.name),
            Model::Quadratic(QSolve::Factor) => {
                let a = (&bar.0 + (&current.0 * lr)?)?;
                let g = (&bar.1 + (&current.1 * lr)?)?;
                damped_inverse(&a, &g, recipe, last, &block.name)
            }
            Model::Quadratic(QSolve::Exact) => {
                sum_inverse((&bar.0, &bar.1), (&current.0, &current.1), lr, self.damping, &block.name)
            }
        }
    }

    /// `V min(1, rms_clip / rms(V))`.
    pub(super) fn rms_clipped(&self, direction: Tensor) -> Result<Tensor> {
        let Some(limit) = self.params.rms_clip else { return Ok(direction) };
        let rms = (sum(&direction.sqr()?)? / direction.elem_count().max(1) as f64).sqrt();
        if rms > limit { direction * (limit / rms) } else { Ok(direction) }
    }

    /// Replaces the scaling of the eigenbasis by the averaged second moments; `refresh` holds new records.
    fn correct(
        &self,
        block: &Block,
        state: &mut BlockState,
        refresh: Option<(&LayerFactors, usize)>,
    ) -> std::result::Result<(), Refusal> {
        let Some(Preconditioner::Basis { basis_a, basis_g, .. }) = &state.preconditioner else {
            return Ok(());
        };
        let (basis_a, basis_g) = (basis_a.clone(), basis_g.clone());
        let scaled = if block.part == Part::Bias {
            // One input, the constant 1: the factor G is the second moment itself.
            let Some(g) = &state.factor_g else { return Ok(()) };
            let rotated = basis_g.t()?.matmul(g)?.matmul(&basis_g)?;
            let eye = Tensor::eye(rotated.dim(1)?, rotated.dtype(), rotated.device())?;
            (rotated.broadcast_mul(&eye)?).sum_keepdim(2)?
        } else {
            let last = match (&block.state.moments, &block.state.preconditioner) {
                (Some(moments), Some(Preconditioner::Basis { basis_a: last_a, basis_g: last_g, .. })) => {
                    Some(turned_moments(moments, (last_a, last_g), (&basis_a, &basis_g))?)
                }
                _ => None,
            };
            match (refresh, last) {
                (Some((layer, terms)), last) => {
                    let folded = block.part == Part::Folded;
                    let current = moments(&layer.kept, &basis_a, &basis_g, folded, terms)?;
                    ema(last.as_ref(), &current, self.params.stat_decay)?
                }
                (None, Some(last)) => last,
                (None, None) => return Ok(()),
            }
        };
        let scale = (&scaled + self.damping)?.recip()?;
        state.moments = Some(scaled);
        state.preconditioner = Some(Preconditioner::Basis { basis_a, basis_g, scale });
        Ok(())
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
