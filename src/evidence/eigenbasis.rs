//! Blocks of the curvature, a tensor each, in bases in which they are taken as diagonal.

use super::log_det::{Complexity, Effective, LogDet, Precision, refuse_condition};
use super::posterior::Covariance;
use super::rows::LayerRows;
use crate::ops::dense::product;
use candle_core::{DType, Result, Tensor, bail};

/// A tensor's block: `(U_g (x) U_a) diag(values) (U_g (x) U_a)^T`. All in f64.
#[derive(Debug, Clone)]
pub(crate) struct Eigenbasis {
    /// The problem's tensor.
    pub tensor: usize,
    /// `U_a`, `[groups, in, in]`; without it the inputs as they are. A bias has none.
    pub inputs: Option<Tensor>,
    /// `U_g`, `[groups, out / groups, out / groups]`, likewise.
    pub grads: Option<Tensor>,
    /// In the order of the tensor, flattened.
    pub values: Tensor,
}

impl Eigenbasis {
    /// The rows of a weight, in f64, in this basis.
    pub fn turn(&self, layer: &LayerRows) -> Result<LayerRows> {
        let (inputs, grads) = layer.factors();
        Ok(layer.with(turned(inputs, self.inputs.as_ref())?, turned(grads, self.grads.as_ref())?))
    }

    /// The rows of a bias, `[rows, out]` in f64, in this basis.
    pub fn turn_bias(&self, rows: &Tensor) -> Result<Tensor> {
        turned(rows, self.grads.as_ref())
    }
}

/// Numbers whose last dimension are the features of all groups, times eigenvectors `[groups, d, d]`.
pub(crate) fn turned(t: &Tensor, vectors: Option<&Tensor>) -> Result<Tensor> {
    let Some(vectors) = vectors else { return Ok(t.clone()) };
    let (groups, dim, _) = vectors.dims3()?;
    let flat = t.reshape(((), groups, dim))?.transpose(0, 1)?.contiguous()?;
    product(&flat, vectors)?.transpose(0, 1)?.contiguous()?.reshape(t.shape())
}

/// The blocks of all tensors.
#[derive(Debug, Clone)]
pub(crate) struct Eigenbases {
    pub blocks: Vec<Eigenbasis>,
    /// Of the rows that they are of.
    pub dtype: DType,
    /// Whether the values are true sums in the basis, not products of eigenvalues.
    pub rotated: bool,
}

impl Eigenbases {
    /// A tensor's.
    pub fn of(&self, tensor: usize) -> Option<&Eigenbasis> {
        self.blocks.iter().find(|block| block.tensor == tensor)
    }
}

impl Complexity for Eigenbases {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let mut found = LogDet::zero(precisions.len());
        for block in &self.blocks {
            let Some(Precision::Uniform(delta)) = precisions.get(block.tensor) else {
                bail!(
                    "evidence: Kronecker factors need one prior precision a tensor (or layer, or for all), not one a weight"
                )
            };
            let (mut value, mut effective) = (0.0, 0.0);
            for lambda in block.values.to_vec1::<f64>()? {
                let ratio = s * lambda / delta;
                found.condition = found.condition.max(1.0 + ratio);
                value += ratio.ln_1p();
                effective += ratio / (1.0 + ratio);
            }
            found.value += value;
            Effective::Total(effective).add_to(&mut found.effective[block.tensor], 1.0)?;
        }
        refuse_condition("Kronecker factors", found.condition, self.dtype)?;
        Ok(found)
    }

    fn covariance(&self, _: f64, _: &[Precision]) -> Result<Option<Covariance>> {
        Ok(Some(Covariance::Kron(self.clone())))
    }
}
