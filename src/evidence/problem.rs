//! What an evidence is asked of: a model with its parameters, a likelihood, and examples.

use super::log_det::sum_of;
use crate::nn::{Module, VarMap, loss};
use crate::tape::{Layer, Likelihood, Tape};
use candle_core::{D, DType, Result, Tensor, bail};
use std::sync::Arc;

/// Examples of one pass where their rows are summed and not kept.
const PASS: usize = 256;

/// Examples in two tensors whose first dimensions are the examples.
#[derive(Debug, Clone)]
pub struct Examples {
    x: Tensor,
    y: Tensor,
}

impl Examples {
    /// Inputs `x` as the model takes them, and labels `y`: class numbers `[n]` or `[n, t]` of an integer type for a categorical
    /// likelihood, targets in the shape of the outputs for the others.
    ///
    /// # Errors
    /// When there are no examples, or not as many of `y` as of `x`.
    pub fn new(x: Tensor, y: Tensor) -> Result<Self> {
        let (n, labels) = (x.dims().first().copied(), y.dims().first().copied());
        if n != labels || n.is_none_or(|n| n == 0) {
            bail!("evidence: expected examples and as many labels, got {:?} and {:?}", x.dims(), y.dims())
        }
        Ok(Self { x: x.detach(), y: y.detach() })
    }

    /// How many there are, at least one.
    pub fn len(&self) -> usize {
        self.x.dims().first().copied().unwrap_or(0)
    }

    /// Never: [`Examples::new`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The inputs.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The labels.
    pub fn y(&self) -> &Tensor {
        &self.y
    }

    /// Those of the given numbers, in this order.
    ///
    /// # Errors
    /// When a number is out of range.
    pub fn select(&self, numbers: &[usize]) -> Result<Self> {
        if let Some(wrong) = numbers.iter().find(|&&i| i >= self.len()) {
            bail!("evidence: example {wrong} of {}", self.len())
        }
        let numbers: Vec<u32> = numbers.iter().map(|&i| i as u32).collect();
        let of = |t: &Tensor| t.index_select(&Tensor::new(numbers.as_slice(), t.device())?, 0);
        Self::new(of(&self.x)?, of(&self.y)?)
    }

    /// All of them, so many at a time that what a pass leaves behind fits.
    pub(crate) fn passes(&self) -> impl Iterator<Item = Result<Self>> {
        (0..self.len()).step_by(PASS).map(|from| match PASS.min(self.len() - from) {
            all if all == self.len() => Ok(self.clone()),
            some => Self::new(self.x.narrow(0, from, some)?, self.y.narrow(0, from, some)?),
        })
    }

    /// The class of every example.
    pub(crate) fn classes(&self) -> Result<Vec<u32>> {
        if !self.y.dtype().is_int() || self.y.rank() != 1 {
            bail!(
                "evidence: groups by label need class numbers [n], got {:?} {:?}",
                self.y.dtype(),
                self.y.dims()
            )
        }
        self.y.to_dtype(DType::U32)?.to_vec1()
    }
}

/// One parameter tensor of a model.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in the VarMap.
    pub name: String,
    /// The name of its layer.
    pub layer: String,
    /// Itself.
    pub tensor: Tensor,
    /// The layer's number on the tape.
    pub(crate) of_layer: usize,
    pub(crate) is_bias: bool,
}

/// A model whose layers are on a tape, with a likelihood.
///
/// Everything that is computed of it is a function of its parameters as they are at that moment.
#[derive(Clone)]
pub struct Problem<'a> {
    pub(crate) model: &'a dyn Module,
    pub(crate) tape: Tape,
    pub(crate) likelihood: Likelihood,
    parameters: Arc<Vec<Parameter>>,
}

impl std::fmt::Debug for Problem<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
        f.debug_struct("Problem").field("likelihood", &self.likelihood).field("parameters", &names).finish()
    }
}

impl<'a> Problem<'a> {
    /// `model` must have been built inside `tape`'s [`Tape::build`] from `vars`; its forward maps inputs `[n, ..]` to outputs
    /// `[n, classes]` or `[n, t, classes]`, and must be deterministic. Closures are models.
    ///
    /// # Errors
    /// When the tape is empty, or a Var is the weight or bias of none of its layers: its share in the evidence is not known. The
    /// message names all such Vars.
    pub fn new(tape: &Tape, vars: &VarMap, model: &'a dyn Module, likelihood: Likelihood) -> Result<Self> {
        let layers = tape.layers();
        if layers.is_empty() {
            bail!(
                "evidence: no layers on the tape; build the model inside Tape::build from kronwake::nn layers"
            )
        }
        let Ok(data) = vars.data().lock() else { bail!("evidence: the VarMap's lock is poisoned") };
        let mut named: Vec<_> =
            data.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        drop(data);
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut parameters = Vec::new();
        for layer in &layers {
            let pair = [Some((&layer.weight, false)), layer.bias.as_ref().map(|b| (b, true))];
            for (tensor, is_bias) in pair.into_iter().flatten() {
                if let Some(other) = parameters.iter().find(|p: &&Parameter| p.tensor.id() == tensor.id()) {
                    bail!(
                        "evidence: {} is the weight of two layers of different kinds, {} and {}: its share cannot be counted",
                        other.name,
                        other.layer,
                        layer.name
                    )
                }
                let Some((name, _)) = named.iter().find(|(_, var)| var.id() == tensor.id()) else {
                    let kind = if is_bias { "bias" } else { "weight" };
                    bail!("evidence: the {kind} of layer {} is not in the VarMap", layer.name)
                };
                parameters.push(Parameter {
                    name: name.clone(),
                    layer: layer.name.clone(),
                    tensor: tensor.clone(),
                    of_layer: layer.index,
                    is_bias,
                });
            }
        }
        let known = |name: &String| parameters.iter().any(|p| &p.name == name);
        let unknown: Vec<_> =
            named.iter().map(|(name, _)| name).filter(|name| !known(name)).cloned().collect();
        if !unknown.is_empty() {
            bail!(
                "evidence: {} {} no weight or bias of a layer on the tape, whose share could be counted; build the model from \
                 kronwake::nn layers inside Tape::build",
                unknown.join(", "),
                if unknown.len() == 1 { "is" } else { "are" }
            )
        }
        Ok(Self { model, tape: tape.clone(), likelihood, parameters: Arc::new(parameters) })
    }

    /// The parameter tensors: layer by layer in the order of construction, weight before bias. Precisions, gradients and effective
    /// numbers of parameters come in this order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The likelihood.
    pub fn likelihood(&self) -> Likelihood {
        self.likelihood
    }

    pub(crate) fn shared_parameters(&self) -> Arc<Vec<Parameter>> {
        self.parameters.clone()
    }

    /// Which tensors a layer's weight and bias are.
    pub(crate) fn tensors_of(&self, layer: &Layer) -> (Option<usize>, Option<usize>) {
        let find =
            |is_bias| self.parameters.iter().position(|p| p.of_layer == layer.index && p.is_bias == is_bias);
        (find(false), find(true))
    }

    /// The outputs for some examples.
    ///
    /// # Errors
    /// As the model's forward, and when the outputs are not finite or have another batch.
    pub(crate) fn outputs(&self, examples: &Examples) -> Result<Tensor> {
        let outputs = self.model.forward(&examples.x)?;
        if outputs.dims().first() != Some(&examples.len()) || outputs.rank() < 2 {
            bail!(
                "evidence: expected outputs [{}, .., classes] for inputs {:?}, got {:?}",
                examples.len(),
                examples.x.dims(),
                outputs.dims()
            )
        }
        let sum = sum_of(&outputs.detach().abs()?)?;
        if !sum.is_finite() {
            bail!("evidence: the outputs are not finite: look for NaN in the parameters or the inputs")
        }
        Ok(outputs)
    }

    /// The fit of outputs to labels.
    pub(crate) fn fit(&self, outputs: &Tensor, examples: &Examples) -> Result<DataFit> {
        let outputs = outputs.detach().to_dtype(DType::F64)?;
        let classes = outputs.dim(D::Minus1)?;
        let terms = self.likelihood.terms(&outputs)?;
        let y = examples.y.to_device(outputs.device())?;
        let loss = match self.likelihood {
            Likelihood::Categorical => {
                if y.elem_count() != terms || !y.dtype().is_int() {
                    bail!(
                        "evidence: expected {terms} class numbers for outputs {:?}, got {:?} {:?}",
                        outputs.dims(),
                        y.dtype(),
                        y.dims()
                    )
                }
                let y = y.flatten_all()?.to_dtype(DType::I64)?;
                let (least, most) = (y.min(0)?.to_scalar::<i64>()?, y.max(0)?.to_scalar::<i64>()?);
                if least < 0 || most >= classes as i64 {
                    let wrong = if least < 0 { least } else { most };
                    bail!("evidence: label {wrong} is out of range for {classes} classes")
                }
                let mean =
                    loss::cross_entropy(&outputs.reshape((terms, classes))?, &y.to_dtype(DType::U32)?)?;
                mean.to_scalar::<f64>()? * terms as f64
            }
            _ if y.dims() != outputs.dims() => {
                bail!("evidence: expected targets of shape {:?}, got {:?}", outputs.dims(), y.dims())
            }
            // ln(1 + e^z) - y z, in the form that does not overflow.
            Likelihood::Bernoulli => {
                let y = y.to_dtype(DType::F64)?;
                let outside = y.lt(0.)?.to_dtype(DType::U32)?.add(&y.gt(1.)?.to_dtype(DType::U32)?)?;
                if outside.sum_all()?.to_scalar::<u32>()? > 0 {
                    bail!("evidence: targets of a Bernoulli likelihood lie between 0 and 1")
                }
                let softplus = (outputs.relu()? + (outputs.abs()?.neg()?.exp()? + 1.)?.log()?)?;
                sum_of(&(softplus - (y * outputs)?)?)?
            }
            Likelihood::Gaussian => sum_of(&(y.to_dtype(DType::F64)? - outputs)?.sqr()?)?,
        };
        if !loss.is_finite() {
            bail!("evidence: the labels are not finite")
        }
        Ok(DataFit { likelihood: self.likelihood, loss, outputs: (terms * classes) as f64 })
    }
}

/// How well outputs fit labels, summed over examples.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataFit {
    likelihood: Likelihood,
    /// The negative log-likelihood, or for a Gaussian one the sum of squared errors.
    loss: f64,
    /// Terms times classes.
    outputs: f64,
}

impl DataFit {
    pub fn zero(likelihood: Likelihood) -> Self {
        Self { likelihood, loss: 0.0, outputs: 0.0 }
    }

    pub fn add(&mut self, other: &DataFit, weight: f64) {
        self.loss += weight * other.loss;
        self.outputs += weight * other.outputs;
    }

    /// The log-likelihood.
    pub fn log_likelihood(&self, noise: f64, temperature: f64) -> f64 {
        match self.likelihood {
            Likelihood::Gaussian => {
                let normalizer = self.outputs * (noise * (2.0 * std::f64::consts::PI).sqrt()).ln();
                (-self.loss / (2.0 * noise * noise) - normalizer) / temperature
            }
            _ => -self.loss / temperature,
        }
    }

    /// The derivative of the log-likelihood with respect to `log noise`.
    pub fn by_log_noise(&self, noise: f64, temperature: f64) -> f64 {
        match self.likelihood {
            Likelihood::Gaussian => (self.loss / (noise * noise) - self.outputs) / temperature,
            _ => 0.0,
        }
    }
}
