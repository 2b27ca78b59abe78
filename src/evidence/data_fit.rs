//! How well outputs fit labels.

use super::examples::Examples;
use crate::tape::Likelihood;
use candle_core::{D, DType, Result, Tensor, bail};

/// Labels as the likelihood wants them.
pub(crate) enum Targets {
    /// A class number a term.
    Classes(Vec<i64>),
    /// In the outputs' shape, f64.
    Values(Tensor),
}

impl Targets {
    /// The labels of examples for outputs of shape `dims`, `[n, .., classes]`; those of terms of weight 0 may be anything.
    ///
    /// # Errors
    /// When they have another shape or type, or one that counts is out of range or not finite.
    pub fn of(
        likelihood: Likelihood,
        examples: &Examples,
        dims: &[usize],
        weights: Option<&[f64]>,
    ) -> Result<Self> {
        let labels = if likelihood == Likelihood::Categorical { examples.class_numbers()? } else { vec![] };
        Self::with_classes(likelihood, labels, examples, dims, weights)
    }

    /// [`Targets::of`] with the examples' class numbers, where the likelihood has such.
    pub fn with_classes(
        likelihood: Likelihood,
        mut labels: Vec<i64>,
        examples: &Examples,
        dims: &[usize],
        weights: Option<&[f64]>,
    ) -> Result<Self> {
        let classes = dims.last().copied().unwrap_or(0);
        let terms = dims.iter().product::<usize>() / classes.max(1);
        let y = examples.y();
        let counts = |term: usize| weights.is_none_or(|weights| weights[term] > 0.0);
        if likelihood == Likelihood::Categorical {
            if labels.len() != terms {
                bail!(
                    "evidence: expected {terms} class numbers for outputs {dims:?}, got {:?} {:?}",
                    y.dtype(),
                    y.dims()
                )
            }
            for (term, label) in labels.iter_mut().enumerate() {
                if !counts(term) {
                    *label = 0;
                } else if *label < 0 || *label >= classes as i64 {
                    bail!(
                        "evidence: label {label} is out of range for {classes} classes (term {term} of {terms}); Examples::ignoring({label}) \
                         leaves such terms out"
                    )
                }
            }
            return Ok(Self::Classes(labels));
        }
        if y.dims() != dims {
            bail!("evidence: expected targets of shape {dims:?}, got {:?}", y.dims())
        }
        let mut values = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        for (term, values) in values.chunks_mut(classes.max(1)).enumerate() {
            if !counts(term) {
                values.fill(0.0);
            } else if values.iter().any(|v| !v.is_finite()) {
                bail!("evidence: the labels are not finite (term {term} of {terms})")
            } else if likelihood == Likelihood::Bernoulli && values.iter().any(|v| !(0.0..=1.0).contains(v)) {
                bail!(
                    "evidence: targets of a Bernoulli likelihood lie between 0 and 1 (term {term} of {terms})"
                )
            }
        }
        Ok(Self::Values(Tensor::from_vec(values, dims, y.device())?))
    }
}

/// How well outputs fit labels, summed over examples.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataFit {
    likelihood: Likelihood,
    /// The negative log-likelihood, or for a Gaussian one the sum of squared errors, each over its output's own noise.
    loss: f64,
    /// Terms times classes.
    outputs: f64,
    /// The sum over these of the logarithms of the outputs' own noise.
    log_noise: f64,
}

impl DataFit {
    pub fn zero(likelihood: Likelihood) -> Self {
        Self { likelihood, loss: 0.0, outputs: 0.0, log_noise: 0.0 }
    }

    /// Of outputs that are finite where terms count; `noise` is that of each output of a Gaussian likelihood, over the noise of all.
    pub fn of(
        likelihood: Likelihood,
        outputs: &Tensor,
        targets: &Targets,
        weights: Option<&[f64]>,
        noise: Option<&[f64]>,
    ) -> Result<Self> {
        let outputs = outputs.detach().to_dtype(DType::F64)?;
        let classes = outputs.dim(D::Minus1)?;
        let losses = match targets {
            Targets::Classes(labels) => {
                let labels: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
                let labels = Tensor::from_vec(labels, ((), 1), outputs.device())?;
                let rows = outputs.reshape(((), classes))?;
                (rows.log_sum_exp(1)? - rows.gather(&labels, 1)?.squeeze(1)?)?
            }
            Targets::Values(y) => {
                let y = y.to_device(outputs.device())?;
                let each = match likelihood {
                    Likelihood::Gaussian => {
                        let errors = (y - &outputs)?;
                        match noise {
                            Some(noise) => {
                                errors.broadcast_div(&Tensor::new(noise, outputs.device())?)?.sqr()?
                            }
                            None => errors.sqr()?,
                        }
                    }
                    // ln(1 + e^z) - y z, in the form that does not overflow.
                    _ => {
                        let softplus = (outputs.relu()? + (outputs.abs()?.neg()?.exp()? + 1.)?.log()?)?;
                        (softplus - (y * &outputs)?)?
                    }
                };
                each.sum(D::Minus1)?
            }
        };
        let losses = losses.flatten_all()?.to_vec1::<f64>()?;
        let (loss, terms) = match weights {
            None => (losses.iter().sum::<f64>(), losses.len() as f64),
            Some(weights) => {
                let counted = losses.iter().zip(weights).filter(|(_, w)| **w > 0.0);
                (counted.map(|(loss, w)| loss * w).sum(), weights.iter().sum())
            }
        };
        if !loss.is_finite() {
            bail!("evidence: the fit of the outputs to the labels is not finite")
        }
        let log_noise = terms * noise.map_or(0.0, |noise| noise.iter().map(|r| r.ln()).sum());
        Ok(Self { likelihood, loss, outputs: terms * classes as f64, log_noise })
    }

    pub fn add(&mut self, other: &DataFit, weight: f64) {
        self.loss += weight * other.loss;
        self.outputs += weight * other.outputs;
        self.log_noise += weight * other.log_noise;
    }

    /// The numbers that add up.
    pub fn numbers(&self) -> [f64; 3] {
        // One that is forgotten here does not compile.
        let Self { likelihood: _, loss, outputs, log_noise } = *self;
        [loss, outputs, log_noise]
    }

    /// One of such numbers.
    pub fn with(self, [loss, outputs, log_noise]: [f64; 3]) -> Self {
        Self { likelihood: self.likelihood, loss, outputs, log_noise }
    }

    /// The log-likelihood.
    pub fn log_likelihood(&self, noise: f64, temperature: f64) -> f64 {
        match self.likelihood {
            Likelihood::Gaussian => {
                let normalizer =
                    self.outputs * (noise * (2.0 * std::f64::consts::PI).sqrt()).ln() + self.log_noise;
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
