//! The diagonal of the generalized Gauss-Newton matrix: a log-determinant that bounds the exact one from above (Hadamard).

use super::last_layer::{Hessians, Last, Sums};
use super::log_det::{Complexity, LogDet, Precision, precision_of, refuse_condition, sum_of};
use super::posterior::Covariance;
use super::rows::{CHUNK, LayerRows, Rows};
use crate::ops::dense::product;
use candle_core::{DType, Result, Tensor};
use std::collections::BTreeMap;

/// Sums of squares of the rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Diagonal {
    /// By tensor, flattened, f64.
    sums: BTreeMap<usize, Tensor>,
    /// Of the rows.
    dtype: Option<DType>,
}

impl Sums for Diagonal {
    fn add(&mut self, rows: &Rows) -> Result<()> {
        self.dtype = Some(rows.dtype());
        for layer in &rows.layers {
            if let Some(tensor) = layer.weight {
                self.take(tensor, weight_squares(layer)?)?;
            }
            if let Some(tensor) = layer.bias {
                self.take(tensor, layer.of_bias()?.to_dtype(DType::F64)?.sqr()?.sum(0)?)?;
            }
        }
        Ok(())
    }

    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()> {
        self.dtype = Some(last.dtype);
        let each = hessians.diagonals(None)?;
        if let Some(tensor) = last.weight {
            self.take(tensor, product(&each.t()?, &last.features.sqr()?)?.flatten_all()?)?;
        }
        if let Some(tensor) = last.bias {
            self.take(tensor, each.sum(0)?)?;
        }
        Ok(())
    }
}

impl Diagonal {
    /// `1 / (s h + P0)` of each tensor, flattened.
    pub fn variances(&self, s: f64, precisions: &[Precision]) -> Result<Vec<(usize, Tensor)>> {
        // What the evidence refuses.
        self.log_det(s, precisions)?;
        let of = |(&tensor, squares): (&usize, &Tensor)| {
            let deltas = precision_of(precisions, tensor)?.flat(squares.elem_count(), squares.device())?;
            Ok((tensor, ((squares * s)? + deltas)?.recip()?))
        };
        self.sums.iter().map(of).collect()
    }

    fn take(&mut self, tensor: usize, squares: Tensor) -> Result<()> {
        let sum = match self.sums.get(&tensor) {
            Some(sum) => (sum + squares)?,
            None => squares,
        };
        self.sums.insert(tensor, sum);
        Ok(())
    }
}

/// Of every weight the sum over rows of the squares, flattened, f64.
pub(crate) fn weight_squares(layer: &LayerRows) -> Result<Tensor> {
    if layer.is_product()? {
        let (inputs, grads) = layer.factors();
        let square = |t: Tensor| t.to_dtype(DType::F64)?.sqr();
        let grads = square(grads.squeeze(2)?)?.sum(1)?;
        return product(&grads.t()?, &square(inputs.squeeze(1)?)?)?.flatten_all();
    }
    let squares = |outs| layer.of_weight(outs)?.to_dtype(DType::F64)?.sqr()?.sum(0);
    let parts = layer.chunks(CHUNK)?.into_iter().map(squares);
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
}

impl Complexity for Diagonal {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let mut found = LogDet::zero(precisions.len());
        for (&tensor, squares) in &self.sums {
            let precision = precision_of(precisions, tensor)?;
            let deltas = precision.flat(squares.elem_count(), squares.device())?;
            let ratio = ((squares / deltas)? * s)?;
            if ratio.elem_count() > 0 {
                found.condition = found.condition.max(1.0 + ratio.max_all()?.to_scalar::<f64>()?);
            }
            let one = (&ratio + 1.0)?;
            found.value += sum_of(&one.log()?)?;
            found.effective[tensor] = Some(precision.effective(&(ratio / one)?)?);
        }
        refuse_condition("diagonal", found.condition, self.dtype.unwrap_or(DType::F64))?;
        Ok(found)
    }

    fn covariance(&self, s: f64, precisions: &[Precision]) -> Result<Option<Covariance>> {
        Ok(Some(Covariance::Diagonal(self.variances(s, precisions)?)))
    }
}
