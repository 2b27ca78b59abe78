//! The rows of `B^T J`: what the outputs of each example, seen through a square root of their Hessian, owe to each parameter.
//!
//! They are kept in factors, as the tape records them: the inputs of each layer and the gradients of its outputs, of one backward pass
//! for every column of the root. Written out they have `examples * each` rows of as many numbers as there are parameters.

use crate::curvature::wide;
use crate::ops::dense::product;
use crate::tape::{Inputs, Kind, Layer, Record, Reduce, Tape};
use candle_core::{Result, Tensor, bail};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Numbers of the rows written out at a time.
pub(crate) const CHUNK: usize = 1 << 24;

/// The rows of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub layers: Vec<LayerRows>,
    pub examples: usize,
    /// Rows of an example.
    pub each: usize,
}

/// A layer's part of the rows. The uses of a layer that a forward pass uses several times count as positions.
#[derive(Debug, Clone)]
pub(crate) struct LayerRows {
    pub layer: Arc<Layer>,
    /// `[examples, t, groups * in]`, or a view of `[examples, groups * in, t]`; of an embedding the numbers of its rows,
    /// `[examples, t, 1]` in u32.
    inputs: Tensor,
    /// `[examples, each, t, out]`, or a view of `[examples, each, out, t]`
    grads: Tensor,
    /// What [`Rows::write_out`] kept: `[examples, each, out * in]` of the weight and `[examples, each, out]` of the bias.
    written: [Option<Tensor>; 2],
    /// The inner products of a linear layer's inputs, `[examples, examples]`, likewise.
    gram: Option<Tensor>,
    /// Which of the problem's tensors the weight is, unless it is left out.
    pub weight: Option<usize>,
    /// The same of the bias.
    pub bias: Option<usize>,
    /// The rows of the weight.
    outs: usize,
}

/// Gathers the records of the passes over one forward.
#[derive(Default)]
struct Gather {
    uses: Vec<Uses>,
}

/// One layer's.
#[derive(Default)]
struct Uses {
    /// Of the first pass.
    inputs: Vec<Tensor>,
    /// Of the current pass, a tensor a use, in the order of `inputs`.
    grads: Vec<Tensor>,
    /// `[examples, t, out]` a pass.
    passes: Vec<Tensor>,
}

impl Reduce for Gather {
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()> {
        if self.uses.len() <= layer.index {
            self.uses.resize_with(layer.index + 1, Uses::default);
        }
        let uses = &mut self.uses[layer.index];
        if uses.passes.is_empty() {
            uses.inputs.push(match &record.inputs {
                Inputs::Picked(numbers) => numbers.unsqueeze(2)?,
                inputs => wide(&inputs.rows()?)?,
            });
        }
        uses.grads.push(wide(&record.grads)?);
        Ok(())
    }
}

impl Gather {
    fn end_pass(&mut self) -> Result<()> {
        for uses in &mut self.uses {
            if !uses.grads.is_empty() {
                uses.passes.push(joined(&std::mem::take(&mut uses.grads))?);
            }
        }
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

/// Whether records `[.., t, features]` lie in memory as `[.., features, t]`, as those of convolutions do.
fn turned(t: &Tensor) -> Result<bool> {
    let rank = t.rank();
    Ok(!t.is_contiguous() && t.transpose(rank - 2, rank - 1)?.is_contiguous())
}

/// The passes side by side, `[examples, passes, t, out]`, in memory as they are.
fn stacked(passes: &[Tensor]) -> Result<Tensor> {
    for pass in passes {
        if !turned(pass)? {
            return Tensor::stack(passes, 1);
        }
    }
    let passes = passes.iter().map(|pass| pass.transpose(1, 2)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&passes, 1)?.transpose(2, 3)
}

impl Rows {
    /// The rows `<cotangent, J>`, one an example and cotangent, in the shape of `outputs` `[examples, ..]`.
    ///
    /// `tensors(layer)` says which of the problem's tensors the layer's weight and bias are.
    ///
    /// # Errors
    /// When a layer of the tape took no part, or mixes examples: the batch of its record is another.
    pub fn gather(
        tape: &Tape,
        outputs: &Tensor,
        cotangents: impl Iterator<Item = Result<Tensor>>,
        tensors: impl Fn(&Layer) -> (Option<usize>, Option<usize>),
    ) -> Result<Self> {
        let examples = outputs.dims().first().copied().unwrap_or(1);
        let gather = Arc::new(Mutex::new(Gather::default()));
        let mut each = 0;
        for cotangent in cotangents {
            tape.reduce_into(outputs, &cotangent?, gather.clone())?;
            gather.lock().unwrap_or_else(PoisonError::into_inner).end_pass()?;
            each += 1;
        }
        let mut gathered = gather.lock().unwrap_or_else(PoisonError::into_inner);
        let mut layers = Vec::new();
        for layer in tape.layers() {
            let uses = gathered.uses.get_mut(layer.index).map(std::mem::take).unwrap_or_default();
            if uses.passes.len() != each {
                bail!(
                    "evidence: layer {} made no record; every layer of the tape must take part in the forward pass",
                    layer.name
                )
            }
            let (inputs, grads) = (joined(&uses.inputs)?, stacked(&uses.passes)?);
            if inputs.dim(0)? != examples {
                bail!(
                    "evidence: layer {} sees a batch of {}, expected the {examples} examples of the outputs {:?}",
                    layer.name,
                    inputs.dim(0)?,
                    outputs.dims()
                )
            }
            let (weight, bias) = tensors(&layer);
            let outs = layer.weight.dim(0)?;
            let inputs = if turned(&inputs)? { inputs } else { inputs.contiguous()? };
            let (written, gram) = ([None, None], None);
            layers.push(LayerRows { layer, inputs, grads, written, gram, weight, bias, outs });
        }
        Ok(Self { layers, examples, each })
    }

    /// Computes once what all kernels are made of: the rows of layers whose positions share the weight, where a layer's take no more than
    /// `elements` numbers, and the inner products of the inputs of the others.
    pub fn write_out(mut self, elements: usize) -> Result<Self> {
        for layer in &mut self.layers {
            if layer.layer.kind != Kind::Matrix {
                continue;
            }
            if layer.is_product()? {
                let inputs = layer.flat_inputs()?;
                layer.gram = Some(product(&inputs, &inputs.t()?)?);
                continue;
            }
            let columns = layer.layer.out_features() * layer.columns();
            let split = |rows: Tensor| rows.reshape((self.examples, self.each, ()));
            if layer.weight.is_some() && self.examples * self.each * columns <= elements {
                let parts = layer.chunks(elements)?.into_iter().map(|outs| layer.of_weight(outs));
                let parts = parts.collect::<Result<Vec<_>>>()?;
                let rows = if let [one] = parts.as_slice() { one.clone() } else { Tensor::cat(&parts, 1)? };
                layer.written[0] = Some(split(rows)?);
            }
            if layer.bias.is_some() {
                layer.written[1] = Some(split(layer.of_bias()?)?);
            }
        }
        Ok(self)
    }

    /// Rows and columns of the kernel.
    pub fn count(&self) -> usize {
        self.examples * self.each
    }

    /// The rows of some of the examples.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        let narrow = |t: &Tensor| t.narrow(0, start, len);
        self.map(len, self.each, |layer| {
            let gram = layer.gram.as_ref().map(|gram| narrow(gram)?.narrow(1, start, len));
            Ok(LayerRows { inputs: narrow(&layer.inputs)?, gram: gram.transpose()?, ..layer.of(narrow)? })
        })
    }

    /// The rows of one of the cotangents.
    pub fn one_of_each(&self, index: usize) -> Result<Self> {
        self.map(self.examples, 1, |layer| layer.of(|t| t.narrow(1, index, 1)))
    }

    fn map(
        &self,
        examples: usize,
        each: usize,
        map: impl Fn(&LayerRows) -> Result<LayerRows>,
    ) -> Result<Self> {
        Ok(Self { layers: self.layers.iter().map(map).collect::<Result<_>>()?, examples, each })
    }

    /// The rows as functions of one layer's tensors alone, of its weight, of its bias, or of both.
    pub fn of_layer(&self, index: usize, weight: bool, bias: bool) -> Option<Self> {
        let mut layer = self.layers.get(index)?.clone();
        layer.weight = layer.weight.filter(|_| weight);
        layer.bias = layer.bias.filter(|_| bias);
        Some(Self { layers: vec![layer], examples: self.examples, each: self.each })
    }
}

impl LayerRows {
    /// Some of the rows, by their first two dimensions.
    fn of(&self, some: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let [weight, bias] = self.written.each_ref().map(|t| t.as_ref().map(&some).transpose());
        Ok(Self { grads: some(&self.grads)?, written: [weight?, bias?], ..self.clone() })
    }

    /// The inner products of the inputs of examples `rows` with those of the first examples up to them.
    pub fn gram(&self, rows: Range<usize>) -> Result<Tensor> {
        if let Some(gram) = &self.gram {
            return gram.narrow(0, rows.start, rows.len())?.narrow(1, 0, rows.end);
        }
        let inputs = self.flat_inputs()?;
        product(&inputs.narrow(0, rows.start, rows.len())?, &inputs.narrow(0, 0, rows.end)?.t()?)
    }

    /// Positions that share the weight.
    pub fn positions(&self) -> Result<usize> {
        self.inputs.dim(1)
    }

    /// The columns of the weight matrix; those of a group's inputs.
    pub fn columns(&self) -> usize {
        self.layer.in_features()
    }

    /// The gradients `[rows, t * out]`; of a layer without shared positions those of its outputs.
    pub fn flat_grads(&self) -> Result<Tensor> {
        self.grads.flatten(0, 1)?.flatten_from(1)
    }

    /// The inputs `[examples, t * groups * in]`.
    pub fn flat_inputs(&self) -> Result<Tensor> {
        self.inputs.flatten_from(1)
    }

    /// Inputs `[examples, t, groups * in]` and gradients `[examples, each, t, out]`.
    pub fn factors(&self) -> (&Tensor, &Tensor) {
        (&self.inputs, &self.grads)
    }

    /// The gradients of all rows, `[rows, t, out]`, in memory as they are.
    pub fn grads_by_row(&self) -> Result<Tensor> {
        if turned(&self.grads)? {
            return self.grads.transpose(2, 3)?.flatten(0, 1)?.transpose(1, 2);
        }
        self.grads.flatten(0, 1)
    }

    /// The layer with other inputs and gradients.
    pub fn with(&self, inputs: Tensor, grads: Tensor) -> Self {
        Self { inputs, grads, written: [None, None], gram: None, ..self.clone() }
    }

    /// The rows' part of the bias, `[rows, out]`.
    pub fn of_bias(&self) -> Result<Tensor> {
        let summed = match &self.written[1] {
            Some(written) => written.clone(),
            None if self.positions()? == 1 => self.grads.squeeze(2)?,
            // Numbers side by side add up fastest.
            None => self.grads.transpose(2, 3)?.sum(3)?,
        };
        summed.flatten(0, 1)
    }

    /// The rows' part of some of the weight's rows, all in one group: `[rows, outs.len() * columns]`.
    pub fn of_weight(&self, outs: Range<usize>) -> Result<Tensor> {
        let (examples, each, positions, features) = self.grads.dims4()?;
        match self.layer.kind {
            Kind::Matrix => {
                let (columns, group) = (self.columns(), outs.start / self.outs_of_group());
                if let Some(written) = &self.written[0] {
                    let (start, len) = (outs.start * columns, outs.len() * columns);
                    return written.flatten(0, 1)?.narrow(1, start, len)?.contiguous();
                }
                let grads = self.grads.narrow(3, outs.start, outs.len())?.transpose(2, 3)?;
                let grads = grads.contiguous()?.reshape((examples, each * outs.len(), positions))?;
                let inputs = self.inputs.narrow(2, group * columns, columns)?;
                product(&grads, &inputs)?.reshape((examples * each, outs.len() * columns))
            }
            Kind::Gain => {
                let inputs = self.inputs.narrow(2, outs.start, outs.len())?.unsqueeze(1)?;
                let grads = self.grads.narrow(3, outs.start, outs.len())?;
                grads.broadcast_mul(&inputs)?.sum(2)?.flatten(0, 1)
            }
            Kind::Table => {
                let numbers = Tensor::arange(outs.start as u32, outs.end as u32, self.inputs.device())?;
                let hot = self.inputs.broadcast_eq(&numbers.reshape((1, 1, outs.len()))?)?;
                let hot = hot.to_dtype(self.grads.dtype())?.transpose(1, 2)?.contiguous()?;
                let grads = self.grads.permute((0, 2, 1, 3))?.contiguous()?;
                let sums = product(&hot, &grads.reshape((examples, positions, each * features))?)?;
                let sums = sums.reshape((examples, outs.len(), each, features))?.transpose(1, 2)?;
                sums.contiguous()?.reshape((examples * each, outs.len() * features))
            }
        }
    }

    /// Whether the weight's part is a product of inner products of inputs and of gradients.
    pub fn is_product(&self) -> Result<bool> {
        Ok(self.layer.kind == Kind::Matrix && self.positions()? == 1 && self.layer.groups == 1)
    }

    /// An embedding with the rows that are picked alone: no other has a part.
    pub fn compact(&self) -> Result<Self> {
        if self.layer.kind != Kind::Table {
            return Ok(self.clone());
        }
        let numbers = self.inputs.flatten_all()?.to_vec1::<u32>()?;
        let mut picked = numbers.clone();
        picked.sort_unstable();
        picked.dedup();
        let places = numbers.iter().map(|n| picked.partition_point(|p| p < n) as u32).collect::<Vec<_>>();
        let inputs = Tensor::from_vec(places, self.inputs.shape(), self.inputs.device())?;
        Ok(Self { inputs, outs: picked.len(), ..self.clone() })
    }

    fn outs_of_group(&self) -> usize {
        (self.outs / self.layer.groups.max(1)).max(1)
    }

    /// The weight's rows in chunks for [`LayerRows::of_weight`], none across groups, of at most `elements` numbers each unless one row
    /// has more.
    pub fn chunks(&self, elements: usize) -> Result<Vec<Range<usize>>> {
        let rows = self.grads.dim(0)? * self.grads.dim(1)?;
        let most = (elements / (rows * self.columns()).max(1)).max(1);
        let per_group = self.outs_of_group();
        let mut chunks = Vec::new();
        for group in 0..self.layer.groups {
            let mut start = group * per_group;
            while start < (group + 1) * per_group {
                let end = (start + most).min((group + 1) * per_group);
                chunks.push(start..end);
                start = end;
            }
        }
        Ok(chunks)
    }
}
