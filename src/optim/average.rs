//! Averaged parameters: the center of the wake.

use super::natural::Natural;
use super::rule::WakeRule;
use crate::ops::dense::mix;
use candle_core::{Result, Tensor};

/// An average of the parameters over the steps, `theta_bar_k = sum_i w_i theta_i / sum_i w_i` with `w_i ~ i^power`.
///
/// It is where a wake without a model leads: `theta_bar` minimizes `sum_i w_i D(theta_i, theta)` as far as `D` is quadratic
/// with one curvature. The noise of single steps cancels in it, so it is the better model to evaluate and to keep, most of
/// all while steps are long. The weights (polynomial-decay averaging, Shamir & Zhang 2013) reach back over about the last
/// `1 / power` of all steps, so there is no time constant to choose. Costs a copy of the parameters and an
/// addition a step; training itself is not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Average {
    /// The exponent of the weights; 0 weighs all steps alike.
    pub power: f64,
}

impl Default for Average {
    fn default() -> Self {
        Self { power: 8.0 }
    }
}

impl<R: WakeRule> Natural<R> {
    /// The averages after a step that led to `values`.
    pub(super) fn next_averages(&self, values: &[Tensor]) -> Result<Vec<Tensor>> {
        let Some(Average { power }) = self.params.average else { return Ok(vec![]) };
        if self.averages.is_empty() {
            // The Vars are written in place, so what is kept has to be a copy.
            return values.iter().map(Tensor::copy).collect();
        }
        let weight = (power + 1.0) / ((self.steps + 1) as f64 + power);
        let mixed = |(old, new): (&Tensor, &Tensor)| mix(old, 1.0 - weight, new, weight);
        self.averages.iter().zip(values).map(mixed).collect()
    }

    /// The averaged parameters by name, once a step was taken under [`super::Params::average`]; else nothing.
    pub fn averages(&self) -> Vec<(&str, &Tensor)> {
        self.vars.iter().map(|param| param.name.as_str()).zip(&self.averages).collect()
    }

    /// Puts the averaged parameters into the Vars for good: the model to keep when training is over. Without averages nothing
    /// happens. Steps that follow start there, and the averages go on.
    pub fn adopt_average(&mut self) -> Result<()> {
        for (param, average) in self.vars.iter_mut().zip(&self.averages) {
            param.write(average)?;
        }
        Ok(())
    }

    /// Runs `f` with the averaged parameters in the Vars, and puts the stepped ones back; without averages it just runs `f`.
    pub fn at_average<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.averages.is_empty() {
            return f();
        }
        let stepped: Vec<Tensor> = self.vars.iter().map(|param| param.var.copy()).collect::<Result<_>>()?;
        let shown = self.vars.iter().zip(&self.averages).try_for_each(|(param, average)| param.show(average));
        let result = shown.and_then(|()| f());
        // Whatever happened, the stepped parameters come back.
        for (param, value) in self.vars.iter().zip(&stepped) {
            param.var.set(value)?;
        }
        result
    }
}
