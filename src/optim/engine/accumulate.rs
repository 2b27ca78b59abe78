//! Micro-batches whose union is one step.

use super::NaturalGradient;
use crate::curvature::wide;
use candle_core::{Result, Tensor, bail};

/// Gradients of micro-batches, each times its number of loss terms.
#[derive(Debug)]
pub(super) struct Accumulated {
    grads: Vec<Option<Tensor>>,
    /// Where it is read.
    loss: Option<f64>,
    terms: usize,
}

impl NaturalGradient {
    /// Adds the gradients of a micro-batch up for [`step_accumulated`](Self::step_accumulated). `loss` is the mean over the `terms` loss terms
    /// of the micro-batch (examples, for a classifier). Call `observe` before, as for a step.
    ///
    /// # Errors
    /// When there are no terms, or as `backward_step`. What was accumulated before is then forgotten.
    pub fn accumulate(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        self.no_closure("accumulate")?;
        if terms == 0 {
            bail!("{}: a micro-batch without loss terms", self.core.name())
        }
        let result = self.add_micro_batch(loss, terms);
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn add_micro_batch(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        let (value, grads) = self.backward(loss)?;
        self.close_pass()?;
        let weight = terms as f64;
        let weighted = |grad: &Tensor| wide(grad)? * weight;
        let weighted = grads.iter().map(|grad| grad.as_ref().map(weighted).transpose());
        let grads = weighted.collect::<Result<Vec<_>>>()?;
        let value = value.map(|value| value * weight);
        self.accumulated = Some(match self.accumulated.take() {
            None => Accumulated { grads, loss: value, terms },
            Some(sum) => Accumulated {
                grads: sum.grads.into_iter().zip(grads).map(|(a, b)| added(a, b)).collect::<Result<_>>()?,
                loss: sum.loss.zip(value).map(|(sum, value)| sum + value),
                terms: sum.terms + terms,
            },
        });
        Ok(())
    }

    /// Takes the step on the accumulated micro-batches. It is the one that their union would give.
    ///
    /// # Errors
    /// When nothing was accumulated, or as any step.
    pub fn step_accumulated(&mut self) -> Result<()> {
        let Some(Accumulated { grads, loss, terms }) = self.accumulated.take() else {
            bail!("{}: nothing was accumulated", self.core.name())
        };
        let mean = |grad: Option<Tensor>| grad.map(|grad| grad / terms as f64).transpose();
        let grads = grads.into_iter().map(mean).collect::<Result<Vec<_>>>()?;
        self.advance(grads, loss.map(|loss| loss / terms as f64))
    }
}

/// The sum; what took no part counts as zero.
fn added(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => (a + b).map(Some),
        (one, None) | (None, one) => Ok(one),
    }
}
