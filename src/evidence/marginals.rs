//! Predictions without the covariances of an example's outputs, and through the structure of a last layer where the posterior is of that
//! alone.
//!
//! Where the outputs are those of a linear layer, `z = W phi + b`, no backward pass a class is needed, and with a posterior
//! `(U_g (x) U_a) diag(v) (U_g (x) U_a)^T` of `W` their covariance is `U_g diag(d) U_g^T`, `d_i = sum_j v_ij (U_a^T phi)_j^2`: for `c` outputs
//! and `p` features `c (c + p)` operations an example, where rows of each output would be `c^2 p`.

use super::bridge::log_dirichlet;
use super::eigenbasis::turned;
use super::examples::Examples;
use super::pass::Pass;
use super::posterior::{Covariance, Posterior};
use super::predictive::{Noise, Predictive, probit_of, sum_of_draws};
use super::problem::Problem;
use crate::ops::dense::product;
use crate::ops::rng::normal;
use crate::ops::softmax::softmax_last_dim;
use crate::tape::Likelihood;
use candle_core::{D, DType, Result, Tensor, bail};

/// Draws whose outputs are made at a time.
const DRAWS: usize = 64;
/// Streams of random numbers, apart from those of [`Predictive::sampled`].
const MARGINAL: u64 = 1 << 40;
const JOINT: u64 = 2 << 40;

/// Gaussian outputs of a linearized model, an example at a time without the covariances of its outputs.
#[derive(Debug, Clone)]
pub struct Marginals {
    /// The model's outputs `[n, classes]`, f64.
    pub mean: Tensor,
    /// Their variances by the parameters' uncertainty, `[n, classes]`, f64; a Gaussian likelihood's noise is not in it.
    pub variance: Tensor,
    draws: Draws,
    likelihood: Likelihood,
    noise: Noise,
}

/// From what draws of the outputs are made.
#[derive(Debug, Clone)]
enum Draws {
    /// The sum of these.
    Factors(Vec<Factor>),
    Covariances(Box<Predictive>),
}

/// `U diag(d) U^T`.
#[derive(Debug, Clone)]
struct Factor {
    /// `[classes, classes]`; none for the unit matrix.
    vectors: Option<Tensor>,
    /// `[n, classes]`, or `[1, classes]` for all inputs.
    d: Tensor,
}

impl Posterior {
    /// What the linearized model predicts for inputs `[n, ..]`, without the covariances of an input's outputs: as [`Posterior::predict`],
    /// whose results these are, and of a last layer alone ([`Problem::of_part`]) with [`HessianStructure::Kron`](super::HessianStructure),
    /// `Rotated` or `Diagonal` without a backward pass for each output, so that outputs may be thousands.
    ///
    /// # Errors
    /// As [`Posterior::predict`].
    pub fn marginals(&self, problem: &Problem<'_>, x: &Tensor) -> Result<Marginals> {
        self.check_inputs(problem, x)?;
        let (mut means, mut variances, mut spreads) = (Vec::new(), Vec::new(), Vec::new());
        let (mut of_weight, mut of_bias) = (None, None);
        for some in Examples::new(x.clone(), x.clone())?.masked_by(&problem.tape)?.passes() {
            let some = some?;
            let pass = problem.pass(&some)?;
            if means.is_empty() {
                pass.refuse_mixing()?;
            }
            let Some(factors) = self.factors(problem, &pass)? else {
                let predicted = self.predict(problem, x)?;
                return Ok(Marginals {
                    mean: predicted.mean.clone(),
                    variance: crate::linalg::kron::diagonal(&predicted.covariance)?,
                    likelihood: self.likelihood,
                    noise: self.noise.clone(),
                    draws: Draws::Covariances(Box::new(predicted)),
                });
            };
            let mean = pass.outputs.detach().to_dtype(DType::F64)?;
            let mut variance = mean.zeros_like()?;
            for Factor { vectors, d } in factors.iter().flatten() {
                let part = match vectors {
                    Some(vectors) => product(d, &vectors.sqr()?.t()?)?,
                    None => d.clone(),
                };
                variance = variance.broadcast_add(&part)?;
            }
            variances.push(variance);
            means.push(mean);
            let [weight, bias] = factors;
            if let Some(Factor { vectors, d }) = weight {
                spreads.push(d);
                of_weight = vectors;
            }
            of_bias = bias;
        }
        let mut factors: Vec<Factor> = of_bias.into_iter().collect();
        if !spreads.is_empty() {
            factors.push(Factor { vectors: of_weight, d: Tensor::cat(&spreads, 0)? });
        }
        Ok(Marginals {
            mean: Tensor::cat(&means, 0)?,
            variance: Tensor::cat(&variances, 0)?,
            draws: Draws::Factors(factors),
            likelihood: self.likelihood,
            noise: self.noise.clone(),
        })
    }

    /// The parts of the weight and of the bias, for a last layer.
    fn factors(&self, problem: &Problem<'_>, pass: &Pass<'_>) -> Result<Option<[Option<Factor>; 2]>> {
        if matches!(self.covariance, Covariance::Full(..)) {
            return Ok(None);
        }
        let Some(last) = pass.last(problem)? else { return Ok(None) };
        let classes = pass.outputs.dim(1)?;
        let mut factors = [None, None];
        if let Some(Variances { inputs, grads, each }) = self.variances_of(last.weight)? {
            let features = turned(&last.features, inputs.as_ref())?.sqr()?;
            let d = product(&features, &each.reshape((classes, ()))?.t()?)?;
            factors[0] = Some(Factor { vectors: grads.map(|grads| grads.squeeze(0)).transpose()?, d });
        }
        if let Some(Variances { grads, each, .. }) = self.variances_of(last.bias)? {
            let vectors = grads.map(|grads| grads.squeeze(0)).transpose()?;
            // The same for all inputs.
            factors[1] = Some(Factor { vectors, d: each.reshape((1, classes))? });
        }
        Ok(Some(factors))
    }

    /// Draws of the outputs for inputs `[n, ..]`, `[draws, n, classes]` in f64: each is of one draw of the parameters, the same for all
    /// inputs and for the same seed, so that what depends on several inputs (the best of them, a sum) can be read off. For a last layer alone,
    /// with [`HessianStructure::Kron`](super::HessianStructure), `Rotated` or `Diagonal`; a Gaussian likelihood's noise is not in it.
    ///
    /// # Errors
    /// When there are no draws, the posterior is of more than the last linear layer, or as [`Posterior::predict`].
    pub fn joint_samples(
        &self,
        problem: &Problem<'_>,
        x: &Tensor,
        draws: usize,
        seed: u64,
    ) -> Result<Tensor> {
        self.check_inputs(problem, x)?;
        if draws == 0 {
            bail!("posterior: 0 draws, expected 1 or more")
        }
        let mut parts = Vec::new();
        for some in Examples::new(x.clone(), x.clone())?.masked_by(&problem.tape)?.passes() {
            let some = some?;
            let pass = problem.pass(&some)?;
            if parts.is_empty() {
                pass.refuse_mixing()?;
            }
            let last = match self.covariance {
                Covariance::Full(..) => None,
                _ => pass.last(problem)?,
            };
            let Some(last) = last else {
                bail!(
                    "posterior: draws for several inputs at once are of the last linear layer alone (Problem::of_part), with Kronecker \
                     factors or a diagonal; this one is {} of {}",
                    self.covariance.structure(),
                    self.names.join(", ")
                )
            };
            let mean = pass.outputs.detach().to_dtype(DType::F64)?;
            let (_, classes) = mean.dims2()?;
            let mut drawn = Vec::new();
            for draw in 0..draws {
                let mut outputs = mean.clone();
                for (part, tensor) in [last.weight, last.bias].into_iter().enumerate() {
                    let Some(Variances { inputs, grads, each: variance }) = self.variances_of(tensor)? else {
                        continue;
                    };
                    let stream = JOINT + 2 * draw as u64 + part as u64;
                    let z = (0..variance.elem_count())
                        .map(|i| normal(seed, stream, i as u64))
                        .collect::<Vec<_>>();
                    let z = Tensor::from_vec(z, variance.dims(), variance.device())?;
                    let scaled = (z * variance.sqrt()?)?.reshape((classes, ()))?;
                    let of_inputs = match part {
                        0 => product(&turned(&last.features, inputs.as_ref())?, &scaled.t()?)?,
                        _ => scaled.t()?.contiguous()?,
                    };
                    outputs = outputs.broadcast_add(&back(&of_inputs, grads.as_ref())?)?;
                }
                drawn.push(outputs);
            }
            parts.push(Tensor::stack(&drawn, 0)?);
        }
        Tensor::cat(&parts, 1)
    }

    /// The variances of a tensor; none of none.
    fn variances_of(&self, tensor: Option<usize>) -> Result<Option<Variances>> {
        let Some(tensor) = tensor else { return Ok(None) };
        Ok(match &self.covariance {
            Covariance::Full(..) => None,
            Covariance::Kron(bases) => match bases.of(tensor) {
                Some(block) => {
                    let (inputs, grads) = (block.inputs.clone(), block.grads.clone());
                    Some(Variances { inputs, grads, each: self.scale(block)? })
                }
                None => None,
            },
            Covariance::Diagonal(variances) => variances
                .iter()
                .find(|(t, _)| *t == tensor)
                .map(|(_, v)| Variances { inputs: None, grads: None, each: v.clone() }),
        })
    }
}

/// Eigenvectors of inputs and gradients of a tensor's block, and the variances in this basis, flattened.
struct Variances {
    inputs: Option<Tensor>,
    grads: Option<Tensor>,
    each: Tensor,
}

/// Rows `[n, classes]` in a basis `[1, classes, classes]`, out of it.
fn back(rows: &Tensor, vectors: Option<&Tensor>) -> Result<Tensor> {
    match vectors {
        Some(vectors) => product(rows, &vectors.squeeze(0)?.t()?),
        None => Ok(rows.clone()),
    }
}

impl Marginals {
    /// The prediction by MacKay's probit approximation, as [`Predictive::probit`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn probit(&self) -> Result<Tensor> {
        probit_of(self.likelihood, &self.mean, &self.variance)
    }

    /// The parameters of the Laplace bridge's Dirichlet distribution, as [`Predictive::dirichlet`].
    ///
    /// # Errors
    /// As [`Predictive::dirichlet`].
    pub fn dirichlet(&self) -> Result<Tensor> {
        self.log_dirichlet()?.exp()
    }

    /// The prediction by the Laplace bridge, as [`Predictive::bridge`], from the factors of the covariances alone.
    ///
    /// # Errors
    /// As [`Predictive::dirichlet`].
    pub fn bridge(&self) -> Result<Tensor> {
        softmax_last_dim(&self.log_dirichlet()?)
    }

    fn log_dirichlet(&self) -> Result<Tensor> {
        let row_sums = match &self.draws {
            Draws::Covariances(predicted) => predicted.covariance.sum(D::Minus1)?,
            Draws::Factors(factors) => {
                let mut sums = self.mean.zeros_like()?;
                for Factor { vectors, d } in factors {
                    // U diag(d) U^T 1
                    let part = match vectors {
                        Some(u) => product(&d.broadcast_mul(&u.sum_keepdim(0)?)?, &u.t()?)?,
                        None => d.clone(),
                    };
                    sums = sums.broadcast_add(&part)?;
                }
                sums
            }
        };
        log_dirichlet(self.likelihood, &self.mean, &self.variance, &row_sums)
    }

    /// The variance of each prediction, `[n, classes]`: that of the outputs, and the noise's with a Gaussian likelihood.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn predictive_variance(&self) -> Result<Tensor> {
        match self.likelihood {
            Likelihood::Gaussian => self.noise.added_to(&self.variance),
            _ => Ok(self.variance.clone()),
        }
    }

    /// The prediction by the mean over `draws` draws of the outputs of each input, with their covariances, `[n, classes]`, the same for
    /// the same seed.
    ///
    /// # Errors
    /// As [`Predictive::sampled`].
    pub fn sampled(&self, draws: usize, seed: u64) -> Result<Tensor> {
        let factors = match &self.draws {
            Draws::Covariances(predicted) => return predicted.sampled(draws, seed),
            Draws::Factors(factors) => factors,
        };
        if draws == 0 {
            bail!("posterior: 0 draws, expected 1 or more")
        }
        let (n, classes) = self.mean.dims2()?;
        let roots = factors.iter().map(|f| Ok((&f.vectors, f.d.sqrt()?))).collect::<Result<Vec<_>>>()?;
        let mut sum = self.mean.zeros_like()?;
        for start in (0..draws).step_by(DRAWS) {
            let count = DRAWS.min(draws - start);
            let mut outputs = self.mean.unsqueeze(0)?.repeat((count, 1, 1))?;
            for (part, (vectors, root)) in roots.iter().enumerate() {
                let stream = |draw: usize| MARGINAL + 2 * (start + draw) as u64 + part as u64;
                let z = (0..count)
                    .flat_map(|draw| (0..n * classes).map(move |i| normal(seed, stream(draw), i as u64)));
                let z = Tensor::from_vec(z.collect::<Vec<f64>>(), (count, n, classes), self.mean.device())?;
                let z = z.broadcast_mul(root)?.flatten(0, 1)?;
                let moved = match vectors {
                    Some(vectors) => product(&z, &vectors.t()?)?,
                    None => z,
                };
                outputs = (outputs + moved.reshape((count, n, classes))?)?;
            }
            sum = (sum + sum_of_draws(self.likelihood, &outputs)?)?;
        }
        sum / draws as f64
    }
}
