//! The rules of one Var.

use super::Rule;
use crate::ops::group::check_factor;
use crate::penalty::Penalty;
use crate::penalty::multiplier::Multiplier;
use candle_core::{DType, Result, Tensor, Var, bail};

/// A Var with its rules.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub name: String,
    pub var: Var,
    /// All rules of this Var alone but those in `multipliers`.
    pub rules: Vec<Rule>,
    pub multipliers: Vec<Multiplier>,
}

/// Refuses what a penalty made of weights in another dtype or shape than theirs.
pub(super) fn check_like(penalty: &dyn Penalty, what: &str, made: &Tensor, weights: &Tensor) -> Result<()> {
    if made.dims() != weights.dims() || made.dtype() != weights.dtype() {
        bail!(
            "{}: expected {what} in {:?} {:?}, got {:?} {:?}",
            penalty.name(),
            weights.dtype(),
            weights.dims(),
            made.dtype(),
            made.dims()
        )
    }
    Ok(())
}

impl Entry {
    pub fn add(&mut self, rule: &Rule) -> Result<()> {
        let float = self.var.dtype().is_float();
        match rule {
            Rule::Free => {}
            Rule::Penalize { .. }
            | Rule::SpatialTotal { .. }
            | Rule::Proximal { .. }
            | Rule::Project { .. }
            | Rule::Mask { .. }
            | Rule::Lagrangian { .. }
            | Rule::LagrangianTotal { .. }
                if !float =>
            {
                bail!("expected a floating point Var, got {:?}", self.var.dtype())
            }
            Rule::SpatialTotal { penalty, factor } => check_factor(&penalty.name(), *factor)?,
            Rule::Penalize { penalty, factor } | Rule::Proximal { penalty, factor } => {
                check_factor(&penalty.name(), *factor)?;
                self.rules.push(rule.clone());
            }
            Rule::Project { set } => {
                set.check_for(self.var.dims())?;
                self.rules.push(rule.clone());
            }
            Rule::Mask { mask } => {
                if mask.dims() != self.var.dims() || mask.dtype() != DType::U8 {
                    bail!(
                        "expected a mask of U8 {:?}, got {:?} {:?}",
                        self.var.dims(),
                        mask.dtype(),
                        mask.dims()
                    )
                }
                let mask = mask.to_device(self.var.device())?.contiguous()?;
                self.rules.push(Rule::Mask { mask });
            }
            Rule::Lagrangian { omega, bound, dual } => {
                self.multipliers.push(Multiplier::new(*omega, *bound, *dual, self.var.dims())?);
            }
            // The table's, which knows the other Vars.
            Rule::LagrangianTotal { .. } => {}
        }
        Ok(())
    }

    /// The value that the rules make of `value` after a step, if another, and the multipliers there.
    pub fn next(&self, value: &Tensor, lr: f64) -> Result<(Option<Tensor>, Vec<Multiplier>)> {
        let moved = self.moved(value, lr)?;
        let mut multipliers = self.multipliers.clone();
        for multiplier in &mut multipliers {
            multiplier.update(moved.as_ref().unwrap_or(value))?;
        }
        Ok((moved, multipliers))
    }

    /// [`Constraints::let_through`](super::Constraints::let_through) of one value.
    pub fn let_through(&self, value: &Tensor) -> Result<Option<Tensor>> {
        if value.dims() != self.var.dims() {
            bail!("expected a value {:?}, got {:?}", self.var.dims(), value.dims())
        }
        self.moved(value, 0.0)
    }

    fn moved(&self, value: &Tensor, lr: f64) -> Result<Option<Tensor>> {
        let mut moved: Option<Tensor> = None;
        for rule in &self.rules {
            let now = moved.as_ref().unwrap_or(value);
            let next = match rule {
                Rule::Proximal { penalty, factor } => {
                    if !(lr.is_finite() && lr >= 0.0) {
                        bail!("expected a finite learning rate of zero or more, got {lr}")
                    }
                    let next = penalty.prox(now, lr * factor)?;
                    check_like(penalty.as_ref(), "a proximal step", &next, value)?;
                    // A penalty may give back the weights themselves, which a Var does not take.
                    Some(next.copy()?)
                }
                Rule::Project { set } => set.moved(now)?,
                // A choice and not a product: zero times NaN or an infinity is NaN.
                Rule::Mask { mask } => {
                    let mask = mask.to_device(now.device())?;
                    Some(mask.where_cond(now, &now.zeros_like()?)?)
                }
                Rule::Free
                | Rule::Penalize { .. }
                | Rule::SpatialTotal { .. }
                | Rule::Lagrangian { .. }
                | Rule::LagrangianTotal { .. } => None,
            };
            moved = next.or(moved);
        }
        Ok(moved)
    }
}
