//! The factors of a batch whose rows several ranks have: each rank's, times what they are means of, added up and divided again.

use super::mean::Last;
use super::{Counts, FactorSums, LayerFactors, Sharing, Want, wide_dtype};
use crate::parallel::{Form, Kind, Sums, Totals};
use crate::tape::Layer;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What all ranks know of the factors to come.
pub(crate) struct Joint<'a> {
    pub wants: &'a [Option<Want>],
    pub layers: &'a [Arc<Layer>],
    pub sharing: Sharing,
    /// The averages that the factors join, if they do, and how much of these stays.
    pub last: Vec<LayerFactors>,
    pub decay: f64,
    /// Of each layer, the rank that alone needs its factors; empty where all do.
    pub owners: Vec<Option<usize>>,
}

/// A layer's records that are kept: pairs of inputs and gradients.
pub(crate) type Kept = Vec<(Tensor, Tensor)>;

/// One of a layer's factors.
struct Factor {
    name: &'static str,
    form: Form,
    of: fn(&LayerFactors) -> Option<&Tensor>,
    set: fn(&mut LayerFactors, Tensor),
    /// What it is a mean of.
    count: Count,
}

#[derive(Clone, Copy)]
enum Count {
    Weights,
    Total,
    /// Of the layer itself.
    Rows,
    Terms,
}

/// What a layer has counted.
#[derive(Clone, Copy, Default)]
struct Counted {
    rows: f64,
    terms: f64,
}

impl Count {
    fn of(self, counts: &Counts, layer: Counted) -> f64 {
        match self {
            Count::Weights => counts.weights,
            Count::Total => counts.total,
            Count::Rows => FactorSums::rows(counts, layer.rows),
            Count::Terms => layer.terms,
        }
    }
}

impl Joint<'_> {
    fn owner(&self, layer: usize) -> Option<usize> {
        self.owners.get(layer).copied().flatten()
    }

    fn factors(&self, index: usize) -> Vec<Factor> {
        let (layer, Some(want)) = (&self.layers[index], self.wants[index]) else { return vec![] };
        let groups = layer.groups.max(1);
        let form = |dims: [usize; 3]| Form {
            dims: dims.to_vec(),
            dtype: wide_dtype(layer.weight.dtype()),
            device: layer.weight.device().clone(),
        };
        let by_rows = self.sharing == Sharing::Expand || !layer.kind.is_linear();
        let (inputs, grads) =
            if by_rows { (Count::Weights, Count::Rows) } else { (Count::Terms, Count::Total) };
        let mut factors = vec![];
        if let Some(weight) = want.weight {
            factors.push(Factor {
                name: "A",
                form: form(weight.a.dims(groups)),
                of: |layer| layer.a.as_ref(),
                set: |layer, factor| layer.a = Some(factor),
                count: inputs,
            });
            factors.push(Factor {
                name: "G",
                form: form(weight.g.dims(groups)),
                of: |layer| layer.g.as_ref(),
                set: |layer, factor| layer.g = Some(factor),
                count: grads,
            });
        }
        if let Some(bias) = want.bias {
            factors.push(Factor {
                name: "G of the bias",
                form: form(bias.dims(1)),
                of: |layer| layer.g_bias.as_ref(),
                set: |layer, factor| layer.g_bias = Some(factor),
                count: Count::Total,
            });
        }
        factors
    }

    /// Adds this rank's factors, if it has rows, to what all ranks add up. Returns the records that each layer keeps, and which factor is not
    /// finite.
    pub fn add(&self, own: Option<FactorSums>, sums: &mut Sums) -> Result<(Vec<Kept>, Option<String>)> {
        let own = own.filter(|own| own.counts.terms > 0);
        let counts = own.as_ref().map(|own| own.counts).unwrap_or_default();
        for number in [counts.terms as f64, counts.total, counts.weights, counts.squares] {
            sums.number(number);
        }
        let counted: Vec<Counted> = match &own {
            Some(own) => own.sums.iter().map(|sums| Counted { rows: sums.rows, terms: sums.terms }).collect(),
            None => vec![Counted::default(); self.layers.len()],
        };
        let finished = match own {
            Some(own) => own.finish(self.layers)?,
            None => vec![LayerFactors::default(); self.layers.len()],
        };
        for (index, (layer, counted)) in finished.iter().zip(counted).enumerate() {
            sums.number(counted.rows);
            sums.number(counted.terms);
            for factor in self.factors(index) {
                let value = (factor.of)(layer);
                let count = if value.is_some() { factor.count.of(&counts, counted) } else { 0.0 };
                sums.number(count);
                sums.number(if value.is_some() { 1.0 } else { 0.0 });
                let name = || format!("factor {} of layer {}", factor.name, self.layers[index].name);
                sums.tensor(Kind::Exact, self.owner(index), value, &factor.form, count, name)?;
            }
        }
        Ok((finished.into_iter().map(|layer| layer.kept).collect(), sums.not_finite()?))
    }

    /// The factors of all rows that are for this rank, and what they are means of.
    pub fn read(&self, totals: &mut Totals) -> Result<(Vec<LayerFactors>, Counts)> {
        let terms = totals.number()?.round() as usize;
        let counts =
            Counts { terms, total: totals.number()?, weights: totals.number()?, squares: totals.number()? };
        let mut layers = Vec::with_capacity(self.layers.len());
        for index in 0..self.layers.len() {
            let counted = Counted { rows: totals.number()?, terms: totals.number()? };
            let mut layer = LayerFactors::default();
            for factor in self.factors(index) {
                let (brought, ranks) = (totals.number()?, totals.number()?);
                let all = factor.count.of(&counts, counted);
                let all = if all > 0.0 { all } else { 1.0 };
                let mean = totals.tensor(Kind::Exact, self.owner(index), &factor.form, all)?;
                let Some(mean) = mean.filter(|_| ranks > 0.0) else { continue };
                let last = Last::new(self.last.get(index), self.decay, factor.of);
                (factor.set)(&mut layer, last.completed(mean, brought / all)?);
            }
            layers.push(layer);
        }
        Ok((layers, counts))
    }
}
