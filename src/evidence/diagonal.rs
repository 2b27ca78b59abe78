//! The diagonal of the generalized Gauss-Newton matrix: a log-determinant that bounds the exact one from above (Hadamard).

use super::log_det::{Complexity, Effective, LogDet, Precision, sum_of};
use super::rows::{LayerRows, Rows};
use crate::ops::dense::product;
use candle_core::{DType, Result, Tensor, bail};
use std::collections::BTreeMap;

/// Numbers of the rows written out at a time.
const CHUNK: usize = 1 << 24;

/// Sums of squares of the rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Diagonal {
    /// By tensor, flattened, f64.
    sums: BTreeMap<usize, Tensor>,
}

impl Diagonal {
    pub fn add(&mut self, rows: &Rows) -> Result<()> {
        for layer in &rows.layers {
            if let Some(tensor) = layer.weight {
                self.take(tensor, weight_squares(layer)?)?;
            }
            if let Some(tensor) = layer.bias {
                self.take(tensor, layer.of_bias()?.sqr()?.sum(0)?)?;
            }
        }
        Ok(())
    }

    /// `1 / (s h + P0)` of each tensor, flattened.
    pub fn covariance(&self, s: f64, precisions: &[Precision]) -> Result<Vec<(usize, Tensor)>> {
        let of = |(&tensor, squares): (&usize, &Tensor)| {
            let shifted = match precisions.get(tensor) {
                Some(Precision::Uniform(delta)) => ((squares * s)? + *delta)?,
                Some(Precision::Each(deltas)) => {
                    ((squares * s)? + deltas.flatten_all()?.to_device(squares.device())?)?
                }
                None => bail!("posterior: tensor {tensor} of {} precisions", precisions.len()),
            };
            Ok((tensor, shifted.recip()?))
        };
        self.sums.iter().map(of).collect()
    }

    fn take(&mut self, tensor: usize, squares: Tensor) -> Result<()> {
        let squares = squares.to_dtype(DType::F64)?;
        let sum = match self.sums.get(&tensor) {
            Some(sum) => (sum + squares)?,
            None => squares,
        };
        self.sums.insert(tensor, sum);
        Ok(())
    }
}

/// Of every weight the sum over rows of the squares, flattened.
pub(crate) fn weight_squares(layer: &LayerRows) -> Result<Tensor> {
    if layer.is_product()? {
        let (inputs, grads) = layer.factors();
        let grads = grads.squeeze(2)?.sqr()?.sum(1)?;
        return product(&grads.t()?, &inputs.squeeze(1)?.sqr()?)?.flatten_all();
    }
    let parts = layer.chunks(CHUNK)?.into_iter().map(|outs| layer.of_weight(outs)?.sqr()?.sum(0));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
}

impl Complexity for Diagonal {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let mut found = LogDet::zero(precisions.len());
        for (&tensor, squares) in &self.sums {
            let ratio = match precisions.get(tensor) {
                Some(Precision::Uniform(delta)) => (squares * (s / delta))?,
                Some(Precision::Each(deltas)) => {
                    ((squares / deltas.flatten_all()?.to_device(squares.device())?)? * s)?
                }
                None => bail!("evidence: tensor {tensor} of {} precisions", precisions.len()),
            };
            let one = (&ratio + 1.0)?;
            found.value += sum_of(&one.log()?)?;
            let each = (ratio / one)?;
            found.effective[tensor] = Some(match &precisions[tensor] {
                Precision::Uniform(_) => Effective::Total(sum_of(&each)?),
                Precision::Each(deltas) => {
                    Effective::Each(each.to_device(deltas.device())?.reshape(deltas.shape())?)
                }
            });
        }
        Ok(found)
    }
}
