//! Gaussian outputs, and predictions from them.

use crate::linalg::cholesky::cholesky;
use crate::linalg::eigh::eigh;
use crate::ops::rng::normal;
use crate::ops::softmax::softmax_last_dim;
use crate::tape::Likelihood;
use candle_core::{Result, Tensor, bail};

/// Gaussian outputs of a linearized model.
#[derive(Debug, Clone)]
pub struct Predictive {
    /// The model's outputs `[n, classes]`, f64.
    pub mean: Tensor,
    /// Their covariance by the parameters' uncertainty, `[n, classes, classes]`, f64; a Gaussian likelihood's noise is not in it.
    pub covariance: Tensor,
    pub(super) likelihood: Likelihood,
    pub(super) noise: Noise,
}

/// The noise of a Gaussian likelihood.
#[derive(Debug, Clone)]
pub(super) struct Noise {
    /// Of all outputs.
    pub all: f64,
    /// Of each, over that of all.
    pub each: Option<Vec<f64>>,
}

impl Noise {
    /// `variance` `[n, classes]` with the noise's added.
    pub fn added_to(&self, variance: &Tensor) -> Result<Tensor> {
        let all = self.all * self.all;
        match &self.each {
            Some(each) => {
                let squares = (Tensor::new(each.as_slice(), variance.device())?.sqr()? * all)?;
                variance.broadcast_add(&squares.unsqueeze(0)?)
            }
            None => variance + all,
        }
    }
}

impl Predictive {
    /// The variance of each prediction, `[n, classes]`: that of the outputs, and the noise's with a Gaussian likelihood.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn variance(&self) -> Result<Tensor> {
        let variance = crate::linalg::kron::diagonal(&self.covariance)?;
        match self.likelihood {
            Likelihood::Gaussian => self.noise.added_to(&variance),
            _ => Ok(variance),
        }
    }

    /// The prediction by MacKay's probit approximation, `[n, classes]`: the model's own with every output divided by
    /// `sqrt(1 + pi/8 variance)`. Of a Gaussian likelihood the mean.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn probit(&self) -> Result<Tensor> {
        probit_of(self.likelihood, &self.mean, &crate::linalg::kron::diagonal(&self.covariance)?)
    }

    /// The prediction by the mean over `draws` draws of the outputs, `[n, classes]`, the same for the same seed.
    ///
    /// # Errors
    /// When there are no draws, or a covariance is not positive semi-definite beyond rounding.
    pub fn sampled(&self, draws: usize, seed: u64) -> Result<Tensor> {
        if draws == 0 {
            bail!("posterior: 0 draws, expected 1 or more")
        }
        let (n, classes) = self.mean.dims2()?;
        let roots = (0..n).map(|example| root(&self.covariance.get(example)?, example));
        let root = Tensor::stack(&roots.collect::<Result<Vec<_>>>()?, 0)?;
        let mut sum: Option<Tensor> = None;
        for draw in 0..draws {
            let z: Vec<f64> = (0..n * classes).map(|i| normal(seed, draw as u64, i as u64)).collect();
            let z = Tensor::from_vec(z, (n, classes, 1), self.mean.device())?;
            let outputs = (&self.mean + root.matmul(&z)?.squeeze(2)?)?;
            let part = sum_of_draws(self.likelihood, &outputs.unsqueeze(0)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        match sum {
            Some(sum) => sum / draws as f64,
            None => bail!("posterior: no draws"),
        }
    }
}

/// The mean by MacKay's probit approximation of outputs with these means and variances, `[n, classes]`.
pub(super) fn probit_of(likelihood: Likelihood, mean: &Tensor, variance: &Tensor) -> Result<Tensor> {
    if likelihood == Likelihood::Gaussian {
        return Ok(mean.clone());
    }
    let scale = ((variance * (std::f64::consts::PI / 8.0))? + 1.0)?.sqrt()?;
    likelihood.mean(&(mean / scale)?)
}

/// The sum over draws `[draws, n, classes]` of the outputs of the likelihood's means.
pub(super) fn sum_of_draws(likelihood: Likelihood, outputs: &Tensor) -> Result<Tensor> {
    let means = match likelihood {
        Likelihood::Categorical => softmax_last_dim(outputs)?,
        other => other.mean(outputs)?,
    };
    means.sum(0)
}

/// `R` with `R R^T` the covariance of an input's outputs, f64: a Cholesky factor, or where outputs that always move together make the
/// covariance singular to rounding, eigenvectors times the roots of their eigenvalues.
fn root(covariance: &Tensor, example: usize) -> Result<Tensor> {
    const NAME: &str = "posterior: the covariance of outputs";
    let one = covariance.unsqueeze(0)?;
    if let Ok(lower) = cholesky(&one, NAME) {
        return lower.squeeze(0);
    }
    let found = eigh(&one, NAME)?;
    let values = found.values.flatten_all()?.to_vec1::<f64>()?;
    let (least, most) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
    // Far above what sums in f64 round.
    if least < -1e-6 * most.max(0.0) {
        bail!(
            "{NAME} for input {example} is not positive semi-definite: it has eigenvalues from {least:e} to {most:e}"
        )
    }
    found.vectors.squeeze(0)?.broadcast_mul(&found.values.relu()?.sqrt()?)
}
