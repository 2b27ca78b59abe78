//! What a layer reports of one backward pass, and who reads it.
//!
//! Every layer speaks one format, `[batch, shared, features]`:
//!
//! * a linear layer on `[n, in]`: `[n, 1, in]` and `[n, 1, out]`;
//! * a linear layer on `[n, .., in]`: the middle dimensions are one, `shared`;
//! * a convolution: `shared` counts the output positions, an input is the patch under the kernel in weight
//!   order `(channels, kh, kw)`;
//! * a convolution with groups: the features of group `j` are the `j`-th of `groups` equal runs;
//! * the gain of a norm: what it multiplies, and the gradients of the norm's outputs;
//! * an embedding: the numbers of the rows, `[n, t]`, and the gradients of the rows.

use crate::ops::moment_queue::{Average, Moments};
use crate::ops::patches::{ConvShape, patches};
use candle_core::{Result, Tensor, TensorId, bail};
use std::sync::Arc;

use super::mask::Mask;

/// What a layer does with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Multiplies inputs with it: linear layers and convolutions.
    #[default]
    Linear,
    /// Multiplies every feature with its number: the weight `[features]` of a norm.
    Norm,
    /// Picks rows of it: the weight `[rows, features]` of an embedding.
    Embedding,
}

impl Kind {
    /// Whether inputs are multiplied with the weight, so that its gradient is a sum of outer products of inputs and output gradients.
    pub fn is_linear(self) -> bool {
        match self {
            Kind::Linear => true,
            Kind::Norm | Kind::Embedding => false,
        }
    }

    /// Whether the inputs are numbers of the weight's rows.
    pub fn is_embedding(self) -> bool {
        match self {
            Kind::Embedding => true,
            Kind::Linear | Kind::Norm => false,
        }
    }
}

/// A layer with a weight, as the tape knows it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Position on the tape, in order of construction.
    pub index: usize,
    /// The `VarBuilder` prefix at which the layer was built (`fc1`), or `layer{index}` without one.
    pub name: String,
    /// What it does with its weight. Kronecker blocks are of matrices and tables.
    pub kind: Kind,
    /// The weight, `[out, in / groups, ..kernel]`, `[features]` or `[rows, features]`.
    pub weight: Tensor,
    /// The bias, `[out]`.
    pub bias: Option<Tensor>,
    /// Groups of a convolution; 1 otherwise.
    pub groups: usize,
}

impl Layer {
    /// Output features, over all groups.
    pub fn out_features(&self) -> usize {
        let dims = self.weight.dims();
        let of_weight = if self.kind.is_embedding() { dims.last() } else { dims.first() };
        of_weight.copied().unwrap_or(0)
    }

    /// Input features of one group: the columns of its weight matrix.
    pub fn in_features(&self) -> usize {
        self.weight.dims().iter().skip(1).product()
    }

    pub(crate) fn is_use_of(&self, weight: TensorId, kind: Kind) -> bool {
        self.weight.id() == weight && self.kind == kind
    }
}

/// One layer's use in one backward pass.
#[derive(Debug, Clone)]
pub struct Record {
    /// Inputs of the layer.
    pub inputs: Inputs,
    /// Gradients of the scalar that was differentiated, with respect to the layer's outputs, `[batch, shared, out]`.
    pub grads: Tensor,
    /// The positions that count, if not all do.
    pub(crate) mask: Option<Arc<Mask>>,
}

/// The inputs `[batch, shared, groups * in]` of a layer's use.
#[derive(Debug, Clone)]
pub enum Inputs {
    /// Themselves; a view of any strides.
    Rows(Tensor),
    /// Those of a convolution: the patches of its images, which are many times as large and not stored.
    Patches {
        /// The images, `[batch, channels, height, width]`.
        x: Tensor,
        /// The convolution.
        shape: ConvShape,
    },
    /// The numbers of the rows that an embedding picks, `[batch, shared]`, u32.
    Indices(Tensor),
}

impl Inputs {
    /// The inputs as a tensor `[batch, shared, groups * in]`, a view of any strides.
    ///
    /// # Errors
    /// When a convolution's images are not of a floating point type, or the layer is an embedding.
    pub fn rows(&self) -> Result<Tensor> {
        match self {
            Inputs::Indices(_) => bail!("tape: an embedding's inputs are numbers of rows"),
            Inputs::Rows(rows) => Ok(rows.clone()),
            Inputs::Patches { x, shape } => patches(x, shape),
        }
    }

    /// The average with the second moments of the inputs, as [`Moments::of_rows`] gives it.
    pub(crate) fn moment(
        &self,
        moments: &mut Moments,
        average: Average,
        groups: usize,
        append_one: bool,
        name: &str,
    ) -> Result<Tensor> {
        match self {
            Inputs::Indices(_) => bail!("layer {name}: an embedding has no matrix of second moments"),
            Inputs::Rows(rows) => moments.of_rows(average, rows, groups, append_one, name),
            Inputs::Patches { x, shape } => moments.of_patches(average, x, shape, append_one, name),
        }
    }
}

/// Reads the records of a pass as they are made: Kronecker factors, Gram matrices, per-example gradients.
///
/// The tensors of a record belong to no graph. Reduce them at once: keeping them keeps a layer's inputs in memory.
pub trait Reduce: Send {
    /// Takes one record. A layer that is used `k` times in a forward pass makes `k` records.
    ///
    /// # Errors
    /// What the reader makes of the record; the pass ends then.
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()>;

    /// Whether a use of `layer` may hand its part of every example's gradient to [`Reduce::examples`] instead of a record, where that is
    /// cheaper to make: convolutions whose outputs are pooled, of f32 and f64 on the CPU and without a mask, do so. No, unless a reader
    /// says otherwise.
    fn takes_examples(&self, layer: &Layer) -> bool {
        let _ = layer;
        false
    }

    /// Takes what [`Reduce::takes_examples`] asked for, once for every use of the layer.
    ///
    /// # Errors
    /// What the reader makes of it; the pass ends then. A reader that has not asked refuses.
    fn examples(&mut self, layer: &Layer, grads: ExampleGrads) -> Result<()> {
        let _ = grads;
        bail!("tape: layer {} hands over gradients an example to a reader that takes records", layer.name)
    }
}

/// A use's part of the gradients of the scalar that was differentiated, with respect to a layer's weight and bias, of each example alone.
#[derive(Debug, Clone)]
pub struct ExampleGrads {
    /// `[batch, out * in]`, the weight's numbers in their order.
    pub weight: Tensor,
    /// `[batch, out]`, whether or not the layer has a bias.
    pub bias: Tensor,
}

/// Keeps every record with the index of its layer; for diagnostics and tests.
#[derive(Debug, Default)]
pub struct Keep(pub Vec<(usize, Record)>);

impl Reduce for Keep {
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()> {
        self.0.push((layer.index, record.clone()));
        Ok(())
    }
}
