//! What is learned: examples, and the model that is to learn them.

use super::args::Args;
use candle_core::{Result, Tensor};
use kronwake::nn::VarBuilder;
use std::path::Path;

/// Which examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Train,
    Test,
}

/// What a model takes: images, or tokens and which of them are there.
pub type Inputs = Vec<Tensor>;

/// A model: its logits `[.., classes]`.
pub type Forward = Box<dyn Fn(&Inputs) -> Result<Tensor>>;

/// A fine-tuning.
pub trait Task {
    /// What it is, on a line.
    fn title(&self) -> String;
    /// The number of examples.
    fn len(&self, side: Side) -> usize;
    /// The examples at `places`, and their labels `[..]`.
    fn batch(&self, side: Side, places: &[usize]) -> Result<(Inputs, Tensor)>;
    /// A model with its parameters in `vb`.
    fn build(&self, vb: VarBuilder) -> Result<Forward>;
    /// The prefix of the new last layer's parameters.
    fn head(&self) -> String;
    /// Patterns of the layers that get adapters.
    fn adapted(&self) -> Vec<String>;
    /// Trains the base and writes it to `path`.
    fn train_base(&self, args: &Args, path: &Path) -> Result<()>;
}
