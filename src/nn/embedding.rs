//! candle_nn's embedding, tapped.

use super::Linear;
use super::lora::{AdapterKind, Lora};
use crate::tape::{Kind, Tap, Tape, picked};
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Rows of a table `[rows, features]`, picked by number: inputs `[n, ..]` of an integer type, outputs `[n, .., features]`.
///
/// Built inside [`Tape::build`] the layer is tapped: its table gets a Kronecker block, diagonal in the rows. Built inside
/// [`Lora::build`] it may have adapters.
#[derive(Clone, Debug)]
pub struct Embedding {
    embeddings: Tensor,
    hidden_size: usize,
    tap: Option<Tap>,
    adapters: Option<Box<Adapters>>,
}

/// What a layer adds to its own row `i`: `scale A[i] B^T`.
#[derive(Clone, Debug)]
struct Adapters {
    a: Embedding,
    b: Linear,
    scale: f64,
}

impl Embedding {
    /// A layer from its table `[rows, hidden_size]`.
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        Self::tapped("", embeddings, hidden_size)
    }

    fn tapped(name: &str, embeddings: Tensor, hidden_size: usize) -> Self {
        let tap = Tape::tap_as(Kind::Embedding, name, &embeddings, None, 1);
        Self { embeddings, hidden_size, tap, adapters: None }
    }

    /// A layer with a name, which may get adapters: it is a constant then, and they are tapped.
    fn named(name: &str, embeddings: Tensor, hidden_size: usize) -> Result<Self> {
        let Some(adapter) = Lora::adapter(AdapterKind::Embedding, name, &embeddings)? else {
            return Ok(Self::tapped(name, embeddings, hidden_size));
        };
        let [of_a, of_b] = AdapterKind::Embedding.parts().map(|part| format!("{name}.{part}"));
        let rank = adapter.a.dim(1)?;
        let a = Self::tapped(&of_a, adapter.a, rank);
        let b = Linear::tapped(of_b, adapter.b, None);
        let adapters = Some(Box::new(Adapters { a, b, scale: adapter.scale }));
        Ok(Self { embeddings: embeddings.detach(), hidden_size, tap: None, adapters })
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
        let rows = picked(numbers, &self.embeddings, self.tap.as_ref())?;
        let Some(Adapters { a, b, scale }) = self.adapters.as_deref() else { return Ok(rows) };
        let low = a.forward(numbers)?;
        // A single number is a row, of which a linear layer wants a batch.
        let change =
            if low.rank() > 1 { b.forward(&low)? } else { b.forward(&low.unsqueeze(0)?)?.squeeze(0)? };
        rows + (change * *scale)?
    }
}

/// A layer from the variable `weight` of `vb`, drawn from a standard normal distribution as candle_nn does it.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder) -> Result<Embedding> {
    let weight = vb.get_with_hints((in_size, out_size), "weight", Init::Randn { mean: 0., stdev: 1. })?;
    Embedding::named(&vb.prefix(), weight, out_size)
}
