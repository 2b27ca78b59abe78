//! The Laplace posterior of the parameters, and what a linearized model predicts under it.
//!
//! The posterior is `N(theta, (s G + P0)^-1)`, the outputs of the linearized model for an input `x` are Gaussian with mean `f(x; theta)`
//! and covariance `J(x) (s G + P0)^-1 J(x)^T` (MacKay 1992; Immer, Korzepa & Bauer, "Improving predictions of Bayesian neural nets
//! via local linearization", AISTATS 2021).

use super::dense::Dense;
use super::diagonal::Diagonal;
use super::eigenbasis::{Eigenbases, Eigenbasis};
use super::estimator::check_dense;
use super::examples::Examples;
use super::hyper::Hyper;
use super::kron::KronSums;
use super::last_layer::{Sums, sum_up};
use super::log_det::{Complexity, Precision, precision_of};
use super::pass::{Checked, Columns, each_pass};
use super::predictive::{Noise, Predictive};
use super::problem::Problem;
use super::rotated::MarginalSums;
use super::rows::{CHUNK, LayerRows, Rows};
use crate::ops::dense::product;
use crate::tape::Likelihood;
use candle_core::{DType, Result, Tensor, bail};

/// What stands for the curvature of a posterior.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HessianStructure {
    /// The generalized Gauss-Newton matrix of all parameters, written out.
    Full,
    /// Kronecker factors of each tensor's block. The default.
    #[default]
    Kron,
    /// The diagonal of each tensor's block in a Kronecker basis, from true sums over the examples, as
    /// [`Curvature::Rotated`](super::Curvature).
    Rotated,
    /// The diagonal.
    Diagonal,
}

#[derive(Debug, Clone)]
pub(crate) enum Covariance {
    /// `(s G + P0)^-1`, with the tensors in the order of its rows and their sizes.
    Full(Tensor, Vec<(usize, usize)>),
    Kron(Eigenbases),
    /// `(s h + P0)^-1` of each tensor, flattened.
    Diagonal(Vec<(usize, Tensor)>),
}

/// A Gaussian posterior of the parameters at fixed hyperparameters.
#[derive(Debug, Clone)]
pub struct Posterior {
    pub(super) covariance: Covariance,
    pub(super) s: f64,
    pub(super) precisions: Vec<Precision>,
    pub(super) likelihood: Likelihood,
    pub(super) noise: Noise,
    /// Of the parameters that it is of.
    pub(super) names: Vec<String>,
    /// What the rows of a prediction may take.
    pub(super) memory: usize,
}

impl Covariance {
    pub(super) fn structure(&self) -> &'static str {
        match self {
            Covariance::Full(..) => "Full",
            Covariance::Kron(Eigenbases { rotated: true, .. }) => "Rotated",
            Covariance::Kron(_) => "Kron",
            Covariance::Diagonal(_) => "Diagonal",
        }
    }
}

impl Posterior {
    /// Fits the posterior to `examples` at the present parameters and hyperparameters. `memory`: the most bytes that the full matrix and
    /// its inverse, or the rows of a pass over examples or inputs, may take; passes are smaller where 256 examples would take more.
    ///
    /// # Errors
    /// As the estimators: outputs that are not finite, a full matrix that is too large, a diagonal prior with Kronecker factors.
    pub fn fit(
        problem: &Problem<'_>,
        examples: &Examples,
        structure: HessianStructure,
        hyper: &Hyper,
        memory: usize,
    ) -> Result<Self> {
        let precisions = hyper.precisions()?;
        let noise = Noise { all: hyper.noise()?, each: problem.output_noise().map(<[f64]>::to_vec) };
        let s = hyper.scale()?;
        let Checked { examples, .. } = problem.checked(examples)?;
        let sum_up = |sums: &mut dyn Sums| sum_up(problem, &examples, memory, sums, |_| Ok(()));
        let covariance = match structure {
            HessianStructure::Full => {
                let size: usize = problem.parameters().iter().map(|p| p.tensor.elem_count()).sum();
                check_dense(size, memory)?;
                let mut sums = Dense::new();
                sum_up(&mut sums)?;
                let (covariance, spans) = sums.covariance(s, &precisions)?;
                Covariance::Full(covariance, spans)
            }
            HessianStructure::Kron | HessianStructure::Rotated => {
                if precisions.iter().any(|p| matches!(p, Precision::Each(_))) {
                    bail!(
                        "posterior: Kronecker factors need one prior precision a tensor (or layer, or for all), not one a weight"
                    )
                }
                let bases = if structure == HessianStructure::Kron {
                    let mut sums = KronSums::default();
                    sum_up(&mut sums)?;
                    sums.finish()?
                } else {
                    let mut marginals = MarginalSums::default();
                    sum_up(&mut marginals)?;
                    let mut sums = marginals.bases()?;
                    sum_up(&mut sums)?;
                    sums.finish()?
                };
                // What the evidence refuses.
                bases.log_det(s, &precisions)?;
                Covariance::Kron(bases)
            }
            HessianStructure::Diagonal => {
                let mut sums = Diagonal::default();
                sum_up(&mut sums)?;
                Covariance::Diagonal(sums.variances(s, &precisions)?)
            }
        };
        let names = problem.parameters().iter().map(|p| p.name.clone()).collect();
        Ok(Self { covariance, s, precisions, likelihood: problem.likelihood, noise, names, memory })
    }

    /// Refuses another problem, and no inputs.
    pub(super) fn check_inputs(&self, problem: &Problem<'_>, x: &Tensor) -> Result<()> {
        self.check(problem)?;
        if x.dims().first().is_none_or(|&n| n == 0) {
            bail!("posterior: no inputs to predict for, got {:?}", x.dims())
        }
        Ok(())
    }

    /// Refuses another problem than that of the fit.
    pub(super) fn check(&self, problem: &Problem<'_>) -> Result<()> {
        let names: Vec<&str> = problem.parameters().iter().map(|p| p.name.as_str()).collect();
        if problem.output_noise() != self.noise.each.as_deref() {
            bail!(
                "posterior: of outputs with noise {:?}, expected that of the problem that it was fitted to, {:?}",
                problem.output_noise(),
                self.noise.each
            )
        }
        if names != self.names || problem.likelihood != self.likelihood {
            bail!(
                "posterior: of {:?} and {}, expected the problem that it was fitted to, {:?} and {}",
                problem.likelihood,
                names.join(", "),
                self.likelihood,
                self.names.join(", ")
            )
        }
        Ok(())
    }

    /// What the linearized model predicts for inputs `[n, ..]`.
    ///
    /// # Errors
    /// When the outputs are not `[n, classes]`, not finite, or the forward fails.
    pub fn predict(&self, problem: &Problem<'_>, x: &Tensor) -> Result<Predictive> {
        self.check_inputs(problem, x)?;
        let (mut means, mut covariances) = (Vec::new(), Vec::new());
        let inputs = Examples::new(x.clone(), x.clone())?.masked_by(&problem.tape)?;
        each_pass(problem, &inputs, Columns::Outputs, self.memory, |pass, rows| {
            if means.is_empty() {
                pass.refuse_mixing()?;
            }
            let (_, classes) = pass.outputs.dims2()?;
            covariances.push(self.covariance_of(&rows.to_f64()?)?.reshape(((), classes, classes))?);
            means.push(pass.outputs.detach());
            Ok(())
        })?;
        Ok(Predictive {
            mean: Tensor::cat(&means, 0)?.to_dtype(DType::F64)?,
            covariance: Tensor::cat(&covariances, 0)?.to_dtype(DType::F64)?,
            likelihood: self.likelihood,
            noise: self.noise.clone(),
        })
    }

    /// A better noise of each output of a Gaussian likelihood than the present one, for [`Problem::with_output_noise`] and a noise of 1 for
    /// all: `noise_c^2 = sum_n (y_nc - f_nc)^2 / (N - gamma_c)`, with `gamma_c` the effective number of parameters of the output (MacKay
    /// 1992). Where it is the present one, the evidence of a full posterior has no slope by it; a few rounds of fitting and this get there.
    /// Weights of terms count.
    ///
    /// # Errors
    /// When the likelihood is another one, an output fits its targets without an error, or has as many effective parameters as targets; as
    /// [`Posterior::predict`].
    pub fn output_noise(&self, problem: &Problem<'_>, examples: &Examples) -> Result<Vec<f64>> {
        if self.likelihood != Likelihood::Gaussian {
            bail!("posterior: only a Gaussian likelihood has noise, and this one is {:?}", self.likelihood)
        }
        let Checked { examples, .. } = problem.checked(examples)?;
        let found = self.predict(problem, examples.x())?;
        let (n, classes) = found.mean.dims2()?;
        let weights = match examples.term_weights(found.mean.dims(), false)? {
            Some(weights) => weights,
            None => vec![1.0; n],
        };
        let count: f64 = weights.iter().sum();
        let weights = Tensor::from_vec(weights, (n, 1), found.mean.device())?;
        let targets = examples.y().to_dtype(DType::F64)?.to_device(found.mean.device())?;
        let summed = |t: Tensor| t.broadcast_mul(&weights)?.sum(0)?.to_vec1::<f64>();
        let errors = summed((targets - &found.mean)?.sqr()?)?;
        let spread = summed(crate::linalg::kron::diagonal(&found.covariance)?)?;
        let mut noise = Vec::with_capacity(classes);
        for (c, (errors, spread)) in errors.into_iter().zip(spread).enumerate() {
            let now = self.noise.all * self.noise.each.as_ref().map_or(1.0, |each| each[c]);
            let gamma = spread / (now * now);
            let next = (errors / (count - gamma)).sqrt();
            if !(next.is_finite() && next > 0.0) {
                bail!(
                    "posterior: output {c} has squared errors of {errors:e} over {count} targets with {gamma:.1} effective parameters, from \
                     which no noise follows: take larger prior precisions, or leave its noise as it is"
                )
            }
            noise.push(next);
        }
        Ok(noise)
    }

    /// `J Sigma J^T` of each example, `[n, each, each]`, of rows in f64: the covariances of outputs that move together are small
    /// differences of large numbers.
    fn covariance_of(&self, rows: &Rows) -> Result<Tensor> {
        let per_example = |j: &Tensor| j.reshape((rows.examples, rows.each, ()));
        match &self.covariance {
            Covariance::Full(sigma, spans) => {
                let mut parts = vec![None; spans.len()];
                let mut put = |tensor: usize, part: Tensor| {
                    if let Some(at) = spans.iter().position(|&(t, _)| t == tensor) {
                        parts[at] = Some(part);
                    }
                };
                for layer in &rows.layers {
                    if let Some(tensor) = layer.weight {
                        let chunks = layer.chunks(usize::MAX)?.into_iter().map(|outs| layer.of_weight(outs));
                        put(tensor, Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 1)?);
                    }
                    if let Some(tensor) = layer.bias {
                        put(tensor, layer.of_bias()?);
                    }
                }
                let parts: Vec<Tensor> = parts.into_iter().flatten().collect();
                let j = Tensor::cat(&parts, 1)?.to_dtype(sigma.dtype())?;
                let turned = product(&j, sigma)?;
                product(&per_example(&turned)?, &per_example(&j)?.transpose(1, 2)?)
            }
            Covariance::Kron(bases) => {
                let mut sum = None;
                for layer in &rows.layers {
                    if let Some(block) = layer.weight.and_then(|tensor| bases.of(tensor)) {
                        add_parts(&mut sum, rows, &block.turn(layer)?, &self.scale(block)?)?;
                    }
                    if let Some(block) = layer.bias.and_then(|tensor| bases.of(tensor)) {
                        let j = block.turn_bias(&layer.of_bias()?)?;
                        let scale = self.scale(block)?.sqrt()?;
                        add_gram(&mut sum, &per_example(&j.broadcast_mul(&scale.unsqueeze(0)?)?)?)?;
                    }
                }
                found(sum)
            }
            Covariance::Diagonal(variances) => {
                let of = |tensor: usize| variances.iter().find(|(t, _)| *t == tensor).map(|(_, v)| v);
                let mut sum = None;
                for layer in &rows.layers {
                    if let Some(variance) = layer.weight.and_then(of) {
                        add_parts(&mut sum, rows, layer, variance)?;
                    }
                    if let Some(variance) = layer.bias.and_then(of) {
                        let j = layer.of_bias()?;
                        let scale = variance.sqrt()?.to_dtype(j.dtype())?;
                        add_gram(&mut sum, &per_example(&j.broadcast_mul(&scale.unsqueeze(0)?)?)?)?;
                    }
                }
                found(sum)
            }
        }
    }

    /// `1 / (s value + precision)`.
    pub(super) fn scale(&self, block: &Eigenbasis) -> Result<Tensor> {
        let values = &block.values;
        let deltas =
            precision_of(&self.precisions, block.tensor)?.flat(values.elem_count(), values.device())?;
        ((values * self.s)? + deltas)?.recip()
    }
}

/// Adds a weight's part, in chunks; `variance` `[out * in]`.
fn add_parts(sum: &mut Option<Tensor>, rows: &Rows, layer: &LayerRows, variance: &Tensor) -> Result<()> {
    for outs in layer.chunks(CHUNK)? {
        let (j, columns) = (layer.of_weight(outs.clone())?, layer.columns());
        let scale = variance.narrow(0, outs.start * columns, outs.len() * columns)?.sqrt()?;
        let j = j.broadcast_mul(&scale.to_dtype(j.dtype())?.unsqueeze(0)?)?;
        add_gram(sum, &j.reshape((rows.examples, rows.each, ()))?)?;
    }
    Ok(())
}

/// Adds `j j^T` of each example.
fn add_gram(sum: &mut Option<Tensor>, j: &Tensor) -> Result<()> {
    let part = product(j, &j.transpose(1, 2)?)?;
    *sum = Some(match sum.take() {
        Some(sum) => (sum + part)?,
        None => part,
    });
    Ok(())
}

fn found(sum: Option<Tensor>) -> Result<Tensor> {
    match sum {
        Some(sum) => Ok(sum),
        None => bail!("posterior: no parameters"),
    }
}
