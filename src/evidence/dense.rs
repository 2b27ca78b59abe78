//! The generalized Gauss-Newton matrix of some parameter tensors, written out: `log det(I + s P0^-1/2 G P0^-1/2)`.
//!
//! Parameter space: the matrix has a row a parameter, however many examples there are. The log-determinant is that of the kernel of the
//! same rows (Sylvester).

use super::last_layer::{Hessians, Last, Sums};
use super::log_det::{Complexity, LogDet, Precision, precision_of, refuse_condition, remedy};
use super::rows::Rows;
use crate::linalg::cholesky::{Half, log_det_inverse};
use crate::linalg::kron::diagonal;
use crate::ops::dense::product;
use candle_core::{DType, Result, Tensor, bail};

/// `G` of the tensors of some rows.
#[derive(Debug, Clone)]
pub(crate) struct Dense {
    /// `[parameters, parameters]`, f64.
    g: Option<Tensor>,
    /// The tensors in the order of the rows of `g`: their numbers and sizes.
    spans: Vec<(usize, usize)>,
    /// Of the rows.
    dtype: DType,
}

impl Dense {
    pub fn new() -> Self {
        Self { g: None, spans: Vec::new(), dtype: DType::F64 }
    }

    fn take(&mut self, part: Tensor) -> Result<()> {
        self.g = Some(match self.g.take() {
            Some(g) => (g + part)?,
            None => part,
        });
        Ok(())
    }
}

impl Sums for Dense {
    /// Adds the matrix of some examples' rows, of one set of tensors at every call.
    fn add(&mut self, rows: &Rows) -> Result<()> {
        let (mut parts, mut spans) = (Vec::new(), Vec::new());
        for layer in &rows.layers {
            if let Some(tensor) = layer.weight {
                let mut size = 0;
                for outs in layer.chunks(usize::MAX)? {
                    let part = layer.of_weight(outs)?;
                    size += part.dim(1)?;
                    parts.push(part);
                }
                spans.push((tensor, size));
            }
            if let Some(tensor) = layer.bias {
                parts.push(layer.of_bias()?);
                spans.push((tensor, layer.layer.out_features()));
            }
        }
        // A product in f32 would round every direction as the largest.
        let j = Tensor::cat(&parts, 1)?.to_dtype(DType::F64)?;
        self.dtype = rows.dtype();
        let part = product(&j.t()?, &j)?;
        self.spans = spans;
        self.take(part)
    }

    fn add_last(&mut self, last: &Last, hessians: &Hessians) -> Result<()> {
        let (n, columns) = last.features.dims2()?;
        let classes = hessians.d.dim(1)?;
        self.dtype = last.dtype;
        self.spans.clear();
        let mut inputs = Vec::new();
        if let Some(tensor) = last.weight {
            self.spans.push((tensor, classes * columns));
            inputs.push(last.features.clone());
        }
        if let Some(tensor) = last.bias {
            self.spans.push((tensor, classes));
            inputs.push(Tensor::ones((n, 1), DType::F64, last.features.device())?);
        }
        let inputs = Tensor::cat(&inputs, 1)?;
        let of_weight = if last.weight.is_some() { columns } else { 0 };
        let size = classes * inputs.dim(1)?;
        // Where the features of an output are, and its one of the bias.
        let place = |output: usize, feature: usize| match feature < of_weight {
            true => output * of_weight + feature,
            false => classes * of_weight + output,
        };
        let mut g = vec![0.0; size * size];
        for row in 0..classes {
            for column in 0..=row {
                let weighted = inputs.broadcast_mul(&hessians.entry(row, column)?.unsqueeze(1)?)?;
                let block = product(&inputs.t()?, &weighted)?.to_vec2::<f64>()?;
                for (i, line) in block.iter().enumerate() {
                    for (j, value) in line.iter().enumerate() {
                        let (at, by) = (place(row, i), place(column, j));
                        g[at * size + by] = *value;
                        g[by * size + at] = *value;
                    }
                }
            }
        }
        self.take(Tensor::from_vec(g, (size, size), last.features.device())?)
    }
}

impl Dense {
    /// `sqrt(s) P0^-1/2` of every row, and `I + s P0^-1/2 G P0^-1/2`.
    fn shifted(&self, g: &Tensor, s: f64, precisions: &[Precision]) -> Result<(Tensor, Tensor)> {
        let of = |&(tensor, size): &(usize, usize)| precision_of(precisions, tensor)?.flat(size, g.device());
        let deltas = self.spans.iter().map(of).collect::<Result<Vec<_>>>()?;
        let scale = (Tensor::cat(&deltas, 0)?.recip()? * s)?.sqrt()?;
        let shifted = g.broadcast_mul(&scale.unsqueeze(0)?)?.broadcast_mul(&scale.unsqueeze(1)?)?;
        let shifted = (shifted + Tensor::eye(scale.dim(0)?, DType::F64, g.device())?)?;
        Ok((scale, shifted))
    }

    /// `log det` and inverse of `shifted`, and a bound of its condition number.
    fn factorized(&self, shifted: &Tensor) -> Result<(f64, Tensor, f64)> {
        // The Frobenius norm; no eigenvalue is below 1.
        let condition = shifted.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
        refuse_condition("matrix I + s G / P0", condition, self.dtype)?;
        match log_det_inverse(shifted, Half::Both, "evidence: the matrix I + s G / P0") {
            Ok((value, inverse)) => Ok((value, inverse, condition)),
            Err(error) => {
                bail!("{error}; its condition number is up to {condition:.1e}: {}", remedy(self.dtype))
            }
        }
    }

    /// `(s G + P0)^-1`, with the tensors in the order of its rows and their sizes.
    pub fn covariance(&self, s: f64, precisions: &[Precision]) -> Result<(Tensor, Vec<(usize, usize)>)> {
        let Some(g) = &self.g else { bail!("posterior: no examples") };
        let (scale, shifted) = self.shifted(g, s, precisions)?;
        let (_, inverse, _) = self.factorized(&shifted)?;
        let scale = (scale * s.sqrt().recip())?;
        let covariance = inverse.broadcast_mul(&scale.unsqueeze(0)?)?.broadcast_mul(&scale.unsqueeze(1)?)?;
        Ok((covariance, self.spans.clone()))
    }
}

impl Complexity for Dense {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let mut found = LogDet::zero(precisions.len());
        let Some(g) = &self.g else { return Ok(found) };
        let (_, shifted) = self.shifted(g, s, precisions)?;
        let (value, inverse, condition) = self.factorized(&shifted)?;
        (found.value, found.condition) = (value, condition);
        // ((I + H)^-1 H)_ii = 1 - ((I + H)^-1)_ii
        let each = (1.0 - diagonal(&inverse.unsqueeze(0)?)?.squeeze(0)?)?;
        let mut at = 0;
        for &(tensor, size) in &self.spans {
            let share = precision_of(precisions, tensor)?.effective(&each.narrow(0, at, size)?)?;
            found.effective[tensor] = Some(share);
            at += size;
        }
        Ok(found)
    }
}
