//! The prior that a penalty stands for.
//!
//! Training that minimizes `-log likelihood + r(w)` finds the most probable weights under the prior
//! `exp(-r(w)) / integral exp(-r)`: in variational terms the posterior is a Dirac (Wolinski, Charpiat, Ollivier, "An
//! equivalence between Bayesian priors and penalties in variational inference", arXiv 2002.00178).

use std::f64::consts::{LN_2, PI, TAU};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use crate::ops::rng;

/// A density of weights, independent between blocks of [`size`](Prior::size) of them.
///
/// | of the penalty | density of a block | variance of a weight |
/// |---|---|---|
/// | `b w^2` | `N(0, 1 / 2b)` | `1 / 2b` |
/// | `b abs(w)` | Laplace | `2 / b^2` |
/// | `b norm(w)`, `w` of `n` weights | `b^n Gamma(n/2) / (2 pi^(n/2) Gamma(n)) exp(-b norm(w))` | `(n + 1) / b^2` |
/// | `c cos(f w) + b w^2` | `exp(-c cos(f w) - b w^2)`, normalized numerically | by the same quadrature |
///
/// A tensor's blocks are consecutive elements in row-major order.
///
/// ```
/// use candle_core::{DType, Device, Result};
/// use kronwake::penalty::Prior;
///
/// # fn main() -> Result<()> {
/// let prior = Prior::group_lasso(2.0, 3)?;
/// assert_eq!(prior.variance()?, 1.0);
/// let weights = prior.sample((100, 3), DType::F32, &Device::Cpu, 7, 0)?;
/// assert_eq!(weights.dims(), [100, 3]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prior {
    pub(super) law: Law,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Law {
    Gaussian { factor: f64 },
    Laplace { factor: f64 },
    GroupLasso { factor: f64, size: usize },
    Cosine { amplitude: f64, frequency: f64, decay: f64 },
}

impl Prior {
    /// Of the penalty `factor w^2`: a Gaussian of precision `2 factor`.
    ///
    /// # Errors
    /// Unless the factor is positive and finite.
    pub fn l2(factor: f64) -> Result<Self> {
        Ok(Self { law: Law::Gaussian { factor: positive("L2", "factor", factor)? } })
    }

    /// Of the penalty `factor abs(w)`.
    ///
    /// # Errors
    /// Unless the factor is positive and finite.
    pub fn l1(factor: f64) -> Result<Self> {
        Ok(Self { law: Law::Laplace { factor: positive("L1", "factor", factor)? } })
    }

    /// Of the penalty `factor norm(w)` of groups of `size` weights; a penalty weighted by `sqrt(size)` has `sqrt(size)`
    /// times its own factor here.
    ///
    /// # Errors
    /// Unless the factor is positive and finite and the size positive.
    pub fn group_lasso(factor: f64, size: usize) -> Result<Self> {
        if size == 0 {
            bail!("prior of group lasso: expected groups of one weight or more, got 0")
        }
        Ok(Self { law: Law::GroupLasso { factor: positive("group lasso", "factor", factor)?, size } })
    }

    /// Proportional to `exp(-amplitude cos(frequency w) - decay w^2)`: the prior of the penalty
    /// `amplitude exp(-s^2 frequency^2 / 2) cos(frequency mu) + decay (mu^2 + s^2) - entropy` of Gaussian posteriors
    /// `N(mu, s^2)`.
    ///
    /// Without decay the density is periodic and has no integral: [`Prior::log_density`] gives it unnormalized then and the
    /// other methods fail.
    ///
    /// # Errors
    /// Unless `-5 <= amplitude <= 5` (samples are drawn by rejection, with up to `exp(2 abs(amplitude))` trials on average), the frequency is
    /// positive and the decay is zero or more.
    pub fn cosine(amplitude: f64, frequency: f64, decay: f64) -> Result<Self> {
        if !(-5. ..=5.).contains(&amplitude) {
            bail!("cosine prior: expected an amplitude from -5 to 5, got {amplitude}")
        }
        let frequency = positive("cosine", "frequency", frequency)?;
        if decay != 0. {
            positive("cosine", "decay", decay)?;
        }
        Ok(Self { law: Law::Cosine { amplitude, frequency, decay } })
    }

    /// Weights of a block: 1 for all but group lasso.
    pub fn size(&self) -> usize {
        match self.law {
            Law::GroupLasso { size, .. } => size,
            Law::Gaussian { .. } | Law::Laplace { .. } | Law::Cosine { .. } => 1,
        }
    }

    /// The penalty of one block: minus the logarithm of the unnormalized density.
    fn penalty(&self, block: &[f64]) -> f64 {
        match self.law {
            Law::Gaussian { factor } => factor * block.iter().map(|w| w * w).sum::<f64>(),
            Law::Laplace { factor } => factor * block.iter().map(|w| w.abs()).sum::<f64>(),
            Law::GroupLasso { factor, .. } => factor * norm(block),
            Law::Cosine { amplitude, frequency, decay } => {
                block.iter().map(|w| amplitude * (frequency * w).cos() + decay * w * w).sum()
            }
        }
    }

    /// The sum over the blocks of `w` of the density's logarithm, normalized where it can be.
    ///
    /// # Errors
    /// Where `w` is not made of whole blocks or has numbers that are not finite.
    pub fn log_density(&self, w: &[f64]) -> Result<f64> {
        let size = self.size();
        if !w.len().is_multiple_of(size) {
            bail!("log density of a prior: {} weights found, expected blocks of {size}", w.len())
        }
        if let Some((at, value)) = w.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            bail!("log density of a prior: weight {at} is {value}, expected finite weights")
        }
        let normalizer = if self.is_proper() { self.log_normalizer()? } else { 0. };
        let blocks = (w.len() / size) as f64;
        Ok(-w.chunks_exact(size).map(|block| self.penalty(block)).sum::<f64>() - blocks * normalizer)
    }

    /// Whether the density has an integral: all but a cosine's without decay.
    pub fn is_proper(&self) -> bool {
        match self.law {
            Law::Cosine { decay, .. } => decay != 0.,
            Law::Gaussian { .. } | Law::Laplace { .. } | Law::GroupLasso { .. } => true,
        }
    }

    fn check_proper(&self, what: &str) -> Result<()> {
        if !self.is_proper() {
            bail!("{what} of the cosine prior: it is periodic and has no integral, expected a decay above 0")
        }
        Ok(())
    }

    /// `log integral exp(-r(w)) dw` over a block.
    ///
    /// # Errors
    /// Where there is no integral.
    pub fn log_normalizer(&self) -> Result<f64> {
        self.check_proper("log normalizer")?;
        Ok(match self.law {
            Law::Gaussian { factor } => 0.5 * (PI.ln() - factor.ln()),
            Law::Laplace { factor } => LN_2 - factor.ln(),
            Law::GroupLasso { factor, size } => {
                // The area of the unit sphere times the integral of r^(n-1) exp(-b r).
                let n = size as f64;
                LN_2 + 0.5 * n * PI.ln() - ln_gamma(0.5 * n) + ln_gamma(n) - n * factor.ln()
            }
            Law::Cosine { amplitude, frequency, decay } => {
                let s = (0.5 / decay).sqrt();
                0.5 * (PI.ln() - decay.ln()) + tilted(amplitude, frequency * s, |_| 1.).ln()
            }
        })
    }

    /// The variance of each weight; the mean is 0.
    ///
    /// # Errors
    /// Where the density has no integral.
    pub fn variance(&self) -> Result<f64> {
        self.check_proper("variance")?;
        Ok(match self.law {
            Law::Gaussian { factor } => 0.5 / factor,
            Law::Laplace { factor } => 2. / (factor * factor),
            Law::GroupLasso { factor, size } => (size as f64 + 1.) / (factor * factor),
            Law::Cosine { amplitude, frequency, decay } => {
                let turn = frequency * (0.5 / decay).sqrt();
                let ratio = tilted(amplitude, turn, |z| z * z) / tilted(amplitude, turn, |_| 1.);
                ratio * 0.5 / decay
            }
        })
    }

    /// Draws independent blocks that fill a tensor in row-major order: a function of `seed`, `stream` and the place alone
    /// ([`rng`]).
    ///
    /// # Errors
    /// Where the density has no integral or the shape is not made of whole blocks.
    pub fn sample(
        &self,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
        seed: u64,
        stream: u64,
    ) -> Result<Tensor> {
        self.check_proper("sample")?;
        let (shape, size) = (shape.into(), self.size());
        let len = shape.elem_count();
        if !len.is_multiple_of(size) {
            bail!("sample of a prior: expected a shape of whole blocks of {size} weights, got {shape:?}")
        }
        /// Where a second number of the same place comes from.
        const SECOND: u64 = 1 << 63;
        let normal = |i: u64| rng::normal(seed, stream, i);
        let uniform = |i: u64| rng::uniform(seed, stream, i);
        let coordinate = |i: u64| match self.law {
            Law::Gaussian { factor } => (0.5 / factor).sqrt() * normal(i),
            Law::Laplace { factor } => {
                let u = 2. * uniform(i);
                let (sign, u) = if u < 1. { (1., u) } else { (-1., u - 1.) };
                -sign * (1. - u).ln() / factor
            }
            Law::GroupLasso { .. } => normal(i),
            Law::Cosine { amplitude, frequency, decay } => {
                let s = (0.5 / decay).sqrt();
                let mut trial = i;
                loop {
                    let w = s * normal(trial);
                    let accepted = (-amplitude * (frequency * w).cos() - amplitude.abs()).exp();
                    if uniform(trial | SECOND) < accepted {
                        break w;
                    }
                    // Beyond the places of any tensor.
                    trial += 1 << 40;
                }
            }
        };
        let mut w: Vec<f64> = (0..len as u64).map(coordinate).collect();
        if let Law::GroupLasso { factor, size } = self.law {
            for (block, w) in w.chunks_exact_mut(size).enumerate() {
                // The radius is Gamma(n, b): a sum of n exponential numbers.
                let first = (block * size) as u64;
                let places = (first..first + size as u64).map(|i| i | SECOND);
                let radius = -places.map(|i| (1. - uniform(i)).ln()).sum::<f64>() / factor;
                // Zero once in 2^53 draws of a group of one.
                let length = norm(w).max(f64::MIN_POSITIVE);
                w.iter_mut().for_each(|w| *w *= radius / length);
            }
        }
        Tensor::from_vec(w, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }
}

fn positive(prior: &str, what: &str, value: f64) -> Result<f64> {
    if !(value.is_finite() && value > 0.) {
        bail!("{prior} prior: expected a positive finite {what}, got {value}")
    }
    Ok(value)
}

/// The Euclidean norm, without overflow.
fn norm(w: &[f64]) -> f64 {
    let max = w.iter().fold(0f64, |m, v| m.max(v.abs()));
    if max == 0. { 0. } else { max * w.iter().map(|v| (v / max).powi(2)).sum::<f64>().sqrt() }
}

/// `E f(z) exp(-amplitude cos(turn z))` of a standard normal `z`.
///
/// By the trapezoidal rule, whose error for an analytic function falls as `exp(-2 pi^2 / (step of its fastest frequency))`.
/// Where the cosine turns often within the Gaussian, its mean over a period stands for it: what is left out is
/// `exp(-turn^2 / 2)`.
fn tilted(amplitude: f64, turn: f64, f: impl Fn(f64) -> f64) -> f64 {
    const RANGE: f64 = 10.;
    const OFTEN: f64 = 9.5;
    if turn > OFTEN {
        let points = 128;
        let period = (0..points).map(|k| (-amplitude * (TAU * f64::from(k) / f64::from(points)).cos()).exp());
        return period.sum::<f64>() / f64::from(points) * tilted(0., 0., f);
    }
    // Frequencies up to 9 of the Gaussian, and 40 harmonics of the cosine, are held.
    let half = (RANGE * (9. + 40. * turn)).ceil();
    let step = RANGE / half;
    let mut sum = 0.;
    for k in -(half as i64)..=half as i64 {
        let z = k as f64 * step;
        sum += f(z) * (-amplitude * (turn * z).cos() - 0.5 * z * z).exp();
    }
    sum * step / TAU.sqrt()
}

/// `log Gamma(x)` for `x >= 0.5`: Stirling's series beyond 10, reached by the recurrence.
fn ln_gamma(mut x: f64) -> f64 {
    let mut product = 1.;
    while x < 10. {
        product *= x;
        x += 1.;
    }
    let y = 1. / (x * x);
    let series = (1. / 12. - y * (1. / 360. - y * (1. / 1260. - y * (1. / 1680. - y / 1188.)))) / x;
    (x - 0.5) * x.ln() - x + 0.5 * TAU.ln() + series - f64::ln(product)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma() {
        let mut expected = 0.;
        for n in 1..200u32 {
            // Gamma(n), and Gamma(n) Gamma(n + 1/2) = 2^(1 - 2n) sqrt(pi) Gamma(2n).
            let n = f64::from(n);
            assert!((ln_gamma(n) - expected).abs() < 1e-13 * (1. + expected), "{n}");
            let twice = ln_gamma(n) + ln_gamma(n + 0.5) - (1. - 2. * n) * LN_2 - 0.5 * PI.ln();
            assert!((twice - ln_gamma(2. * n)).abs() < 1e-12 * (1. + ln_gamma(2. * n)), "{n}");
            expected += n.ln();
        }
        assert!((ln_gamma(0.5) - 0.5 * PI.ln()).abs() < 1e-14);
    }

    /// `integral f` from `from` to `to` by Gauss's rule of two points on many pieces.
    fn integral(from: f64, to: f64, f: impl Fn(f64) -> f64) -> f64 {
        let pieces = 4000;
        let h = (to - from) / f64::from(pieces);
        let at = |k: i32, sign: f64| f(from + h * (f64::from(k) + 0.5 + sign * 0.5 / 3f64.sqrt()));
        (0..pieces).map(|k| at(k, -1.) + at(k, 1.)).sum::<f64>() * 0.5 * h
    }

    #[test]
    fn normalizers_and_variances() -> Result<()> {
        for (prior, range) in [
            (Prior::l2(0.3)?, 20.),
            (Prior::l2(7e4)?, 0.1),
            (Prior::l1(2.5)?, 20.),
            (Prior::cosine(2., 3., 0.4)?, 15.),
            (Prior::cosine(-4., 0.05, 0.4)?, 15.),
            (Prior::cosine(5., 40., 0.4)?, 15.),
            (Prior::cosine(5., 1., 0.01)?, 90.),
        ] {
            let normalizer = prior.log_normalizer()?;
            let at = |w: f64| (-prior.penalty(&[w]) - normalizer).exp();
            // The pieces meet at Laplace's kink.
            let total = 2. * integral(0., range, at);
            let square = 2. * integral(0., range, |w| w * w * at(w));
            assert!((total - 1.).abs() < 1e-10, "{prior:?}: {total}");
            let variance = prior.variance()?;
            assert!((square / variance - 1.).abs() < 1e-10, "{prior:?}: {square}, {variance}");
        }
        // A group's: over the plane and over space by spheres of areas 2 pi r and 4 pi r^2, on the line as Laplace's.
        for (size, area) in [(2, TAU), (3, 2. * TAU)] {
            let prior = Prior::group_lasso(1.5, size)?;
            let at = |r: f64| {
                let mut w = vec![0.; size];
                w[size - 1] = r;
                area * r.powi(size as i32 - 1) * prior.log_density(&w).map_or(f64::NAN, f64::exp)
            };
            assert!((integral(0., 40., at) - 1.).abs() < 1e-10);
            let variance = integral(0., 40., |r| r * r * at(r)) / size as f64;
            assert!((variance - prior.variance()?).abs() < 1e-9);
        }
        let (line, laplace) = (Prior::group_lasso(3., 1)?, Prior::l1(3.)?);
        assert!((line.log_normalizer()? - laplace.log_normalizer()?).abs() < 1e-13);
        assert_eq!(line.variance()?, laplace.variance()?);
        Ok(())
    }

    #[test]
    fn extremes() -> Result<()> {
        for factor in [1e-20, 1e20] {
            for prior in [Prior::l2(factor)?, Prior::l1(factor)?, Prior::group_lasso(factor, 100_000)?] {
                let zeros = vec![0.; prior.size()];
                assert!(prior.log_density(&zeros)?.is_finite());
                assert_eq!(prior.log_density(&zeros)?, -prior.log_normalizer()?);
            }
        }
        assert!((norm(&[3e200, -4e200]) / 5e200 - 1.).abs() < 1e-15);
        let sample = Prior::l1(1e20)?.sample(1000, DType::F32, &Device::Cpu, 0, 0)?.to_vec1::<f32>()?;
        assert!(sample.iter().all(|v| v.is_finite()));
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        for bad in [0., -1., f64::NAN, f64::INFINITY] {
            assert!(
                Prior::l2(bad).is_err() && Prior::l1(bad).is_err() && Prior::group_lasso(bad, 2).is_err()
            );
            assert!(Prior::cosine(1., bad, 1.).is_err());
        }
        assert!(Prior::group_lasso(1., 0).is_err());
        assert!(Prior::cosine(5.1, 1., 1.).is_err() && Prior::cosine(f64::NAN, 1., 1.).is_err());
        assert!(Prior::cosine(1., 1., -1.).is_err());
        let periodic = Prior::cosine(1., 2., 0.)?;
        assert!((periodic.log_density(&[0.3])? + 0.6f64.cos()).abs() < 1e-15);
        assert!(periodic.log_normalizer().is_err() && periodic.variance().is_err());
        assert!(periodic.sample(3, DType::F32, &Device::Cpu, 0, 0).is_err());
        let groups = Prior::group_lasso(1., 3)?;
        assert!(groups.log_density(&[1.; 4]).is_err() && groups.log_density(&[1., f64::NAN, 0.]).is_err());
        assert!(groups.sample((2, 2), DType::F32, &Device::Cpu, 0, 0).is_err());
        Ok(())
    }
}
