//! What is learned: examples, and the model that is to learn them.

use super::args::Args;
use candle_core::{Device, Result, Tensor, Var};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::VarBuilder;
use kronwake::ops::rng::normal;
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
    /// Patterns of the layers that get adapters.
    fn adapted(&self) -> Vec<String>;
    /// The parameters of a checkpoint, under the names that they have in the model.
    fn read(&self, path: &Path) -> Result<Checkpoint> {
        Checkpoint::read(path, &Device::Cpu)
    }
    /// Trains the base and writes it to `path`.
    fn train_base(&self, args: &Args, path: &Path) -> Result<()>;
}

/// Sets every parameter to random numbers of the seed: matrices normal with variance `1 / fan_in`, but tables 0.02^2, gains
/// 1, and biases 0.
pub fn draw(vars: &[(String, Var)], seed: u64) -> Result<()> {
    for ((name, var), stream) in vars.iter().zip(0..) {
        let (rank, fan_in) = (var.rank(), var.dims().iter().skip(1).product::<usize>());
        let table = name.contains("embed") || name.contains("token");
        let number = |i: usize| normal(seed, stream, i as u64);
        let value = |i: usize| match rank {
            1 if name.ends_with("bias") => 0.0,
            1 => 1.0,
            _ if table => 0.02 * number(i),
            _ => number(i) / (fan_in as f64).sqrt(),
        };
        let values: Vec<f64> = (0..var.elem_count()).map(value).collect();
        let values = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
        var.set(&values.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}
