//! Kronecker-factored curvature of each tensor: `G ~ Q (x) A / N`, a log-determinant from eigenvalues.
//!
//! With `a` a layer's inputs and `g` the gradients by the columns of the outputs' root, over `N` examples and `T` positions:
//! `A = sum a a^T`, `Q = 1/T sum g g^T` for a weight, and `sum g g^T` for a bias, which is a block of its own. So it is in
//! laplace-torch's `Kron` (with curvlinops or asdl) and in Immer et al.'s code. It is no bound, in either direction.
//!
//! Positions that a mask leaves out are zeros in the sums, and `N T` is the number of those that count. An example whose terms have weights of
//! mean `w` counts `w` times in `A` and in `N`.
//!
//! Sums and eigenvalues are in f64, whatever the rows are in: an eigenvalue that is zero (of an input that is always zero, of outputs whose
//! gradients always cancel) would else come out as the rounding of the largest, and be charged for where precisions are small.
//!
//! The gain and bias of a norm have diagonal blocks; of an embedding `A` is diagonal too: how often each row was picked.

use super::diagonal::weight_squares;
use super::eigenbasis::{Eigenbases, Eigenbasis};
use super::last_layer::{Hessians, Last, Sums};
use super::rows::{LayerRows, Rows};
use crate::linalg::eigh::eigh;
use crate::ops::dense::product;
use crate::ops::factor::second_moment;
use crate::tape::Kind;
use candle_core::{DType, Result, Tensor, bail};

/// The sums of one layer, f64.
#[derive(Debug, Clone)]
struct Factors {
    name: String,
    weight: Option<(usize, WeightSums)>,
    bias: Option<(usize, BiasSums)>,
    /// Positions of all examples that count.
    positions: f64,
}

#[derive(Debug, Clone)]
enum WeightSums {
    /// `a` `[groups, in, in]`, `q` `[groups, out / groups, out / groups]` over positions too.
    Matrix { a: Tensor, q: Tensor },
    /// The diagonal of the block.
    Gain(Tensor),
    /// How often each row was picked, and `q` `[1, features, features]`.
    Table { counts: Tensor, q: Tensor },
}

#[derive(Debug, Clone)]
enum BiasSums {
    /// `[1, out, out]`
    Matrix(Tensor),
    Diagonal(Tensor),
}

impl Factors {
    fn of(layer: &LayerRows, weights: Option<&Tensor>) -> Result<Self> {
        let of = &layer.layer;
        let name = of.name.as_str();
        let moment = |t: &Tensor, groups| second_moment(&t.to_dtype(DType::F64)?, groups, false, name);
        let grads = |groups| moment(&layer.grads_by_row()?, groups);
        let (inputs, _) = layer.factors();
        let inputs = || match weights {
            Some(weights) => inputs.to_dtype(DType::F64)?.broadcast_mul(&weights.sqrt()?),
            None => Ok(inputs.clone()),
        };
        let weight = match (layer.weight, of.kind) {
            (None, _) => None,
            (Some(tensor), Kind::Linear) => {
                Some((tensor, WeightSums::Matrix { a: moment(&inputs()?, of.groups)?, q: grads(of.groups)? }))
            }
            (Some(tensor), Kind::Norm) => Some((tensor, WeightSums::Gain(weight_squares(layer)?))),
            (Some(tensor), Kind::Embedding) => {
                Some((tensor, WeightSums::Table { counts: layer.picks(weights)?, q: grads(1)? }))
            }
        };
        let bias = match (layer.bias, of.kind, &weight) {
            (None, ..) => None,
            (Some(tensor), Kind::Linear, Some((_, WeightSums::Matrix { q, .. }))) if of.groups == 1 => {
                Some((tensor, BiasSums::Matrix(q.clone())))
            }
            (Some(tensor), Kind::Linear, _) => Some((tensor, BiasSums::Matrix(grads(1)?))),
            (Some(tensor), ..) => {
                Some((tensor, BiasSums::Diagonal(layer.of_bias()?.to_dtype(DType::F64)?.sqr()?.sum(0)?)))
            }
        };
        Ok(Self {
            name: name.to_string(),
            weight,
            bias,
            positions: layer.counts(weights)?.sum_all()?.to_scalar()?,
        })
    }

    fn of_last(last: &Last, hessians: &Hessians) -> Result<Self> {
        let q = hessians.sum(None)?.unsqueeze(0)?;
        let weighted = match &hessians.weights {
            Some(weights) => last.features.broadcast_mul(&weights.unsqueeze(1)?)?,
            None => last.features.clone(),
        };
        let positions = match &hessians.weights {
            Some(weights) => weights.sum_all()?.to_scalar()?,
            None => last.features.dim(0)? as f64,
        };
        let weight = match last.weight {
            Some(tensor) => {
                let a = product(&last.features.t()?, &weighted)?.unsqueeze(0)?;
                Some((tensor, WeightSums::Matrix { a, q: q.clone() }))
            }
            None => None,
        };
        let bias = last.bias.map(|tensor| (tensor, BiasSums::Matrix(q)));
        Ok(Self { name: last.name.clone(), weight, bias, positions })
    }

    fn add(&mut self, other: Factors) -> Result<()> {
        match (&mut self.weight, other.weight) {
            (Some((_, WeightSums::Matrix { a, q })), Some((_, WeightSums::Matrix { a: a1, q: q1 })))
            | (
                Some((_, WeightSums::Table { counts: a, q })),
                Some((_, WeightSums::Table { counts: a1, q: q1 })),
            ) => (*a, *q) = ((&*a + a1)?, (&*q + q1)?),
            (Some((_, WeightSums::Gain(sum))), Some((_, WeightSums::Gain(more)))) => *sum = (&*sum + more)?,
            (None, None) => {}
            _ => bail!("evidence: layer {} changed its kind", self.name),
        }
        match (&mut self.bias, other.bias) {
            (Some((_, BiasSums::Matrix(sum))), Some((_, BiasSums::Matrix(more))))
            | (Some((_, BiasSums::Diagonal(sum))), Some((_, BiasSums::Diagonal(more)))) => {
                *sum = (&*sum + more)?
            }
            (None, None) => {}
            _ => bail!("evidence: layer {} changed its kind", self.name),
        }
        self.positions += other.positions;
        Ok(())
    }
}

/// The sums over some examples.
#[derive(Debug, Clone, Default)]
pub(crate) struct KronSums {
    layers: Vec<Factors>,
    /// Of the rows.
    dtype: Option<DType>,
}

impl Sums for KronSums {
    fn add(&mut self, rows: &Rows) -> Result<()> {
        let factors = rows.layers.iter().map(|layer| Factors::of(layer, rows.weights.as_ref()));
        self.join(factors.collect::<Result<_>>()?, rows.dtype())
    }

    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()> {
        self.join(vec![Factors::of_last(last, hessians)?], last.dtype)
    }
}

impl KronSums {
    fn join(&mut self, factors: Vec<Factors>, dtype: DType) -> Result<()> {
        self.dtype = Some(dtype);
        if self.layers.is_empty() {
            self.layers = factors;
            return Ok(());
        }
        self.layers.iter_mut().zip(factors).try_for_each(|(known, more)| known.add(more))
    }

    /// Where every tensor's block is diagonal, with its eigenvalues.
    pub fn finish(&self) -> Result<Eigenbases> {
        let dtype = self.dtype.unwrap_or(DType::F64);
        let mut blocks = Vec::new();
        for layer in &self.layers {
            // Over all examples and positions.
            let scale = layer.positions.max(f64::MIN_POSITIVE).recip();
            let decomposed = |m: &Tensor| -> Result<(Tensor, Tensor)> {
                let found = eigh(m, &layer.name)?;
                Ok((found.vectors, without_noise(&found.values, dtype)?))
            };
            if let Some((tensor, sums)) = &layer.weight {
                let (mut inputs, mut grads) = (None, None);
                let values = match sums {
                    WeightSums::Matrix { a, q } => {
                        let ((a_vectors, a), (q_vectors, q)) = (decomposed(a)?, decomposed(q)?);
                        (inputs, grads) = (Some(a_vectors), Some(q_vectors));
                        // [groups, out / groups, in], the order of the weight.
                        (q.unsqueeze(2)?.broadcast_mul(&a.unsqueeze(1)?)? * scale)?.flatten_all()?
                    }
                    WeightSums::Gain(squares) => squares.clone(),
                    WeightSums::Table { counts, q } => {
                        let (q_vectors, q) = decomposed(q)?;
                        grads = Some(q_vectors);
                        (counts.unsqueeze(1)?.broadcast_mul(&q)? * scale)?.flatten_all()?
                    }
                };
                blocks.push(Eigenbasis { tensor: *tensor, inputs, grads, values });
            }
            if let Some((tensor, sums)) = &layer.bias {
                let (grads, values) = match sums {
                    BiasSums::Diagonal(squares) => (None, squares.clone()),
                    BiasSums::Matrix(q) => {
                        let (vectors, values) = decomposed(q)?;
                        (Some(vectors), values.flatten_all()?)
                    }
                };
                blocks.push(Eigenbasis { tensor: *tensor, inputs: None, grads, values });
            }
        }
        Ok(Eigenbases { blocks, dtype, rotated: false })
    }
}

/// Eigenvalues `[groups, d]` of sums of squares, with zeros for what is rounding: below 0, below what a decomposition in f64 tells from 0,
/// and of rows in f32 below the square of what these tell.
pub(super) fn without_noise(values: &Tensor, dtype: DType) -> Result<Tensor> {
    let rounding = match dtype {
        DType::F64 => f64::EPSILON.powi(2),
        _ => f64::from(f32::EPSILON).powi(2),
    };
    let relative = (4.0 * rounding).max(values.dim(1)? as f64 * f64::EPSILON);
    let least = (values.max_keepdim(1)? * relative)?;
    let real = values.broadcast_gt(&least)?.to_dtype(DType::F64)?;
    values.relu()? * real
}
