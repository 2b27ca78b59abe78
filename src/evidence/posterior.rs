//! The Laplace posterior of the parameters, and what a linearized model predicts under it.
//!
//! The posterior is `N(theta, (s G + P0)^-1)`, the outputs of the linearized model for an input `x` are Gaussian with mean `f(x; theta)`
//! and covariance `J(x) (s G + P0)^-1 J(x)^T` (MacKay 1992; Immer, Korzepa & Bauer, "Improving predictions of Bayesian neural nets
//! via local linearization", AISTATS 2021).

use super::dense::Dense;
use super::diagonal::Diagonal;
use super::hyper::Hyper;
use super::kron::{KronBasis, KronSums};
use super::log_det::{Precision, precision_of};
use super::problem::{Examples, Problem};
use super::rows::{CHUNK, LayerRows, Rows};
use crate::linalg::cholesky::cholesky;
use crate::ops::dense::product;
use crate::ops::rng::normal;
use crate::ops::softmax::softmax_last_dim;
use crate::tape::{Likelihood, Root};
use candle_core::{D, DType, Result, Tensor, bail};

/// What stands for the curvature of a posterior.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HessianStructure {
    /// The generalized Gauss-Newton matrix of all parameters, written out.
    Full,
    /// Kronecker factors of each tensor's block. The default.
    #[default]
    Kron,
    /// The diagonal.
    Diagonal,
}

#[derive(Debug)]
enum Covariance {
    /// `(s G + P0)^-1`, with the tensors in the order of its rows.
    Full(Tensor, Vec<usize>),
    Kron(Vec<KronBasis>),
    /// `(s h + P0)^-1` of each tensor, flattened.
    Diagonal(Vec<(usize, Tensor)>),
}

/// A Gaussian posterior of the parameters at fixed hyperparameters.
#[derive(Debug)]
pub struct Posterior {
    covariance: Covariance,
    s: f64,
    precisions: Vec<Precision>,
    likelihood: Likelihood,
    noise: f64,
}

impl Posterior {
    /// Fits the posterior to `examples` at the present parameters and hyperparameters. `memory`: the most bytes that the full matrix and
    /// its inverse may take.
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
        let noise = hyper.noise()?;
        let s = hyper.scale()?;
        let each = |visit: &mut dyn FnMut(&Rows) -> Result<()>| -> Result<()> {
            for some in examples.passes() {
                let outputs = problem.outputs(&some?)?;
                let columns = problem.likelihood.cotangents(&outputs, Root::Reduced)?;
                visit(&Rows::gather(&problem.tape, &outputs, columns, |layer| problem.tensors_of(layer))?)?;
            }
            Ok(())
        };
        let covariance = match structure {
            HessianStructure::Full => {
                let size: usize = problem.parameters().iter().map(|p| p.tensor.elem_count()).sum();
                let bytes = 32 * (size as u128).pow(2);
                if bytes > memory as u128 {
                    bail!(
                        "posterior: the matrix of {size} parameters would take {bytes} bytes, and {memory} are allowed"
                    )
                }
                let mut sums = Dense::new();
                each(&mut |rows| sums.add(rows))?;
                let (covariance, order) = sums.covariance(s, &precisions)?;
                Covariance::Full(covariance, order)
            }
            HessianStructure::Kron => {
                if precisions.iter().any(|p| matches!(p, Precision::Each(_))) {
                    bail!(
                        "posterior: Kronecker factors need one prior precision a tensor (or layer, or for all), not one a weight"
                    )
                }
                let mut sums = KronSums::default();
                each(&mut |rows| sums.add(rows))?;
                Covariance::Kron(sums.basis()?)
            }
            HessianStructure::Diagonal => {
                let mut sums = Diagonal::default();
                each(&mut |rows| sums.add(rows))?;
                Covariance::Diagonal(sums.covariance(s, &precisions)?)
            }
        };
        Ok(Self { covariance, s, precisions, likelihood: problem.likelihood, noise })
    }

    /// What the linearized model predicts for inputs `[n, ..]`.
    ///
    /// # Errors
    /// When the outputs are not `[n, classes]`, not finite, or the forward fails.
    pub fn predict(&self, problem: &Problem<'_>, x: &Tensor) -> Result<Predictive> {
        if x.dims().first().is_none_or(|&n| n == 0) {
            bail!("posterior: no inputs to predict for, got {:?}", x.dims())
        }
        let (mut means, mut covariances) = (Vec::new(), Vec::new());
        for some in Examples::new(x.clone(), x.clone())?.passes() {
            let outputs = problem.outputs(&some?)?;
            let (_, classes) = outputs.dims2()?;
            let columns = Likelihood::Gaussian.cotangents(&outputs, Root::PerOutput)?;
            let rows = Rows::gather(&problem.tape, &outputs, columns, |layer| problem.tensors_of(layer))?;
            covariances.push(self.covariance_of(&rows)?.reshape(((), classes, classes))?);
            means.push(outputs.detach());
        }
        Ok(Predictive {
            mean: Tensor::cat(&means, 0)?.to_dtype(DType::F64)?,
            covariance: Tensor::cat(&covariances, 0)?.to_dtype(DType::F64)?,
            likelihood: self.likelihood,
            noise: self.noise,
        })
    }

    /// `J Sigma J^T` of each example, `[n, each, each]`.
    fn covariance_of(&self, rows: &Rows) -> Result<Tensor> {
        let per_example = |j: &Tensor| j.reshape((rows.examples, rows.each, ()));
        match &self.covariance {
            Covariance::Full(sigma, order) => {
                let mut parts = vec![None; order.len()];
                let mut put = |tensor: usize, part: Tensor| {
                    if let Some(at) = order.iter().position(|&t| t == tensor) {
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
                for (layer, basis) in rows.layers.iter().zip(bases) {
                    let turned = basis.turn(layer)?;
                    if let Some((tensor, values)) = &basis.weight {
                        add_parts(&mut sum, rows, &turned, &self.scale(*tensor, values)?)?;
                    }
                    if let Some((tensor, vectors, values)) = &basis.bias {
                        let j = match vectors {
                            Some(vectors) => product(&layer.of_bias()?, vectors)?,
                            None => layer.of_bias()?,
                        };
                        let scale = self.scale(*tensor, values)?.sqrt()?.to_dtype(j.dtype())?;
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
    fn scale(&self, tensor: usize, values: &Tensor) -> Result<Tensor> {
        let deltas = precision_of(&self.precisions, tensor)?.flat(values.elem_count(), values.device())?;
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

/// Gaussian outputs of a linearized model.
#[derive(Debug, Clone)]
pub struct Predictive {
    /// The model's outputs `[n, classes]`, f64.
    pub mean: Tensor,
    /// Their covariance by the parameters' uncertainty, `[n, classes, classes]`, f64; a Gaussian likelihood's noise is not in it.
    pub covariance: Tensor,
    likelihood: Likelihood,
    noise: f64,
}

impl Predictive {
    /// The variance of each prediction, `[n, classes]`: that of the outputs, and the noise's with a Gaussian likelihood.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn variance(&self) -> Result<Tensor> {
        let variance = crate::linalg::kron::diagonal(&self.covariance)?;
        match self.likelihood {
            Likelihood::Gaussian => variance + self.noise * self.noise,
            _ => Ok(variance),
        }
    }

    /// The prediction by MacKay's probit approximation, `[n, classes]`: the model's own with every output divided by
    /// `sqrt(1 + pi/8 variance)`. Of a Gaussian likelihood the mean.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn probit(&self) -> Result<Tensor> {
        if self.likelihood == Likelihood::Gaussian {
            return Ok(self.mean.clone());
        }
        let scale = ((self.variance()? * (std::f64::consts::PI / 8.0))? + 1.0)?.sqrt()?;
        self.likelihood.mean(&(&self.mean / scale)?)
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
        let eye = Tensor::eye(classes, DType::F64, self.mean.device())?.unsqueeze(0)?;
        // Outputs that always move together make it singular.
        let jitter = (crate::linalg::kron::diagonal(&self.covariance)?.max_keepdim(D::Minus1)? * 1e-9)?;
        let jitter = (jitter + f64::MIN_POSITIVE.sqrt())?.unsqueeze(2)?;
        let root = cholesky(
            &(&self.covariance + eye.broadcast_mul(&jitter)?)?,
            "posterior: the covariance of outputs",
        )?;
        let mut sum: Option<Tensor> = None;
        for draw in 0..draws {
            let z: Vec<f64> = (0..n * classes).map(|i| normal(seed, draw as u64, i as u64)).collect();
            let z = Tensor::from_vec(z, (n, classes, 1), self.mean.device())?;
            let outputs = (&self.mean + root.matmul(&z)?.squeeze(2)?)?;
            let part = match self.likelihood {
                Likelihood::Categorical => softmax_last_dim(&outputs)?,
                other => other.mean(&outputs)?,
            };
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        found(sum)? / draws as f64
    }
}
