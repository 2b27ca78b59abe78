//! The two nets, their images, and plain training.

use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::evidence::{Examples, Problem};
use kronwake::nn::init::Stream;
use kronwake::nn::{self, AdamW, Conv2dConfig, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use kronwake::tape::{Likelihood, Tape};
use kronwake_cli::data::{Data, Name, Part};
use std::path::Path;

/// Which net.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// 784-32-16-10, tanh
    Mlp,
    /// Convolutions 1-4 (5 x 5) and 4-8 (3 x 3, padded), each with ReLU and 2 x 2 max pooling, and 288-10
    Cnn,
}

/// A net with random weights from a seed, the same on every machine.
pub struct Net {
    pub vars: VarMap,
    pub tape: Tape,
    model: Box<dyn Module>,
}

impl Net {
    pub fn new(kind: Kind, seed: u64) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let model = tape.build(|| {
            Ok(match kind {
                Kind::Mlp => {
                    let first = nn::linear(784, 32, vb.pp("fc1"))?;
                    let second = nn::linear(32, 16, vb.pp("fc2"))?;
                    let last = nn::linear(16, 10, vb.pp("fc3"))?;
                    Box::new(move |x: &Tensor| {
                        let x = first.forward(&x.flatten_from(1)?)?.tanh()?;
                        last.forward(&second.forward(&x)?.tanh()?)
                    }) as Box<dyn Module>
                }
                Kind::Cnn => {
                    let padded = Conv2dConfig { padding: 1, ..Default::default() };
                    let first = nn::conv2d(1, 4, 5, Default::default(), vb.pp("conv1"))?;
                    let second = nn::conv2d(4, 8, 3, padded, vb.pp("conv2"))?;
                    let last = nn::linear(288, 10, vb.pp("fc"))?;
                    Box::new(move |x: &Tensor| {
                        let x = first.forward_pooled(x, (2, 2), (2, 2), true)?;
                        last.forward(&second.forward_pooled(&x, (2, 2), (2, 2), true)?.flatten_from(1)?)
                    })
                }
            })
        })?;
        for (index, (_, var)) in named(&vars)?.into_iter().enumerate() {
            let stream = Stream::new(seed, "weights", index);
            // The width of a uniform distribution whose variance is 1 / inputs.
            let inputs: usize = var.dims().iter().skip(1).product();
            let bound = if var.rank() > 1 { (3.0 / inputs as f64).sqrt() } else { 0.0 };
            let values = (0..var.elem_count()).map(|i| ((2.0 * stream.uniform(i) - 1.0) * bound) as f32);
            var.set(&Tensor::from_iter(values, &Device::Cpu)?.reshape(var.shape())?)?;
        }
        Ok(Self { vars, tape, model })
    }

    pub fn problem(&self) -> Result<Problem<'_>> {
        Problem::new(&self.tape, &self.vars, &*self.model, Likelihood::Categorical)
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.model.forward(x)
    }

    /// Adam with a rate that falls to zero by half a cosine, on random batches of 100 images. `more` makes the loss of the batch's;
    /// `after` is called after every step.
    pub fn train<S>(
        &self,
        examples: &Examples,
        epochs: usize,
        seed: u64,
        state: &mut S,
        more: impl Fn(&S, Tensor) -> Result<Tensor>,
        mut after: impl FnMut(&mut S) -> Result<()>,
    ) -> Result<()> {
        let (n, size, lr) = (examples.len(), BATCH.min(examples.len()), 3e-3);
        let params = ParamsAdamW { lr, weight_decay: 0.0, ..Default::default() };
        let mut adam = AdamW::new(named(&self.vars)?.into_iter().map(|(_, var)| var).collect(), params)?;
        let steps = epochs * (n / size);
        let mut step = 0;
        for epoch in 0..epochs {
            let order = kronwake_cli::data::order(n, Some(seed), epoch);
            for places in order.chunks_exact(size) {
                let batch = examples.select(places)?;
                let loss = more(state, loss::cross_entropy(&self.forward(batch.x())?, batch.y())?)?;
                let phase = std::f64::consts::PI * step as f64 / steps as f64;
                adam.set_learning_rate(0.5 * lr * (1.0 + phase.cos()));
                adam.backward_step(&loss)?;
                step += 1;
                after(state)?;
            }
        }
        Ok(())
    }

    /// The mean negative log-likelihood, and the share of wrong classes.
    pub fn test(&self, examples: &Examples) -> Result<(f64, f64)> {
        let (mut sum, mut wrong) = (0.0, 0.0);
        let places: Vec<usize> = (0..examples.len()).collect();
        for places in places.chunks(1000) {
            let part = examples.select(places)?;
            let z = self.forward(part.x())?;
            sum += f64::from(loss::cross_entropy(&z, part.y())?.to_scalar::<f32>()?) * places.len() as f64;
            let missed = z.argmax(1)?.ne(part.y())?.to_dtype(DType::F64)?;
            wrong += missed.sum_all()?.to_scalar::<f64>()?;
        }
        Ok((sum / examples.len() as f64, wrong / examples.len() as f64))
    }
}

const BATCH: usize = 100;

/// The parameters by name, in its order.
pub fn named(vars: &VarMap) -> Result<Vec<(String, candle_core::Var)>> {
    let Ok(data) = vars.data().lock() else { bail!("the VarMap's lock is poisoned") };
    let mut named: Vec<_> = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(named)
}

/// MNIST's four files.
pub fn images(dir: &Path) -> Result<Data> {
    Data::from_dir(dir, Name::Mnist)
}

/// Some of a set's images.
pub fn examples(data: &Data, part: &Part, places: &[usize]) -> Result<Examples> {
    let (x, y) = data.batch(part, places, DType::F32, &Device::Cpu)?;
    Examples::new(x, y)
}

/// Random numbers in the shape of images.
pub fn random(count: usize) -> Result<Examples> {
    let stream = Stream::new(0, "images", 0);
    let values = (0..count * 784).map(|i| (3.0 * stream.uniform(i) - 1.0) as f32);
    let x = Tensor::from_iter(values, &Device::Cpu)?.reshape((count, 1, 28, 28))?;
    let labels = (0..count).map(|i| (i % 10) as u32);
    Examples::new(x, Tensor::from_iter(labels, &Device::Cpu)?)
}
