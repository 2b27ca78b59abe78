//! Micro-batches whose union is one step.

use super::NaturalGradient;
use super::under_way::Accumulated;
use crate::curvature::wide;
use candle_core::{Result, Tensor, bail};

impl NaturalGradient {
    /// Adds the gradients of a micro-batch up for [`step_accumulated`](Self::step_accumulated). `loss` is the mean over the `terms` loss terms
    /// of the micro-batch (examples, for a classifier). Call `observe` before, as for a step.
    ///
    /// # Errors
    /// When there are no terms, or as `backward_step`. What was accumulated before is then forgotten.
    pub fn accumulate(&mut self, loss: &Tensor, terms: usize) -> Result<()> {
        if terms == 0 && self.shared.is_some() {
            return Ok(());
        }
        if terms == 0 {
            bail!("{}: a micro-batch without loss terms", self.core.name())
        }
        self.accumulate_weighted(loss, terms as f64)
    }

    /// [`accumulate`](Self::accumulate) of a weighted loss, `sum_n w_n l_n / total` with that `total`: [`crate::tape::Terms::total`] of what
    /// `observe_weighted` was shown. Over all micro-batches the loss is then the sum of all `w_n l_n` over the sum of the totals.
    ///
    /// # Errors
    /// When the total is not positive and finite, and as for a step.
    pub fn accumulate_weighted(&mut self, loss: &Tensor, total: f64) -> Result<()> {
        let result = self.add_checked(loss, total);
        match (&mut self.shared, result) {
            // It is everybody's error, at the step.
            (Some(share), Err(error)) => {
                share.keep(error);
                Ok(())
            }
            (_, result) => result,
        }
    }

    fn add_checked(&mut self, loss: &Tensor, total: f64) -> Result<()> {
        self.no_closure("accumulate")?;
        if !(total.is_finite() && total > 0.0) {
            let name = self.core.name();
            bail!("{name}: expected a micro-batch with a positive total of loss terms, got {total}")
        }
        let result = self.add_micro_batch(loss, total);
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn add_micro_batch(&mut self, loss: &Tensor, weight: f64) -> Result<()> {
        let (value, grads) = self.backward(loss)?;
        self.close_pass()?;
        let weighted = |grad: &Tensor| wide(grad)? * weight;
        let weighted = grads.iter().map(|grad| grad.as_ref().map(weighted).transpose());
        let grads = weighted.collect::<Result<Vec<_>>>()?;
        let value = value.map(|value| value * weight);
        self.accumulated = Some(match self.accumulated.take() {
            None => Accumulated { grads, loss: value, total: weight },
            Some(sum) => Accumulated {
                grads: sum.grads.into_iter().zip(grads).map(|(a, b)| added(a, b)).collect::<Result<_>>()?,
                loss: sum.loss.zip(value).map(|(sum, value)| sum + value),
                total: sum.total + weight,
            },
        });
        Ok(())
    }

    /// Takes the step on the accumulated micro-batches. It is the one that their union would give. Several processes may have accumulated
    /// different numbers of them, also none; they meet here and, where labels are drawn, at each `observe`, of which all then make as many.
    ///
    /// # Errors
    /// When nothing was accumulated, or as any step.
    pub fn step_accumulated(&mut self) -> Result<()> {
        let accumulated = self.accumulated.take();
        if let Some(share) = &mut self.shared {
            share.terms = Some(accumulated.as_ref().map_or(0.0, |sum| sum.total));
        }
        let local = match accumulated {
            Some(Accumulated { grads, loss, total }) => {
                let mean = |grad: Option<Tensor>| grad.map(|grad| grad / total).transpose();
                let grads = grads.into_iter().map(mean).collect::<Result<Vec<_>>>();
                grads.map(|grads| (loss.map(|loss| loss / total), grads))
            }
            // Others may have some.
            None if self.shared.is_some() => Ok(self.no_gradients()),
            None => bail!("{}: nothing was accumulated", self.core.name()),
        };
        self.advance(local)
    }
}

/// The sum; what took no part counts as zero.
fn added(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => (a + b).map(Some),
        (one, None) | (None, one) => Ok(one),
    }
}
