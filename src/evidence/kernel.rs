//! The neural tangent kernel of a batch, `M = B^T J P0^-1 J^T B`, and `log det(I + s M)`.
//!
//! Function space: the matrix has a row an example and output, whatever the number of parameters. Layers add up, and a layer's part
//! comes from inner products of its inputs and of its outputs' gradients, of positions that share a weight by way of the rows
//! written out, a few of the weight's rows at a time. Source: Immer et al., "Stochastic Marginal Likelihood Gradients using Neural
//! Tangent Kernels" (ICML 2023).

use super::log_det::{Complexity, Effective, LogDet, Precision, remedy};
use super::rows::{CHUNK, LayerRows, Rows};
use crate::gpu::Gpu;
use crate::linalg::cholesky::{Half, log_det_inverse};
use crate::ops::dense::product;
use crate::ops::ntk::{self, Panel};
use crate::ops::ntk_host::{self, Kept};
use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use std::ops::Range;

/// Rows of a kernel that are worked on at a time on a GPU: what is above the diagonal is mostly left out.
const PANEL: usize = 512;
/// From how many columns of rows on their products are kept from the kernel for its derivatives: fewer are sooner multiplied again than read.
const WIDE: usize = 32;
/// From which condition on an f32 kernel is factorized in f64, and where its own rounding is too much.
const NARROW: f64 = 1e5;
const TOO_MUCH: [f64; 2] = [5e7, 1e15];

/// One term of a kernel: `(weight inputs inputs^T + bias) grads grads^T`.
struct Term<'a> {
    grads: Tensor,
    /// The layer whose inputs count.
    inputs: Option<&'a LayerRows>,
    weight: f64,
    bias: f64,
}

/// The products that the terms of a kernel have kept, in their order.
#[derive(Default)]
pub(crate) struct Products(Vec<Option<Kept>>);

impl Rows {
    fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, step) = (self.count(), (PANEL / self.each.max(1)).max(1) * self.each);
        (0..rows).step_by(step.max(1)).map(move |start| start..(start + step).min(rows))
    }

    /// Runs `visit` on every panel's products of gradients and of inputs.
    fn each_panel(
        &self,
        term: &Term<'_>,
        mut visit: impl FnMut(Panel, &Tensor, Option<&Tensor>) -> Result<()>,
    ) -> Result<()> {
        for rows in self.panels() {
            let examples = rows.start / self.each..rows.end / self.each;
            let inputs = term.inputs.map(|layer| layer.gram(examples)).transpose()?;
            let panel = Panel { first: rows.start, each: self.each };
            let grads = &term.grads;
            let grads =
                product(&grads.narrow(0, rows.start, rows.len())?, &grads.narrow(0, 0, rows.end)?.t()?)?;
            visit(panel, &grads, inputs.as_ref())?;
        }
        Ok(())
    }

    /// Calls `visit` with a term as the CPU takes it.
    fn with_host<R>(
        &self,
        term: &Term<'_>,
        visit: impl FnOnce(ntk_host::Term<'_>) -> Result<R>,
    ) -> Result<R> {
        let gram = term.inputs.map(|layer| layer.gram(0..self.examples)).transpose()?;
        visit(ntk_host::Term { grads: &term.grads, gram: gram.as_ref(), each: self.each })
    }

    /// `I + s M`, right on and below the diagonal, and of the first wide one of its terms, often the dearest, the products that
    /// [`Rows::effective`] would make again: no more numbers than the kernel has.
    pub fn shifted_kernel(&self, s: f64, precisions: &[Precision]) -> Result<(Tensor, Products)> {
        let Some(first) = self.layers.first() else { bail!("evidence: no layers") };
        let (_, grads) = first.factors();
        let size = self.count();
        let m = identity(size, grads.dtype(), grads.device())?;
        let (mut products, mut kept) = (Vec::new(), false);
        for layer in &self.layers {
            self.each_term(layer, s, precisions, |term, of| {
                if !on_host(m.device()) {
                    return self.each_panel(&term, |panel, grads, inputs| {
                        ntk::add(&m, panel, grads, inputs, term.weight, term.bias)
                    });
                }
                let keep = !kept && term.grads.dim(1)? >= WIDE && !of.is_by_weight(precisions);
                kept |= keep;
                let scale = [term.weight, term.bias];
                products.push(self.with_host(&term, |term| ntk_host::add(&m, &term, scale, keep))?);
                Ok(())
            })?;
        }
        Ok((m, Products(products)))
    }

    /// The terms of a layer's part of `s M`, with the tensors that they are of: its weight and its bias.
    fn each_term(
        &self,
        layer: &LayerRows,
        s: f64,
        precisions: &[Precision],
        mut visit: impl FnMut(Term<'_>, Of) -> Result<()>,
    ) -> Result<()> {
        let at = |tensor: Option<usize>| tensor.and_then(|t| Some((t, precisions.get(t)?)));
        let (weight, bias) = (at(layer.weight), at(layer.bias));
        let alone = layer.is_product()?;
        let (mut weight_left, mut bias_left) = (weight, bias);
        if alone && let Some((of_weight, Precision::Uniform(delta))) = weight {
            // One pass for both.
            let (of_bias, bias) = match bias {
                Some((of_bias, Precision::Uniform(delta))) => {
                    bias_left = None;
                    (Some(of_bias), s / delta)
                }
                _ => (None, 0.0),
            };
            weight_left = None;
            visit(
                Term { grads: layer.flat_grads()?, inputs: Some(layer), weight: s / delta, bias },
                Of::Both { weight: of_weight, bias: of_bias },
            )?;
        }
        if let Some((tensor, precision)) = bias_left {
            let (grads, scale) = scaled(layer.of_bias()?, precision, s, None)?;
            visit(Term { grads, inputs: None, weight: 0.0, bias: scale }, Of::Part { tensor })?;
        }
        if let Some((tensor, precision)) = weight_left {
            let layer = match precision {
                Precision::Uniform(_) => layer.compact()?,
                Precision::Each(_) => layer.clone(),
            };
            for outs in layer.chunks(CHUNK)? {
                let rows = layer.of_weight(outs.clone())?;
                let (grads, scale) = scaled(rows, precision, s, Some((outs, layer.columns())))?;
                visit(Term { grads, inputs: None, weight: 0.0, bias: scale }, Of::Part { tensor })?;
            }
        }
        Ok(())
    }

    /// `s / delta tr(inverse M_l)` of every tensor; `inverse` is that of `I + sM`, or a sum of such of parts, of which the half that
    /// [`half_of_inverse`] says is right. `products` are the kernel's, at the same `s` and precisions.
    pub fn effective(
        &self,
        inverse: &Tensor,
        s: f64,
        precisions: &[Precision],
        products: &Products,
    ) -> Result<Vec<Option<Effective>>> {
        let mut sums: Vec<(Of, Tensor, [f64; 2])> = Vec::new();
        let mut parts: Vec<Vec<Tensor>> = vec![Vec::new(); precisions.len()];
        let mut kept = products.0.iter();
        for layer in &self.layers {
            self.each_term(layer, s, precisions, |term, of| {
                let kept = kept.next().and_then(Option::as_ref);
                if let (Of::Part { tensor }, true) = (of, of.is_by_weight(precisions)) {
                    // Chunks come in the order of the weight's rows.
                    parts[tensor].push((product(inverse, &term.grads)? * &term.grads)?.sum(0)?);
                    return Ok(());
                }
                if on_host(inverse.device()) {
                    let traces = self.with_host(&term, |term| ntk_host::traces(inverse, &term, kept))?;
                    let traces = Tensor::new(&traces, inverse.device())?;
                    sums.push((of, traces, [term.weight, term.bias]));
                    return Ok(());
                }
                self.each_panel(&term, |panel, grads, inputs| {
                    let traces = ntk::traces(inverse, panel, grads, inputs)?;
                    sums.push((of, traces, [term.weight, term.bias]));
                    Ok(())
                })
            })?;
        }
        let mut found = vec![None; precisions.len()];
        let traces: Vec<&Tensor> = sums.iter().map(|(_, traces, _)| traces).collect();
        // One read for all.
        let read = if traces.is_empty() { vec![] } else { Tensor::stack(&traces, 0)?.to_vec2::<f64>()? };
        for ((of, _, [weight, bias]), traces) in sums.iter().zip(read) {
            let [of_weight, of_bias] =
                [traces.first(), traces.get(1)].map(|t| t.copied().unwrap_or(f64::NAN));
            let shares = match *of {
                Of::Both { weight: w, bias: b } => {
                    [Some((w, weight * of_weight)), b.map(|b| (b, bias * of_bias))]
                }
                Of::Part { tensor } => [Some((tensor, bias * of_bias)), None],
            };
            for (tensor, share) in shares.into_iter().flatten() {
                Effective::Total(share).add_to(&mut found[tensor], 1.0)?;
            }
        }
        for ((found, parts), precision) in found.iter_mut().zip(parts).zip(precisions) {
            if !parts.is_empty() {
                *found = Some(precision.effective(&Tensor::cat(&parts, 0)?)?);
            }
        }
        Ok(found)
    }
}

/// Whether kernels are made on the CPU.
fn on_host(device: &Device) -> bool {
    device.is_cpu() && Gpu::of(device).is_none()
}

fn identity(size: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    if !device.is_cpu() {
        return Tensor::eye(size, dtype, device);
    }
    // candle compares two numbers an element.
    fn values<T: WithDType>(size: usize) -> Vec<T> {
        let mut values = vec![T::from_f64(0.0); size * size];
        values.iter_mut().step_by(size + 1).for_each(|v| *v = T::from_f64(1.0));
        values
    }
    match dtype {
        DType::F64 => Tensor::from_vec(values::<f64>(size), (size, size), device),
        _ => Tensor::from_vec(values::<f32>(size), (size, size), device)?.to_dtype(dtype),
    }
}

/// Which tensors a term is of.
#[derive(Debug, Clone, Copy)]
enum Of {
    Both {
        weight: usize,
        bias: Option<usize>,
    },
    /// Some elements of one.
    Part {
        tensor: usize,
    },
}

impl Of {
    /// Whether the tensor has a precision a weight.
    fn is_by_weight(self, precisions: &[Precision]) -> bool {
        matches!(self, Of::Part { tensor } if matches!(precisions.get(tensor), Some(Precision::Each(_))))
    }
}

/// What of an inverse [`Rows::effective`] reads: traces of symmetric matrices take the lower half, products all of it.
pub(crate) fn half_of_inverse(precisions: &[Precision]) -> Half {
    let each = precisions.iter().any(|precision| matches!(precision, Precision::Each(_)));
    if each { Half::Both } else { Half::Lower }
}

/// Rows with a factor that makes them those of `sqrt(s) J P0^-1/2`: the factor apart where it is one for all.
fn scaled(
    rows: Tensor,
    precision: &Precision,
    s: f64,
    outs: Option<(Range<usize>, usize)>,
) -> Result<(Tensor, f64)> {
    match precision {
        Precision::Uniform(delta) => Ok((rows, s / delta)),
        Precision::Each(deltas) => {
            let flat = precision.flat(deltas.elem_count(), rows.device())?;
            let flat = match outs {
                Some((outs, columns)) => flat.narrow(0, outs.start * columns, outs.len() * columns)?,
                None => flat,
            };
            let scale = (flat.recip()? * s)?.sqrt()?.to_dtype(rows.dtype())?;
            Ok((rows.broadcast_mul(&scale.unsqueeze(0)?)?, 1.0))
        }
    }
}

impl Complexity for Rows {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        match self.layers.first() {
            // All of it on a thread of the pool: from outside, every parallel loop of it would wake the pool and wait for it.
            Some(first) if on_host(first.factors().1.device()) => {
                rayon::join(|| self.log_det_here(s, precisions), || ()).0
            }
            _ => self.log_det_here(s, precisions),
        }
    }
}

impl Rows {
    fn log_det_here(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let (m, products) = self.shifted_kernel(s, precisions)?;
        let dtype = m.dtype();
        let (m, condition) = precise(m)?;
        let (value, inverse) = log_det_inverse(&m, half_of_inverse(precisions), NAME)?;
        drop(m);
        let effective = self.effective(&inverse.to_dtype(dtype)?, s, precisions, &products)?;
        Ok(LogDet { value, effective, condition })
    }
}

pub(crate) const NAME: &str = "evidence: the kernel I + sM";

/// A kernel `I + sM` in the type in which it is to be factorized, and a bound of its condition number.
pub(crate) fn precise(m: Tensor) -> Result<(Tensor, f64)> {
    // The Frobenius norm; no eigenvalue is below 1.
    let whole = Panel { first: 0, each: 1 };
    let squares = ntk::traces(&m, whole, &m, None)?.to_vec1::<f64>()?;
    let condition = squares.first().copied().unwrap_or(f64::NAN).sqrt();
    let dtype = m.dtype();
    let limit = TOO_MUCH[usize::from(dtype == DType::F64)];
    if !condition.is_finite() {
        bail!("evidence: the kernel is not finite; are all parameters and inputs?")
    }
    if condition > limit {
        bail!(
            "evidence: the kernel's condition number, up to {condition:.1e}, is beyond what {dtype:?} can tell ({limit:.0e}): {}",
            remedy(dtype)
        )
    }
    let wide = dtype == DType::F32 && condition > NARROW;
    Ok((if wide { m.to_dtype(DType::F64)? } else { m }, condition))
}
