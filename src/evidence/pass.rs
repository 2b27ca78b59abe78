//! A forward pass over some examples, and the backward passes that follow it.

use super::data_fit::{DataFit, Targets};
use super::examples::Examples;
use super::gather::Gathered;
use super::last_layer::Hessians;
use super::log_det::sum_of;
use super::problem::Problem;
use super::rows::{CHUNK, Rows};
use crate::tape::{Likelihood, Root};
use candle_core::{DType, Result, Tensor, bail};

/// The outputs for some examples.
pub(crate) struct Pass<'a> {
    problem: &'a Problem<'a>,
    examples: &'a Examples,
    pub outputs: Tensor,
    /// Of every term, where not all count once.
    weights: Option<Vec<f64>>,
    /// The outputs, zero where a term does not count.
    counted: Tensor,
}

/// Examples that a problem can be asked about.
pub(crate) struct Checked {
    /// With the tape's mask.
    pub examples: Examples,
    /// Columns of the root of an example's Hessian.
    pub columns: usize,
}

impl Problem<'_> {
    /// Runs the model on some examples.
    ///
    /// # Errors
    /// As the model's forward, and when the outputs are not finite where they count or have another batch.
    pub(crate) fn pass<'a>(&'a self, examples: &'a Examples) -> Result<Pass<'a>> {
        let outputs = self.model.forward(examples.x())?;
        if outputs.dims().first() != Some(&examples.len()) || outputs.rank() < 2 || outputs.elem_count() == 0
        {
            bail!(
                "evidence: expected outputs [{}, .., classes] for inputs {:?}, got {:?}",
                examples.len(),
                examples.x().dims(),
                outputs.dims()
            )
        }
        if let Some(noise) = self.output_noise()
            && outputs.dims().last() != Some(&noise.len())
        {
            bail!("evidence: the noise of {} outputs, and the model has {:?}", noise.len(), outputs.dims())
        }
        let weights = examples.term_weights(outputs.dims(), self.likelihood == Likelihood::Categorical)?;
        let counted = counted(&outputs, weights.as_deref())?;
        if !sum_of(&counted.to_dtype(DType::F64)?.abs()?)?.is_finite() {
            bail!("evidence: the outputs are not finite: look for NaN in the parameters or the inputs")
        }
        Ok(Pass { problem: self, examples, outputs, weights, counted })
    }

    /// Checks labels, weights and masks of all examples, and that the model does not mix them, before anything is computed.
    ///
    /// # Errors
    /// Says what is wrong with them.
    pub(crate) fn checked(&self, examples: &Examples) -> Result<Checked> {
        let examples = examples.masked_by(&self.tape)?;
        let categorical = self.likelihood == Likelihood::Categorical;
        let labels = if categorical { examples.class_numbers()? } else { vec![] };
        let some = examples.narrow(0, examples.len().min(FIRST))?;
        let pass = self.pass(&some)?;
        pass.refuse_mixing()?;
        let mut dims = pass.outputs.dims().to_vec();
        dims[0] = examples.len();
        let weights = examples.term_weights(&dims, categorical)?;
        if weights.as_ref().is_some_and(|weights| weights.iter().all(|w| *w == 0.0)) {
            bail!("evidence: no term counts: all are of weight 0, masked, or of the label that is ignored")
        }
        Targets::with_classes(self.likelihood, labels, &examples, &dims, weights.as_deref())?;
        let columns = self.likelihood.cotangents(&pass.counted, Root::Reduced)?.len();
        Ok(Checked { examples, columns })
    }
}

/// Examples of the pass that is looked at first.
const FIRST: usize = 256;

/// The cotangents that a pass's rows are asked for with.
pub(crate) enum Columns {
    /// Those of the curvature.
    Curvature,
    /// One an output `[n, classes]`, of the outputs themselves.
    Outputs,
}

/// Runs `visit` on passes over examples and their rows, so few examples at a time that the rows take no more than `memory` bytes.
///
/// # Errors
/// When those of one example do, or as the model and `visit`.
pub(crate) fn each_pass(
    problem: &Problem<'_>,
    examples: &Examples,
    columns: Columns,
    memory: usize,
    mut visit: impl FnMut(&Pass<'_>, &Rows) -> Result<()>,
) -> Result<()> {
    let (mut start, mut size) = (0, examples.in_a_pass());
    while start < examples.len() {
        let some = examples.narrow(start, size.min(examples.len() - start))?;
        let pass = problem.pass(&some)?;
        let within = |memory| match columns {
            Columns::Curvature => pass.gather_within(pass.columns(Root::Reduced)?, (memory, 0)),
            Columns::Outputs => {
                if pass.outputs.rank() != 2 {
                    bail!(
                        "posterior: predictions are of outputs [n, classes], got {:?}: take a model that picks or averages the positions",
                        pass.outputs.dims()
                    )
                }
                pass.gather_within(
                    Likelihood::Gaussian.cotangents(&pass.outputs, Root::PerOutput)?,
                    (memory, 0),
                )
            }
        };
        match within(memory)? {
            Gathered::Rows(rows) => {
                visit(&pass, &rows)?;
                start += some.len();
            }
            Gathered::TooLarge(bytes) if some.len() > 1 => {
                let fit = memory as u128 * some.len() as u128 / bytes.max(1);
                size = usize::try_from(fit).unwrap_or(usize::MAX).clamp(1, some.len() - 1);
            }
            Gathered::TooLarge(bytes) => bail!(
                "evidence: the inputs of layers and the gradients of their outputs for one example, of {:?} outputs, would take {bytes} \
                 bytes, and {memory} are allowed",
                pass.outputs.dims()
            ),
        }
    }
    Ok(())
}

/// Numbers a term `[n, ..]` for outputs `[n, .., classes]`, as `[n, .., 1]`.
fn per_term<T: candle_core::WithDType>(values: Vec<T>, outputs: &Tensor) -> Result<Tensor> {
    let mut dims = outputs.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = 1;
    }
    Tensor::from_vec(values, dims, outputs.device())
}

/// The outputs, zero where a term does not count.
fn counted(outputs: &Tensor, weights: Option<&[f64]>) -> Result<Tensor> {
    let outputs = outputs.detach();
    let Some(weights) = weights else { return Ok(outputs) };
    let counts: Vec<u8> = weights.iter().map(|&w| u8::from(w > 0.0)).collect();
    let counts = per_term(counts, &outputs)?.broadcast_as(outputs.shape())?;
    // Not a product: what does not count may be infinite.
    counts.where_cond(&outputs, &outputs.zeros_like()?)
}

impl Pass<'_> {
    /// The fit of the outputs to the labels.
    pub fn fit(&self) -> Result<DataFit> {
        let (likelihood, weights) = (self.problem.likelihood, self.weights.as_deref());
        let targets = Targets::of(likelihood, self.examples, self.outputs.dims(), weights)?;
        DataFit::of(likelihood, &self.counted, &targets, weights, self.problem.output_noise())
    }

    /// The columns of a root of the Hessian by the outputs, with the weights of the terms.
    pub fn columns(&self, root: Root) -> Result<impl ExactSizeIterator<Item = Result<Tensor>>> {
        let roots = match &self.weights {
            Some(weights) => {
                let roots = weights.iter().map(|w| w.sqrt()).collect();
                Some(per_term(roots, &self.outputs)?.to_dtype(self.outputs.dtype())?)
            }
            None => None,
        };
        let noise = match self.problem.output_noise() {
            Some(noise) => {
                Some(Tensor::new(noise, self.outputs.device())?.to_dtype(self.outputs.dtype())?.recip()?)
            }
            None => None,
        };
        let columns = self.problem.likelihood.cotangents(&self.counted, root)?;
        Ok(columns.map(move |column| {
            let mut column = column?;
            for by in roots.iter().chain(&noise) {
                column = column.broadcast_mul(by)?;
            }
            Ok(column)
        }))
    }

    /// The Hessians by outputs `[n, classes]`, with the weights of the terms.
    pub fn hessians(&self) -> Result<Hessians> {
        let outputs = self.counted.to_dtype(DType::F64)?;
        let (n, classes) = outputs.dims2()?;
        let likelihood = self.problem.likelihood;
        let (mut d, mut m) = match likelihood {
            Likelihood::Categorical => {
                let p = likelihood.mean(&outputs)?;
                (p.clone(), Some(p))
            }
            Likelihood::Bernoulli => {
                let p = likelihood.mean(&outputs)?;
                ((&p * (1.0 - &p)?)?, None)
            }
            Likelihood::Gaussian => (outputs.ones_like()?, None),
        };
        if let Some(noise) = self.problem.output_noise() {
            let by = Tensor::new(noise, outputs.device())?.sqr()?.recip()?.reshape((1, classes))?;
            d = d.broadcast_mul(&by)?;
        }
        let mut weights = None;
        if let Some(each) = &self.weights {
            let each = Tensor::new(each.as_slice(), outputs.device())?;
            let column = each.reshape((n, 1))?;
            d = d.broadcast_mul(&column)?;
            m = m.map(|m| m.broadcast_mul(&column.sqrt()?)).transpose()?;
            weights = Some(each);
        }
        Ok(Hessians { d, m, weights })
    }

    /// The rows of all parameters for some cotangents; refused where they would take more than `memory` bytes.
    pub fn gather(
        &self,
        cotangents: impl ExactSizeIterator<Item = Result<Tensor>>,
        memory: usize,
    ) -> Result<Rows> {
        self.gathered(cotangents, (memory, 0))
    }

    /// [`Pass::gather`] for kernels alone, written out as [`Rows::write_out`] does.
    pub fn gather_written(
        &self,
        cotangents: impl ExactSizeIterator<Item = Result<Tensor>>,
        memory: usize,
    ) -> Result<Rows> {
        self.gathered(cotangents, (memory, CHUNK))?.write_out(CHUNK)
    }

    fn gathered(
        &self,
        cotangents: impl ExactSizeIterator<Item = Result<Tensor>>,
        (memory, write): (usize, usize),
    ) -> Result<Rows> {
        match self.gather_within(cotangents, (memory, write))? {
            Gathered::Rows(rows) => Ok(rows),
            Gathered::TooLarge(bytes) => bail!(
                "evidence: the inputs of layers and the gradients of their outputs for {} examples would take {bytes} bytes, and {memory} \
                 are allowed: take smaller batches, an estimator that sums (Kron, Rotated, Diagonal), or more memory",
                self.examples.len()
            ),
        }
    }

    fn gather_within(
        &self,
        cotangents: impl ExactSizeIterator<Item = Result<Tensor>>,
        room: (usize, usize),
    ) -> Result<Gathered> {
        let Self { problem, examples, outputs, .. } = self;
        let before = problem.tape.replace_mask(examples.mask().cloned());
        let found = Rows::gather(&problem.tape, outputs, cotangents, |t| problem.number_of(t), room);
        problem.tape.replace_mask(before);
        Ok(match found? {
            Gathered::Rows(rows) => Gathered::Rows(Rows { weights: self.example_weights()?, ..rows }),
            too_large => too_large,
        })
    }

    /// The mean weight of each example's terms, of those that no mask leaves out, `[examples, 1, 1]` in f64, where not all count once.
    fn example_weights(&self) -> Result<Option<Tensor>> {
        let Some(weights) = &self.weights else { return Ok(None) };
        let live = self.examples.live_terms(self.outputs.dims())?;
        let each = (weights.len() / self.examples.len().max(1)).max(1);
        let mean = |(example, weights): (usize, &[f64])| {
            let live = live.as_ref().and_then(|live| live.get(example * each..(example + 1) * each));
            let live = live.map_or(weights.len(), |live| live.iter().filter(|live| **live != 0).count());
            weights.iter().sum::<f64>() / live.max(1) as f64
        };
        let means: Vec<f64> = weights.chunks(each).enumerate().map(mean).collect();
        Tensor::from_vec(means, (self.examples.len(), 1, 1), self.outputs.device()).map(Some)
    }

    /// Compares outputs of a few of the examples alone with those among all.
    pub fn refuse_mixing(&self) -> Result<()> {
        let n = self.examples.len();
        if n < 2 {
            return Ok(());
        }
        let (start, len) = (n / 2, (n - n / 2).min(2));
        let few = self.examples.narrow(start, len)?;
        // A model that takes this very batch alone cannot be asked.
        let Ok(alone) = self.problem.model.forward(few.x()) else { return Ok(()) };
        let among = self.counted.narrow(0, start, len)?;
        let tolerance = match alone.dtype() {
            DType::F64 => 1e-7,
            DType::F32 => 1e-3,
            _ => 3e-2,
        };
        let largest = |t: &Tensor| -> Result<f64> { t.to_dtype(DType::F64)?.abs()?.max_all()?.to_scalar() };
        let scale = largest(&among)?;
        let apart = if alone.dims() == among.dims() {
            let categorical = self.problem.likelihood == Likelihood::Categorical;
            let weights = few.term_weights(alone.dims(), categorical)?;
            let alone = counted(&alone, weights.as_deref())?;
            largest(&(alone.to_dtype(DType::F64)? - among.to_dtype(DType::F64)?)?)?
        } else {
            f64::INFINITY
        };
        // Written so that NaN is refused.
        if apart <= tolerance * scale.max(f64::MIN_POSITIVE) {
            return Ok(());
        }
        bail!(
            "evidence: the outputs for examples {start} to {} are others alone than among {n} examples (by up to {apart:.1e}, of up to \
             {scale:.1e}): the model mixes examples, as BatchNorm in training mode does, or is random, as dropout is; take it in \
             evaluation mode",
            start + len - 1
        )
    }
}
