//! One interface to the optimizers of the study.

use super::first_order::FirstOrder;
use candle_core::{Result, Tensor, Var};
use candle_nn::{AdamW, ParamsAdamW};
use kronwake::optim::{KFacRule, Natural, Optimizer, Q, Qe, So, TwoRate, WakeRule};
use kronwake::tape::Likelihood;

/// A batch that has been through the model.
pub struct Pass<'a> {
    /// `[n, 10]`
    pub logits: &'a Tensor,
    /// The mean over the batch.
    pub loss: &'a Tensor,
    /// The logits at the parameters' current values, without dropout.
    pub logits_now: &'a dyn Fn() -> Result<Tensor>,
}

/// What the training loop needs of an optimizer.
pub trait Train {
    fn learning_rate(&self) -> f64;
    fn set_learning_rate(&mut self, lr: f64);
    /// One step; false if it was left out because a number in it was not finite.
    fn step(&mut self, pass: &Pass) -> Result<bool>;
    /// Runs `f` at the averaged parameters, where the optimizer keeps such.
    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        f()
    }
}

impl Train for FirstOrder {
    fn learning_rate(&self) -> f64 {
        self.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn step(&mut self, pass: &Pass) -> Result<bool> {
        self.update(&pass.loss.backward()?)?;
        Ok(true)
    }
}

/// candle's AdamW.
pub struct Adam(AdamW);

impl Adam {
    pub fn new(vars: Vec<Var>, params: ParamsAdamW) -> Result<Self> {
        AdamW::new(vars, params).map(Self)
    }
}

impl Train for Adam {
    fn learning_rate(&self) -> f64 {
        self.0.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.0.set_learning_rate(lr);
    }

    fn step(&mut self, pass: &Pass) -> Result<bool> {
        self.0.backward_step(pass.loss)?;
        Ok(true)
    }
}

/// How a rule's optimizer takes a step once it has observed the curvature.
pub trait Stepping: WakeRule + 'static {
    fn advance(optimizer: &mut Natural<Self>, pass: &Pass) -> Result<()> {
        optimizer.backward_step(pass.loss)
    }
}

impl Stepping for KFacRule {}
impl Stepping for So {}
impl Stepping for Q {}
impl Stepping for TwoRate {}

impl Stepping for Qe {
    fn advance(optimizer: &mut Natural<Self>, pass: &Pass) -> Result<()> {
        optimizer.step_with(pass.loss, Likelihood::Categorical, &mut || (pass.logits_now)())
    }
}

impl<R: Stepping> Train for Natural<R> {
    fn learning_rate(&self) -> f64 {
        Optimizer::learning_rate(self)
    }

    fn set_learning_rate(&mut self, lr: f64) {
        Optimizer::set_learning_rate(self, lr);
    }

    fn step(&mut self, pass: &Pass) -> Result<bool> {
        let before = self.skipped();
        self.observe(pass.logits, Likelihood::Categorical)?;
        R::advance(self, pass)?;
        Ok(self.skipped() == before)
    }

    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Natural::at_average(self, f)
    }
}
