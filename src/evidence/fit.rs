//! The evidence as a function of the hyperparameters, at fixed parameters.

use super::data_fit::DataFit;
use super::hyper::Hyper;
use super::log_det::{Complexity, Effective, LogDet, Precision, sum_of};
use super::posterior::Posterior;
use super::predictive::Noise;
use super::problem::{Parameter, Problem};
use crate::parallel::{Place, Trouble, World};
use crate::tape::Likelihood;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// All that an estimate of the evidence takes from the parameters and the examples.
#[derive(Debug)]
pub struct Fit {
    parameters: Arc<Vec<Parameter>>,
    data: DataFit,
    /// Of each tensor the sum of squares, about the prior's mean.
    squares: Vec<f64>,
    /// The tensors as they were less the prior's means, in f64 on the CPU.
    values: Vec<Tensor>,
    terms: Vec<(f64, Box<dyn Complexity>)>,
    /// The processes that have the other parts' terms, where there are some.
    world: Option<World>,
    likelihood: Likelihood,
    /// Of each output of a regression, over that of all.
    output_noise: Option<Vec<f64>>,
}

/// An estimate of the log marginal likelihood with its parts and derivatives.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// [`Evidence::log_evidence`] as a tracked scalar of the Vars of [`Hyper`], f64: `value.backward()` works, once; a minimizer takes
    /// `value.neg()`.
    pub value: Tensor,
    /// `log p(D | theta)`, over all examples.
    pub log_likelihood: f64,
    /// `-1/2 sum_i precision_i theta_i^2`, about the prior's mean where it has one.
    pub log_prior: f64,
    /// `log det(s G + P0) - log det P0`, by the estimator's curvature; half of it is the complexity.
    pub log_det: f64,
    /// `log_likelihood + log_prior - log_det / 2`.
    pub log_evidence: f64,
    /// Of each parameter tensor the effective number of parameters: how many of them the data determine.
    pub effective: Vec<f64>,
    /// Of each parameter tensor the derivative of the log evidence by the logarithm of its precision; of a diagonal prior the sum.
    pub grad_log_precision: Vec<f64>,
    /// The derivative by the logarithm of the temperature.
    pub grad_log_temperature: f64,
    /// The derivative by the logarithm of the noise; 0 without noise.
    pub grad_log_noise: f64,
    /// Of each parameter tensor the precision that a fixed-point step takes: effective parameters over the sum of squares (MacKay
    /// 1992). Infinite where the tensor is at the prior's mean.
    pub suggested_precision: Vec<f64>,
    /// A bound of the condition number of what was factorized.
    pub condition: f64,
}

impl Fit {
    pub(crate) fn new(
        problem: &Problem<'_>,
        data: DataFit,
        terms: Vec<(f64, Box<dyn Complexity>)>,
    ) -> Result<Self> {
        let parameters = problem.shared_parameters();
        let values = parameters.iter().map(|p| {
            let wide = |t: &Tensor| t.detach().to_dtype(DType::F64)?.to_device(&Device::Cpu);
            match &p.mean {
                Some(mean) => wide(&p.tensor)? - wide(mean)?,
                None => wide(&p.tensor),
            }
        });
        let values = values.map(|v| v?.copy()).collect::<Result<Vec<_>>>()?;
        let squares = values.iter().map(|v| sum_of(&v.sqr()?)).collect::<Result<Vec<_>>>()?;
        let output_noise = problem.output_noise().map(<[f64]>::to_vec);
        let likelihood = problem.likelihood;
        Ok(Self { parameters, data, squares, values, terms, world: None, likelihood, output_noise })
    }

    /// What this process and the others of `world` have read.
    pub(crate) fn shared(own: Result<Self>, world: &World) -> Result<Self> {
        let place = Place { of: "evidence", call: "fit_together", step: 0 };
        let local = match &own {
            Ok(fit) => Ok(fit.data.numbers().to_vec()),
            Err(error) => Err(Trouble::failed(error)),
        };
        let told = world.meet(place, local).map_err(Trouble::error)?;
        let fit = own?;
        let sum = |index: usize| told.iter().filter_map(|numbers| numbers.get(index)).sum();
        Ok(Self { data: fit.data.with([0, 1, 2].map(sum)), world: Some(world.clone()), ..fit })
    }

    /// The evidence at some hyperparameters.
    ///
    /// # Errors
    /// When the hyperparameters are of another problem or not finite, a diagonal prior meets Kronecker factors, or a matrix is too badly
    /// conditioned for its type (the message says how badly).
    pub fn evidence(&self, hyper: &Hyper) -> Result<Evidence> {
        let (s, precisions) = (hyper.scale()?, hyper.precisions()?);
        if precisions.len() != self.parameters.len() {
            return self.with(LogDet::zero(0), hyper);
        }
        let own = || {
            let mut total = LogDet::zero(precisions.len());
            for (weight, term) in &self.terms {
                total.add(term.log_det(s, &precisions)?, *weight)?;
            }
            Ok(total)
        };
        match &self.world {
            None => self.with(own()?, hyper),
            Some(world) => self.with(LogDet::over(world, own(), &precisions)?, hyper),
        }
    }

    /// The posterior with this fit's curvature, as [`Posterior::fit`] makes it from the examples, which are not read again: of
    /// [`Curvature::Kron`](super::Curvature), `Rotated` or `Diagonal` over all examples at once ([`Parts::Whole`](super::Parts)). `memory` is
    /// as there.
    ///
    /// # Errors
    /// As [`Fit::evidence`], and when the fit is of another curvature or of several parts.
    pub fn posterior(&self, hyper: &Hyper, memory: usize) -> Result<Posterior> {
        // What that refuses.
        self.evidence(hyper)?;
        let (s, precisions) = (hyper.scale()?, hyper.precisions()?);
        let covariance = match (self.terms.as_slice(), &self.world) {
            ([(weight, term)], None) if *weight == 1.0 => term.covariance(s, &precisions)?,
            _ => None,
        };
        let Some(covariance) = covariance else {
            bail!(
                "posterior: of a fit with {} parts of the examples or without blocks of the curvature; expected Curvature::Kron, Rotated or \
                 Diagonal with Parts::Whole, or take Posterior::fit",
                self.terms.len()
            )
        };
        let noise = Noise { all: hyper.noise()?, each: self.output_noise.clone() };
        let names = self.parameters.iter().map(|p| p.name.clone()).collect();
        Ok(Posterior { covariance, s, precisions, likelihood: self.likelihood, noise, names, memory })
    }

    /// The evidence with a log-determinant that has been computed.
    pub(crate) fn with(&self, mut total: LogDet, hyper: &Hyper) -> Result<Evidence> {
        if !Arc::ptr_eq(&self.parameters, hyper.parameters()) {
            let names = |p: &[Parameter]| p.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            if names(&self.parameters) != names(hyper.parameters()) {
                bail!("evidence: the hyperparameters are those of another model")
            }
            let means =
                |p: &[Parameter]| p.iter().map(|p| p.mean.as_ref().map(Tensor::id)).collect::<Vec<_>>();
            if means(&self.parameters) != means(hyper.parameters()) {
                bail!(
                    "evidence: the hyperparameters are of a prior with other means: make them from the problem after \
                     Problem::with_prior_mean"
                )
            }
        }
        let (temperature, noise) = (hyper.temperature()?, hyper.noise()?);
        let precisions = hyper.precisions()?;
        let log_likelihood = self.data.log_likelihood(noise, temperature);
        let (mut log_prior, mut slopes, mut grad_log_precision) = (0.0, Vec::new(), Vec::new());
        let (mut effective, mut suggested) = (Vec::new(), Vec::new());
        for (index, precision) in precisions.iter().enumerate() {
            let found =
                total.effective.get_mut(index).and_then(Option::take).unwrap_or(Effective::Total(0.0));
            let of_data = found.total()?;
            let slope = match precision {
                Precision::Uniform(delta) => {
                    let quadratic = 0.5 * delta * self.squares[index];
                    log_prior -= quadratic;
                    Tensor::new(0.5 * of_data - quadratic, &Device::Cpu)?
                }
                Precision::Each(deltas) => {
                    let quadratic = ((self.values[index].sqr()? * deltas)? * 0.5)?;
                    log_prior -= sum_of(&quadratic)?;
                    match found {
                        Effective::Each(each) => ((each * 0.5)? - quadratic)?,
                        Effective::Total(_) => bail!("evidence: a diagonal prior needs a number a weight"),
                    }
                }
            };
            effective.push(of_data);
            suggested.push(of_data / self.squares[index]);
            grad_log_precision.push(sum_of(&slope)?);
            slopes.push(slope);
        }
        let by_s: f64 = effective.iter().sum();
        let grad_log_temperature = -log_likelihood + 0.5 * by_s;
        let grad_log_noise = match hyper.has_noise() {
            true => self.data.by_log_noise(noise, temperature) + by_s,
            false => 0.0,
        };
        let log_evidence = log_likelihood + log_prior - 0.5 * total.value;
        if !log_evidence.is_finite() {
            bail!("evidence: {log_evidence} = {log_likelihood} + {log_prior} - {} / 2", total.value)
        }
        Ok(Evidence {
            value: hyper.tracked(log_evidence, &slopes, grad_log_temperature, grad_log_noise)?,
            log_likelihood,
            log_prior,
            log_det: total.value,
            log_evidence,
            effective,
            grad_log_precision,
            grad_log_temperature,
            grad_log_noise,
            suggested_precision: suggested,
            condition: total.condition,
        })
    }
}
