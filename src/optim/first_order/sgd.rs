//! Gradient descent with momentum.

use super::update::{At, State, Update, decay, in_range};
use crate::optim::ParamsAdamW;
use candle_core::{Result, Tensor};

/// Options of [`Sgd`](super::Sgd).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsSgd {
    /// Learning rate; 0.01.
    pub lr: f64,
    /// How much of the last direction stays in the next, in [0, 1); 0.9.
    pub momentum: f64,
    /// What is added to the gradient, times the parameter; 0.
    pub weight_decay: f64,
}

impl Default for ParamsSgd {
    fn default() -> Self {
        Self { lr: 0.01, momentum: 0.9, weight_decay: 0.0 }
    }
}

impl Update for ParamsSgd {
    const NAME: &'static str = "sgd";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, momentum, weight_decay } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("momentum", momentum)?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")
    }

    fn adam(&self) -> Option<ParamsAdamW> {
        None
    }

    fn state(&self, value: &Tensor) -> Result<State> {
        Ok(vec![("average0", value.zeros_like()?)])
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let v = (((&state[0] * self.momentum)? + grad)? + (value * at.weight_decay)?)?;
        Ok(((value - (&v * at.lr)?)?, vec![v]))
    }
}
