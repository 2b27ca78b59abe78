//! Layers that are no products: their outputs pass through unchanged, and their gradients are recorded on the way back.

use super::{Inputs, Tap};
use crate::ops::norm::Norm;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

/// What the layer's weight has seen.
enum Seen {
    /// A norm's inputs.
    Normed(Norm, Tensor),
    /// An embedding's numbers.
    Indices(Tensor),
}

struct TapIdentity {
    tap: Tap,
    seen: Seen,
}

/// A norm over the last dimension of `x`, tapped or not.
pub(crate) fn normed(
    norm: Norm,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    tap: Option<&Tap>,
) -> Result<Tensor> {
    let y = norm.apply(x, weight, bias)?;
    match tap {
        Some(tap) if x.rank() > 1 => {
            y.contiguous()?.apply_op1(TapIdentity { tap: tap.clone(), seen: Seen::Normed(norm, x.detach()) })
        }
        _ => Ok(y),
    }
}

/// The rows `numbers` `[n, ..]` of a table `[rows, features]`, `[n, .., features]`, tapped or not.
pub(crate) fn picked(numbers: &Tensor, table: &Tensor, tap: Option<&Tap>) -> Result<Tensor> {
    let mut dims = numbers.dims().to_vec();
    dims.push(table.dim(1)?);
    let y = table.index_select(&numbers.flatten_all()?, 0)?.reshape(dims)?;
    match tap {
        Some(tap) if numbers.rank() > 0 => {
            let batch = numbers.dim(0)?;
            let shared = numbers.elem_count() / batch.max(1);
            let numbers = numbers.to_dtype(DType::U32)?.reshape((batch, shared))?;
            y.contiguous()?.apply_op1(TapIdentity { tap: tap.clone(), seen: Seen::Indices(numbers) })
        }
        _ => Ok(y),
    }
}

impl CustomOp1 for TapIdentity {
    fn name(&self) -> &'static str {
        "tap"
    }

    fn cpu_fwd(&self, y: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("tap: expected a contiguous tensor of its own")
        }
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, y: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("tap: expected a contiguous tensor of its own")
        }
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, y: &Tensor, _: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        if self.tap.wanted().1 {
            let (batch, features) = (y.dim(0)?, y.dims().last().copied().unwrap_or(1));
            let shared = y.elem_count() / (batch * features).max(1);
            let grads = gy.contiguous()?.reshape((batch, shared, features))?;
            let inputs = match &self.seen {
                Seen::Normed(norm, x) => {
                    let ones = Tensor::ones(features, x.dtype(), x.device())?;
                    Inputs::Rows(norm.apply(x, &ones, None)?.reshape((batch, shared, features))?)
                }
                Seen::Indices(numbers) => Inputs::Indices(numbers.clone()),
            };
            self.tap.record(inputs, grads)?;
        }
        Ok(Some(gy.clone()))
    }
}
