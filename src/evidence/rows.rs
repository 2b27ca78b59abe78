//! The rows of `B^T J`: what the outputs of each example, seen through a square root of their Hessian, owe to each parameter.
//!
//! They are kept in factors, as the tape records them: the inputs of each layer and the gradients of its outputs, of one backward pass
//! for every column of the root. Written out they have `examples * each` rows of as many numbers as there are parameters.

use crate::ops::dense::product;
use crate::tape::{ExampleGrads, Kind, Layer};
use candle_core::{DType, Result, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Numbers of the rows written out at a time.
pub(crate) const CHUNK: usize = 1 << 24;

/// The rows of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub layers: Vec<LayerRows>,
    pub examples: usize,
    /// Rows of an example.
    pub each: usize,
    /// How often each example counts, `[examples, 1, 1]` in f64, where not all count once. It is in the gradients already, as a root.
    pub weights: Option<Tensor>,
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
    /// 1 where a position counts, `[examples, t, 1]` of u8; elsewhere inputs and gradients are zero. Without it all count.
    live: Option<Tensor>,
    /// What [`Rows::write_out`] kept: `[examples, each, out * in]` of the weight and `[examples, each, out]` of the bias. Rows that came
    /// written have this alone: their inputs and gradients have no positions.
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

/// Whether records `[.., t, features]` lie in memory as `[.., features, t]`, as those of convolutions do.
pub(super) fn turned(t: &Tensor) -> Result<bool> {
    let rank = t.rank();
    Ok(!t.is_contiguous() && t.transpose(rank - 2, rank - 1)?.is_contiguous())
}

/// The passes side by side, `[examples, passes, t, out]`, in memory as they are.
pub(super) fn stacked(passes: &[Tensor]) -> Result<Tensor> {
    for pass in passes {
        if !turned(pass)? {
            return Tensor::stack(passes, 1);
        }
    }
    let passes = passes.iter().map(|pass| pass.transpose(1, 2)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&passes, 1)?.transpose(2, 3)
}

impl Rows {
    /// Computes once what all kernels are made of: the rows of layers whose positions share the weight, where a layer's take no more than
    /// `elements` numbers, and the inner products of the inputs of the others.
    pub fn write_out(mut self, elements: usize) -> Result<Self> {
        for layer in &mut self.layers {
            let is_written = layer.written.iter().any(Option::is_some);
            let is_linear = layer.layer.kind.is_linear();
            if is_written || !is_linear || (layer.weight.is_none() && layer.positions()? == 1) {
                continue;
            }
            if layer.is_product()? {
                let inputs = layer.flat_inputs()?;
                layer.gram = Some(product(&inputs, &inputs.t()?)?);
                continue;
            }
            let columns = layer.layer.out_features() * layer.columns();
            if layer.weight.is_some() && self.examples * self.each * columns <= elements {
                layer.written[0] = Some(layer.weight_rows(elements)?);
            }
            if layer.bias.is_some() {
                layer.written[1] = Some(layer.split(layer.of_bias()?)?);
            }
        }
        Ok(self)
    }

    /// The type of their numbers.
    pub fn dtype(&self) -> DType {
        self.layers.first().map_or(DType::F64, |layer| layer.grads.dtype())
    }

    /// Rows and columns of the kernel.
    pub fn count(&self) -> usize {
        self.examples * self.each
    }

    /// The rows of some of the examples.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        let weights = self.weights.as_ref().map(|weights| weights.narrow(0, start, len)).transpose()?;
        Ok(Self { weights, ..self.map(len, self.each, |layer| layer.examples(start, len))? })
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
        let layers = self.layers.iter().map(map).collect::<Result<_>>()?;
        Ok(Self { layers, examples, each, weights: self.weights.clone() })
    }

    /// The rows as functions of the tensors that `keep` says alone; none if there are none of them.
    pub fn of_tensors(&self, keep: impl Fn(usize) -> bool) -> Option<Self> {
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (weight, bias) = (layer.weight.filter(|&t| keep(t)), layer.bias.filter(|&t| keep(t)));
            if weight.is_some() || bias.is_some() {
                layers.push(LayerRows { weight, bias, ..layer.clone() });
            }
        }
        (!layers.is_empty()).then_some(Self { layers, ..self.clone() })
    }

    /// The rows in f64.
    pub fn to_f64(&self) -> Result<Self> {
        self.map(self.examples, self.each, LayerRows::to_f64)
    }
}

impl LayerRows {
    /// Inputs `[examples, t, features]` and gradients `[examples, each, t, out]` of no tensors yet.
    pub fn new(layer: Arc<Layer>, inputs: Tensor, grads: Tensor, live: Option<Tensor>) -> Result<Self> {
        let outs = layer.weight.dim(0)?;
        let inputs = if turned(&inputs)? { inputs } else { inputs.contiguous()? };
        let (written, gram) = ([None, None], None);
        Ok(Self { layer, inputs, grads, live, written, gram, weight: None, bias: None, outs })
    }

    /// Rows that came as gradients an example, of one pass after the other.
    pub fn written(layer: Arc<Layer>, passes: &[ExampleGrads]) -> Result<Self> {
        let stacked =
            |of: fn(&ExampleGrads) -> &Tensor| Tensor::stack(&passes.iter().map(of).collect::<Vec<_>>(), 1);
        let (weight, bias) = (stacked(|grads| &grads.weight)?, stacked(|grads| &grads.bias)?);
        let (examples, each, outs) = bias.dims3()?;
        let none = |dims: &[usize]| Tensor::zeros(dims, bias.dtype(), bias.device());
        let inputs = none(&[examples, 0, layer.groups * layer.in_features()])?;
        let rows = Self::new(layer, inputs, none(&[examples, each, 0, outs])?, None)?;
        Ok(Self { written: [Some(weight), Some(bias)], ..rows })
    }

    /// [`LayerRows::written`] with what other uses of the layer add, which came in factors.
    pub fn plus(mut self, others: &Self) -> Result<Self> {
        let added = [others.weight_rows(usize::MAX)?, others.split(others.of_bias()?)?];
        for (written, added) in self.written.iter_mut().zip(added) {
            if let Some(written) = written {
                *written = (&*written + added)?;
            }
        }
        Ok(self)
    }

    /// All of the weight's part, `[examples, each, out * in]`.
    fn weight_rows(&self, elements: usize) -> Result<Tensor> {
        let parts = self.chunks(elements)?.into_iter().map(|outs| self.of_weight(outs));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        self.split(if let [one] = parts.as_slice() { one.clone() } else { Tensor::cat(&parts, 1)? })
    }

    /// `[rows, ..]` as `[examples, each, ..]`.
    fn split(&self, rows: Tensor) -> Result<Tensor> {
        rows.reshape((self.grads.dim(0)?, self.grads.dim(1)?, ()))
    }

    /// Some of the examples.
    pub fn examples(&self, start: usize, len: usize) -> Result<Self> {
        let narrow = |t: &Tensor| t.narrow(0, start, len);
        let gram = self.gram.as_ref().map(|gram| narrow(gram)?.narrow(1, start, len));
        let live = self.live.as_ref().map(narrow).transpose()?;
        Ok(LayerRows { inputs: narrow(&self.inputs)?, live, gram: gram.transpose()?, ..self.of(narrow)? })
    }

    /// Some of the positions, as spans of their numbers and lengths.
    pub fn positions_of(&self, spans: &[(usize, usize)]) -> Result<Self> {
        let some = |t: &Tensor, dim: usize| {
            let parts = spans.iter().map(|&(start, len)| t.narrow(dim, start, len));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, dim)
        };
        let live = self.live.as_ref().map(|live| some(live, 1)).transpose()?;
        Self::new(self.layer.clone(), some(&self.inputs, 1)?, some(&self.grads, 2)?, live)
    }

    pub fn to_f64(&self) -> Result<Self> {
        let wide = |t: &Tensor| if t.dtype().is_float() { t.to_dtype(DType::F64) } else { Ok(t.clone()) };
        Ok(self.with(wide(&self.inputs)?, wide(&self.grads)?))
    }

    /// How often each position counts, `[examples, t, 1]` in f64; `weights` `[examples, 1, 1]` are the examples'.
    pub fn counts(&self, weights: Option<&Tensor>) -> Result<Tensor> {
        let (examples, positions) = (self.inputs.dim(0)?, self.inputs.dim(1)?);
        let counts = match &self.live {
            Some(live) => live.to_dtype(DType::F64)?,
            None => Tensor::ones((examples, positions, 1), DType::F64, self.inputs.device())?,
        };
        match weights {
            Some(weights) => counts.broadcast_mul(weights),
            None => Ok(counts),
        }
    }

    /// How often each row of an embedding is picked, `[rows]`, f64.
    pub fn picks(&self, weights: Option<&Tensor>) -> Result<Tensor> {
        let rows = Tensor::zeros(self.layer.weight.dim(0)?, DType::F64, self.inputs.device())?;
        rows.index_add(&self.inputs.flatten_all()?, &self.counts(weights)?.flatten_all()?, 0)
    }

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
            Kind::Linear => {
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
            Kind::Norm => {
                let inputs = self.inputs.narrow(2, outs.start, outs.len())?.unsqueeze(1)?;
                let grads = self.grads.narrow(3, outs.start, outs.len())?;
                grads.broadcast_mul(&inputs)?.sum(2)?.flatten(0, 1)
            }
            Kind::Embedding => {
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
        Ok(self.layer.kind.is_linear() && self.positions()? == 1 && self.layer.groups == 1)
    }

    /// An embedding with the rows that are picked alone: no other has a part.
    pub fn compact(&self) -> Result<Self> {
        if !self.layer.kind.is_embedding() {
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
