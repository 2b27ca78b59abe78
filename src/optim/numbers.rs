//! Tensors as numbers of the host, which waits for the device that holds them.

use crate::curvature::wide;
use candle_core::{DType, Result, Tensor, bail};

/// A loss as a number.
pub(super) fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        bail!("loss: expected a scalar, got shape {:?}", loss.dims())
    }
    loss.detach().flatten_all()?.to_dtype(DType::F64)?.get(0)?.to_scalar()
}

/// Scalars as numbers, read from their device at once.
pub(super) fn numbers(scalars: &[Tensor]) -> Result<Vec<f64>> {
    match scalars {
        [] => Ok(vec![]),
        scalars => Tensor::stack(scalars, 0)?.to_dtype(DType::F64)?.to_vec1(),
    }
}

/// The sum of all elements, in f64; half types are widened first, or a sum of small numbers could overflow.
pub(super) fn sum(t: &Tensor) -> Result<f64> {
    wide(t)?.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}
