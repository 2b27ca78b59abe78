//! Rows from the records of the passes over one forward.

use super::rows::{LayerRows, Rows, stacked};
use crate::curvature::{wide, wide_dtype};
use crate::tape::{ExampleGrads, Inputs, Layer, Record, Reduce, Tape};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, Mutex, PoisonError};

/// The records so far.
struct Gather {
    /// By the layer's number.
    uses: Vec<Uses>,
    /// Whose records are wanted.
    wanted: Vec<bool>,
    /// Whose rows are wanted written out, so that they may come as gradients an example.
    written: Vec<bool>,
    /// Passes in all, and how many are done.
    passes: usize,
    done: usize,
    /// What all passes will take, as the first tells, and may take.
    bytes: u128,
    memory: usize,
}

/// One layer's.
#[derive(Default)]
struct Uses {
    /// Of the first pass, a use after the other: the inputs, where positions count if not all do, `[examples, t, 1]`, and which bias was
    /// added.
    inputs: Vec<Tensor>,
    live: Vec<Option<Tensor>>,
    biases: Vec<Option<Tensor>>,
    /// Of the current pass, a tensor a use, in the order of `inputs`.
    grads: Vec<Tensor>,
    /// `[examples, t, out]` a pass.
    passes: Vec<Tensor>,
    /// Instead of all that, of the current pass and of those before: gradients an example.
    current: Option<ExampleGrads>,
    written: Vec<ExampleGrads>,
}

impl Reduce for Gather {
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()> {
        if !self.wanted.get(layer.index).copied().unwrap_or(false) {
            return Ok(());
        }
        let first = self.done == 0;
        if first {
            let element = wide_dtype(record.grads.dtype()).size_in_bytes() as u128;
            let inputs = match &record.inputs {
                Inputs::Indices(numbers) => 4 * numbers.elem_count() as u128,
                _ => {
                    let rows = record.grads.elem_count() / layer.out_features().max(1);
                    element * (rows * layer.groups * layer.in_features().max(1)) as u128
                }
            };
            self.bytes += inputs + element * (record.grads.elem_count() * self.passes) as u128;
        }
        if self.bytes > self.memory as u128 {
            // Counted on, and given up at the end of the pass.
            return Ok(());
        }
        let Some(uses) = self.uses.get_mut(layer.index) else { return Ok(()) };
        let mask = record.mask.as_ref().filter(|mask| record.grads.dims().starts_with(&mask.dims()));
        let counted = |t: Tensor| match mask {
            Some(mask) => mask.zeroed(&t),
            None => Ok(t),
        };
        if first {
            uses.inputs.push(match &record.inputs {
                Inputs::Indices(numbers) => numbers.unsqueeze(2)?,
                inputs => counted(wide(&inputs.rows()?)?)?,
            });
            uses.live.push(mask.map(|mask| mask.live().to_device(record.grads.device())).transpose()?);
            uses.biases.push(layer.bias.clone());
        }
        uses.grads.push(counted(wide(&record.grads)?)?);
        Ok(())
    }

    fn takes_examples(&self, layer: &Layer) -> bool {
        self.written.get(layer.index).copied().unwrap_or(false)
    }

    fn examples(&mut self, layer: &Layer, grads: ExampleGrads) -> Result<()> {
        if self.done == 0 {
            let numbers = (grads.weight.elem_count() + grads.bias.elem_count()) * self.passes;
            self.bytes += (grads.weight.dtype().size_in_bytes() * numbers) as u128;
        }
        let Some(uses) = self.uses.get_mut(layer.index) else { return Ok(()) };
        if self.bytes > self.memory as u128 {
            return Ok(());
        }
        // The uses of a layer add up.
        uses.current = Some(match uses.current.take() {
            None => grads,
            Some(before) => {
                ExampleGrads { weight: (before.weight + grads.weight)?, bias: (before.bias + grads.bias)? }
            }
        });
        Ok(())
    }
}

impl Gather {
    fn end_pass(&mut self) -> Result<()> {
        for uses in &mut self.uses {
            if !uses.grads.is_empty() {
                uses.passes.push(joined(&std::mem::take(&mut uses.grads))?);
            }
            uses.written.extend(uses.current.take());
        }
        self.done += 1;
        Ok(())
    }
}

/// Uses one after the other as positions.
fn joined(uses: &[Tensor]) -> Result<Tensor> {
    match uses {
        [one] => Ok(one.clone()),
        several => Tensor::cat(several, 1),
    }
}

impl Uses {
    /// 1 where a position counts, over all uses, `[examples, t, 1]` of u8, unless all count.
    fn live(&self) -> Result<Option<Tensor>> {
        if self.live.iter().all(Option::is_none) {
            return Ok(None);
        }
        let of_use = |(live, inputs): (&Option<Tensor>, &Tensor)| match live {
            Some(live) => Ok(live.clone()),
            None => Tensor::ones((inputs.dim(0)?, inputs.dim(1)?, 1), DType::U8, inputs.device()),
        };
        let all = self.live.iter().zip(&self.inputs).map(of_use).collect::<Result<Vec<_>>>()?;
        joined(&all).map(Some)
    }

    /// The rows of the layer's weight, and of each bias that its uses add: together where all add the same.
    fn rows(self, layer: &Arc<Layer>, number: &impl Fn(&Tensor) -> Option<usize>) -> Result<Vec<LayerRows>> {
        let weight = number(&layer.weight);
        if !self.written.is_empty() {
            let bias = layer.bias.as_ref().and_then(number);
            let mut rows = LayerRows::written(layer.clone(), &self.written)?;
            if !self.passes.is_empty() {
                let (inputs, grads) = (joined(&self.inputs)?, stacked(&self.passes)?);
                rows = rows.plus(&LayerRows::new(layer.clone(), inputs, grads, None)?)?;
            }
            (rows.weight, rows.bias) = (weight, bias);
            return Ok(vec![rows]);
        }
        let live = self.live()?;
        let mut whole = LayerRows::new(layer.clone(), joined(&self.inputs)?, stacked(&self.passes)?, live)?;
        whole.weight = weight;
        let id = |bias: &Option<Tensor>| bias.as_ref().map(Tensor::id);
        if self.biases.iter().all(|bias| id(bias) == id(&layer.bias)) {
            whole.bias = layer.bias.as_ref().and_then(number);
            return Ok(vec![whole]);
        }
        // Each bias has a part of its own, of the positions of the uses that add it.
        let mut spans: Vec<(Tensor, Vec<(usize, usize)>)> = Vec::new();
        let mut start = 0;
        for (bias, inputs) in self.biases.into_iter().zip(&self.inputs) {
            let len = inputs.dim(1)?;
            if let Some(bias) = bias {
                match spans.iter_mut().find(|(other, _)| other.id() == bias.id()) {
                    Some((_, spans)) => spans.push((start, len)),
                    None => spans.push((bias, vec![(start, len)])),
                }
            }
            start += len;
        }
        let mut rows = Vec::new();
        for (bias, spans) in spans {
            if let Some(number) = number(&bias) {
                let mut part = whole.positions_of(&spans)?;
                part.bias = Some(number);
                rows.push(part);
            }
        }
        if whole.weight.is_some() {
            rows.insert(0, whole);
        }
        Ok(rows)
    }
}

/// What came of gathering.
pub(crate) enum Gathered {
    Rows(Rows),
    /// They would take so many bytes.
    TooLarge(u128),
}

impl Rows {
    /// The rows `<cotangent, J>`, one an example and cotangent, in the shape of `outputs` `[examples, ..]`, of the layers whose weight or
    /// bias `number` knows as one of the problem's tensors. Whether they would take more than `memory` bytes is known after the first
    /// cotangent's pass, before any is kept. A layer whose rows have no more than `write` numbers may keep them written out instead of in
    /// factors: for kernels alone.
    ///
    /// # Errors
    /// When one of these layers took no part, or mixes examples: the batch of its record is another.
    pub fn gather(
        tape: &Tape,
        outputs: &Tensor,
        cotangents: impl ExactSizeIterator<Item = Result<Tensor>>,
        number: impl Fn(&Tensor) -> Option<usize>,
        (memory, write): (usize, usize),
    ) -> Result<Gathered> {
        let examples = outputs.dims().first().copied().unwrap_or(1);
        let (tapped, others) = (tape.layers(), tape.other_biases());
        let uses = tapped.iter().map(|_| Uses::default()).collect();
        let mut wanted = vec![false; tapped.len()];
        for layer in tapped.iter().chain(&others) {
            let known = std::iter::once(&layer.weight).chain(&layer.bias).any(|t| number(t).is_some());
            if let Some(wanted) = wanted.get_mut(layer.index) {
                *wanted |= known;
            }
        }
        let passes = cotangents.len();
        let mut written = vec![false; tapped.len()];
        for layer in &tapped {
            let size = layer.out_features() * layer.in_features();
            // Uses that add different biases are told apart by their records.
            let alone = others.iter().all(|other| other.index != layer.index);
            let linear = layer.kind.is_linear() && wanted[layer.index];
            written[layer.index] = linear && alone && examples * passes * size <= write;
        }
        let gather = Gather { uses, wanted: wanted.clone(), written, passes, done: 0, bytes: 0, memory };
        let gather = Arc::new(Mutex::new(gather));
        for cotangent in cotangents {
            tape.reduce_into(outputs, &cotangent?, gather.clone())?;
            let mut gather = gather.lock().unwrap_or_else(PoisonError::into_inner);
            if gather.bytes > memory as u128 {
                return Ok(Gathered::TooLarge(gather.bytes));
            }
            gather.end_pass()?;
        }
        let mut gathered = gather.lock().unwrap_or_else(PoisonError::into_inner);
        let mut layers = Vec::new();
        for layer in tapped.iter().filter(|layer| wanted[layer.index]) {
            let uses = gathered.uses.get_mut(layer.index).map(std::mem::take).unwrap_or_default();
            if uses.passes.len().max(uses.written.len()) != passes {
                bail!(
                    "evidence: layer {} made no record; every layer whose weights are asked for must take part in the forward pass",
                    layer.name
                )
            }
            for of_layer in uses.rows(layer, &number)? {
                let batch = of_layer.factors().0.dim(0)?;
                if batch != examples {
                    bail!(
                        "evidence: layer {} sees a batch of {batch}, expected the {examples} examples of the outputs {:?}",
                        layer.name,
                        outputs.dims()
                    )
                }
                layers.push(of_layer);
            }
        }
        Ok(Gathered::Rows(Self { layers, examples, each: passes, weights: None }))
    }
}
