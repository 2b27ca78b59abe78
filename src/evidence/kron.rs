//! Kronecker-factored curvature of each tensor: `G ~ Q (x) A / N`, a log-determinant from eigenvalues.
//!
//! With `a` a layer's inputs and `g` the gradients by the columns of the outputs' root, over `N` examples and `T` positions:
//! `A = sum a a^T`, `Q = 1/T sum g g^T` for a weight, and `sum g g^T` for a bias, which is a block of its own. So it is in
//! laplace-torch's `Kron` (with curvlinops or asdl) and in Immer et al.'s code. It is no bound, in either direction.
//!
//! The gain and bias of a norm have diagonal blocks; of an embedding `A` is diagonal too: how often each row was picked.

use super::diagonal::weight_squares;
use super::log_det::{Complexity, Effective, LogDet, Precision};
use super::rows::{LayerRows, Rows};
use crate::linalg::eigh::eigh;
use crate::ops::dense::product;
use crate::ops::factor::second_moment;
use crate::tape::Kind;
use candle_core::{DType, Error, Result, Tensor, bail};

/// The sums of one layer.
#[derive(Debug, Clone)]
struct Factors {
    name: String,
    weight: Option<usize>,
    bias: Option<usize>,
    positions: usize,
    sums: Sums,
}

#[derive(Debug, Clone)]
enum Sums {
    Matrix {
        /// `[groups, in, in]`
        a: Tensor,
        /// `[groups, out / groups, out / groups]`, over positions too.
        q: Tensor,
        /// `[1, out, out]`
        q_bias: Option<Tensor>,
    },
    /// The diagonals of the blocks.
    Gain { weight: Tensor, bias: Option<Tensor> },
    /// How often each row was picked, and `q` `[1, features, features]`.
    Table { counts: Tensor, q: Tensor },
}

impl Sums {
    fn of(layer: &LayerRows) -> Result<Self> {
        let (inputs, grads) = layer.factors();
        let (of, name) = (&layer.layer, layer.layer.name.as_str());
        let flat = layer.grads_by_row()?;
        Ok(match of.kind {
            Kind::Matrix => {
                let q = second_moment(&flat, of.groups, false, name)?;
                let q_bias = match (layer.bias, of.groups) {
                    (None, _) => None,
                    (Some(_), 1) => Some(q.clone()),
                    (Some(_), _) => Some(second_moment(&flat, 1, false, name)?),
                };
                Sums::Matrix { a: second_moment(inputs, of.groups, false, name)?, q, q_bias }
            }
            Kind::Gain => {
                let bias = layer.bias.map(|_| layer.of_bias()?.sqr()?.sum(0)).transpose()?;
                Sums::Gain { weight: weight_squares(layer)?, bias }
            }
            Kind::Table => {
                let numbers = inputs.flatten_all()?;
                let ones = Tensor::ones(numbers.elem_count(), grads.dtype(), grads.device())?;
                let counts = Tensor::zeros(of.weight.dim(0)?, grads.dtype(), grads.device())?;
                Sums::Table {
                    counts: counts.index_add(&numbers, &ones, 0)?,
                    q: second_moment(&flat, 1, false, name)?,
                }
            }
        })
    }

    fn add(&mut self, other: Sums) -> Result<()> {
        let sum = |a: &mut Option<Tensor>, b: Option<Tensor>| -> Result<()> {
            *a = match (a.take(), b) {
                (Some(a), Some(b)) => Some((a + b)?),
                (a, b) => a.or(b),
            };
            Ok(())
        };
        match (self, other) {
            (Sums::Matrix { a, q, q_bias }, Sums::Matrix { a: a1, q: q1, q_bias: b1 }) => {
                (*a, *q) = ((&*a + a1)?, (&*q + q1)?);
                sum(q_bias, b1)
            }
            (Sums::Gain { weight, bias }, Sums::Gain { weight: w1, bias: b1 }) => {
                *weight = (&*weight + w1)?;
                sum(bias, b1)
            }
            (Sums::Table { counts, q }, Sums::Table { counts: c1, q: q1 }) => {
                (*counts, *q) = ((&*counts + c1)?, (&*q + q1)?);
                Ok(())
            }
            _ => bail!("evidence: a layer changed its kind"),
        }
    }
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
            let (sums, positions) = (Sums::of(layer)?, layer.positions()?);
            match self.layers.get_mut(index) {
                Some(known) if !fresh => {
                    if known.positions != positions {
                        bail!(
                            "evidence: layer {} has {} and {positions} positions",
                            known.name,
                            known.positions
                        )
                    }
                    known.sums.add(sums)?;
                }
                _ => {
                    let name = layer.layer.name.clone();
                    self.layers.push(Factors {
                        name,
                        weight: layer.weight,
                        bias: layer.bias,
                        positions,
                        sums,
                    });
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
            let decomposed = |m: &Tensor| -> Result<(Tensor, Tensor)> {
                let found = eigh(&m.to_dtype(DType::F64)?, &layer.name)?;
                // Sums of squares have no eigenvalue below 0 but by rounding.
                Ok((found.vectors.to_dtype(m.dtype())?, found.values.relu()?))
            };
            let (mut inputs, mut grads, mut bias) = (None, None, None);
            let values = match &layer.sums {
                Sums::Matrix { a, q, q_bias } => {
                    let ((a_vectors, a), (q_vectors, q)) = (decomposed(a)?, decomposed(q)?);
                    (inputs, grads) = (Some(a_vectors), Some(q_vectors));
                    if let Some(q) = q_bias {
                        let (vectors, values) = decomposed(q)?;
                        bias = Some((Some(vectors.squeeze(0)?), values.squeeze(0)?));
                    }
                    // [groups, out / groups, in], the order of the weight.
                    (q.unsqueeze(2)?.broadcast_mul(&a.unsqueeze(1)?)? * scale)?.flatten_all()?
                }
                Sums::Gain { weight, bias: squares } => {
                    bias = squares
                        .as_ref()
                        .map(|b| Ok::<_, Error>((None, b.to_dtype(DType::F64)?)))
                        .transpose()?;
                    weight.to_dtype(DType::F64)?
                }
                Sums::Table { counts, q } => {
                    let (q_vectors, q) = decomposed(q)?;
                    grads = Some(q_vectors);
                    let counts = counts.to_dtype(DType::F64)?.unsqueeze(1)?;
                    (counts.broadcast_mul(&q)? * scale)?.flatten_all()?
                }
            };
            let weight = layer.weight.map(|tensor| (tensor, values));
            let bias = layer.bias.zip(bias).map(|(tensor, (vectors, values))| (tensor, vectors, values));
            bases.push(KronBasis { inputs, grads, weight, bias });
        }
        Ok(bases)
    }

    /// The eigenvalues.
    pub fn finish(self) -> Result<Kron> {
        let mut blocks = Vec::new();
        for basis in self.basis()? {
            if let Some((tensor, values)) = basis.weight {
                blocks.push((tensor, values.to_vec1()?));
            }
            if let Some((tensor, _, values)) = basis.bias {
                blocks.push((tensor, values.to_vec1()?));
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

/// Where a layer's blocks are diagonal.
#[derive(Debug)]
pub(crate) struct KronBasis {
    /// Eigenvectors of the inputs' factor, `[groups, in, in]`; the inputs as they are without.
    inputs: Option<Tensor>,
    /// Of the gradients', `[groups, out / groups, out / groups]`.
    grads: Option<Tensor>,
    /// The weight, and the eigenvalues of its block in its order, f64.
    pub weight: Option<(usize, Tensor)>,
    /// The bias, eigenvectors `[out, out]` of its block if that is not diagonal, and the eigenvalues.
    pub bias: Option<(usize, Option<Tensor>, Tensor)>,
}

impl KronBasis {
    /// The rows of the weight in this basis.
    pub fn turn(&self, layer: &LayerRows) -> Result<LayerRows> {
        let (inputs, grads) = layer.factors();
        let turned = |t: &Tensor, vectors: &Option<Tensor>| -> Result<Tensor> {
            let Some(vectors) = vectors else { return Ok(t.clone()) };
            let (groups, dim, _) = vectors.dims3()?;
            let flat = t.reshape(((), groups, dim))?.transpose(0, 1)?.contiguous()?;
            product(&flat, vectors)?.transpose(0, 1)?.contiguous()?.reshape(t.shape())
        };
        Ok(layer.with(turned(inputs, &self.inputs)?, turned(grads, &self.grads)?))
    }
}
