//! The same function without dead units, channels and inputs.

mod fold;
mod graph;
mod layer;
mod plan;
mod shrink;

use crate::checkpoint::Checkpoint;
use crate::nn::{BatchNorm, Conv2d, Conv2dConfig, Linear, Module, ModuleT};
use candle_core::{DType, Device, Result, Tensor, bail};

pub use fold::fold_norms;

/// A part of a net: a list of stages is one after the other.
#[derive(Debug, Clone)]
pub enum Stage {
    /// A linear layer on `[n, in]`.
    Linear(Weights),
    /// A convolution on `[n, in, h, w]`, in groups too (as many as channels in a depthwise one).
    Conv(Weights, Conv2dConfig),
    /// A BatchNorm layer as it acts outside of training, on `[n, c]` or `[n, c, h, w]`.
    BatchNorm(Norm),
    /// A function of each element, as ReLU.
    Map(fn(&Tensor) -> Result<Tensor>),
    /// The largest of windows (height, width), a stride (vertical, horizontal) apart.
    MaxPool((usize, usize), (usize, usize)),
    /// The mean of windows (height, width), a stride (vertical, horizontal) apart.
    AvgPool((usize, usize), (usize, usize)),
    /// The mean of each channel, `[n, c, h, w]` to `[n, c]`.
    GlobalAvgPool,
    /// `[n, c, h, w]` to `[n, c h w]`.
    Flatten,
    /// The sum of two lists of stages on the same inputs; a list without stages hands them on.
    Residual {
        /// The layers of the block.
        body: Vec<Stage>,
        /// What goes around them: nothing, or a projection to as many channels.
        shortcut: Vec<Stage>,
    },
}

/// A layer's parameters.
#[derive(Debug, Clone)]
pub struct Weights {
    /// In messages and files: `name.weight`, `name.bias`.
    pub name: String,
    /// `[out, in]` or `[out, in / groups, kh, kw]`.
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

/// A BatchNorm layer's parameters and statistics, `[c]` each: `(x - running_mean) / sqrt(running_var + eps) weight + bias`.
#[derive(Debug, Clone)]
pub struct Norm {
    /// In messages and files: `name.weight`, `name.bias`, `name.running_mean`, `name.running_var`.
    pub name: String,
    /// Factors and offsets, if it has them.
    pub affine: Option<(Tensor, Tensor)>,
    /// The mean of each channel.
    pub running_mean: Tensor,
    /// The variance of each channel.
    pub running_var: Tensor,
    /// Added to the variances.
    pub eps: f64,
}

impl Weights {
    /// The parameters `name.weight` and, if there is one, `name.bias` of a checkpoint.
    ///
    /// # Errors
    /// When there is no `name.weight`.
    pub fn of(file: &Checkpoint, name: &str) -> Result<Self> {
        let bias = file.get(&format!("{name}.bias")).cloned();
        Ok(Self { name: name.into(), weight: needed(file, name, "weight")?, bias })
    }
}

impl Norm {
    /// The BatchNorm layer `name` of a checkpoint; without `name.weight` and `name.bias` if it has none.
    ///
    /// # Errors
    /// When `name.running_mean` or `name.running_var` is missing, or one of `name.weight` and `name.bias`.
    pub fn of(file: &Checkpoint, name: &str, eps: f64) -> Result<Self> {
        let affine = ["weight", "bias"].iter().any(|part| file.get(&format!("{name}.{part}")).is_some());
        let affine = match affine {
            true => Some((needed(file, name, "weight")?, needed(file, name, "bias")?)),
            false => None,
        };
        let [running_mean, running_var] =
            [needed(file, name, "running_mean")?, needed(file, name, "running_var")?];
        Ok(Self { name: name.into(), affine, running_mean, running_var, eps })
    }
}

impl Norm {
    /// Factors, offsets, means and variances on the host.
    fn parts(&self) -> Result<[Vec<f64>; 4]> {
        let (mean, var) = (host(&self.running_mean)?, host(&self.running_var)?);
        if let Some(wrong) = var.iter().find(|var| **var + self.eps <= 0. || var.is_nan()) {
            bail!(
                "compact: BatchNorm {}: running_var holds {wrong}, expected more than {}",
                self.name,
                -self.eps
            )
        }
        let (weight, bias) = match &self.affine {
            Some((weight, bias)) => (host(weight)?, host(bias)?),
            None => (vec![1.; mean.len()], vec![0.; mean.len()]),
        };
        if [&weight, &bias, &var].iter().any(|part| part.len() != mean.len()) {
            bail!("compact: BatchNorm {}: expected all parts of [{}]", self.name, mean.len())
        }
        Ok([weight, bias, mean, var])
    }
}

fn needed(file: &Checkpoint, name: &str, part: &str) -> Result<Tensor> {
    match file.get(&format!("{name}.{part}")) {
        Some(tensor) => Ok(tensor.clone()),
        None => bail!("compact: the checkpoint has no {name}.{part}"),
    }
}

impl Stage {
    /// [`Stage::Linear`] with `name.weight` and `name.bias` of a checkpoint.
    ///
    /// # Errors
    /// As [`Weights::of`].
    pub fn linear(file: &Checkpoint, name: &str) -> Result<Self> {
        Ok(Self::Linear(Weights::of(file, name)?))
    }

    /// [`Stage::Conv`] with `name.weight` and `name.bias` of a checkpoint.
    ///
    /// # Errors
    /// As [`Weights::of`].
    pub fn conv2d(file: &Checkpoint, name: &str, config: Conv2dConfig) -> Result<Self> {
        Ok(Self::Conv(Weights::of(file, name)?, config))
    }

    /// [`Stage::BatchNorm`] with the layer `name` of a checkpoint.
    ///
    /// # Errors
    /// As [`Norm::of`].
    pub fn batch_norm(file: &Checkpoint, name: &str, eps: f64) -> Result<Self> {
        Ok(Self::BatchNorm(Norm::of(file, name, eps)?))
    }

    /// The stage's outputs for `x`.
    ///
    /// # Errors
    /// When `x` is not of the shape that the stage takes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear(w) => Linear::new(w.weight.clone(), w.bias.clone()).forward(x),
            Self::Conv(w, config) => Conv2d::new(w.weight.clone(), w.bias.clone(), *config).forward(x),
            Self::BatchNorm(n) => {
                let (count, mean, var) =
                    (n.running_mean.elem_count(), n.running_mean.clone(), n.running_var.clone());
                let layer = match n.affine.clone() {
                    Some((weight, bias)) => BatchNorm::new(count, mean, var, weight, bias, n.eps)?,
                    None => BatchNorm::new_no_bias(count, mean, var, n.eps)?,
                };
                layer.forward_t(x, false)
            }
            Self::Map(f) => f(x),
            Self::MaxPool(kernel, stride) => crate::ops::pool::max_pool2d(x, *kernel, *stride),
            Self::AvgPool(kernel, stride) => x.avg_pool2d_with_stride(*kernel, *stride),
            Self::GlobalAvgPool => x.mean((2, 3)),
            Self::Flatten => x.flatten_from(1),
            Self::Residual { body, shortcut } => run(body, x)? + run(shortcut, x)?,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Linear(_) => "Linear",
            Self::Conv(..) => "Conv",
            Self::BatchNorm(_) => "BatchNorm",
            Self::Map(_) => "Map",
            Self::MaxPool(..) => "MaxPool",
            Self::AvgPool(..) => "AvgPool",
            Self::GlobalAvgPool => "GlobalAvgPool",
            Self::Flatten => "Flatten",
            Self::Residual { .. } => "Residual",
        }
    }

    /// Whether it has channels of its own: the inputs are picked before the first such stage.
    fn has_channels(&self) -> bool {
        matches!(self, Self::Linear(_) | Self::Conv(..) | Self::BatchNorm(_) | Self::Residual { .. })
    }
}

fn run(stages: &[Stage], x: &Tensor) -> Result<Tensor> {
    stages.iter().try_fold(x.clone(), |x, stage| stage.forward(&x))
}

/// What [`compact`] leaves.
#[derive(Debug, Clone)]
pub struct Compacted {
    /// The stages in the same order, with the names they had.
    pub stages: Vec<Stage>,
    /// The inputs that are read, increasing: features, or channels before a convolution. The first layer expects these alone.
    pub inputs: Vec<usize>,
    /// Of each linear or convolutional layer, in order (of a [`Stage::Residual`] the body first), the units that are left, increasing.
    pub units: Vec<Vec<usize>>,
}

impl Compacted {
    /// Outputs for `x` `[n, in, ..]` with all inputs, of which the live ones are picked before the first layer.
    ///
    /// # Errors
    /// When `x` is not of the shape that the first stage takes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inputs: Vec<u32> = self.inputs.iter().map(|&i| i as u32).collect();
        let inputs = Tensor::from_vec(inputs, self.inputs.len(), x.device())?;
        let first = self.stages.iter().position(Stage::has_channels).unwrap_or(self.stages.len());
        let (before, rest) = self.stages.split_at(first);
        run(rest, &run(before, x)?.index_select(&inputs, 1)?)
    }

    /// Parameters and statistics under the names they had, for a model of these sizes.
    ///
    /// # Errors
    /// When two layers have the same name.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let mut file = Checkpoint::default();
        collect(&self.stages, &mut file)?;
        Ok(file)
    }
}

fn collect(stages: &[Stage], file: &mut Checkpoint) -> Result<()> {
    for stage in stages {
        let (name, tensors) = match stage {
            Stage::Linear(w) | Stage::Conv(w, _) => {
                (&w.name, vec![("weight", Some(&w.weight)), ("bias", w.bias.as_ref())])
            }
            Stage::BatchNorm(n) => {
                let (weight, bias) = n.affine.as_ref().map(|(weight, bias)| (weight, bias)).unzip();
                let statistics =
                    [("running_mean", Some(&n.running_mean)), ("running_var", Some(&n.running_var))];
                (&n.name, [[("weight", weight), ("bias", bias)], statistics].concat())
            }
            Stage::Residual { body, shortcut } => {
                collect(body, file)?;
                collect(shortcut, file)?;
                continue;
            }
            _ => continue,
        };
        for (part, tensor) in tensors {
            let full = format!("{name}.{part}");
            if let Some(tensor) = tensor
                && file.tensors.insert(full.clone(), tensor.clone()).is_some()
            {
                bail!("compact: two layers have a {full}; give them names that differ")
            }
        }
    }
    Ok(())
}

/// Removes the hidden units, channels and inputs without which `stages` are the same function, to rounding:
///
/// * a unit whose incoming weights are all zero, or whose factor in a [`Stage::BatchNorm`] is, is constant; what it adds to the next layer goes
///   to the bias there, or where there is none to the running mean of the BatchNorm behind it (a layer with neither gets a bias). Before a
///   convolution with padding this is done only where the constant is zero, since it does not reach into the padding;
/// * a unit whose outgoing weights are all zero;
/// * an input whose outgoing weights are all zero.
///
/// Removals are followed through all layers. Channels that are added up in a [`Stage::Residual`] go together: where no layer reads any of
/// them. A depthwise convolution loses the channels that its inputs lose; one in groups loses whole groups, and of each group as many channels as
/// of the group with the most live ones. The outputs stay; every layer keeps at least one unit, and the first one input.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::prune::{Stage, Weights, compact};
///
/// let layer = |name: &str, weight: &[[f64; 3]], bias: &[f64]| -> candle_core::Result<Stage> {
///     let weight = Tensor::from_vec(weight.concat(), (weight.len(), 3), &Device::Cpu)?;
///     Ok(Stage::Linear(Weights { name: name.into(), weight, bias: Some(Tensor::new(bias, &Device::Cpu)?) }))
/// };
/// // The second hidden unit is always 2, the third is not read, and so the third input is not either.
/// let stages = [
///     layer("fc1", &[[1., -1., 0.], [0., 0., 0.], [0., 0., 4.]], &[0., 2., 0.])?,
///     Stage::Map(|x| x.relu()),
///     layer("fc2", &[[3., 5., 0.]], &[1.])?,
/// ];
/// let small = compact(&stages)?;
/// assert_eq!((small.inputs.as_slice(), small.units.as_slice()), (&[0, 1][..], &[vec![0], vec![0]][..]));
/// let x = Tensor::new(&[[4f64, 1., 7.]], &Device::Cpu)?;
/// assert_eq!(small.forward(&x)?.to_vec2::<f64>()?, [[3. * 3. + 5. * 2. + 1.]]);
/// # candle_core::Result::Ok(())
/// ```
///
/// A residual net is stated by the names of its layers:
///
/// ```
/// use candle_core::{DType, Device, Result};
/// use kronwake::checkpoint::Checkpoint;
/// use kronwake::nn::{self, Conv2dConfig, VarBuilder, VarMap};
/// use kronwake::prune::{Stage, compact};
///
/// # let vars = VarMap::new();
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = Conv2dConfig { padding: 1, ..Default::default() };
/// # nn::conv2d_no_bias(3, 8, 3, config, vb.pp("stem"))?;
/// # nn::batch_norm(8, 1e-5, vb.pp("bn"))?;
/// # nn::conv2d_no_bias(8, 4, 3, config, vb.pp("block.conv1"))?;
/// # nn::batch_norm(4, 1e-5, vb.pp("block.bn1"))?;
/// # nn::conv2d_no_bias(4, 8, 3, config, vb.pp("block.conv2"))?;
/// # nn::batch_norm(8, 1e-5, vb.pp("block.bn2"))?;
/// # nn::linear(8, 10, vb.pp("fc"))?;
/// let file = Checkpoint::from_varmap(&vars)?;
/// let conv = |name| Stage::conv2d(&file, name, config);
/// let norm = |name| Stage::batch_norm(&file, name, 1e-5);
/// let relu = || Stage::Map(|x| x.relu());
/// let block = vec![conv("block.conv1")?, norm("block.bn1")?, relu(), conv("block.conv2")?, norm("block.bn2")?];
/// let small = compact(&[
///     conv("stem")?,
///     norm("bn")?,
///     relu(),
///     Stage::Residual { body: block, shortcut: vec![] },
///     relu(),
///     Stage::GlobalAvgPool,
///     Stage::linear(&file, "fc")?,
/// ])?;
/// let file = small.checkpoint()?; // what a model of the sizes that are left loads
/// assert_eq!(file.tensors["block.conv1.weight"].dims(), [4, 8, 3, 3]); // nothing was zero
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If there is no layer with weights, layers do not fit each other, or a stage is not what it says, as a [`Stage::Map`] of more than single
/// elements; the message names the stage and the layer.
pub fn compact(stages: &[Stage]) -> Result<Compacted> {
    let mut plan = plan::Plan::of(stages)?;
    let keep = graph::keep(&mut plan);
    shrink::shrunk(stages, &plan, &keep)
}

/// Where the list is true.
fn places(list: &[bool]) -> Vec<usize> {
    (0..list.len()).filter(|&i| list[i]).collect()
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    crate::checkpoint::cast(&t.detach(), DType::F64, &Device::Cpu)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests;
