//! What a layer reports of one backward pass, and who reads it.
//!
//! Every layer speaks one format, `[batch, shared, features]`:
//!
//! * a linear layer on `[n, in]`: `[n, 1, in]` and `[n, 1, out]`;
//! * a linear layer on `[n, .., in]`: the middle dimensions are one, `shared`;
//! * a convolution: `shared` counts the output positions, an input is the patch under the kernel in weight
//!   order `(channels, kh, kw)`;
//! * a convolution with groups: the features of group `j` are the `j`-th of `groups` equal runs.

use crate::ops::factor::{patch_moment, second_moment};
use crate::ops::patches::{ConvShape, patches};
use candle_core::{Result, Tensor, TensorId};

/// A layer with a weight matrix, as the tape knows it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Position on the tape, in order of construction.
    pub index: usize,
    /// The `VarBuilder` prefix at which the layer was built (`fc1`), or `layer{index}` without one.
    pub name: String,
    /// The weight, `[out, in / groups, ..kernel]`.
    pub weight: Tensor,
    /// The bias, `[out]`.
    pub bias: Option<Tensor>,
    /// Groups of a convolution; 1 otherwise.
    pub groups: usize,
}

impl Layer {
    /// Output features, over all groups.
    pub fn out_features(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// Input features of one group: the columns of its weight matrix.
    pub fn in_features(&self) -> usize {
        self.weight.dims().iter().skip(1).product()
    }

    pub(crate) fn shares_weight(&self, id: TensorId) -> bool {
        self.weight.id() == id
    }
}

/// One layer's use in one backward pass.
#[derive(Debug, Clone)]
pub struct Record {
    /// Inputs of the layer.
    pub inputs: Inputs,
    /// Gradients of the scalar that was differentiated, with respect to the layer's outputs, `[batch, shared, out]`.
    pub grads: Tensor,
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
}

impl Inputs {
    /// The inputs as a tensor `[batch, shared, groups * in]`, a view of any strides.
    ///
    /// # Errors
    /// When a convolution's images are not of a floating point type.
    pub fn rows(&self) -> Result<Tensor> {
        match self {
            Inputs::Rows(rows) => Ok(rows.clone()),
            Inputs::Patches { x, shape } => patches(x, shape),
        }
    }

    /// [`second_moment`] of the inputs.
    pub(crate) fn second_moment(&self, groups: usize, append_one: bool, name: &str) -> Result<Tensor> {
        match self {
            Inputs::Rows(rows) => second_moment(rows, groups, append_one, name),
            Inputs::Patches { x, shape } => patch_moment(x, shape, append_one, name),
        }
    }
}

/// Reads the records of a pass as they are made: Kronecker factors, Gram matrices, per-example gradients.
///
/// The tensors of a record belong to no graph. Reduce them at once: keeping them keeps a layer's inputs in memory.
pub trait Reduce: Send {
    /// Takes one record. A layer that is used `k` times in a forward pass makes `k` records.
    fn record(&mut self, layer: &Layer, record: &Record) -> Result<()>;
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
