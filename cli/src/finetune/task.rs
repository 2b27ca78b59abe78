//! What is learned: examples, and the model that is to learn them.

use super::args::Args;
use candle_core::{Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::VarBuilder;
use kronwake::parallel::World;
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

/// The examples of a side at the given places, and their labels.
pub type Batches<'a> = dyn Fn(Side, &[usize]) -> Result<(Inputs, Tensor)> + 'a;

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
    /// Which positions of sequences count, where some are padding.
    fn mask<'a>(&self, _: &'a Inputs) -> Option<&'a Tensor> {
        None
    }
    /// The prefix of the new last layer's parameters, if there is one.
    fn head(&self) -> Option<&str>;
    /// Patterns of the embedding tables and of the layer that makes the outputs.
    fn ends(&self) -> Vec<String>;
    /// Patterns of the layers that get adapters.
    fn adapted(&self) -> Vec<String>;
    /// The parameters of a checkpoint, under the names that they have in the model.
    fn read(&self, path: &Path) -> Result<Checkpoint> {
        Checkpoint::read(path, &Device::Cpu)
    }
    /// Trains the base and writes it to `path`.
    fn train_base(&self, args: &Args, path: &Path, world: &World) -> Result<()>;
}
