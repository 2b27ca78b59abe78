//! candle_nn's embedding, tapped.

use crate::tape::{Kind, Tap, Tape, picked};
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Rows of a table `[rows, features]`, picked by number: inputs `[n, ..]` of an integer type, outputs `[n, .., features]`.
///
/// Built inside [`Tape::build`] the layer is tapped: its table gets a Kronecker block, diagonal in the rows.
#[derive(Clone, Debug)]
pub struct Embedding {
    embeddings: Tensor,
    hidden_size: usize,
    tap: Option<Tap>,
}

impl Embedding {
    /// A layer from its table `[rows, hidden_size]`.
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        Self::named("", embeddings, hidden_size)
    }

    fn named(name: &str, embeddings: Tensor, hidden_size: usize) -> Self {
        let tap = Tape::tap_as(Kind::Table, name, &embeddings, None, 1);
        Self { embeddings, hidden_size, tap }
    }

    /// The table.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// The features of a row.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

impl Module for Embedding {
    fn forward(&self, numbers: &Tensor) -> Result<Tensor> {
        picked(numbers, &self.embeddings, self.tap.as_ref())
    }
}

/// A layer from the variable `weight` of `vb`, drawn from a standard normal distribution as candle_nn does it.
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder) -> Result<Embedding> {
    let weight = vb.get_with_hints((in_size, out_size), "weight", Init::Randn { mean: 0., stdev: 1. })?;
    Ok(Embedding::named(&vb.prefix(), weight, out_size))
}
