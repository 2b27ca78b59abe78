//! One interface to every optimizer of this example.

use super::args::Args;
use super::first_order::{FirstOrder, Rule};
use super::values::Choice;
use candle_core::{Result, Tensor, bail};
use candle_nn::VarMap;
use std::path::Path;
use tracing::info_span;

/// What the training loop needs of an optimizer.
pub trait Train {
    /// Name and settings, for the user.
    fn title(&self) -> String;
    /// Steps taken, those before a resume included.
    fn steps(&self) -> usize;
    fn set_learning_rate(&mut self, lr: f64);
    /// One step on the batch with these `logits [n, 10]` and this mean loss. `forward` gives the logits of the same
    /// batch at the parameters' current values.
    fn step(
        &mut self,
        logits: &Tensor,
        loss: &Tensor,
        forward: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<()>;
    /// Writes parameters and state.
    fn save(&self, path: &Path) -> Result<()>;
    /// Sets parameters and state.
    fn resume(&mut self, path: &Path) -> Result<()>;
}

/// The learning rate of the command line, or the default of the optimizer.
pub fn learning_rate(choice: Choice, args: &Args) -> f64 {
    args.lr.unwrap_or(match choice {
        Choice::Sgd => 0.05,
        _ => 0.003,
    })
}

/// The optimizer `choice` of all parameters in `vars`.
pub fn build(choice: Choice, args: &Args, vars: &VarMap) -> Result<Box<dyn Train>> {
    let lr = learning_rate(choice, args);
    let rule = match choice {
        Choice::Sgd => Rule::Sgd { momentum: 0.9 },
        Choice::Adamw => Rule::AdamW,
        _ => bail!("{} is not there yet", choice.name()),
    };
    Ok(Box::new(FirstOrder::new(vars, rule, lr, args.weight_decay)?))
}

impl Train for FirstOrder {
    fn title(&self) -> String {
        let name = match self.rule {
            Rule::Sgd { momentum } => format!("SGD with momentum {momentum}"),
            Rule::AdamW => "AdamW".into(),
        };
        format!("{name}, learning rate {}, weight decay {}", self.lr, self.decay)
    }

    fn steps(&self) -> usize {
        self.step
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn step(&mut self, _: &Tensor, loss: &Tensor, _: &mut dyn FnMut() -> Result<Tensor>) -> Result<()> {
        let grads = info_span!("backward").in_scope(|| loss.backward())?;
        info_span!("step").in_scope(|| self.update(&grads))
    }

    fn save(&self, path: &Path) -> Result<()> {
        FirstOrder::save(self, path)
    }

    fn resume(&mut self, path: &Path) -> Result<()> {
        FirstOrder::resume(self, path)
    }
}
