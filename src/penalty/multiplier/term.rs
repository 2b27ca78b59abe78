//! What multipliers add to the loss.

use super::{Multiplier, NAME, Omega, Part};
use crate::gpu::tensor_of;
use crate::ops::dual::Row;
use crate::ops::group::scaled;
use crate::ops::precomputed;
use candle_core::{DType, Layout, Result, Storage, Tensor};
use std::sync::Arc;

impl Multiplier {
    /// [`Multiplier::term`] of several tensors.
    pub(in super::super) fn total_term(&self, weights: &[&Tensor]) -> Result<Tensor> {
        let (value, slopes) = self.evaluate(weights)?;
        let slopes = Arc::new(slopes);
        let mut value = Some(value);
        let mut total: Option<Tensor> = None;
        // The first tensor's operation brings the value, the others nothing, and each its gradient.
        for (part, w) in weights.iter().enumerate() {
            let value = match value.take() {
                Some(value) => value,
                None => storage(&Tensor::zeros((), dtype_of(weights), w.device())?)?,
            };
            let slopes = Arc::clone(&slopes);
            let term = precomputed::of_one(NAME, w, value, move |grad| slopes.of(part, Some(grad)))?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        match total {
            Some(total) => Ok(total),
            None => Tensor::zeros((), DType::F64, self.state.device()),
        }
    }

    /// [`Multiplier::total_term`] and its gradients, outside of candle's graph.
    pub(in super::super) fn total_gradients(&self, weights: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (value, slopes) = self.evaluate(weights)?;
        let gradients = (0..weights.len()).map(|part| slopes.of(part, None)).collect::<Result<_>>()?;
        Ok((tensor_of(value, ()), gradients))
    }

    /// The value, and what the gradients are made of.
    pub(super) fn evaluate(&self, weights: &[&Tensor]) -> Result<(Storage, Slopes)> {
        /// The gradient of a norm below it is shorter than 1, which also is a subgradient at zero.
        const LEAST: f64 = 1e-290;
        let values = self.omegas(weights)?;
        let device = values.device();
        let excess = (&values - self.bound.value())?;
        let row = |row: Row| row.of(&self.state)?.to_device(device);
        let (alpha, penalty) = (row(Row::Alpha)?, row(Row::Penalty)?);
        let over = |t: Tensor| if self.bound.is_equality() { Ok(t) } else { t.relu() };
        let (value, push) = if self.dual.augmented_lagrangian.is_some() {
            let push = over((&alpha + (&penalty * &excess)?)?)?;
            // The squares' difference without that of large numbers.
            let value = ((&push - &alpha)? * (&push + &alpha)?)?;
            ((value / (&penalty * 2.0)?)?, push)
        } else {
            let over = over(excess.clone())?;
            let quadratic = (over.sqr()? * (&penalty * 0.5)?)?;
            (((&alpha * &excess)? + quadratic)?, (&alpha + (over * &penalty)?)?)
        };
        let factors = match self.omega {
            Omega::Norm(_) => (push / values.broadcast_maximum(&Tensor::new(LEAST, device)?)?)?,
            Omega::SquaredNorm(_) => (push * 2.0)?,
            Omega::L1(_) => push,
        };
        let each = |w: &&Tensor| {
            let w = w.detach().contiguous()?;
            match self.omega {
                Omega::Norm(_) | Omega::SquaredNorm(_) => Ok(w),
                Omega::L1(_) => w.sign(),
            }
        };
        let value = storage(&value.sum_all()?.to_dtype(dtype_of(weights))?)?;
        let weights = weights.iter().map(each).collect::<Result<_>>()?;
        Ok((value, Slopes { weights, factors, parts: self.parts.clone() }))
    }
}

/// Of the value.
fn dtype_of(weights: &[&Tensor]) -> DType {
    if weights.iter().any(|w| w.dtype() == DType::F64) { DType::F64 } else { DType::F32 }
}

fn storage(scalar: &Tensor) -> Result<Storage> {
    let (storage, _) = scalar.storage_and_layout();
    storage.try_clone(&Layout::contiguous(()))
}

/// The gradients of a [`Multiplier::total_term`]: each weight, or its sign, times the factor of its group.
pub(super) struct Slopes {
    weights: Vec<Tensor>,
    factors: Tensor,
    parts: Vec<Part>,
}

impl Slopes {
    pub(super) fn of(&self, part: usize, scale: Option<&Tensor>) -> Result<Tensor> {
        let factors = match scale {
            Some(scale) => self.factors.broadcast_mul(&scale.to_dtype(DType::F64)?)?,
            None => self.factors.clone(),
        };
        scaled(&self.weights[part], self.parts[part].layout.tiles(), 0.0, &factors)
    }
}
