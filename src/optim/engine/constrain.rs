//! Constraints on the parameters after a step, and on their averages.

use super::NaturalGradient;
use crate::ops::dense::mix;
use crate::optim::step::average::newest_weight;
use crate::penalty::Constraints;
use candle_core::{Result, Tensor};

impl NaturalGradient {
    /// Does what [`Constraints::after_step`] does, at this optimizer's learning rate times that of the Var's group. Call it in place of that.
    ///
    /// Where a Var is in half precision, its f32 master, from which the next step starts, is stepped and projected. The Var becomes the
    /// master's rounding, which may be outside of a set by that much. Proximal steps are in proportion to the learning rate, also where a
    /// [`StepRule`](crate::optim::StepRule) finds the length of the optimizer's own step.
    ///
    /// Averaged parameters ([`Params::average`](crate::optim::Params::average)) are those of what the constraints let through, and are let
    /// through themselves ([`Constraints::let_through`]). With a plain `after_step` they are neither; there see
    /// [`adopt_average_through`](Self::adopt_average_through).
    ///
    /// # Errors
    /// As for [`Constraints::after_step`]. Nothing has changed then.
    pub fn constrain(&mut self, constraints: &mut Constraints) -> Result<()> {
        let changes = constraints.changes(|var| {
            let param = self.core.vars.iter().find(|param| param.var.id() == var.id());
            let scale = param.map_or(1.0, |param| param.lr_scale);
            let value = param.map_or_else(|| var.as_detached_tensor(), |param| param.value());
            (value, self.core.params.lr * scale)
        })?;
        let averages = self.constrained_averages(constraints, &changes.values)?;
        for (var, value) in &changes.values {
            match self.core.vars.iter_mut().find(|param| param.var.id() == var.id()) {
                Some(param) => param.write(value)?,
                None => var.set(value)?,
            }
        }
        for (average, new) in self.core.averages.iter_mut().zip(averages) {
            match new {
                // Kernels of a GPU know where it lies.
                Some(new) if self.device.is_some() => average.slice_set(&new.contiguous()?, 0, 0)?,
                Some(new) => *average = new,
                None => {}
            }
        }
        constraints.adopt(changes);
        Ok(())
    }

    /// The averages with `values` in place of what the step had led to, and let through; none where one stays as it is.
    fn constrained_averages(
        &self,
        constraints: &Constraints,
        values: &[(candle_core::Var, Tensor)],
    ) -> Result<Vec<Option<Tensor>>> {
        let core = &self.core;
        let mut averages = Vec::with_capacity(core.averages.len());
        for (param, average) in core.vars.iter().zip(&core.averages) {
            let moved = match values.iter().find(|(var, _)| var.id() == param.var.id()) {
                Some((_, value)) => {
                    let change = (value - param.value())?;
                    Some(mix(average, 1.0, &change, newest_weight(core))?)
                }
                None => None,
            };
            let through = constraints.let_through_of(&param.var, moved.as_ref().unwrap_or(average))?;
            averages.push(through.or(moved));
        }
        Ok(averages)
    }

    /// [`adopt_average`](Self::adopt_average) of the averages that the constraints let through, for trainings that call
    /// [`Constraints::after_step`] and not [`constrain`](Self::constrain).
    ///
    /// # Errors
    /// As for [`Constraints::let_through`]; nothing has changed then.
    pub fn adopt_average_through(&mut self, constraints: &Constraints) -> Result<()> {
        let pairs = self.core.vars.iter().zip(&self.core.averages);
        let through = pairs.map(|(param, average)| constraints.let_through_of(&param.var, average));
        let through = through.collect::<Result<Vec<_>>>()?;
        for ((param, average), through) in self.core.vars.iter_mut().zip(&self.core.averages).zip(through) {
            param.write(through.as_ref().unwrap_or(average))?;
        }
        Ok(())
    }
}
