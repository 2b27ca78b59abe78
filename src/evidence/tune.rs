//! Climbing the evidence at fixed parameters.

use super::adam::Adam;
use super::estimator::{Curvature, Estimator, Outputs};
use super::examples::Examples;
use super::fit::{Evidence, Fit};
use super::hyper::Hyper;
use super::partition::Parts;
use super::problem::Problem;
use candle_core::{Result, Var};

/// How [`tune`] climbs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsTune {
    /// Steps of Adam on the logarithms of the hyperparameters; 0 only evaluates.
    pub steps: usize,
    /// The first step's rate, which falls by a half cosine to 0: about the largest change of a logarithm in one step.
    pub lr: f64,
    /// Of random parts and outputs.
    pub seed: u64,
}

impl Default for ParamsTune {
    fn default() -> Self {
        Self { steps: 100, lr: 0.1, seed: 0 }
    }
}

impl Estimator {
    /// Whether [`Estimator::fit`] depends on its seed.
    pub fn is_random(&self) -> bool {
        let outputs = matches!(self.curvature, Curvature::Kernel(Outputs::One(_) | Outputs::OneEach(_)));
        outputs || self.draws.is_some() || matches!(self.parts, Parts::Random(_) | Parts::ByLabel(_))
    }
}

/// Maximizes the evidence by the Vars of `hyper`, and evaluates it there.
///
/// `watch(step, evidence)` is told the evidence before each step, which takes a fresh draw where the estimator is random, and last
/// `watch(steps, ..)` the result.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::evidence::{Estimator, Examples, Hyper, ParamsTune, Problem, Structure, tune};
/// use kronwake::nn::{self, VarBuilder, VarMap};
/// use kronwake::tape::{Likelihood, Tape};
///
/// # fn main() -> candle_core::Result<()> {
/// let (vars, tape) = (VarMap::new(), Tape::new());
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let model = tape.build(|| nn::linear(2, 3, vb.pp("fc")))?;
/// let x = Tensor::randn(0., 1., (40, 2), &Device::Cpu)?;
/// let y = Tensor::arange(0u32, 40, &Device::Cpu)?.to_dtype(DType::F32)?.affine(0.075, 0.)?.to_dtype(DType::U32)?;
/// let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
/// let examples = Examples::new(x, y)?;
/// let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
/// let whole = Estimator { draws: None, ..Estimator::batch(40) };
/// let start = whole.fit(&problem, &examples, 0)?.evidence(&hyper)?;
/// let params = ParamsTune { steps: 50, ..Default::default() };
/// let end = tune(&problem, &examples, &whole, &hyper, &params, |_, _| ())?;
/// assert!(end.log_evidence > start.log_evidence);
/// // In a mean loss over the examples, the L2 decay that stands for the tuned prior:
/// let decay = hyper.tensor_precisions()?[0] / 40.0;
/// # assert!(decay > 0.);
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`Estimator::fit`] and [`Fit::evidence`]; the hyperparameters are then what they were.
pub fn tune(
    problem: &Problem<'_>,
    examples: &Examples,
    estimator: &Estimator,
    hyper: &Hyper,
    params: &ParamsTune,
    watch: impl FnMut(usize, &Evidence),
) -> Result<Evidence> {
    let draw = |step: usize| estimator.fit(problem, examples, params.seed.wrapping_add(step as u64));
    let redraw = |step: usize| estimator.is_random().then(|| draw(step)).transpose();
    or_restored(&hyper.vars(), || climb(&draw(0)?, redraw, hyper, params, watch))
}

impl Fit {
    /// [`tune`] at this fit, where its estimator is not random: examples are not read again.
    ///
    /// # Errors
    /// As [`Fit::evidence`]; the hyperparameters are then what they were.
    pub fn tune(
        &self,
        hyper: &Hyper,
        params: &ParamsTune,
        watch: impl FnMut(usize, &Evidence),
    ) -> Result<Evidence> {
        or_restored(&hyper.vars(), || climb(self, |_| Ok(None), hyper, params, watch))
    }
}

/// What `change` returns; the Vars are what they were if that is an error.
pub(super) fn or_restored<T>(vars: &[Var], change: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = vars.iter().map(|var| var.copy()).collect::<Result<Vec<_>>>()?;
    let found = change();
    if found.is_err() {
        for (var, value) in vars.iter().zip(&before) {
            var.set(value)?;
        }
    }
    found
}

/// `redraw(step)` is a fit in place of the last one, if there is to be another.
fn climb(
    first: &Fit,
    redraw: impl Fn(usize) -> Result<Option<Fit>>,
    hyper: &Hyper,
    params: &ParamsTune,
    mut watch: impl FnMut(usize, &Evidence),
) -> Result<Evidence> {
    let mut adam = Adam::new(hyper.vars(), params.lr)?;
    let mut drawn = None;
    for step in 0..params.steps {
        if step > 0
            && let Some(fit) = redraw(step)?
        {
            drawn = Some(fit);
        }
        let evidence = drawn.as_ref().unwrap_or(first).evidence(hyper)?;
        watch(step, &evidence);
        let phase = std::f64::consts::PI * step as f64 / params.steps as f64;
        adam.lr = params.lr * 0.5 * (1.0 + phase.cos());
        adam.climb(&evidence.value.backward()?)?;
    }
    let last = if params.steps > 0 { redraw(params.steps)? } else { None };
    let evidence = last.as_ref().or(drawn.as_ref()).unwrap_or(first).evidence(hyper)?;
    watch(params.steps, &evidence);
    Ok(evidence)
}
