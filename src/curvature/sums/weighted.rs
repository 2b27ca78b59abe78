//! Weights of loss terms in a layer's records: which rows count, and how much.

use super::mean::{Last, Mean};
use super::{WantWeight, input_moment, wide, wide_dtype};
use crate::ops::moments::{Average, Moments};
use crate::tape::{Inputs, Record, TermWeights};
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// A backward pass, of which a batch may have several.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    /// The weights of the loss terms.
    pub weights: Arc<TermWeights>,
    /// What the pass adds to the number that sums over terms are divided by.
    pub share: f64,
    /// Multiplies the records' gradients.
    pub scale: f64,
    /// Of several passes over one batch only the first brings the inputs and counts the terms.
    pub fresh: bool,
    /// Whether the gradients are those of the weighted terms, and not of terms times the roots of their weights.
    pub of_loss: bool,
}

impl Pass {
    /// A pass over terms that count the same.
    #[cfg(test)]
    pub fn equal(terms: usize, scale: f64, fresh: bool) -> Self {
        let weights = Arc::new(TermWeights::equal(terms));
        Self { weights, share: terms as f64, scale, fresh, of_loss: false }
    }
}

/// The weights of a record's rows.
pub(super) struct RowWeights {
    /// Of all rows with [`TermWeights::of_rows`]' divisors, unless all are `factor`.
    rows: Option<Vec<[f64; 2]>>,
    factor: f64,
    shared: usize,
    /// Whether a row is in the mask.
    live: Option<Vec<bool>>,
    /// Whether the layer saw each position of the mask as an example.
    flat: bool,
}

/// Rows with a weight above 0.
pub(super) struct Counted {
    numbers: Vec<u32>,
    weights: Vec<f64>,
    /// Rows of an example.
    shared: usize,
}

impl RowWeights {
    pub fn new(pass: &Pass, record: &Record) -> Result<Self> {
        let (batch, shared, _) = record.grads.dims3()?;
        let flat = record.mask.as_ref().is_some_and(|mask| !record.grads.dims().starts_with(&mask.dims()));
        Ok(Self {
            rows: pass.weights.of_rows(batch, shared),
            factor: pass.weights.factor(),
            shared,
            live: record.mask.as_ref().map(|mask| mask.counts().to_vec()),
            flat,
        })
    }

    /// What multiplies the gradients of a weighted loss to make them those of terms times the roots of their weights: the tensor
    /// `[batch, shared, 1]` where it differs from row to row, and a number.
    pub fn of_loss(&self, record: &Record) -> Result<(Option<Tensor>, f64)> {
        let inverse = |weight: f64| if weight > 0.0 { weight.sqrt().recip() } else { 0.0 };
        let Some(rows) = &self.rows else { return Ok((None, inverse(self.factor))) };
        let (batch, shared, _) = record.grads.dims3()?;
        let dtype = wide_dtype(record.grads.dtype());
        let by = rows.iter().map(|row| inverse(row[1])).collect::<Vec<_>>();
        let by = Tensor::from_vec(by, (batch, shared, 1), &candle_core::Device::Cpu)?.to_dtype(dtype)?;
        Ok((Some(by.to_device(record.grads.device())?), 1.0))
    }

    fn is_live(&self, row: usize) -> bool {
        self.live.as_ref().is_none_or(|live| live.get(row).copied().unwrap_or(false))
    }

    /// The sum over rows in the mask, of which there are `live`.
    pub fn sum(&self, live: usize) -> f64 {
        match &self.rows {
            None => self.factor * live as f64,
            Some(rows) => {
                rows.iter().enumerate().filter(|(row, _)| self.is_live(*row)).map(|(_, row)| row[0]).sum()
            }
        }
    }

    /// The rows that count; `None` where all in the mask do, with the weight `factor`.
    pub fn counted(&self) -> Option<Counted> {
        let rows = self.rows.as_ref()?.iter().map(|row| row[0]).enumerate();
        Some(Counted::of(rows.filter(|(row, _)| self.is_live(*row)), self.shared))
    }

    /// The examples that count, where the positions of each are one row: those that the layer saw, or the mask's positions.
    pub fn examples(&self) -> Option<Counted> {
        let rows = self.rows.as_ref()?;
        if self.flat {
            let live = rows.iter().enumerate().filter(|(row, _)| self.is_live(*row));
            return Some(Counted::of(live.map(|(_, row)| row[0]).enumerate(), 1));
        }
        let mean = |rows: &[[f64; 2]]| rows.iter().map(|row| row[0]).sum::<f64>() / rows.len().max(1) as f64;
        Some(Counted::of(rows.chunks(self.shared.max(1)).map(mean).enumerate(), 1))
    }

    pub fn factor(&self) -> f64 {
        self.factor
    }
}

impl Counted {
    fn of(rows: impl Iterator<Item = (usize, f64)>, shared: usize) -> Self {
        let (numbers, weights) = rows.filter(|row| row.1 > 0.0).map(|(row, w)| (row as u32, w)).unzip();
        Self { numbers, weights, shared: shared.max(1) }
    }

    /// The weight that all have, if it is one.
    fn common(&self) -> Option<f64> {
        let first = *self.weights.first()?;
        self.weights.iter().all(|w| *w == first).then_some(first)
    }

    /// The examples, if each counts with all its rows or with none.
    fn examples(&self) -> Option<Vec<u32>> {
        let shared = self.shared as u32;
        let whole = |rows: &[u32]| {
            let first = rows.first()?;
            let all = rows.len() == self.shared && first % shared == 0;
            (all && rows.iter().zip(*first..).all(|(row, expected)| *row == expected))
                .then_some(first / shared)
        };
        self.numbers.chunks(self.shared).map(whole).collect()
    }

    /// Those of some examples, numbered from the first.
    fn of_examples(&self, from: usize, count: usize) -> Self {
        let first = (from * self.shared) as u32;
        let end = first + (count * self.shared) as u32;
        let some = self.numbers.iter().zip(&self.weights).filter(|row| (first..end).contains(row.0));
        let (numbers, weights) = some.map(|(row, w)| (row - first, *w)).unzip();
        Self { numbers, weights, shared: self.shared }
    }

    fn numbers(&self, like: &Tensor) -> Result<Tensor> {
        Tensor::from_vec(self.numbers.clone(), self.numbers.len(), like.device())
    }

    /// These rows of `[batch, shared, features]` as examples of one position, each group followed by a 1 where `one` says so; all times the
    /// roots of the weights.
    fn rooted(&self, rows: &Tensor, groups: usize, one: bool) -> Result<Tensor> {
        let rows = wide(&self.select(rows)?)?;
        let roots = self.weights.iter().map(|w| w.sqrt()).collect::<Vec<_>>();
        let roots = Tensor::from_vec(roots, (self.weights.len(), 1, 1), &candle_core::Device::Cpu)?;
        let roots = roots.to_dtype(rows.dtype())?.to_device(rows.device())?;
        let rows = rows.broadcast_mul(&roots)?;
        if !one {
            return Ok(rows);
        }
        let (count, _, features) = rows.dims3()?;
        let ones = roots.broadcast_as((count, groups, 1))?;
        Tensor::cat(&[&rows.reshape((count, groups, features / groups.max(1)))?, &ones.contiguous()?], 2)?
            .reshape((count, 1, ()))
    }

    fn select(&self, rows: &Tensor) -> Result<Tensor> {
        rows.flatten(0, 1)?.contiguous()?.index_select(&self.numbers(rows)?, 0)?.unsqueeze(1)
    }
}

/// The input factor of a layer, as far as it has come.
pub(super) struct InputMean<'a> {
    pub mean: &'a mut Option<Mean>,
    pub last: Last<'a>,
    /// The sum of all weights.
    pub count: f64,
}

/// What an input factor is of.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    pub groups: usize,
    pub want: WantWeight,
    pub name: &'a str,
}

impl InputMean<'_> {
    /// Adds a second moment times a number.
    pub fn add(&mut self, weight: f64, moment: impl FnOnce(Average) -> Result<Tensor>) -> Result<()> {
        self.last.add(self.mean, self.count, weight, moment)
    }

    /// Adds the second moments of rows that count differently.
    pub fn add_counted(
        &mut self,
        moments: &mut Moments,
        inputs: &Inputs,
        side: Side<'_>,
        counted: &Counted,
        dtype: DType,
    ) -> Result<()> {
        /// Elements of patches that are formed at once.
        const PATCHES: usize = 1 << 22;
        let Side { groups, want, name } = side;
        let of_rooted = |moments: &mut Moments, average: Average, rows: &Tensor, counted: &Counted| {
            let rows = counted.rooted(rows, groups, want.folded)?;
            want.a.moment(moments, average, &rows, groups, false, name)
        };
        let device = match inputs {
            Inputs::Rows(rows) | Inputs::Picked(rows) => rows.device().clone(),
            Inputs::Patches { x, .. } => x.device().clone(),
        };
        if counted.numbers.is_empty() {
            return self
                .add(0.0, |average| average.add(Tensor::zeros(&want.a.dims(groups), dtype, &device)?));
        }
        let common = counted.common();
        match inputs {
            Inputs::Picked(numbers) => {
                let picked = numbers.flatten_all()?.index_select(&counted.numbers(numbers)?, 0)?;
                let weights = Tensor::from_vec(
                    counted.weights.clone(),
                    counted.weights.len(),
                    &candle_core::Device::Cpu,
                )?;
                let weights = weights.to_dtype(dtype)?.to_device(&device)?;
                let none = Tensor::zeros(want.a.dim, dtype, &device)?;
                let sums = none.index_add(&picked, &weights, 0)?.reshape(&want.a.dims(1))?;
                self.add(1.0, |average| average.add(sums))
            }
            Inputs::Rows(rows) => match common {
                Some(weight) => {
                    let rows = Inputs::Rows(counted.select(rows)?);
                    self.add(weight, |average| input_moment(moments, average, &rows, side, dtype))
                }
                None => self.add(1.0, |average| of_rooted(moments, average, rows, counted)),
            },
            Inputs::Patches { x, shape } => {
                if let (Some(weight), Some(examples)) = (common, counted.examples()) {
                    let examples = Tensor::from_vec(examples.clone(), examples.len(), &device)?;
                    let some =
                        Inputs::Patches { x: x.contiguous()?.index_select(&examples, 0)?, shape: *shape };
                    return self.add(weight, |average| input_moment(moments, average, &some, side, dtype));
                }
                let batch = x.dim(0)?;
                let features = shape.group_features() * groups;
                let at_once = (PATCHES / (counted.shared * features).max(1)).max(1);
                for from in (0..batch).step_by(at_once) {
                    let count = at_once.min(batch - from);
                    let some = counted.of_examples(from, count);
                    if some.numbers.is_empty() {
                        continue;
                    }
                    let part = Inputs::Patches { x: x.narrow(0, from, count)?.contiguous()?, shape: *shape };
                    let rows = part.rows()?;
                    self.add(1.0, |average| of_rooted(moments, average, &rows, &some))?;
                }
                Ok(())
            }
        }
    }
}
