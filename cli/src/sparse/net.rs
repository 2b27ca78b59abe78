//! LeNet-300-100, and the smaller nets that pruning makes of it.

use super::penalty::Penalized;
use crate::data::{self, Data, Part, order};
use crate::measure;
use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::curvature::{Collect, Factors, Sharing};
use kronwake::nn::{self, Dropout, Linear, Module, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::ops::pool::relu;
use kronwake::optim::{AdamW, Optimizer, ParamsAdamW, Schedule};
use kronwake::penalty::{Constraints, Rule};
use kronwake::prune::{Compacted, Stage, Weights, compact};
use kronwake::tape::{Fisher, Likelihood, Tape};

const DEVICE: Device = Device::Cpu;
/// Images of a pass for the factors; the result does not depend on it.
const FACTOR_BATCH: usize = 1000;

/// Images `[n, 784]` on the scale 0 to 1, so that the background is no input, and their classes.
#[derive(Clone)]
pub struct Images {
    pub x: Tensor,
    pub y: Tensor,
}

impl Images {
    fn of(data: &Data, part: &Part, places: &[usize]) -> Result<Self> {
        let (x, y) = data.batch(part, places, DType::F32, &DEVICE)?;
        Ok(Self { x: x.flatten_from(1)?.contiguous()?, y })
    }

    pub fn len(&self) -> usize {
        self.y.elem_count()
    }

    /// Some of the images.
    fn at(&self, places: &[usize]) -> Result<Self> {
        let places: Vec<u32> = places.iter().map(|&i| i as u32).collect();
        let places = Tensor::from_vec(places.clone(), places.len(), &DEVICE)?;
        Ok(Self { x: self.x.index_select(&places, 0)?, y: self.y.index_select(&places, 0)? })
    }

    /// Some of the pixels.
    pub fn pixels(&self, inputs: &[usize]) -> Result<Self> {
        if inputs.len() == self.x.dim(1)? {
            return Ok(self.clone());
        }
        let inputs: Vec<u32> = inputs.iter().map(|&i| i as u32).collect();
        let inputs = Tensor::from_vec(inputs.clone(), inputs.len(), &DEVICE)?;
        Ok(Self { x: self.x.index_select(&inputs, 1)?, y: self.y.clone() })
    }
}

/// The images to train with, those by which all is chosen, and those for the end.
pub struct Split {
    pub train: Images,
    pub held: Images,
    pub test: Images,
}

impl Split {
    /// Every sixth training image, of a shuffle that is always the same, is held out.
    pub fn new(mut data: Data) -> Result<Self> {
        data.moments = (0.0, 1.0);
        let (train, held) = data::split(data.train.len());
        Ok(Self {
            train: Images::of(&data, &data.train, &train)?,
            held: Images::of(&data, &data.train, &held)?,
            test: Images::of(&data, &data.test, &order(data.test.len(), None, 0))?,
        })
    }
}

/// Linear layers with ReLU between them, and which of the pixels the first one takes.
pub struct Net {
    pub inputs: Vec<usize>,
    vars: VarMap,
    tape: Tape,
    layers: Vec<Linear>,
}

/// How long and how fast to train.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub epochs: usize,
    /// At first; it falls to zero by half a cosine.
    pub lr: f64,
    pub batch: usize,
    /// Probability with which a pixel is dropped.
    pub dropout: f64,
    pub seed: u64,
}

impl Net {
    fn new(inputs: Vec<usize>, widths: &[usize]) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &DEVICE);
        let layer =
            |(i, pair): (usize, &[usize])| nn::linear(pair[0], pair[1], vb.pp(format!("fc{}", i + 1)));
        let layers = tape.build(|| widths.windows(2).enumerate().map(layer).collect())?;
        Ok(Self { inputs, vars, tape, layers })
    }

    /// 784-300-100-10 with random weights.
    pub fn random(seed: u64) -> Result<Self> {
        let net = Self::new((0..784).collect(), &[784, 300, 100, 10])?;
        init::seeded_uniform(&init::named(&net.vars)?, seed)?;
        Ok(net)
    }

    pub fn of(weights: &[Weights], inputs: &[usize]) -> Result<Self> {
        let mut widths = vec![inputs.len()];
        for layer in weights {
            widths.push(layer.weight.dim(0)?);
        }
        let net = Self::new(inputs.to_vec(), &widths)?;
        for (layer, weights) in net.layers.iter().zip(weights) {
            net.set(layer.weight(), &weights.weight)?;
            if let (Some(var), Some(bias)) = (layer.bias(), &weights.bias) {
                net.set(var, bias)?;
            }
        }
        Ok(net)
    }

    fn set(&self, tensor: &Tensor, value: &Tensor) -> Result<()> {
        match init::named(&self.vars)?.into_iter().find(|(_, var)| var.id() == tensor.id()) {
            Some((_, var)) => var.set(&value.copy()?),
            None => bail!("a layer's parameter {:?} is not in the table", tensor.dims()),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (at, layer) in self.layers.iter().enumerate() {
            if at > 0 {
                x = relu(&x)?;
            }
            x = layer.forward(&x)?;
        }
        Ok(x)
    }

    /// Copies of the layers' parameters.
    pub fn weights(&self) -> Result<Vec<Weights>> {
        let one = |(i, layer): (usize, &Linear)| {
            Ok(Weights {
                name: format!("fc{}", i + 1),
                weight: layer.weight().detach().copy()?,
                bias: layer.bias().map(|bias| bias.detach().copy()).transpose()?,
            })
        };
        self.layers.iter().enumerate().map(one).collect()
    }

    /// The same net without dead units and pixels.
    pub fn compacted(&self) -> Result<Self> {
        let Compacted { stages, inputs, .. } = compact(&stages(self.weights()?))?;
        let inputs: Vec<usize> = inputs.into_iter().map(|i| self.inputs[i]).collect();
        let weights = stages.into_iter().filter_map(|stage| match stage {
            Stage::Linear(weights) => Some(weights),
            _ => None,
        });
        Self::of(&weights.collect::<Vec<_>>(), &inputs)
    }

    /// Widths of the layers, from the pixels to the classes.
    pub fn widths(&self) -> Result<Vec<usize>> {
        let outputs = self.layers.iter().map(|layer| layer.weight().dim(0));
        std::iter::once(Ok(self.inputs.len())).chain(outputs).collect()
    }

    /// Parameters that are not zero, biases among them.
    pub fn nonzeros(&self) -> Result<usize> {
        let one = |(_, var): (_, candle_core::Var)| {
            var.ne(0f32)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()
        };
        let counts = init::named(&self.vars)?.into_iter().map(one);
        counts.map(|count| count.map(|count| count as usize)).sum()
    }

    /// The share of `images`, of all pixels, whose largest logit is their class's.
    pub fn accuracy(&self, images: &Images) -> Result<f64> {
        let images = images.pixels(&self.inputs)?;
        let found = measure::evaluate(&order(images.len(), None, 0), |places| {
            let (from, count) = (places[0], places.len());
            Ok((self.forward(&images.x.narrow(0, from, count)?)?, images.y.narrow(0, from, count)?))
        });
        Ok(found?.1)
    }

    /// Kronecker factors over the first 10,000 of `images`.
    pub fn factors(&self, images: &Images) -> Result<Vec<Factors>> {
        let images = images.pixels(&self.inputs)?;
        let mut collect = Collect::new(&self.tape, Likelihood::Categorical, Fisher::Exact, Sharing::Expand)?;
        let all = images.len().min(10_000);
        for from in (0..all).step_by(FACTOR_BATCH) {
            let count = FACTOR_BATCH.min(all - from);
            collect.add(&self.forward(&images.x.narrow(0, from, count)?)?, None)?;
        }
        collect.finish()
    }

    /// Trains with a penalty, by Adam.
    ///
    /// Weights that are zero stay zero if they are masked.
    pub fn train(&self, images: &Images, pace: Pace, penalty: Penalized, masked: bool) -> Result<()> {
        let Penalized { choice, factor } = penalty;
        let names: Vec<String> = (1..=self.layers.len()).map(|i| format!("fc{i}.weight")).collect();
        let mut rules = vec![("*", Rule::Free)];
        rules.extend(choice.rules(factor)?);
        if masked {
            for (name, layer) in names.iter().zip(&self.layers) {
                rules.push((name, Rule::Mask { mask: layer.weight().detach().ne(0f32)? }));
            }
        }
        let mut constraints = Constraints::new(&self.vars, &rules)?;
        let images = images.pixels(&self.inputs)?;
        let mut adam =
            AdamW::from_varmap(&self.vars, ParamsAdamW { weight_decay: 0.0, ..Default::default() })?;
        let steps = pace.epochs * images.len().div_ceil(pace.batch);
        let schedule = Schedule::cosine(pace.lr, steps + 1, 0, 0.0)?;
        let dropout = Dropout::seeded(pace.dropout as f32, pace.seed)?;
        let mut step = 0;
        for epoch in 0..pace.epochs {
            for places in order(images.len(), Some(pace.seed), epoch).chunks(pace.batch) {
                let batch = images.at(places)?;
                dropout.set_step(step as u64);
                let x = dropout.forward(&batch.x, pace.dropout > 0.0)?;
                let loss = cross_entropy(&self.forward(&x)?, &batch.y)?;
                let mut grads = loss.backward()?;
                let loss = (loss.detach() + constraints.add_gradients(&mut grads)?)?;
                if !loss.to_scalar::<f32>()?.is_finite() {
                    bail!("the loss is not finite in epoch {}; lower the rate or --factor", epoch + 1)
                }
                adam.set_learning_rate(schedule.at(step));
                adam.step(&grads)?;
                constraints.after_step(schedule.at(step))?;
                step += 1;
            }
        }
        Ok(())
    }
}

/// The layers with ReLU between them.
pub fn stages(weights: Vec<Weights>) -> Vec<Stage> {
    let last = weights.len();
    let mut stages = vec![];
    for (at, weights) in weights.into_iter().enumerate() {
        stages.push(Stage::Linear(weights));
        if at + 1 < last {
            stages.push(Stage::Map(relu));
        }
    }
    stages
}
