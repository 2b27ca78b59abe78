//! What an evidence is asked of: a model with its parameters and a likelihood.

use crate::nn::{Module, VarMap};
use crate::pattern::matches;
use crate::tape::{Layer, Likelihood, Tape};
use candle_core::{DType, Result, Tensor, TensorId, bail};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One parameter tensor of a model.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in the VarMap.
    pub name: String,
    /// The name of its layer.
    pub layer: String,
    /// Itself.
    pub tensor: Tensor,
    /// The prior's mean, detached and as it was given; zero without one.
    pub(crate) mean: Option<Tensor>,
    /// The layer's number on the tape.
    pub(crate) of_layer: usize,
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
    /// Of a Gaussian likelihood the noise of each output, over the noise of all.
    output_noise: Option<Arc<Vec<f64>>>,
}

impl Parameter {
    /// What the prior pulls to zero: the tensor, less the prior's mean. Differentiable by the tensor.
    pub(crate) fn centred(&self) -> Result<Tensor> {
        match &self.mean {
            Some(mean) => &self.tensor - mean,
            None => Ok(self.tensor.clone()),
        }
    }
}

impl std::fmt::Debug for Problem<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
        f.debug_struct("Problem").field("likelihood", &self.likelihood).field("parameters", &names).finish()
    }
}

impl<'a> Problem<'a> {
    /// `model` must have been built inside `tape`'s [`Tape::build`] from `vars`; its forward maps inputs `[n, ..]` to outputs
    /// `[n, classes]` or `[n, t, classes]`, and must be deterministic, with outputs of an example that do not depend on the others
    /// (BatchNorm in evaluation mode). Closures are models.
    ///
    /// A weight or table may be used by several layers of one kind, with the same bias, with others, or without. What
    /// [`Tape::mask`] leaves out does not count; the mask has to be of all the examples that are given.
    ///
    /// # Errors
    /// When the tape is empty, or a Var is the weight or bias of none of its layers: its share in the evidence is not known. The
    /// message names all such Vars. When layers of different kinds share a tensor.
    pub fn new(tape: &Tape, vars: &VarMap, model: &'a dyn Module, likelihood: Likelihood) -> Result<Self> {
        let problem = Self::of_part(tape, vars, model, likelihood, &["*"])?;
        for layer in tape.layers().iter().chain(&tape.other_biases()) {
            for (kind, tensor) in [("weight", Some(&layer.weight)), ("bias", layer.bias.as_ref())] {
                if tensor.is_some_and(|tensor| problem.number_of(tensor).is_none()) {
                    bail!(
                        "evidence: the {kind} of layer {} is not in the VarMap; Problem::of_part takes what is not in it as constant",
                        layer.name
                    )
                }
            }
        }
        Ok(problem)
    }

    /// A part of a model: the Vars whose names match one of `patterns`, in which `*` stands for any run of characters and `?` for any
    /// one, and none of those that begin with `!`. All others are constants: they have no prior and no uncertainty, and their layers stay
    /// in the forward pass and out of the determinant. With exclusions alone, all other Vars are meant.
    ///
    /// The last layer is `&["fc3.*"]`, everything but norms `&["!*norm*"]`, the adapters of a [`Lora`](crate::nn::Lora) `&["*"]` of its
    /// [`varmap`](crate::nn::Lora::varmap).
    /// The statistics of a BatchNorm are Vars of no layer: leave them and its weights out.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use kronwake::{evidence::Problem, nn::{self, VarBuilder, VarMap}, tape::{Likelihood, Tape}};
    /// let (vars, tape) = (VarMap::new(), Tape::new());
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let model = tape.build(|| {
    ///     Ok(nn::seq().add(nn::linear(4, 8, vb.pp("fc1"))?).add_fn(|x| x.tanh()).add(nn::linear(8, 3, vb.pp("fc2"))?))
    /// })?;
    /// let problem = Problem::of_part(&tape, &vars, &model, Likelihood::Categorical, &["fc2.*"])?;
    /// let names: Vec<_> = problem.parameters().iter().map(|p| p.name.as_str()).collect();
    /// assert_eq!(names, ["fc2.weight", "fc2.bias"]);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// As [`Problem::new`], of the Vars of the part alone, and when a pattern matches no Var or the part is empty.
    pub fn of_part(
        tape: &Tape,
        vars: &VarMap,
        model: &'a dyn Module,
        likelihood: Likelihood,
        patterns: &[&str],
    ) -> Result<Self> {
        let layers = tape.layers();
        if layers.is_empty() {
            bail!(
                "evidence: no layers on the tape; build the model inside Tape::build from kronwake::nn layers"
            )
        }
        let named = part(vars, patterns)?;
        let mut found = Found { named: &named, parameters: Vec::new() };
        let others = tape.other_biases();
        for layer in &layers {
            found.take(layer, &layer.weight)?;
            let uses = std::iter::once(layer).chain(others.iter().filter(|use_| use_.index == layer.index));
            for bias in uses.filter_map(|layer| layer.bias.as_ref()) {
                // Uses with one bias are one layer's.
                if !found.parameters.iter().any(|p| p.tensor.id() == bias.id() && p.of_layer == layer.index) {
                    found.take(layer, bias)?;
                }
            }
        }
        let parameters = found.parameters;
        let known = |id: TensorId| parameters.iter().any(|p| p.tensor.id() == id);
        let unknown: Vec<_> =
            named.iter().filter(|(_, var)| !known(var.id())).map(|(name, _)| name.clone()).collect();
        if !unknown.is_empty() {
            bail!(
                "evidence: {} {} no weight or bias of a layer on the tape, whose share could be counted; build the model from \
                 kronwake::nn layers inside Tape::build, or leave it out of the part (Problem::of_part)",
                unknown.join(", "),
                if unknown.len() == 1 { "is" } else { "are" }
            )
        }
        Ok(Self {
            model,
            tape: tape.clone(),
            likelihood,
            parameters: Arc::new(parameters),
            output_noise: None,
        })
    }

    /// Centres the prior at `means`, by the parameters' names: of a model that was fine-tuned the pretrained values, of adapters their start.
    /// A parameter that is not among them keeps a prior of mean zero; names that are no parameters are not looked at, so that a whole
    /// checkpoint ([`Checkpoint::tensors`](crate::checkpoint::Checkpoint::tensors)) may be given. The means are copied.
    ///
    /// The log prior is then `-1/2 sum_i precision_i (theta_i - mean_i)^2`, and [`TuneDuring::loss`](super::TuneDuring::loss) pulls to the
    /// means; determinants and posteriors are what they were. [`Hyper`](super::Hyper) has to be made from the problem with its means.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kronwake::{checkpoint::Checkpoint, evidence::Problem, nn::{self, VarBuilder, VarMap}, tape::{Likelihood, Tape}};
    /// # let (vars, tape) = (VarMap::new(), Tape::new());
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// # let model = tape.build(|| nn::linear(2, 3, vb.pp("fc")))?;
    /// # let mut base = Checkpoint::default();
    /// # base.tensors.insert("fc.weight".into(), Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    /// let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?.with_prior_mean(&base.tensors)?;
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When a mean has another shape than its parameter or is not finite, or none of the parameters has one.
    pub fn with_prior_mean(self, means: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut parameters = self.parameters.as_ref().clone();
        for p in &mut parameters {
            let Some(mean) = means.get(&p.name) else { continue };
            if mean.dims() != p.tensor.dims() {
                bail!(
                    "evidence: the prior's mean of {} has shape {:?}, expected {:?}",
                    p.name,
                    mean.dims(),
                    p.tensor.dims()
                )
            }
            let mean = mean.detach().to_device(p.tensor.device())?.to_dtype(p.tensor.dtype())?.copy()?;
            if !mean.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?.is_finite() {
                bail!("evidence: the prior's mean of {} is not finite in {:?}", p.name, p.tensor.dtype())
            }
            p.mean = Some(mean);
        }
        if parameters.iter().all(|p| p.mean.is_none()) {
            let names: Vec<_> = parameters.iter().map(|p| p.name.as_str()).collect();
            bail!("evidence: the prior's means are of none of the parameters, which are {}", names.join(", "))
        }
        Ok(Self { parameters: Arc::new(parameters), ..self })
    }

    /// Gives every output of a Gaussian likelihood a noise of its own: its standard deviation is `noise[c]` times the noise of
    /// [`Hyper`](super::Hyper), which is 1 unless it is set or tuned. [`Posterior::output_noise`](super::Posterior::output_noise) finds
    /// them. [`TuneDuring::loss`](super::TuneDuring::loss) takes the mean of `1/2 sum_c ((y_c - f_c) / noise_c)^2`.
    ///
    /// # Errors
    /// When the likelihood is another one, there are no numbers, or one is not a finite number above 0.
    pub fn with_output_noise(self, noise: &[f64]) -> Result<Self> {
        if self.likelihood != Likelihood::Gaussian {
            bail!("evidence: only a Gaussian likelihood has noise, and this one is {:?}", self.likelihood)
        }
        if noise.is_empty() || noise.iter().any(|noise| !(noise.is_finite() && *noise > 0.0)) {
            bail!("evidence: noise {noise:?}, expected a finite number above 0 for each output")
        }
        Ok(Self { output_noise: Some(Arc::new(noise.to_vec())), ..self })
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

    pub(crate) fn output_noise(&self) -> Option<&[f64]> {
        self.output_noise.as_ref().map(|noise| noise.as_slice())
    }

    pub(crate) fn shared_parameters(&self) -> Arc<Vec<Parameter>> {
        self.parameters.clone()
    }

    /// Which of the parameters a tensor is.
    pub(crate) fn number_of(&self, tensor: &Tensor) -> Option<usize> {
        self.parameters.iter().position(|p| p.tensor.id() == tensor.id())
    }
}

/// The Vars that `patterns` choose, by name.
fn part(vars: &VarMap, patterns: &[&str]) -> Result<Vec<(String, Tensor)>> {
    let Ok(data) = vars.data().lock() else { bail!("evidence: the VarMap's lock is poisoned") };
    let mut named: Vec<_> = data.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    drop(data);
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    let of = |pattern: &str| pattern.strip_prefix('!').unwrap_or(pattern).to_string();
    if let Some(idle) = patterns.iter().find(|p| !named.iter().any(|(name, _)| matches(&of(p), name)))
        && !named.is_empty()
    {
        let names: Vec<_> = named.iter().map(|(name, _)| name.as_str()).collect();
        bail!("evidence: no Var matches {idle:?}; there are {}", names.join(", "))
    }
    let (out, within): (Vec<&str>, Vec<&str>) = patterns.iter().partition(|p| p.starts_with('!'));
    named.retain(|(name, _)| {
        (within.is_empty() || within.iter().any(|p| matches(p, name)))
            && !out.iter().any(|p| matches(&of(p), name))
    });
    if named.is_empty() {
        bail!("evidence: no Var is in the part {patterns:?}")
    }
    Ok(named)
}

/// Parameters as they are found on the tape.
struct Found<'a> {
    named: &'a [(String, Tensor)],
    parameters: Vec<Parameter>,
}

impl Found<'_> {
    /// A layer's tensor, if it is in the part.
    fn take(&mut self, layer: &Layer, tensor: &Tensor) -> Result<()> {
        let Some((name, _)) = self.named.iter().find(|(_, var)| var.id() == tensor.id()) else {
            return Ok(());
        };
        if let Some(other) = self.parameters.iter().find(|p| p.tensor.id() == tensor.id()) {
            bail!(
                "evidence: {name} is shared by the layers {} and {}, which use it in different ways (as weights of two kinds, or as \
                 the bias of two weights): its share cannot be counted; give each its own, or leave it out of the part \
                 (Problem::of_part)",
                other.layer,
                layer.name
            )
        }
        self.parameters.push(Parameter {
            name: name.clone(),
            layer: layer.name.clone(),
            tensor: tensor.clone(),
            mean: None,
            of_layer: layer.index,
        });
        Ok(())
    }
}
