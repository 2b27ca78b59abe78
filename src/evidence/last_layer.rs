//! The curvature of a last linear layer in closed form, without a backward pass a class.
//!
//! Where the outputs are those of a linear layer, `z = W phi + b`, the Jacobian of an example is `I (x) phi^T`, and its share in the
//! Gauss-Newton matrix `Lambda (x) phi phi^T`. All likelihoods have Hessians `Lambda = diag(d) - m m^T`, so that sums over `N` examples of `c`
//! outputs and `p` features take products of matrices `[N, c]` and `[N, p]`. One backward pass a batch tells the features.

use super::examples::Examples;
use super::log_det::sum_of;
use super::pass::{Columns, Pass, each_pass};
use super::problem::Problem;
use super::rows::Rows;
use crate::ops::dense::product;
use crate::ops::rng::normal;
use candle_core::{DType, Result, Tensor, bail};

/// The features of the last layer for some inputs, with what its weight and bias are.
pub(crate) struct Last {
    /// `[n, in]`, f64.
    pub features: Tensor,
    pub weight: Option<usize>,
    pub bias: Option<usize>,
    pub name: String,
    /// Of the outputs.
    pub dtype: DType,
}

/// Hessians by the outputs, `diag(d) - m m^T` of each example with its weight; both `[n, classes]`, f64.
pub(crate) struct Hessians {
    pub d: Tensor,
    pub m: Option<Tensor>,
    /// How often each example counts, `[n]`, where not all count once.
    pub weights: Option<Tensor>,
}

impl Hessians {
    /// `sum_n w_n H_n` for weights `[n]`, `[classes, classes]`.
    pub fn sum(&self, weights: Option<&Tensor>) -> Result<Tensor> {
        let scaled = |t: &Tensor, by: &Option<Tensor>| match by {
            Some(by) => t.broadcast_mul(by),
            None => Ok(t.clone()),
        };
        let weights = weights.map(|w| w.unsqueeze(1)).transpose()?;
        let d = scaled(&self.d, &weights)?.sum(0)?;
        let diagonal = Tensor::eye(d.dim(0)?, DType::F64, d.device())?.broadcast_mul(&d.unsqueeze(0)?)?;
        match &self.m {
            Some(m) => diagonal - product(&m.t()?, &scaled(m, &weights)?)?,
            None => Ok(diagonal),
        }
    }

    /// The diagonals `[n, classes]` of `U^T H_n U`; without `U` of `H_n`.
    pub fn diagonals(&self, vectors: Option<&Tensor>) -> Result<Tensor> {
        let (d, m) = match vectors {
            None => (self.d.clone(), self.m.clone()),
            Some(u) => (product(&self.d, &u.sqr()?)?, self.m.as_ref().map(|m| product(m, u)).transpose()?),
        };
        match m {
            // Below zero by rounding alone.
            Some(m) => (d - m.sqr()?)?.relu(),
            None => Ok(d),
        }
    }

    /// The entries `[n]` of a row and column.
    pub fn entry(&self, row: usize, column: usize) -> Result<Tensor> {
        let of = |t: &Tensor, at: usize| t.narrow(1, at, 1)?.squeeze(1);
        let d = if row == column {
            of(&self.d, row)?
        } else {
            self.d.narrow(1, 0, 1)?.squeeze(1)?.zeros_like()?
        };
        match &self.m {
            Some(m) => d - (of(m, row)? * of(m, column)?)?,
            None => Ok(d),
        }
    }
}

/// Sums over examples from which a curvature is made.
pub(crate) trait Sums {
    /// Adds the rows of some examples.
    fn add(&mut self, rows: &Rows) -> Result<()>;
    /// Adds examples of a last layer, as [`Sums::add`] adds their rows.
    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()>;
}

impl Pass<'_> {
    /// The features, if the parameters are those of one linear layer alone, whose outputs are the model's.
    pub(crate) fn last(&self, problem: &Problem<'_>) -> Result<Option<Last>> {
        let (parameters, Ok((n, classes))) = (problem.parameters(), self.outputs.dims2()) else {
            return Ok(None);
        };
        let one = parameters.iter().all(|p| p.of_layer == parameters[0].of_layer);
        let layer = problem.tape.layers().into_iter().find(|layer| parameters[0].of_layer == layer.index);
        let linear = |layer: &crate::tape::Layer| layer.kind.is_linear() && layer.out_features() == classes;
        if !one || !layer.is_some_and(|layer| linear(&layer)) {
            return Ok(None);
        }
        // Whatever is between the layer and the outputs would change a random cotangent.
        let random = (0..n * classes).map(|i| normal(1, 0, i as u64)).collect::<Vec<_>>();
        let cotangent =
            Tensor::from_vec(random, (n, classes), self.outputs.device())?.to_dtype(self.outputs.dtype())?;
        let rows = self.gather(std::iter::once(Ok(cotangent.clone())), usize::MAX)?;
        let [layer] = rows.layers.as_slice() else { return Ok(None) };
        let (inputs, grads) = layer.factors();
        if layer.positions()? != 1 || layer.layer.groups != 1 || grads.elem_count() != n * classes {
            return Ok(None);
        }
        let apart = (grads.reshape((n, classes))? - cotangent.to_dtype(grads.dtype())?)?;
        if sum_of(&apart.abs()?)? != 0.0 {
            return Ok(None);
        }
        let features = inputs.squeeze(1)?.to_dtype(DType::F64)?;
        let name = layer.layer.name.clone();
        Ok(Some(Last { features, weight: layer.weight, bias: layer.bias, name, dtype: grads.dtype() }))
    }
}

/// Adds all examples to `sums`, few at a time, so that their rows take no more than `memory` bytes; `visit` is told of each pass.
///
/// # Errors
/// As [`each_pass`].
pub(crate) fn sum_up(
    problem: &Problem<'_>,
    examples: &Examples,
    memory: usize,
    sums: &mut dyn Sums,
    mut visit: impl FnMut(&Pass<'_>) -> Result<()>,
) -> Result<()> {
    for (index, some) in examples.passes().enumerate() {
        let some = some?;
        let pass = problem.pass(&some)?;
        match pass.last(problem)? {
            Some(last) => {
                visit(&pass)?;
                sums.add_last(&last, &pass.hessians()?)?;
            }
            None if index == 0 => {
                return each_pass(problem, examples, Columns::Curvature, memory, |pass, rows| {
                    visit(pass)?;
                    sums.add(rows)
                });
            }
            None => bail!(
                "evidence: the outputs are those of the last layer for some examples and not for others; give the model one way from it \
                 to the outputs"
            ),
        }
    }
    Ok(())
}
