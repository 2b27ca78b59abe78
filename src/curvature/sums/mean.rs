//! Means of second moments that grow pass by pass and join an exponential average.

use super::LayerFactors;
use crate::ops::moment_queue::Average;
use candle_core::{Result, Tensor};

/// A factor of what has come so far: `decay last + (1 - decay) sum / count`, without the first term if there is no last average.
pub(super) struct Mean {
    value: Tensor,
    /// Loss terms, or rows.
    count: f64,
}

/// What a mean has of the last average, of which it is to be the next: a share of `decay`.
#[derive(Clone, Copy)]
pub(super) struct Last<'a> {
    average: Option<&'a Tensor>,
    decay: f64,
}

impl<'a> Last<'a> {
    /// Of one of a layer's factors, if there are any yet.
    pub fn new(
        layer: Option<&'a LayerFactors>,
        decay: f64,
        of: fn(&LayerFactors) -> Option<&Tensor>,
    ) -> Self {
        let average = layer.and_then(of);
        Self { average, decay: if average.is_some() { decay } else { 0.0 } }
    }

    /// What makes of a mean of which `before` of the rows have come, and of a moment, the mean of all.
    pub fn average(&self, mean: Option<&'a Tensor>, before: f64, weight: f64) -> Average<'a> {
        let keep = self.decay * (1.0 - before);
        Average {
            bar: mean.map(|mean| (mean, before)),
            last: self.average.filter(|_| keep > 0.0).map(|last| (last, keep)),
            weight: (1.0 - self.decay) * weight,
        }
    }

    /// Adds to a mean the second moment that `moment` computes, times `weight`; then it is one of `count` rows. Of none the sum is zero.
    pub fn add(
        &self,
        mean: &'a mut Option<Mean>,
        count: f64,
        weight: f64,
        moment: impl FnOnce(Average) -> Result<Tensor>,
    ) -> Result<()> {
        let count = if count > 0.0 { count } else { 1.0 };
        let before = mean.as_ref().map_or(0.0, |mean| mean.count / count);
        let value = moment(self.average(mean.as_ref().map(|mean| &mean.value), before, weight / count))?;
        *mean = Some(Mean { value, count });
        Ok(())
    }

    /// A mean of `count` rows, of which the last ones may have brought nothing.
    pub fn finished(&self, mean: Option<Mean>, count: f64) -> Result<Option<Tensor>> {
        let Some(Mean { value, count: counted }) = mean else { return Ok(None) };
        if counted == count || count <= 0.0 {
            return Ok(Some(value));
        }
        let before = counted / count;
        Average { weight: before, ..self.average(None, before, 0.0) }.add(value).map(Some)
    }

    /// A sum of shares of means, each with as much of the last average in it: `share` is what they are of the whole. What they lack of the
    /// last average is added.
    pub fn completed(&self, mean: Tensor, share: f64) -> Result<Tensor> {
        Average { weight: 1.0, ..self.average(None, share, 0.0) }.add(mean)
    }
}
