//! Adam for the Vars that have no Kronecker block: gains and offsets of norms, scalars.

use super::block::Param;
use candle_core::{Result, Tensor};
use candle_nn::ParamsAdamW;

/// Adam's state for one Var (Kingma & Ba 2015, with the decoupled decay of Loshchilov & Hutter 2019).
#[derive(Debug, Clone)]
pub(crate) struct Adam {
    /// Index of the param.
    pub param: usize,
    pub steps: usize,
    /// Averages of the gradient and of its square, in the Var's shape.
    pub moments: Option<(Tensor, Tensor)>,
}

impl Adam {
    /// The state and the value after a step on `gradient`.
    pub fn next(&self, param: &Param, gradient: &Tensor, options: &ParamsAdamW) -> Result<(Self, Tensor)> {
        let ParamsAdamW { lr, beta1, beta2, eps, .. } = *options;
        let lr = lr * param.lr_scale;
        let (first, second) = match &self.moments {
            Some((first, second)) => (
                ((first * beta1)? + (gradient * (1.0 - beta1))?)?,
                ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?,
            ),
            None => ((gradient * (1.0 - beta1))?, (gradient.sqr()? * (1.0 - beta2))?),
        };
        let steps = self.steps + 1;
        let bias1 = 1.0 - beta1.powi(steps as i32);
        let bias2 = 1.0 - beta2.powi(steps as i32);
        let direction = (&first / bias1)?.div(&((&second / bias2)?.sqrt()? + eps)?)?;
        let value = param.value();
        let decayed = (&value * (1.0 - lr * (options.weight_decay + param.weight_decay)))?;
        let value = (decayed - (direction * lr)?)?;
        Ok((Self { param: self.param, steps, moments: Some((first, second)) }, value))
    }
}
