//! The same function without dead units and inputs.

use crate::nn::{Conv2d, Conv2dConfig, Linear, Module};
use candle_core::{DType, Device, Result, Tensor, bail};

/// A part of a stack of layers.
#[derive(Debug, Clone)]
pub enum Stage {
    /// A linear layer on `[n, in]`.
    Linear(Weights),
    /// A convolution in one group on `[n, in, h, w]`.
    Conv(Weights, Conv2dConfig),
    /// A function of each element, as ReLU.
    Map(fn(&Tensor) -> Result<Tensor>),
    /// The largest of windows (height, width), a stride (vertical, horizontal) apart.
    MaxPool((usize, usize), (usize, usize)),
    /// `[n, c, h, w]` to `[n, c h w]`.
    Flatten,
}

/// A layer's parameters.
#[derive(Debug, Clone)]
pub struct Weights {
    /// In messages and files: `name.weight`, `name.bias`.
    pub name: String,
    /// `[out, in]` or `[out, in, kh, kw]`.
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Stage {
    /// The stage's outputs for `x`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear(w) => Linear::new(w.weight.clone(), w.bias.clone()).forward(x),
            Self::Conv(w, config) => Conv2d::new(w.weight.clone(), w.bias.clone(), *config).forward(x),
            Self::Map(f) => f(x),
            Self::MaxPool(kernel, stride) => crate::ops::pool::max_pool2d(x, *kernel, *stride),
            Self::Flatten => x.flatten_from(1),
        }
    }
}

/// What [`compact`] leaves.
#[derive(Debug, Clone)]
pub struct Compacted {
    /// The stages in the same order, with the names they had.
    pub stages: Vec<Stage>,
    /// The inputs that are read, increasing: features, or channels before a convolution. The first layer expects these alone.
    pub inputs: Vec<usize>,
    /// Of each layer with weights, in order, the units that are left, increasing.
    pub units: Vec<Vec<usize>>,
}

impl Compacted {
    /// Outputs for `x` `[n, in, ..]` with all inputs, of which the live ones are picked before the first layer.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inputs: Vec<u32> = self.inputs.iter().map(|&i| i as u32).collect();
        let inputs = Tensor::from_vec(inputs, self.inputs.len(), x.device())?;
        let weighted = |stage: &Stage| matches!(stage, Stage::Linear(_) | Stage::Conv(..));
        let first = self.stages.iter().position(weighted).unwrap_or(self.stages.len());
        let (before, rest) = self.stages.split_at(first);
        let run = |x: Tensor, stages: &[Stage]| stages.iter().try_fold(x, |x, stage| stage.forward(&x));
        run(run(x.clone(), before)?.index_select(&inputs, 1)?, rest)
    }
}

/// Removes the hidden units, channels and inputs without which `stages` are the same function, to rounding:
///
/// * a unit whose incoming weights are all zero is constant; what it adds to the next layer goes to the bias there (which a layer without one
///   gets). Before a convolution with padding this is done only where the constant is zero, since it does not reach into the padding;
/// * a unit whose outgoing weights are all zero;
/// * an input whose outgoing weights are all zero.
///
/// Removals are followed through all layers. The outputs stay; every layer keeps at least one unit, and the first one input.
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
/// # Errors
/// If there is no layer with weights, or layers do not fit each other; the message names the layer.
pub fn compact(stages: &[Stage]) -> Result<Compacted> {
    let mut layers = layers(stages)?;
    for at in 1..layers.len() {
        fold_constants(stages, &mut layers, at)?;
    }
    // From the end: a unit that goes takes the reads of the units before it along.
    for at in (1..layers.len()).rev() {
        let read = layers[at].columns_read()?;
        let keep =
            at_least_one(layers[at - 1].live.iter().zip(&read).map(|(live, read)| *live && *read).collect());
        layers[at - 1].live = keep.clone();
        layers[at - 1].clear_rows()?;
        layers[at].inputs = keep;
    }
    let read = at_least_one(layers[0].columns_read()?);
    layers[0].inputs = read;
    let inputs = places(&layers[0].inputs);
    let units = layers.iter().map(|layer| places(&layer.live)).collect();
    let mut shrunk = layers.iter().map(Layer::shrunk);
    let mut next = || shrunk.next().unwrap_or_else(|| bail!("compact: fewer layers than stages"));
    let stages = stages.iter().map(|stage| {
        Ok(match stage {
            Stage::Linear(_) => Stage::Linear(next()?),
            Stage::Conv(_, config) => Stage::Conv(next()?, *config),
            other => other.clone(),
        })
    });
    Ok(Compacted { stages: stages.collect::<Result<_>>()?, inputs, units })
}

/// A layer as `[out, in * run]`, where a `run` of columns belongs to one unit of the layer before.
struct Layer {
    stage: usize,
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    out: usize,
    run: usize,
    inputs: Vec<bool>,
    live: Vec<bool>,
    padding: usize,
    /// Of a convolution.
    kernel: Vec<usize>,
    dtype: DType,
    device: Device,
}

fn layers(stages: &[Stage]) -> Result<Vec<Layer>> {
    let mut layers: Vec<Layer> = vec![];
    let mut flat = false;
    for (stage, what) in stages.iter().enumerate() {
        let (weights, config) = match what {
            Stage::Linear(weights) => (weights, None),
            Stage::Conv(weights, config) => (weights, Some(config)),
            Stage::Flatten => {
                flat = true;
                continue;
            }
            Stage::Map(_) | Stage::MaxPool(..) => continue,
        };
        let name = weights.name.clone();
        let dims = weights.weight.dims().to_vec();
        let rank = if config.is_some() { 4 } else { 2 };
        if dims.len() != rank || weights.weight.elem_count() == 0 || config.is_some_and(|c| c.groups != 1) {
            bail!("compact: layer {name}: expected {rank} dimensions, none empty, in one group, got {dims:?}")
        }
        if let Some(bias) = weights.bias.as_ref().filter(|bias| bias.dims() != [dims[0]]) {
            bail!("compact: layer {name}: expected a bias [{}], got {:?}", dims[0], bias.dims())
        }
        let kernel = dims[2..].to_vec();
        let (mut columns, mut run) = (dims[1], kernel.iter().product());
        if let Some(before) = layers.last() {
            let of_conv = !before.kernel.is_empty();
            // Only after a convolution are there pixels to flatten.
            let pixels = of_conv && flat && config.is_none();
            let fits = if pixels { columns % before.out == 0 } else { columns == before.out };
            if !fits || (of_conv && config.is_none() && !flat) || (!of_conv && config.is_some()) {
                bail!(
                    "compact: layer {name} {dims:?} does not follow layer {} of {} units",
                    before.name,
                    before.out
                )
            }
            if pixels {
                run = columns / before.out;
                columns = before.out;
            }
        }
        flat = false;
        layers.push(Layer {
            stage,
            name,
            weight: host(&weights.weight)?.reshape((dims[0], columns, run))?,
            bias: weights.bias.as_ref().map(host).transpose()?,
            out: dims[0],
            run,
            inputs: vec![true; columns],
            live: vec![true; dims[0]],
            padding: config.map_or(0, |c| c.padding),
            kernel,
            dtype: weights.weight.dtype(),
            device: weights.weight.device().clone(),
        });
    }
    if layers.is_empty() {
        bail!("compact: expected at least one layer with weights")
    }
    Ok(layers)
}

/// Moves what the constant units of layer `at - 1` add to layer `at` to the bias there.
fn fold_constants(stages: &[Stage], layers: &mut [Layer], at: usize) -> Result<()> {
    let (before, rest) = layers.split_at_mut(at);
    let (Some(before), Some(layer)) = (before.last_mut(), rest.first_mut()) else { return Ok(()) };
    let zeros = Tensor::zeros(before.out, DType::F64, &Device::Cpu)?;
    let mut constant = before.bias.clone().unwrap_or(zeros).to_dtype(before.dtype)?;
    for stage in &stages[before.stage + 1..layer.stage] {
        if let Stage::Map(f) = stage {
            constant = f(&constant)?;
        }
    }
    let constant: Vec<f64> = host(&constant)?.to_vec1()?;
    let reads = before.rows_read()?;
    let mut columns = layer.weight.to_vec3::<f64>()?;
    let mut bias = match &layer.bias {
        Some(bias) => bias.to_vec1::<f64>()?,
        None => vec![0.0; layer.out],
    };
    let mut folded = false;
    for (unit, value) in constant.iter().enumerate().filter(|(unit, _)| !reads[*unit]) {
        if *value != 0.0 && layer.padding > 0 {
            continue;
        }
        for (row, bias) in columns.iter_mut().zip(&mut bias) {
            let sum: f64 = row[unit].iter().sum();
            // Not 0 times an infinite constant.
            if sum != 0.0 {
                *bias += sum * value;
                folded |= *value != 0.0;
            }
            row[unit].fill(0.0);
        }
    }
    layer.weight = Tensor::new(columns, &Device::Cpu)?;
    if folded || layer.bias.is_some() {
        layer.bias = Some(Tensor::new(bias, &Device::Cpu)?);
    }
    Ok(())
}

impl Layer {
    /// Whether units of the layer before are read.
    fn columns_read(&self) -> Result<Vec<bool>> {
        let any = self.weight.ne(0f64)?.max(2)?.max(0)?.to_vec1::<u8>()?;
        Ok(any.iter().map(|&any| any != 0).collect())
    }

    /// Whether units read anything.
    fn rows_read(&self) -> Result<Vec<bool>> {
        let any = self.weight.ne(0f64)?.max(2)?.max(1)?.to_vec1::<u8>()?;
        Ok(any.iter().map(|&any| any != 0).collect())
    }

    /// Zeros the weights of units that go.
    fn clear_rows(&mut self) -> Result<()> {
        let keep: Vec<f64> = self.live.iter().map(|&live| f64::from(u8::from(live))).collect();
        self.weight =
            self.weight.broadcast_mul(&Tensor::new(keep, &Device::Cpu)?.reshape((self.out, 1, 1))?)?;
        Ok(())
    }

    fn shrunk(&self) -> Result<Weights> {
        let pick = |live: &[bool]| {
            let places: Vec<u32> = places(live).into_iter().map(|i| i as u32).collect();
            Tensor::new(places, &Device::Cpu)
        };
        let (rows, columns) = (pick(&self.live)?, pick(&self.inputs)?);
        let weight = self.weight.index_select(&rows, 0)?.index_select(&columns, 1)?.contiguous()?;
        let mut dims = vec![rows.elem_count(), columns.elem_count()];
        match self.kernel.is_empty() {
            true => dims[1] *= self.run,
            false => dims.extend(&self.kernel),
        }
        let back = |t: Tensor| t.to_dtype(self.dtype)?.to_device(&self.device);
        let bias = self.bias.as_ref().map(|bias| back(bias.index_select(&rows, 0)?)).transpose()?;
        Ok(Weights { name: self.name.clone(), weight: back(weight.reshape(dims)?)?, bias })
    }
}

/// Where the list is true.
fn places(list: &[bool]) -> Vec<usize> {
    (0..list.len()).filter(|&i| list[i]).collect()
}

/// Tensors without elements are of little use.
fn at_least_one(mut list: Vec<bool>) -> Vec<bool> {
    let any = list.contains(&true);
    if let Some(first) = list.first_mut() {
        *first |= !any;
    }
    list
}

fn host(t: &Tensor) -> Result<Tensor> {
    t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)
}

#[cfg(test)]
mod tests;
