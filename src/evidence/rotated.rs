//! The diagonal of each tensor's block in a Kronecker basis: a log-determinant that bounds the exact one from above.
//!
//! With `D_r` the rows of a weight as matrices `[out, in]`, over all examples, columns of the root and pairs of positions, the basis is
//! that of the marginals `sum_r D_r D_r^T = U_g .. U_g^T` and `sum_r D_r^T D_r = U_a .. U_a^T`, and the diagonal in it
//! `s_ij = sum_r (U_g^T D_r U_a)_ij^2`: EKFAC's moments (George et al. 2018), as sums. A bias has the eigenvalues of its block, a norm's gain
//! the diagonal, an embedding a basis of its features.
//!
//! Proof of the bound: a rotation of a block changes neither its determinant nor that of the prior, which is a multiple of 1 on a tensor;
//! the determinant of a positive definite matrix is at most the product of its diagonal (Hadamard), and of its diagonal blocks (Fischer).

use super::diagonal::weight_squares;
use super::eigenbasis::{Eigenbases, Eigenbasis, turned};
use super::last_layer::{Hessians, Last, Sums};
use super::rows::{CHUNK, LayerRows, Rows};
use crate::linalg::eigh::eigh;
use crate::ops::dense::product;
use crate::tape::Kind;
use candle_core::{DType, Device, Result, Tensor, bail};

/// The sums over some examples of one tensor's rows, f64.
#[derive(Debug, Clone)]
enum Marginals {
    /// `sum D D^T` `[groups, out / groups, out / groups]` and `sum D^T D` `[groups, in, in]`.
    Matrix { grads: Tensor, inputs: Tensor },
    /// `sum D^T D` of an embedding's features, or the block of a bias: `[1, features, features]`.
    Features(Tensor),
    /// The block is taken as diagonal as it is.
    None,
}

/// Those of all tensors, from a first pass over the examples.
#[derive(Debug, Clone, Default)]
pub(crate) struct MarginalSums {
    /// Tensors with the names of their layers.
    sums: Vec<(usize, String, Marginals)>,
    dtype: Option<DType>,
}

/// `sum_r m_r m_r^T` of matrices `[.., rows, columns]` next to each other in `[r, rows, columns]`.
fn gram(m: &Tensor) -> Result<Tensor> {
    let (count, rows, columns) = m.dims3()?;
    let flat = m.transpose(0, 1)?.contiguous()?.reshape((rows, count * columns))?;
    product(&flat, &flat.t()?)
}

impl Marginals {
    fn of_weight(layer: &LayerRows) -> Result<Self> {
        let of = &layer.layer;
        match of.kind {
            Kind::Norm => Ok(Marginals::None),
            Kind::Embedding => {
                // Rows that are not picked are zero.
                let layer = layer.compact()?;
                let (columns, mut sum) = (layer.columns(), None);
                for outs in layer.chunks(CHUNK)? {
                    let rows = layer.of_weight(outs)?.to_dtype(DType::F64)?.reshape(((), columns))?;
                    add(&mut sum, product(&rows.t()?, &rows)?.unsqueeze(0)?)?;
                }
                Ok(sum.map_or(Marginals::None, Marginals::Features))
            }
            Kind::Linear if layer.is_product()? => {
                let (inputs, grads) = layer.factors();
                let (inputs, grads) =
                    (inputs.squeeze(1)?.to_dtype(DType::F64)?, grads.squeeze(2)?.to_dtype(DType::F64)?);
                // |a|^2 sum_c g g^T, and sum_c |g|^2 a a^T.
                let lengths = inputs.sqr()?.sum_keepdim(1)?.sqrt()?.unsqueeze(1)?;
                let grads_by = grads.broadcast_mul(&lengths)?.flatten(0, 1)?;
                let lengths = grads.sqr()?.sum(2)?.sum_keepdim(1)?.sqrt()?;
                let inputs_by = inputs.broadcast_mul(&lengths)?;
                let square = |t: &Tensor| product(&t.t()?, t)?.unsqueeze(0);
                Ok(Marginals::Matrix { grads: square(&grads_by)?, inputs: square(&inputs_by)? })
            }
            Kind::Linear => {
                let (groups, columns, out) = (of.groups.max(1), layer.columns(), of.out_features());
                let rows_of_group = out / groups;
                let (mut grads, mut inputs) = (Vec::new(), Vec::new());
                for group in 0..groups {
                    let outs = group * rows_of_group..(group + 1) * rows_of_group;
                    let d = layer.of_weight(outs)?.to_dtype(DType::F64)?;
                    let d = d.reshape(((), rows_of_group, columns))?;
                    grads.push(gram(&d)?);
                    let flat = d.flatten(0, 1)?;
                    inputs.push(product(&flat.t()?, &flat)?);
                }
                Ok(Marginals::Matrix { grads: Tensor::stack(&grads, 0)?, inputs: Tensor::stack(&inputs, 0)? })
            }
        }
    }

    fn add(&mut self, other: Self) -> Result<()> {
        match (self, other) {
            (Marginals::Matrix { grads, inputs }, Marginals::Matrix { grads: g, inputs: i }) => {
                (*grads, *inputs) = ((&*grads + g)?, (&*inputs + i)?);
            }
            (Marginals::Features(sum), Marginals::Features(more)) => *sum = (&*sum + more)?,
            (Marginals::None, Marginals::None) => {}
            _ => bail!("evidence: a layer changed its kind"),
        }
        Ok(())
    }
}

fn add(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + part)?,
        None => part,
    });
    Ok(())
}

impl Sums for MarginalSums {
    fn add(&mut self, rows: &Rows) -> Result<()> {
        self.dtype = Some(rows.dtype());
        for layer in &rows.layers {
            if let Some(tensor) = layer.weight {
                for some in in_chunks(rows, layer)? {
                    self.take(tensor, &layer.layer.name, Marginals::of_weight(&some)?)?;
                }
            }
            if let Some(tensor) = layer.bias {
                let marginals = match layer.layer.kind {
                    Kind::Norm => Marginals::None,
                    _ => {
                        let rows = layer.of_bias()?.to_dtype(DType::F64)?;
                        Marginals::Features(product(&rows.t()?, &rows)?.unsqueeze(0)?)
                    }
                };
                self.take(tensor, &layer.layer.name, marginals)?;
            }
        }
        Ok(())
    }

    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()> {
        self.dtype = Some(last.dtype);
        if let Some(tensor) = last.weight {
            // |phi|^2 H, and tr(H) phi phi^T.
            let grads = hessians.sum(Some(&last.features.sqr()?.sum(1)?))?.unsqueeze(0)?;
            let traces = hessians.diagonals(None)?.sum_keepdim(1)?;
            let inputs = product(&last.features.t()?, &last.features.broadcast_mul(&traces)?)?;
            let inputs = inputs.unsqueeze(0)?;
            self.take(tensor, &last.name, Marginals::Matrix { grads, inputs })?;
        }
        if let Some(tensor) = last.bias {
            let features = hessians.sum(None)?.unsqueeze(0)?;
            self.take(tensor, &last.name, Marginals::Features(features))?;
        }
        Ok(())
    }
}

impl MarginalSums {
    fn take(&mut self, tensor: usize, name: &str, marginals: Marginals) -> Result<()> {
        match self.sums.iter_mut().find(|(known, ..)| *known == tensor) {
            Some((.., known)) => known.add(marginals),
            None => {
                self.sums.push((tensor, name.to_string(), marginals));
                Ok(())
            }
        }
    }

    /// The bases, without any sums in them yet.
    pub fn bases(self) -> Result<RotatedSums> {
        let mut blocks = Vec::new();
        for (tensor, name, marginals) in self.sums {
            let vectors = |m: &Tensor| Ok::<_, candle_core::Error>(eigh(m, &name)?.vectors);
            let (inputs, grads) = match marginals {
                Marginals::Matrix { grads, inputs } => (Some(vectors(&inputs)?), Some(vectors(&grads)?)),
                Marginals::Features(features) => (None, Some(vectors(&features)?)),
                Marginals::None => (None, None),
            };
            let values = Tensor::zeros(0, DType::F64, &Device::Cpu)?;
            blocks.push((Eigenbasis { tensor, inputs, grads, values }, None));
        }
        Ok(RotatedSums { blocks, dtype: self.dtype.unwrap_or(DType::F64) })
    }
}

/// The layer's rows, so few examples at a time that a weight's, written out, take no more than [`CHUNK`] numbers unless one example's do.
fn in_chunks(rows: &Rows, layer: &LayerRows) -> Result<Vec<LayerRows>> {
    if !layer.layer.kind.is_linear() || layer.is_product()? {
        return Ok(vec![layer.clone()]);
    }
    let one = rows.each * layer.layer.out_features() * layer.columns();
    let step = (CHUNK / one.max(1)).clamp(1, rows.examples.max(1));
    let starts = (0..rows.examples).step_by(step);
    starts.map(|start| layer.examples(start, step.min(rows.examples - start))).collect()
}

/// Sums of squares in the bases, from a second pass over the examples.
#[derive(Debug, Clone)]
pub(crate) struct RotatedSums {
    /// Bases without values, and the sums.
    blocks: Vec<(Eigenbasis, Option<Tensor>)>,
    dtype: DType,
}

impl Sums for RotatedSums {
    fn add(&mut self, rows: &Rows) -> Result<()> {
        for layer in &rows.layers {
            for (basis, sum) in &mut self.blocks {
                if layer.weight == Some(basis.tensor) {
                    add(sum, weight_squares(&basis.turn(&layer.to_f64()?)?)?)?;
                } else if layer.bias == Some(basis.tensor) {
                    let rows = layer.of_bias()?.to_dtype(DType::F64)?;
                    add(sum, basis.turn_bias(&rows)?.sqr()?.sum(0)?)?;
                }
            }
        }
        Ok(())
    }

    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()> {
        for (basis, sum) in &mut self.blocks {
            let of_basis = |vectors: &Option<Tensor>| vectors.as_ref().map(|v| v.squeeze(0)).transpose();
            let diagonals = hessians.diagonals(of_basis(&basis.grads)?.as_ref())?;
            if last.weight == Some(basis.tensor) {
                let features = turned(&last.features, basis.inputs.as_ref())?.sqr()?;
                add(sum, product(&diagonals.t()?, &features)?.flatten_all()?)?;
            } else if last.bias == Some(basis.tensor) {
                add(sum, diagonals.sum(0)?)?;
            }
        }
        Ok(())
    }
}

impl RotatedSums {
    pub fn finish(self) -> Result<Eigenbases> {
        let mut blocks = Vec::new();
        for (basis, sum) in self.blocks {
            let Some(values) = sum else { bail!("evidence: no examples") };
            blocks.push(Eigenbasis { values, ..basis });
        }
        Ok(Eigenbases { blocks, dtype: self.dtype, rotated: true })
    }
}
