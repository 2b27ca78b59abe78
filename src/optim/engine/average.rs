//! The averaged parameters, shown and kept.

use super::NaturalGradient;
use candle_core::{Result, Tensor};

impl NaturalGradient {
    /// The averaged parameters by name, once a step was taken under [`crate::optim::Params::average`]; before that an empty list.
    pub fn averages(&self) -> Vec<(&str, &Tensor)> {
        self.core.vars.iter().map(|param| param.name.as_str()).zip(&self.core.averages).collect()
    }

    /// Puts the averaged parameters into the Vars for good. They are the model to keep when training is over. Steps that follow start there,
    /// and the averages go on. Without averages nothing happens.
    ///
    /// # Errors
    /// When a Var cannot be written.
    pub fn adopt_average(&mut self) -> Result<()> {
        for (param, average) in self.core.vars.iter_mut().zip(&self.core.averages) {
            param.write(average)?;
        }
        Ok(())
    }

    /// Runs `f` with the averaged parameters in the Vars, and puts the stepped ones back whatever `f` returns. Without averages it just runs
    /// `f`.
    ///
    /// # Errors
    /// Those of `f`, and when a Var cannot be written.
    pub fn at_average<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.core.averages.is_empty() {
            return f();
        }
        let stepped: Vec<Tensor> =
            self.core.vars.iter().map(|param| param.var.copy()).collect::<Result<_>>()?;
        let shown = self
            .core
            .vars
            .iter()
            .zip(&self.core.averages)
            .try_for_each(|(param, average)| param.show(average));
        let result = shown.and_then(|()| f());
        // Whatever happened, the stepped parameters come back.
        for (param, value) in self.core.vars.iter().zip(&stepped) {
            param.var.set(value)?;
        }
        result
    }
}
