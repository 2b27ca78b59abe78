//! Hyperparameters tuned while a model trains.

use super::adam::Adam;
use super::estimator::Estimator;
use super::examples::Examples;
use super::file::{Reading, Writing};
use super::fit::Evidence;
use super::hyper::{Hyper, Structure};
use super::problem::Problem;
use super::tune::or_restored;
use crate::penalty::{Lp, Penalty};
use candle_core::{Result, Tensor, bail};
use std::path::Path;

/// How a round moves the precisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TuneRule {
    /// Steps of Adam up the evidence. The default.
    #[default]
    Adam,
    /// MacKay's fixed point: a precision moves to the effective number of parameters over the sum of squares about the prior's mean, of all
    /// tensors that it is of, a part `lr` of the way on the logarithm and by a factor of e^2 at most. One step or two go as far as many of
    /// Adam, which still moves temperature and noise. Not for [`Structure::Diagonal`].
    FixedPoint,
}

/// When and how [`TuneDuring`] moves the hyperparameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsTuneDuring {
    /// The estimate of the evidence.
    pub estimator: Estimator,
    /// Training steps before the first round: until the parameters fit anything, their evidence says little.
    pub burn_in: usize,
    /// Training steps from one round to the next.
    pub every: usize,
    /// How the precisions move.
    pub rule: TuneRule,
    /// Steps on the logarithms in a round.
    pub steps: usize,
    /// Adam's rate; of a fixed point the part of the way, at most 1.
    pub lr: f64,
    /// How much a fixed point believes that all precisions are one: a hyperprior of so many effective parameters, about the precision that all
    /// groups together would have ([`Hyper`]'s groups). A group with few effective parameters then cannot run away. 0 is none.
    pub pooled: f64,
    /// Of random parts and outputs.
    pub seed: u64,
}

impl ParamsTuneDuring {
    /// Rounds of ten steps of rate 0.1, one an epoch of `epoch` training steps from the tenth epoch on, on random batches of `batch`
    /// examples.
    pub fn by_batches(batch: usize, epoch: usize) -> Self {
        Self {
            estimator: Estimator::batch(batch),
            burn_in: 10 * epoch,
            every: epoch,
            rule: TuneRule::Adam,
            steps: 10,
            lr: 0.1,
            pooled: 0.0,
            seed: 0,
        }
    }

    /// [`ParamsTuneDuring::by_batches`] with [`Estimator::extrapolated`] and a whole step to the fixed point a round, a twentieth of the training of
    /// `steps` steps apart and from a tenth of it on: 19 estimates for a training. Give it a precision a layer ([`Structure::PerLayer`])
    /// from 10: of what was tried that is the best on the whole, on MNIST better than the best of six fixed decays by validation data.
    pub fn by_fixed_points(batch: usize, steps: usize) -> Self {
        Self {
            estimator: Estimator::extrapolated(batch),
            burn_in: steps / 10,
            every: (steps / 20).max(1),
            rule: TuneRule::FixedPoint,
            steps: 1,
            lr: 1.0,
            pooled: 0.0,
            seed: 0,
        }
    }
}

/// Alternates the steps of any optimizer on the parameters with steps on prior precisions (and temperature and noise): the training loss
/// has the prior's penalty in it, and the prior follows the evidence.
///
/// Source: Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning" (ICML 2021) and the stochastic
/// bounds of 2023.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::evidence::{Examples, Hyper, ParamsTuneDuring, Problem, Structure, TuneDuring};
/// use kronwake::nn::{self, Module, Optimizer, SGD, VarBuilder, VarMap, loss};
/// use kronwake::tape::{Likelihood, Tape};
///
/// # fn main() -> candle_core::Result<()> {
/// let (vars, tape) = (VarMap::new(), Tape::new());
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let model = tape.build(|| nn::linear(2, 3, vb.pp("fc")))?;
/// let x = Tensor::randn(0f32, 1., (30, 2), &Device::Cpu)?;
/// let y = Tensor::from_iter((0..30).map(|i| i % 3u32), &Device::Cpu)?;
/// let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
/// let examples = Examples::new(x, y)?;
/// let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
/// let mut tuning = TuneDuring::new(hyper, ParamsTuneDuring::by_batches(10, 1), examples.len())?;
/// let mut sgd = SGD::new(vars.all_vars(), 0.1)?;
/// for _ in 0..20 {
///     let data = loss::cross_entropy(&model.forward(examples.x())?, examples.y())?;
///     sgd.backward_step(&tuning.loss(&data)?)?;
///     if let Some(evidence) = tuning.after_step(&problem, &examples)? {
///         println!("{} {:?}", evidence.log_evidence, tuning.weight_decays()?);
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TuneDuring {
    hyper: Hyper,
    params: ParamsTuneDuring,
    adam: Adam,
    /// Training examples.
    examples: usize,
    training_steps: usize,
    draws: u64,
}

impl TuneDuring {
    /// For a training set of `examples` examples, from the present values of `hyper`.
    ///
    /// # Errors
    /// When there are no examples, `every` is 0, or the rate is not a finite number above 0; when a fixed point has a rate above 1 or a prior
    /// of a precision a weight; when precisions are pooled by less than 0, or by another rule.
    pub fn new(hyper: Hyper, params: ParamsTuneDuring, examples: usize) -> Result<Self> {
        if examples == 0 || params.every == 0 {
            bail!(
                "evidence: {examples} examples and a round every {} steps, expected 1 or more",
                params.every
            )
        }
        if params.rule == TuneRule::FixedPoint
            && (params.lr > 1.0 || hyper.structure() == Structure::Diagonal)
        {
            bail!(
                "evidence: a fixed point with a rate of {} and precisions {:?}, expected at most 1 and one for a tensor, a layer or all",
                params.lr,
                hyper.structure()
            )
        }
        let needs_point = params.pooled > 0.0 && params.rule != TuneRule::FixedPoint;
        if needs_point || !(params.pooled.is_finite() && params.pooled >= 0.0) {
            bail!(
                "evidence: precisions pooled by {} with {:?}, expected 0 or more, and 0 unless the rule is a fixed point",
                params.pooled,
                params.rule
            )
        }
        let adam = Adam::new(hyper.vars(), params.lr)?;
        Ok(Self { hyper, params, adam, examples, training_steps: 0, draws: 0 })
    }

    /// `data + T/(2N) sum_i precision_i theta_i^2`, differentiable by the parameters, for the *mean* loss of a batch of the `N` training
    /// examples, the squares about the prior's means: the negative log posterior, up to what does not depend on the parameters, times `T/N`. With a Gaussian likelihood
    /// `data` is the mean of `1/(2 noise^2) |y - f|^2`.
    ///
    /// # Errors
    /// When the hyperparameters cannot be read, or a parameter is not finite.
    pub fn loss(&self, data: &Tensor) -> Result<Tensor> {
        let mut loss = data.clone();
        let factor = 0.5 * self.hyper.temperature()? / self.examples as f64;
        let precisions = self.hyper.tensor_precisions()?;
        for (index, p) in self.hyper.parameters().iter().enumerate() {
            let part = match self.hyper.structure() {
                Structure::Diagonal => {
                    let each =
                        self.hyper.vars()[index].as_tensor().detach().exp()?.to_dtype(p.tensor.dtype())?;
                    (p.centred()?.sqr()? * each.to_device(p.tensor.device())?)?.sum_all()? * factor
                }
                _ => {
                    Lp::l2().value(&p.centred()?)? * (factor * precisions.get(index).copied().unwrap_or(0.0))
                }
            };
            loss = (loss + part?.to_dtype(data.dtype())?)?;
        }
        Ok(loss)
    }

    /// Counts a training step, and moves the hyperparameters when a round is due: the evidence before its last step.
    ///
    /// # Errors
    /// As [`Estimator::fit`] and [`Fit::evidence`](super::Fit::evidence); the hyperparameters and their averages are then what they
    /// were.
    pub fn after_step(&mut self, problem: &Problem<'_>, examples: &Examples) -> Result<Option<Evidence>> {
        self.training_steps += 1;
        let since = self.training_steps.checked_sub(self.params.burn_in.max(1));
        if since.is_none_or(|since| since % self.params.every != 0) {
            return Ok(None);
        }
        let (adam, draws) = (self.adam.clone(), self.draws);
        let found = or_restored(&self.hyper.vars(), || self.round(problem, examples));
        if found.is_err() {
            (self.adam, self.draws) = (adam, draws);
        }
        found
    }

    fn round(&mut self, problem: &Problem<'_>, examples: &Examples) -> Result<Option<Evidence>> {
        let mut fit = None;
        let mut last = None;
        for _ in 0..self.params.steps {
            if fit.is_none() || self.params.estimator.is_random() {
                self.draws += 1;
                let seed = self.params.seed.wrapping_add(self.draws);
                fit = Some(self.params.estimator.fit(problem, examples, seed)?);
            }
            let Some(fit) = &fit else { break };
            let evidence = fit.evidence(&self.hyper)?;
            let fixed_point = match self.params.rule {
                TuneRule::Adam => None,
                TuneRule::FixedPoint => {
                    Some(self.hyper.fixed_point(&evidence, self.params.lr, self.params.pooled)?)
                }
            };
            self.adam.climb(&evidence.value.backward()?)?;
            if let Some(precisions) = fixed_point {
                self.hyper.set_precisions(&precisions)?;
            }
            last = Some(evidence);
        }
        Ok(last)
    }

    /// The hyperparameters.
    pub fn hyper(&self) -> &Hyper {
        &self.hyper
    }

    /// Of each parameter tensor the L2 decay that stands for its prior in a mean loss, `T precision / N`: what [`TuneDuring::loss`] adds
    /// the half of, times the sum of squares. With means ([`Problem::with_prior_mean`]) it pulls to these, as an optimizer's decay does not.
    ///
    /// # Errors
    /// When the hyperparameters cannot be read.
    pub fn weight_decays(&self) -> Result<Vec<f64>> {
        let scale = self.hyper.temperature()? / self.examples as f64;
        Ok(self.hyper.tensor_precisions()?.into_iter().map(|precision| scale * precision).collect())
    }

    /// Writes the hyperparameters with all that the rounds to come depend on as safetensors, in f64: the logarithms under their names of
    /// [`Hyper::varmap`], Adam's averages as `NAME/first_moment` and `NAME/second_moment`, counts in the metadata. The model's parameters are
    /// not in it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut file = Writing::new(KEY);
        for (name, value) in self.fixed() {
            file.line(&name, value);
        }
        file.line("training_steps", self.training_steps);
        file.line("draws", self.draws);
        file.line("adam_steps", self.adam.steps);
        for ((name, var), moments) in self.hyper.named_vars().into_iter().zip(&self.adam.moments) {
            for (slot, moment) in MOMENTS.into_iter().zip(moments) {
                file.tensor(format!("{name}/{slot}"), moment)?;
            }
            file.tensor(name, var.as_tensor())?;
        }
        file.write(path.as_ref())
    }

    /// Goes on from what [`TuneDuring::save`] wrote, for the same parameters, structure of precisions and schedule: the rounds that
    /// follow are bit for bit those that would have followed there. The estimator and the rate may be others.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use kronwake::evidence::{Hyper, ParamsTuneDuring, Problem, Structure, TuneDuring};
    /// # use kronwake::nn::{self, VarBuilder, VarMap};
    /// # use kronwake::tape::{Likelihood, Tape};
    /// # let (vars, tape) = (VarMap::new(), Tape::new());
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// # let model = tape.build(|| nn::linear(2, 3, vb.pp("fc")))?;
    /// # let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    /// # let file = std::env::temp_dir().join(format!("kronwake-doc-tuning-{}", std::process::id()));
    /// let new = || TuneDuring::new(Hyper::new(&problem, Structure::PerTensor, 1.0)?, ParamsTuneDuring::by_batches(10, 1), 30);
    /// new()?.save(&file)?;
    /// let mut tuning = new()?;
    /// tuning.resume(&file)?;
    /// # std::fs::remove_file(&file)?;
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be read, or does not fit: one message lists every difference, and nothing has changed.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let mut file = Reading::open(path.as_ref(), KEY)?;
        let fixed = self.fixed();
        for name in SOMETIMES {
            if fixed.iter().all(|(other, _)| other != name) {
                file.expect_none(name);
            }
        }
        for (name, value) in fixed {
            file.expect(&name, value);
        }
        let training_steps = file.number("training_steps");
        let draws = file.number("draws");
        let adam_steps = file.number("adam_steps");
        let (mut values, mut moments) = (Vec::new(), Vec::new());
        for (name, var) in self.hyper.named_vars() {
            let [first, second] = MOMENTS.map(|slot| file.tensor(&format!("{name}/{slot}"), var.dims()));
            moments.extend(first.zip(second).map(|(first, second)| [first, second]));
            values.extend(file.tensor(&name, var.dims()).map(|value| (var, value)));
        }
        file.finish()?;
        let (Some(training_steps), Some(draws), Some(adam_steps)) = (training_steps, draws, adam_steps)
        else {
            bail!("{}: counts are missing", path.as_ref().display())
        };
        for (var, value) in values {
            var.set(&value)?;
        }
        (self.adam.moments, self.adam.steps) = (moments, adam_steps);
        (self.training_steps, self.draws) = (training_steps, draws);
        Ok(())
    }

    /// What a file must agree with.
    fn fixed(&self) -> Vec<(String, String)> {
        let ParamsTuneDuring { burn_in, every, rule, steps, seed, .. } = self.params;
        let mut fixed = self.hyper.fixed();
        if rule != TuneRule::Adam {
            fixed.push(("rule".into(), format!("{rule:?}")));
        }
        for (name, value) in [
            ("examples", self.examples as u64),
            ("burn_in", burn_in as u64),
            ("every", every as u64),
            ("steps", steps as u64),
            ("seed", seed),
        ] {
            fixed.push((name.into(), value.to_string()));
        }
        fixed
    }
}

/// The metadata entry of a file.
const KEY: &str = "kronwake tuning";
/// Lines that not all files have.
const SOMETIMES: [&str; 2] = ["means", "rule"];
const MOMENTS: [&str; 2] = ["first_moment", "second_moment"];
