//! From records to Kronecker factors: the sums over a batch, or over the micro-batches of one.
//!
//! With `a` a layer input (a patch, for a convolution), `e` the gradient of a *per-term* loss with respect to the
//! layer's output, `N` loss terms and `T` positions a term:
//!
//! * expand: `A = 1/N sum_n sum_t a a^T`, `G = 1/(N T) sum_n sum_t e e^T`;
//! * reduce: `A = 1/N sum_n abar abar^T`, `abar` the mean over positions, `G = 1/N sum_n ebar ebar^T`, `ebar` the sum;
//! * a bias in a block of its own: `G = 1/N sum_n (sum_t e) (sum_t e)^T` and `A = [[1]]`.
//!
//! An embedding's input is a row of its table as a vector of zeros and a 1, so that `A` is diagonal: how often each row is picked, a
//! mean over loss terms. Its positions are always examples.
//!
//! Where terms have weights `w_n` that are divided by a total `W`, sums are `sum_n w_n ..` in place of `1/N sum_n ..` and divided by
//! `sum_n w_n` for `A` and by `W` for `G`; see [`Terms`](crate::tape::Terms) for the weights of positions.
//!
//! The layer's Fisher is about `A (x) G`. Sources: Martens & Grosse 2015; for convolutions Grosse & Martens 2016; expand and
//! reduce after Eschenhagen et al. 2023. The uses of a layer that a forward pass uses several times count as positions.

mod joint;
mod mean;
mod weighted;

pub(crate) use joint::{Joint, Kept};
pub(crate) use weighted::Pass;

use super::FactorShape;
use crate::ops::moment_queue::{Average, Moments};
use crate::tape::{Inputs, Layer, Record, Reduce};
use candle_core::{DType, Result, Tensor, TensorId, bail};
use mean::{Last, Mean};
use std::borrow::Cow;
use weighted::{Counted, InputMean, RowWeights, Side};

/// How the positions that share a weight (of a convolution, of a sequence) enter the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Every position is an example of its own; exact for deep linear nets with a loss term per position.
    #[default]
    Expand,
    /// Positions are averaged (inputs) and summed (gradients) first; exact for deep linear nets whose outputs are
    /// averaged over positions before the loss. Cheaper, since a sequence then counts as one row.
    Reduce,
}

/// What is wanted of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    /// The weight's own factors.
    pub weight: Option<WantWeight>,
    /// A factor for a bias that is a block of its own.
    pub bias: Option<FactorShape>,
    /// The bias that it is of. Uses of the weight with another, or without one, have no part in it.
    pub of_bias: Option<TensorId>,
    /// Keep the records: the EKFAC correction reads them once the eigenbasis is known.
    pub keep: bool,
    /// Whether a pass may do without the layer, which then has no factors.
    pub optional: bool,
}

/// The factors of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WantWeight {
    /// Whether the bias is folded in.
    pub folded: bool,
    /// Of the inputs, the folded one included.
    pub a: FactorShape,
    /// Of a group's outputs.
    pub g: FactorShape,
}

/// One refresh of one layer.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerFactors {
    /// `[groups, in (+ 1), in (+ 1)]`, or in runs.
    pub a: Option<Tensor>,
    /// `[groups, out / groups, out / groups]`, or in runs.
    pub g: Option<Tensor>,
    /// `[1, out, out]`, or in runs.
    pub g_bias: Option<Tensor>,
    /// Inputs `[n, t, groups * in]` and per-term gradients `[n, t, out]`, a pair a pass.
    pub kept: Vec<(Tensor, Tensor)>,
}

/// The means of a layer, and what the current pass has gathered of it.
#[derive(Default)]
struct Sums {
    a: Option<Mean>,
    g: Option<Mean>,
    g_bias: Option<Mean>,
    kept: Vec<(Tensor, Tensor)>,
    groups: usize,
    /// The weights of the rows that `a` counted; `g` counts the same ones in every pass.
    rows: f64,
    /// The weights of the terms of batches that the layer took part in, and those of the current pass's examples.
    terms: f64,
    examples: Option<Counted>,
    input_sum: Option<Tensor>,
    grad_sum: Option<Tensor>,
    /// Positions of every example, and those of single examples where some are left out.
    positions: usize,
    counts: Option<Tensor>,
    inputs: Vec<Tensor>,
    grads: Vec<Tensor>,
}

/// Reduces records to the factors of every layer that is wanted.
pub(crate) struct FactorSums {
    wants: Vec<Option<Want>>,
    sharing: Sharing,
    sums: Vec<Sums>,
    /// Of the current pass.
    moments: Moments,
    /// The averages that the factors join, and how much of these stays.
    last: Vec<LayerFactors>,
    decay: f64,
    counts: Counts,
    pass: Option<Pass>,
}

/// What the sums over loss terms are divided by.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Terms, those of weight 0 included.
    pub terms: usize,
    /// The total that the loss is divided by.
    pub total: f64,
    /// The sum of all weights.
    pub weights: f64,
    /// The sum of their squares.
    pub squares: f64,
}

impl Counts {
    /// The number of terms of equal weight whose mean varies as the weighted one does.
    pub fn effective(&self) -> f64 {
        if self.squares > 0.0 { self.total * self.weights / self.squares } else { self.total }
    }
}

impl FactorSums {
    /// `wants[i]` is for layer `i` of the tape.
    pub fn new(wants: Vec<Option<Want>>, sharing: Sharing) -> Self {
        let sums = wants.iter().map(|_| Sums::default()).collect();
        let (moments, last) = (Moments::default(), vec![]);
        Self { wants, sharing, sums, moments, last, decay: 0.0, counts: Counts::default(), pass: None }
    }

    /// Makes the factors the next exponential averages: `decay last + (1 - decay) F` in place of `F`, where there is a last one.
    pub fn averaging(self, last: Vec<LayerFactors>, decay: f64) -> Self {
        Self { last, decay, ..self }
    }

    /// Whether its factors are averages.
    pub fn averages(&self) -> bool {
        !self.last.is_empty()
    }

    /// What has been counted so far; the number of terms is that of the next micro-batch's first row.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Announces a pass.
    pub fn begin(&mut self, pass: Pass) {
        if pass.fresh {
            self.counts.terms += pass.weights.terms;
            self.counts.total += pass.share;
            self.counts.weights += pass.weights.sum();
            self.counts.squares += pass.weights.squares();
        }
        self.pass = Some(pass);
    }

    /// The gradients of the pass are those of a loss times `factor`.
    pub fn divide(&mut self, factor: f64) {
        if let Some(pass) = &mut self.pass {
            pass.scale /= factor;
        }
    }

    /// What sums over rows of the weight 1 are divided by, where those over terms are by their total.
    fn rows(counts: &Counts, rows: f64) -> f64 {
        if counts.weights > 0.0 { rows * (counts.total / counts.weights) } else { rows }
    }

    /// Closes the pass: sums over positions are complete only now, and what a GPU is to compute of it is queued.
    pub fn end(&mut self) -> Result<()> {
        let total = self.counts.total;
        for (index, (sums, want)) in self.sums.iter_mut().zip(&self.wants).enumerate() {
            let Some(want) = want else { continue };
            let last = self.last.get(index);
            let moments = &mut self.moments;
            let (inputs, grads) = (sums.input_sum.take(), sums.grad_sum.take());
            if let Some(grads) = &grads {
                if let Some(runs) = want.bias {
                    let last = Last::new(last, self.decay, |last| last.g_bias.as_ref());
                    last.add(&mut sums.g_bias, total, 1.0, |average| {
                        runs.moment(moments, average, grads, 1, false, "factor_g")
                    })?;
                }
                if let Some(weight) = want.weight
                    && self.sharing == Sharing::Reduce
                {
                    let last = Last::new(last, self.decay, |last| last.g.as_ref());
                    last.add(&mut sums.g, total, 1.0, |average| {
                        weight.g.moment(moments, average, grads, sums.groups, false, "factor_g")
                    })?;
                }
            }
            if let (Some(inputs), Some(weight)) = (inputs, want.weight) {
                let mean = match sums.counts.take() {
                    None => (inputs / sums.positions.max(1) as f64)?,
                    Some(counts) => {
                        let counts = (counts + sums.positions as f64)?.to_dtype(inputs.dtype())?;
                        inputs.broadcast_div(&counts)?
                    }
                };
                let last = Last::new(last, self.decay, |last| last.a.as_ref());
                let mut into = InputMean { mean: &mut sums.a, last, count: sums.terms };
                let side = Side { groups: sums.groups, want: weight, name: "factor_a" };
                let (dtype, inputs) = (mean.dtype(), Inputs::Rows(mean));
                match sums.examples.take() {
                    Some(counted) => into.add_counted(moments, &inputs, side, &counted, dtype)?,
                    None => {
                        let factor = self.pass.as_ref().map_or(1.0, |pass| pass.weights.factor());
                        into.add(factor, |average| input_moment(moments, average, &inputs, side, dtype))?
                    }
                }
            }
            sums.positions = 0;
            if !sums.inputs.is_empty() {
                let pair = (Tensor::cat(&sums.inputs, 1)?, Tensor::cat(&sums.grads, 1)?);
                sums.kept.push(pair);
                sums.inputs.clear();
                sums.grads.clear();
            }
        }
        self.moments.run()
    }
}

impl FactorSums {
    /// The factors, means over terms and rows, or their averages. An error names the first layer that made no record and had to.
    pub fn finish(self, layers: &[std::sync::Arc<Layer>]) -> Result<Vec<LayerFactors>> {
        let counts = self.counts;
        let mut finished = Vec::with_capacity(self.sums.len());
        for (index, ((sums, want), layer)) in self.sums.into_iter().zip(&self.wants).zip(layers).enumerate() {
            if let Some(want) = want
                && !want.optional
                && ((want.weight.is_some() && (sums.a.is_none() || sums.g.is_none()))
                    || (want.bias.is_some() && sums.g_bias.is_none()))
            {
                bail!(
                    "curvature: layer {} made no record; every tapped layer must take part in the forward pass that is \
                     observed, or have its Vars frozen",
                    layer.name
                )
            }
            let last = self.last.get(index);
            let of = |factor: fn(&LayerFactors) -> Option<&Tensor>| Last::new(last, self.decay, factor);
            let by_rows = self.sharing == Sharing::Expand || !layer.kind.is_linear();
            let (inputs, grads) = match by_rows {
                true => (counts.weights, Self::rows(&counts, sums.rows)),
                false => (sums.terms, counts.total),
            };
            finished.push(LayerFactors {
                a: of(|last| last.a.as_ref()).finished(sums.a, inputs)?,
                g: of(|last| last.g.as_ref()).finished(sums.g, grads)?,
                g_bias: of(|last| last.g_bias.as_ref()).finished(sums.g_bias, counts.total)?,
                kept: sums.kept,
            });
        }
        Ok(finished)
    }
}

impl Reduce for FactorSums {
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()> {
        let Some(want) = self.wants.get(layer.index).copied().flatten() else { return Ok(()) };
        let Some(pass) = &self.pass else {
            bail!("curvature: layer {} made a record outside a pass", layer.name)
        };
        let weights = RowWeights::new(pass, record)?;
        let (with_inputs, mut scale) = (pass.fresh, pass.scale);
        let mut record = Cow::Borrowed(record);
        if pass.of_loss {
            let (by_rows, by_all) = weights.of_loss(&record)?;
            scale *= by_all;
            if let Some(by_rows) = by_rows {
                let grads = wide(&record.grads)?.broadcast_mul(&by_rows)?;
                record.to_mut().grads = grads;
            }
        }
        let sums = &mut self.sums[layer.index];
        sums.groups = layer.groups;
        let (dtype, seen) = (wide_dtype(record.grads.dtype()), &*record);
        let record = &*seen.of_live_examples()?;
        let reduce = self.sharing == Sharing::Reduce && layer.kind.is_linear();
        if let Some(weight) = want.weight
            && !reduce
        {
            let rows = record.of_live_rows()?;
            let (moments, last) = (&mut self.moments, self.last.get(layer.index));
            if with_inputs {
                let last = Last::new(last, self.decay, |last| last.a.as_ref());
                let mut into = InputMean { mean: &mut sums.a, last, count: self.counts.weights };
                let side = Side { groups: layer.groups, want: weight, name: &layer.name };
                match weights.counted() {
                    Some(counted) => into.add_counted(moments, &seen.inputs, side, &counted, dtype)?,
                    None => into.add(weights.factor(), |average| {
                        input_moment(moments, average, &rows.inputs, side, dtype)
                    })?,
                }
                sums.rows += weights.sum(rows.grads.dim(0)? * rows.grads.dim(1)?);
            }
            let last = Last::new(last, self.decay, |last| last.g.as_ref());
            last.add(&mut sums.g, Self::rows(&self.counts, sums.rows), scale * scale, |average| {
                weight.g.moment(moments, average, &rows.grads, layer.groups, false, &layer.name)
            })?;
        }
        let weight = want.weight.is_some();
        let own_bias = want.of_bias.is_none() || layer.bias.as_ref().map(Tensor::id) == want.of_bias;
        if (want.bias.is_some() && own_bias) || (weight && reduce) {
            add_uses(&mut sums.grad_sum, &(wide(&record.live_grads()?.sum_keepdim(1)?)? * scale)?, layer)?;
        }
        if weight && reduce && with_inputs {
            if sums.input_sum.is_none() {
                sums.terms += pass.weights.sum();
                sums.examples = weights.examples();
            }
            let (inputs, counts) = record.input_sums()?;
            add_uses(&mut sums.input_sum, &wide(&inputs)?, layer)?;
            match counts {
                Some(counts) => add_uses(&mut sums.counts, &counts, layer)?,
                None => sums.positions += record.grads.dim(1)?,
            }
        }
        if weight && want.keep {
            sums.inputs.push(wide(&record.inputs.rows()?)?.contiguous()?);
            sums.grads.push((wide(&*record.live_grads()?)? * scale)?);
        }
        Ok(())
    }
}

/// The average with the second moment of a layer's inputs; `dtype` is the factor's.
fn input_moment(
    moments: &mut Moments,
    average: Average,
    inputs: &Inputs,
    Side { groups, want, name }: Side<'_>,
    dtype: DType,
) -> Result<Tensor> {
    match inputs {
        // Of a table, the rows are the inputs, and what is wanted of them is diagonal.
        Inputs::Indices(numbers) => {
            let picked = numbers.flatten_all()?;
            let ones = Tensor::ones(picked.dim(0)?, dtype, picked.device())?;
            let none = Tensor::zeros(want.a.dim, ones.dtype(), picked.device())?;
            average.add(none.index_add(&picked, &ones, 0)?.reshape(&want.a.dims(1))?)
        }
        inputs if want.a.is_full() => inputs.moment(moments, average, groups, want.folded, name),
        inputs => want.a.moment(moments, average, &inputs.rows()?, groups, want.folded, name),
    }
}

/// f32 for the half types: the factors and all that follows from them are kept in at least single precision.
pub(crate) fn wide(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(wide_dtype(t.dtype()))
}

/// The dtype in which the state of a Var of `dtype` is kept.
pub(crate) fn wide_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Adds the per-example sums of a use to those of a layer's other uses in a forward pass.
fn add_uses(total: &mut Option<Tensor>, part: &Tensor, layer: &Layer) -> Result<()> {
    *total = Some(match total.take() {
        None => part.clone(),
        Some(total) if total.dims() == part.dims() => (total + part)?,
        Some(total) => bail!(
            "layer {}: its uses in one forward pass have batches of {:?} and {:?}; they must agree for a bias block of \
             its own and for Sharing::Reduce",
            layer.name,
            total.dims(),
            part.dims()
        ),
    });
    Ok(())
}

#[cfg(test)]
mod tests;
