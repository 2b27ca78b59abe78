//! Constraints on the parameters after a step.

use super::NaturalGradient;
use crate::penalty::Constraints;
use candle_core::Result;

impl NaturalGradient {
    /// Does what [`Constraints::after_step`] does, at this optimizer's learning rate times that of the Var's group. Call it in place of that.
    ///
    /// Where a Var is in half precision, its f32 master, from which the next step starts, is stepped and projected. The Var becomes the
    /// master's rounding, which may be outside of a set by that much. Proximal steps are in proportion to the learning rate, also where a
    /// [`StepRule`](crate::optim::StepRule) finds the length of the optimizer's own step.
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
        for (var, value) in &changes.values {
            match self.core.vars.iter_mut().find(|param| param.var.id() == var.id()) {
                Some(param) => param.write(value)?,
                None => var.set(value)?,
            }
        }
        constraints.adopt(changes);
        Ok(())
    }
}
