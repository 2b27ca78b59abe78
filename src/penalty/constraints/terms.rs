//! What constraints add to the loss: as a term of it, or as gradients beside its own.

use super::{Constraints, Entry, Rule, SpatialTotal, check_like, named};
use crate::penalty::Penalty;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};

impl Constraints {
    /// What the rules add to the loss, a scalar: in f32, or in f64 if a Var with such a rule is.
    ///
    /// # Errors
    /// If weights are NaN or infinite; the message names the Var.
    pub fn loss(&self) -> Result<Tensor> {
        let mut total = None;
        for entry in &self.entries {
            for term in entry.terms().map_err(|e| named(&entry.name, e))? {
                total = Some(plus(total, term)?);
            }
        }
        for spatial in &self.spatial_totals {
            total = Some(plus(total, (spatial.penalty.total(&self.layers(spatial))? * spatial.factor)?)?);
        }
        for lagrangian in &self.lagrangian_totals {
            let weights = self.weights(&lagrangian.places);
            total = Some(plus(
                total,
                lagrangian.multiplier.total_term(&weights).map_err(|e| lagrangian.named(e))?,
            )?);
        }
        self.or_zero(total)
    }

    /// Adds the gradient of [`Constraints::loss`] to `grads`, and returns its value, which is outside of candle's graph.
    ///
    /// The step is the same as with the loss as a term, to rounding, for less: each penalty's value and gradient are of one evaluation,
    /// and candle's backward pass does not see them. Optimizers that ask for the loss itself
    /// ([`Optimizer::backward_step`](crate::nn::Optimizer::backward_step)) take [`Constraints::loss`].
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kronwake::nn::{Optimizer, SGD, VarBuilder, VarMap};
    /// use kronwake::penalty::{Constraints, Lp, Rule};
    /// use std::sync::Arc;
    ///
    /// let varmap = VarMap::new();
    /// let w = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu).get(2, "w")?;
    /// let rule = Rule::Penalize { penalty: Arc::new(Lp::l2()), factor: 0.5 };
    /// let mut constraints = Constraints::new(&varmap, &[("w", rule)])?;
    /// let mut sgd = SGD::new(varmap.all_vars(), 0.1)?;
    /// let target = Tensor::new(&[3f64, 4.], &Device::Cpu)?;
    /// for _ in 0..200 {
    ///     let loss = ((&w - &target)?.sqr()?.sum_all()? * 0.5)?;
    ///     let mut grads = loss.backward()?;
    ///     let penalty = constraints.add_gradients(&mut grads)?;
    ///     assert!((loss + penalty)?.to_scalar::<f64>()?.is_finite()); // for the log
    ///     sgd.step(&grads)?;
    ///     constraints.after_step(0.1)?;
    /// }
    /// // The least 1/2 (w - target)^2 + 1/2 w^2.
    /// let found = w.to_vec1::<f64>()?;
    /// assert!((found[0] - 1.5).abs() < 1e-9 && (found[1] - 2.0).abs() < 1e-9);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// As for [`Constraints::loss`], and if a penalty's gradient has not the weights' shape and dtype; `grads` is then what it was.
    pub fn add_gradients(&self, grads: &mut GradStore) -> Result<Tensor> {
        let mut total = None;
        let mut sums: Vec<Option<Tensor>> =
            self.entries.iter().map(|entry| grads.get(&entry.var).cloned()).collect();
        let mut add = |place: usize, gradient: Tensor| -> Result<()> {
            sums[place] = Some(match &sums[place] {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
            Ok(())
        };
        for (place, entry) in self.entries.iter().enumerate() {
            for (value, gradient) in entry.gradients().map_err(|e| named(&entry.name, e))? {
                total = Some(plus(total, value)?);
                add(place, gradient).map_err(|e| named(&entry.name, e))?;
            }
        }
        for spatial in &self.spatial_totals {
            let (value, gradients) =
                spatial.penalty.total_and_gradients(&self.layers(spatial), spatial.factor)?;
            total = Some(plus(total, value)?);
            for (&place, gradient) in spatial.places.iter().zip(gradients) {
                add(place, gradient).map_err(|e| named(&self.entries[place].name, e))?;
            }
        }
        for lagrangian in &self.lagrangian_totals {
            let weights = self.weights(&lagrangian.places);
            let (value, gradients) =
                lagrangian.multiplier.total_gradients(&weights).map_err(|e| lagrangian.named(e))?;
            total = Some(plus(total, value)?);
            for (&place, gradient) in lagrangian.places.iter().zip(gradients) {
                add(place, gradient).map_err(|e| lagrangian.named(e))?;
            }
        }
        let total = self.or_zero(total)?;
        for (entry, sum) in self.entries.iter().zip(sums) {
            if let Some(sum) = sum {
                grads.insert(&entry.var, sum);
            }
        }
        Ok(total)
    }

    fn layers(&self, spatial: &SpatialTotal) -> Vec<(&str, Tensor)> {
        let entries = spatial.places.iter().map(|&place| &self.entries[place]);
        entries.map(|entry| (entry.name.as_str(), entry.var.as_tensor().clone())).collect()
    }

    fn or_zero(&self, total: Option<Tensor>) -> Result<Tensor> {
        let vars = || self.entries.iter().map(|entry| &entry.var);
        total.map_or_else(
            || {
                let dtype = if vars().any(|var| var.dtype() == DType::F64) { DType::F64 } else { DType::F32 };
                let device = vars().next().map_or(&Device::Cpu, |var| var.device());
                Tensor::zeros((), dtype, device)
            },
            Ok,
        )
    }
}

/// The sum, in f64 where the dtypes differ.
fn plus(total: Option<Tensor>, term: Tensor) -> Result<Tensor> {
    match total {
        None => Ok(term),
        Some(total) if total.dtype() == term.dtype() => total + term,
        Some(total) => total.to_dtype(DType::F64)? + term.to_dtype(DType::F64)?,
    }
}

impl Entry {
    /// The penalties that are terms of the loss, with their factors.
    fn penalties(&self) -> impl Iterator<Item = (&dyn Penalty, f64)> {
        self.rules.iter().filter_map(|rule| match rule {
            Rule::Penalize { penalty, factor } => Some((penalty.as_ref(), *factor)),
            Rule::Free
            | Rule::SpatialTotal { .. }
            | Rule::Proximal { .. }
            | Rule::Project { .. }
            | Rule::Mask { .. }
            | Rule::Lagrangian { .. }
            | Rule::LagrangianTotal { .. } => None,
        })
    }

    fn terms(&self) -> Result<Vec<Tensor>> {
        let mut terms = vec![];
        for (penalty, factor) in self.penalties() {
            terms.push((penalty.value(&self.var)? * factor)?);
        }
        for multiplier in &self.multipliers {
            terms.push(multiplier.term(&self.var)?);
        }
        Ok(terms)
    }

    /// [`Entry::terms`] with their gradients.
    fn gradients(&self) -> Result<Vec<(Tensor, Tensor)>> {
        let mut all = vec![];
        for (penalty, factor) in self.penalties() {
            let (value, gradient) = penalty.value_and_gradient(&self.var, factor)?;
            check_like(penalty, "a gradient", &gradient, &self.var)?;
            all.push((value, gradient));
        }
        for multiplier in &self.multipliers {
            all.push(multiplier.term_and_gradient(&self.var)?);
        }
        Ok(all)
    }
}
