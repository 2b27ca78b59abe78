//! Adam on the logarithms of hyperparameters, whose state can be saved.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var, bail};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// Adam without decay (Kingma & Ba 2015).
#[derive(Debug, Clone)]
pub(super) struct Adam {
    vars: Vec<Var>,
    pub lr: f64,
    pub steps: usize,
    /// Of each Var the averages of gradients and of their squares.
    pub moments: Vec<[Tensor; 2]>,
}

impl Adam {
    pub fn new(vars: Vec<Var>, lr: f64) -> Result<Self> {
        if !(lr.is_finite() && lr > 0.0) {
            bail!("evidence: a learning rate of {lr}, expected a finite number above 0")
        }
        let zeros = |var: &Var| Ok([var.zeros_like()?.detach(), var.zeros_like()?.detach()]);
        let moments = vars.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { vars, lr, steps: 0, moments })
    }

    /// A step up the gradients `grads`.
    pub fn climb(&mut self, grads: &GradStore) -> Result<()> {
        self.steps += 1;
        let corrections = [BETA1, BETA2].map(|beta| 1.0 / (1.0 - beta.powf(self.steps as f64)));
        for (var, [first, second]) in self.vars.iter().zip(&mut self.moments) {
            let Some(grad) = grads.get(var) else { continue };
            *first = ((&*first * BETA1)? + (grad * (1.0 - BETA1))?)?;
            *second = ((&*second * BETA2)? + (grad.sqr()? * (1.0 - BETA2))?)?;
            let scale = ((&*second * corrections[1])?.sqrt()? + EPS)?;
            let step = ((&*first * corrections[0])? / scale)?;
            var.set(&(var.as_detached_tensor() + (step * self.lr)?)?)?;
        }
        Ok(())
    }
}
