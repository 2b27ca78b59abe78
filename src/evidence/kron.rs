//! Kronecker-factored curvature of each tensor: `G ~ Q (x) A / N`, a log-determinant from eigenvalues.
//!
//! With `a` a layer's inputs and `g` the gradients by the columns of the outputs' root, over `N` examples and `T` positions:
//! `A = sum a a^T`, `Q = 1/T sum g g^T` for a weight, and `sum g g^T` for a bias, which is a block of its own. So it is in
//! laplace-torch's `Kron` (with curvlinops or asdl) and in Immer et al.'s code. It is no bound, in either direction.

use super::log_det::{Complexity, Effective, LogDet, Precision};
use super::rows::{LayerRows, Rows};
use crate::linalg::eigh::eigh;
use crate::ops::dense::product;
use crate::ops::factor::second_moment;
use candle_core::{DType, Result, Tensor, bail};

/// The sums of one layer.
#[derive(Debug, Clone)]
struct Factors {
    name: String,
    weight: Option<usize>,
    bias: Option<usize>,
    /// `[groups, in, in]`
    a: Tensor,
    /// `[groups, out / groups, out / groups]`, over positions too.
    q: Tensor,
    /// `[1, out, out]`
    q_bias: Option<Tensor>,
    positions: usize,
}

/// The sums over some examples.
#[derive(Debug, Clone, Default)]
pub(crate) struct KronSums {
    layers: Vec<Factors>,
    examples: usize,
}

impl KronSums {
    pub fn add(&mut self, rows: &Rows) -> Result<()> {
        let fresh = self.layers.is_empty();
        for (index, layer) in rows.layers.iter().enumerate() {
            let (inputs, grads) = layer.factors();
            let (of, name) = (&layer.layer, layer.layer.name.clone());
            let grads = grads.flatten(0, 1)?;
            let a = second_moment(inputs, of.groups, false, &name)?;
            let q = second_moment(&grads, of.groups, false, &name)?;
            let q_bias = match (layer.bias, of.groups) {
                (None, _) => None,
                (Some(_), 1) => Some(q.clone()),
                (Some(_), _) => Some(second_moment(&grads, 1, false, &name)?),
            };
            let positions = layer.positions()?;
            match self.layers.get_mut(index) {
                Some(sums) if !fresh => {
                    sums.a = (&sums.a + a)?;
                    sums.q = (&sums.q + q)?;
                    sums.q_bias = match (sums.q_bias.take(), q_bias) {
                        (Some(sum), Some(part)) => Some((sum + part)?),
                        (sum, part) => sum.or(part),
                    };
                    if sums.positions != positions {
                        bail!("evidence: layer {name} has {} and {positions} positions", sums.positions)
                    }
                }
                _ => {
                    let (weight, bias) = (layer.weight, layer.bias);
                    self.layers.push(Factors { name, weight, bias, a, q, q_bias, positions });
                }
            }
        }
        self.examples += rows.examples;
        Ok(())
    }

    /// The eigenvectors, with the eigenvalues of every tensor's block.
    pub fn basis(self) -> Result<Vec<KronBasis>> {
        let mut bases = Vec::new();
        for layer in self.layers {
            let scale = 1.0 / (layer.positions.max(1) * self.examples.max(1)) as f64;
            let [a, q] = [&layer.a, &layer.q].map(|m| eigh(&m.to_dtype(DType::F64)?, &layer.name));
            let (a, q) = (a?, q?);
            let dtype = layer.a.dtype();
            // [groups, out / groups, in], the order of the weight.
            let products = (q.values.unsqueeze(2)?.broadcast_mul(&a.values.unsqueeze(1)?)? * scale)?;
            let weight = layer.weight.map(|_| products.relu()?.flatten_all()).transpose()?;
            let bias = match (layer.bias, &layer.q_bias) {
                (Some(_), Some(q)) => {
                    let q = eigh(&q.to_dtype(DType::F64)?, &layer.name)?;
                    Some((q.vectors.squeeze(0)?.to_dtype(dtype)?, q.values.squeeze(0)?.relu()?))
                }
                _ => None,
            };
            let [inputs, grads] = [a.vectors.to_dtype(dtype)?, q.vectors.to_dtype(dtype)?];
            bases.push(KronBasis { inputs, grads, weight, bias });
        }
        Ok(bases)
    }

    /// The eigenvalues.
    pub fn finish(self) -> Result<Kron> {
        let values = |m: &Tensor, name: &str| -> Result<Vec<Vec<f64>>> {
            let values = eigh(&m.to_dtype(DType::F64)?, name)?.values.to_vec2::<f64>()?;
            // Sums of squares have none below 0 but by rounding.
            Ok(values.into_iter().map(|row| row.into_iter().map(|v| v.max(0.0)).collect()).collect())
        };
        let mut blocks = Vec::new();
        for layer in self.layers {
            let scale = 1.0 / (layer.positions.max(1) * self.examples.max(1)) as f64;
            if let Some(tensor) = layer.weight {
                let (a, q) = (values(&layer.a, &layer.name)?, values(&layer.q, &layer.name)?);
                let products = a
                    .iter()
                    .zip(&q)
                    .flat_map(|(a, q)| q.iter().flat_map(move |q| a.iter().map(move |a| scale * q * a)));
                blocks.push((tensor, products.collect()));
            }
            if let (Some(tensor), Some(q)) = (layer.bias, layer.q_bias) {
                blocks.push((tensor, values(&q, &layer.name)?.into_iter().flatten().collect()));
            }
        }
        Ok(Kron { blocks })
    }
}

/// The eigenvalues of each tensor's block.
#[derive(Debug, Clone)]
pub(crate) struct Kron {
    blocks: Vec<(usize, Vec<f64>)>,
}

impl Complexity for Kron {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let mut found = LogDet::zero(precisions.len());
        for (tensor, values) in &self.blocks {
            let Some(Precision::Uniform(delta)) = precisions.get(*tensor) else {
                bail!(
                    "evidence: Kronecker factors need one prior precision a tensor (or layer, or for all), not one a weight"
                )
            };
            let (mut value, mut effective) = (0.0, 0.0);
            for lambda in values {
                let ratio = s * lambda / delta;
                value += ratio.ln_1p();
                effective += ratio / (1.0 + ratio);
            }
            found.value += value;
            Effective::Total(effective).add_to(&mut found.effective[*tensor], 1.0)?;
        }
        Ok(found)
    }
}

/// Where a layer's block is diagonal.
#[derive(Debug)]
pub(crate) struct KronBasis {
    /// Eigenvectors of the inputs' factor, `[groups, in, in]`.
    inputs: Tensor,
    /// Of the gradients', `[groups, out / groups, out / groups]`.
    grads: Tensor,
    /// The eigenvalues of the weight's block, `[out * in]` in f64.
    pub weight: Option<Tensor>,
    /// Eigenvectors `[out, out]` and eigenvalues of the bias's block.
    pub bias: Option<(Tensor, Tensor)>,
}

impl KronBasis {
    /// The rows of the weight in this basis.
    pub fn turn(&self, layer: &LayerRows) -> Result<LayerRows> {
        let (inputs, grads) = layer.factors();
        let turned = |t: &Tensor, vectors: &Tensor| -> Result<Tensor> {
            let (groups, dim, _) = vectors.dims3()?;
            let flat = t.reshape(((), groups, dim))?.transpose(0, 1)?.contiguous()?;
            product(&flat, vectors)?.transpose(0, 1)?.contiguous()?.reshape(t.shape())
        };
        Ok(layer.with(turned(inputs, &self.inputs)?, turned(grads, &self.grads)?))
    }
}
