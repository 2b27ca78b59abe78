//! Variational inference with a Gaussian for each weight (Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight uncertainty in
//! neural networks", 2015), with exact divergences from the priors of penalties.
//!
//! For a posterior `q = N(mu, s^2)`, independent between weights, and a prior `alpha = exp(-r) / Z`,
//! `KL(q || alpha) = E_q r(w) - sum (log s + 1/2 log 2 pi e) + log Z` with
//!
//! | `r(w)` | `E_q r(w)` |
//! |---|---|
//! | `b w^2` | `b (mu^2 + s^2)` |
//! | `b abs(w)` | `b [s sqrt(2 / pi) exp(-z^2 / 2) + mu erf(z / sqrt 2)]`, `z = mu / s` |
//! | `b norm(w)` | a quadrature in one variable, for any `s` in a group; exact to about 1e-12 in f64, 1e-8 else |
//! | `c cos(f w) + b w^2` | `c exp(-s^2 f^2 / 2) cos(f mu) + b (mu^2 + s^2)` |

use std::f64::consts::{E, PI, TAU};

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use rayon::prelude::*;

use super::{
    Prior,
    norms::{Nodes, expected_norm},
    prior::Law,
};
use crate::ops::rng;

/// `KL(N(mu, exp(log_s)^2) || prior)` summed over all weights: a scalar in f32, or f64 for f64, differentiable in `mu` and
/// `log_s`, which have equal shapes and dtypes.
///
/// The divergence from a group-lasso prior is computed on the host, wherever the tensors are, at about a hundred evaluations
/// of its integrand per group. Its arguments must be finite; elsewhere NaN gives NaN.
///
/// # Errors
/// Where shapes or dtypes differ, where there are no whole groups, and for a prior without an integral.
pub fn kl(prior: &Prior, mu: &Tensor, log_s: &Tensor) -> Result<Tensor> {
    if mu.dims() != log_s.dims() || mu.dtype() != log_s.dtype() {
        let (m, s) = ((mu.dims(), mu.dtype()), (log_s.dims(), log_s.dtype()));
        bail!("kl: expected mu and log_s of one shape and dtype, got {m:?} and {s:?}")
    }
    let (len, size) = (mu.elem_count(), prior.size());
    if !len.is_multiple_of(size) {
        bail!("kl: expected whole groups of {size} weights, got {:?}", mu.dims())
    }
    let wide = match mu.dtype() {
        DType::F64 => DType::F64,
        DType::F32 | DType::F16 | DType::BF16 => DType::F32,
        other => bail!("kl: dtype {other:?} found, expected f32, f64, f16 or bf16"),
    };
    let (mu, log_s) = (mu.to_dtype(wide)?, log_s.to_dtype(wide)?);
    let expected = match prior.law {
        Law::Gaussian { factor } => expected_square(factor, &mu, &log_s)?,
        Law::Laplace { factor } => (expected_absolute(&mu, &log_s)? * factor)?,
        Law::GroupLasso { factor, size } => (expected_norms(&mu, &log_s, size)? * factor)?,
        Law::Cosine { amplitude, frequency, decay } => {
            let narrowed = ((&log_s * 2.)?.exp()? * (-0.5 * frequency * frequency))?.exp()?;
            let waves = (narrowed * (&mu * frequency)?.cos()?)?.sum_all()?;
            ((waves * amplitude)? + expected_square(decay, &mu, &log_s)?)?
        }
    };
    let constant = (len / size) as f64 * prior.log_normalizer()? - len as f64 * 0.5 * (TAU * E).ln();
    (expected - log_s.sum_all()?)? + constant
}

/// `factor sum (mu^2 + s^2)`.
fn expected_square(factor: f64, mu: &Tensor, log_s: &Tensor) -> Result<Tensor> {
    (mu.sqr()? + (log_s * 2.)?.exp()?)?.sum_all()? * factor
}

/// `sum E abs(w)`.
fn expected_absolute(mu: &Tensor, log_s: &Tensor) -> Result<Tensor> {
    let (m, log_s0) = (mu.detach(), log_s.detach());
    // A deviation of zero would make 0 / 0 of a mean of zero.
    let least = if m.dtype() == DType::F64 { f64::MIN_POSITIVE } else { f32::MIN_POSITIVE.into() };
    let s = log_s0.exp()?.maximum(least)?;
    let z = (&m / &s)?;
    let by_log_s = ((s * (z.sqr()? * -0.5)?.exp()?)? * (2. / PI).sqrt())?;
    let by_mu = (z * 0.5f64.sqrt())?.erf()?;
    let value = (&by_log_s + (&m * &by_mu)?)?.sum_all()?;
    // The two terms are the derivatives too. Candle's own would have infinity times zero where z^2 overflows.
    with_derivatives(value, [(mu, by_mu), (log_s, by_log_s)])
}

/// `sum E norm(w)` over groups of `size` consecutive weights.
fn expected_norms(mu: &Tensor, log_s: &Tensor, size: usize) -> Result<Tensor> {
    let host = |x: &Tensor| -> Result<Vec<f64>> {
        x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
    };
    let (m, s) = (host(mu)?, host(log_s)?);
    for (name, values) in [("mu", &m), ("log_s", &s)] {
        if let Some((at, value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            bail!("kl: element {at} of {name} is {value}, expected finite numbers")
        }
    }
    let nodes = if mu.dtype() == DType::F64 { Nodes::FINE } else { Nodes::COARSE };
    let of_group = |(mu, log_s): (&[f64], &[f64])| {
        let s: Vec<f64> = log_s.iter().map(|v| v.exp()).collect();
        expected_norm(nodes, mu, &s)
    };
    let groups: Vec<_> =
        m.par_chunks_exact(size).zip(s.par_chunks_exact(size)).with_min_len(16).map(of_group).collect();
    let (mut value, mut by_mu, mut by_log_s) = (0., Vec::with_capacity(m.len()), Vec::with_capacity(m.len()));
    for (norm, of_mu, of_log_s) in groups {
        value += norm;
        by_mu.extend(of_mu);
        by_log_s.extend(of_log_s);
    }
    let back = |x: Vec<f64>| -> Result<Tensor> {
        Tensor::from_vec(x, mu.shape(), &Device::Cpu)?.to_dtype(mu.dtype())?.to_device(mu.device())
    };
    let value = Tensor::new(value, &Device::Cpu)?.to_dtype(mu.dtype())?.to_device(mu.device())?;
    with_derivatives(value, [(mu, back(by_mu)?), (log_s, back(by_log_s)?)])
}

/// The scalar `value` with the given derivatives with respect to tensors, through terms whose value is zero.
fn with_derivatives(value: Tensor, derivatives: [(&Tensor, Tensor); 2]) -> Result<Tensor> {
    derivatives
        .into_iter()
        .try_fold(value, |sum, (x, derivative)| sum + (derivative.detach() * (x - x.detach())?)?.sum_all()?)
}

/// A Gaussian posterior, independent between the weights of one tensor, and their prior.
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_nn::{AdamW, Optimizer, ParamsAdamW};
/// use kronwake::penalty::{MeanField, Prior, variational_loss};
///
/// # fn main() -> Result<()> {
/// // y = 2 x with noise of variance 1.
/// let x = Tensor::new(&[[1f32], [-1.], [0.5], [2.]], &Device::Cpu)?;
/// let y = (&x * 2.)?;
/// let start = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?;
/// let weights = MeanField::new(&start, 0.1, Prior::l2(0.5)?, 0)?;
/// let params = ParamsAdamW { lr: 0.02, weight_decay: 0.0, ..Default::default() };
/// let mut optimizer = AdamW::new(weights.vars(), params)?;
/// for step in 0..300 {
///     let errors = (x.matmul(&weights.sample(step)?.t()?)? - &y)?;
///     let mean_nll = (errors.sqr()?.mean_all()? * 0.5)?;
///     optimizer.backward_step(&variational_loss(&mean_nll, &[&weights], 4)?)?;
/// }
/// // Exactly: N(12.5 / 7.25, 1 / 7.25).
/// let mean = weights.mean().flatten_all()?.to_vec1::<f32>()?[0];
/// assert!((mean - 12.5 / 7.25).abs() < 0.2);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MeanField {
    mean: Var,
    log_scale: Var,
    prior: Prior,
    seed: u64,
}

impl MeanField {
    /// New variables: the means start at `init`, every deviation at `scale`, in `init`'s dtype. Tensors of equal seed draw
    /// equal noise: give each its own.
    ///
    /// # Errors
    /// Unless the scale is positive and finite, the dtype a float, `init` finite and made of whole blocks of the prior, and the prior has an
    /// integral.
    pub fn new(init: &Tensor, scale: f64, prior: Prior, seed: u64) -> Result<Self> {
        if !(scale.is_finite() && scale > 0.) {
            bail!("mean field: expected a positive finite scale, got {scale}")
        }
        let log_scale = Tensor::full(scale.ln(), init.shape(), init.device())?.to_dtype(init.dtype())?;
        let start = kl(&prior, init, &log_scale)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if !start.is_finite() {
            bail!(
                "mean field: the divergence of the start from its prior is {start}, expected finite weights"
            )
        }
        let (mean, log_scale) = (Var::from_tensor(&init.detach().copy()?)?, Var::from_tensor(&log_scale)?);
        Ok(Self { mean, log_scale, prior, seed })
    }

    /// The posterior's means.
    pub fn mean(&self) -> &Var {
        &self.mean
    }

    /// The logarithms of the posterior's standard deviations.
    pub fn log_scale(&self) -> &Var {
        &self.log_scale
    }

    /// Both, for an optimizer.
    pub fn vars(&self) -> Vec<Var> {
        vec![self.mean.clone(), self.log_scale.clone()]
    }

    /// Weights `mean + exp(log_scale) e`, differentiable in both, with standard normal `e` that are a function of the seed,
    /// the step and the place alone.
    ///
    /// # Errors
    /// Those of candle's operations, where the device has no memory left.
    pub fn sample(&self, step: u64) -> Result<Tensor> {
        let noise = |i: usize| rng::normal(self.seed, step, i as u64);
        let noise: Vec<f64> =
            (0..self.mean.elem_count()).into_par_iter().with_min_len(4096).map(noise).collect();
        let noise = Tensor::from_vec(noise, self.mean.shape(), &Device::Cpu)?
            .to_dtype(self.mean.dtype())?
            .to_device(self.mean.device())?;
        self.mean.as_tensor() + (self.log_scale.exp()? * noise)?
    }

    /// The divergence from the prior, see [`kl`].
    ///
    /// # Errors
    /// As for [`kl`].
    pub fn kl(&self) -> Result<Tensor> {
        kl(&self.prior, &self.mean, &self.log_scale)
    }
}

/// `mean_nll + sum kl / examples`, in the dtype of `mean_nll`: minus the evidence's lower bound per example, where `mean_nll`
/// is the mean over the batch of minus the log likelihood under weights from [`MeanField::sample`].
///
/// # Errors
/// Where `examples`, the number of training examples, is 0.
pub fn variational_loss(mean_nll: &Tensor, layers: &[&MeanField], examples: usize) -> Result<Tensor> {
    if examples == 0 {
        bail!("variational loss: there are no examples")
    }
    layers.iter().try_fold(mean_nll.clone(), |loss, layer| {
        loss + (layer.kl()? / examples as f64)?.to_dtype(mean_nll.dtype())?
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::testing::{check_gradients, random, random_var, values};

    fn priors() -> Result<[Prior; 4]> {
        Ok([Prior::l2(0.7)?, Prior::l1(1.3)?, Prior::group_lasso(0.9, 3)?, Prior::cosine(1.5, 2., 0.3)?])
    }

    #[test]
    fn gradients() -> Result<()> {
        for prior in priors()? {
            check_gradients(&[random_var(0, &[4, 3])?, random_var(1, &[4, 3])?], |args| {
                kl(&prior, &args[0], &args[1])
            });
        }
        Ok(())
    }

    #[test]
    fn against_samples_of_the_posterior() -> Result<()> {
        let (mu, log_s) = (random(0, &[2, 3])?, random(1, &[2, 3])?);
        let (m, l) = (values(&mu)?, values(&log_s)?);
        for prior in priors()? {
            let n = 10_000;
            let (mut sum, mut squares) = (0., 0.);
            for draw in 0..n {
                let e: Vec<f64> = (0..6).map(|i| rng::normal(3, draw, i)).collect();
                let w: Vec<f64> = (0..6).map(|i| m[i] + l[i].exp() * e[i]).collect();
                let log_q: f64 = (0..6).map(|i| -l[i] - 0.5 * TAU.ln() - 0.5 * e[i] * e[i]).sum();
                let term = log_q - prior.log_density(&w)?;
                sum += term;
                squares += term * term;
            }
            let mean = sum / n as f64;
            let error = ((squares / n as f64 - mean * mean) / n as f64).sqrt();
            let exact: f64 = kl(&prior, &mu, &log_s)?.to_scalar()?;
            assert!((mean - exact).abs() < 5. * error, "{prior:?}: {mean} +- {error}, {exact}");
        }
        Ok(())
    }

    proptest! {
        /// A divergence is never negative, whatever the shapes and scales.
        #[test]
        fn is_not_negative(
            groups in 1usize..5, size in 1usize..9, stream in 0u64..1000, mean in -20f64..20., scale in -20f64..20.,
            factor in -20f64..20.,
        ) {
            let of = |stream, scale: f64| random(stream, &[groups, size]).and_then(|x| x * 10f64.powf(scale));
            let mu = of(stream, mean).unwrap();
            let log_s = (random(stream + 1, &[groups, size]).unwrap() + scale * 10f64.ln()).unwrap();
            let factor = 10f64.powf(factor);
            for prior in [Prior::l2(factor), Prior::l1(factor), Prior::group_lasso(factor, size)] {
                let value = kl(&prior.unwrap(), &mu, &log_s).and_then(|v| v.to_scalar::<f64>()).unwrap();
                prop_assert!(value >= 0. && value.is_finite(), "{value}");
            }
        }
    }

    #[test]
    fn equal_gaussians_do_not_diverge() -> Result<()> {
        let (mu, log_s) =
            (Tensor::zeros(5, DType::F64, &Device::Cpu)?, Tensor::full(-0.5 * 6f64.ln(), 5, &Device::Cpu)?);
        assert!(kl(&Prior::l2(3.)?, &mu, &log_s)?.to_scalar::<f64>()?.abs() < 1e-14);
        Ok(())
    }

    #[test]
    fn extremes() -> Result<()> {
        // Means and deviations of very different size, zeros, in all dtypes: finite, with finite gradients.
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mu = Tensor::new(&[0f64, 0., 1., -1e4, 1e-7, 1e4], &Device::Cpu)?.to_dtype(dtype)?;
            let log_s = Tensor::new(&[-200f64, 3., -200., -90., 0., 5.], &Device::Cpu)?.to_dtype(dtype)?;
            let (mu, log_s) = (Var::from_tensor(&mu)?, Var::from_tensor(&log_s)?);
            for prior in priors()? {
                let value = kl(&prior, &mu, &log_s)?;
                assert_eq!(value.dtype(), if dtype == DType::F64 { dtype } else { DType::F32 });
                let grads = value.backward()?;
                let found = [Some(&value), grads.get(&mu), grads.get(&log_s)].into_iter().flatten();
                let found: Vec<_> = found.map(values).collect::<Result<_>>()?;
                assert!(
                    found.len() == 3 && found.iter().flatten().all(|v| v.is_finite()),
                    "{prior:?} {found:?}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn dtypes_agree() -> Result<()> {
        let (mu, log_s) = (random(0, &[5, 6])?, random(1, &[5, 6])?);
        for prior in priors()? {
            let exact: f64 = kl(&prior, &mu, &log_s)?.to_scalar()?;
            for (dtype, error) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
                let narrow = kl(&prior, &mu.to_dtype(dtype)?, &log_s.to_dtype(dtype)?)?.to_scalar::<f32>()?;
                assert!((f64::from(narrow) / exact - 1.).abs() < error, "{dtype:?} {narrow} {exact}");
            }
        }
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        let (mu, other) = (random(0, &[2, 2])?, random(1, &[4])?);
        assert!(kl(&Prior::l2(1.)?, &mu, &other).is_err());
        assert!(kl(&Prior::l2(1.)?, &mu, &mu.to_dtype(DType::F32)?).is_err());
        assert!(kl(&Prior::group_lasso(1., 3)?, &mu, &mu).is_err());
        assert!(kl(&Prior::cosine(1., 1., 0.)?, &mu, &mu).is_err());
        let nan = (&mu * f64::NAN)?;
        assert!(kl(&Prior::group_lasso(1., 2)?, &nan, &mu).is_err());
        assert!(MeanField::new(&nan, 0.1, Prior::l2(1.)?, 0).is_err());
        for scale in [0., -1., f64::NAN, f64::INFINITY] {
            assert!(MeanField::new(&mu, scale, Prior::l2(1.)?, 0).is_err());
        }
        let layer = MeanField::new(&mu, 0.1, Prior::l2(1.)?, 0)?;
        assert!(variational_loss(&mu.sum_all()?, &[&layer], 0).is_err());
        Ok(())
    }
}
