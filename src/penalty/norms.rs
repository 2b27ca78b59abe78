//! The mean Euclidean norm of independent Gaussian numbers.

use std::f64::consts::PI;

/// Nodes of the quadrature.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nodes {
    /// Between the logarithms of two nodes.
    step: f64,
    /// The logarithm of the first.
    first: f64,
}

impl Nodes {
    /// For sums kept in f64: errors of about 1e-12.
    pub(super) const FINE: Self = Self { step: 0.3, first: -25. };
    /// For sums kept in f32: errors of about 1e-8.
    pub(super) const COARSE: Self = Self { step: 0.48, first: -14. };
}

/// `E norm(w)` for independent `w_i ~ N(mu_i, s_i^2)`, and its derivatives with respect to `mu` and to `log s`.
///
/// With `phi(t) = E exp(-t norm(w)^2) = prod (1 + 2 t s_i^2)^(-1/2) exp(-t mu_i^2 / (1 + 2 t s_i^2))` and
/// `m = E norm(w)^2 = sum mu_i^2 + s_i^2`,
///
/// `E norm(w) = sqrt(m) - 1 / (2 sqrt(pi)) integral_0^inf (phi(t) - exp(-t m)) t^(-3/2) dt`,
///
/// from `sqrt(q) = 1 / (2 sqrt(pi)) integral (1 - exp(-t q)) t^(-3/2) dt` for `q = norm(w)^2` less that for `q = m`. The
/// difference falls fast at both ends of a logarithmic axis, on which the trapezoidal rule has an error of about
/// `exp(-pi^2 / step)`.
pub(super) fn expected_norm(nodes: Nodes, mu: &[f64], s: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    /// Beyond it the last terms of the slowest integrand, that of a derivative of a weight near zero, are below 1e-10.
    const LAST: f64 = 46.;
    let scale = mu.iter().chain(s).fold(0f64, |m, v| m.max(v.abs()));
    if scale == 0. {
        return (0., vec![0.; mu.len()], vec![0.; mu.len()]);
    }
    // In units in which m = 1.
    let radius = scale * mu.iter().chain(s).map(|v| (v / scale).powi(2)).sum::<f64>().sqrt();
    let squares: Vec<[f64; 2]> =
        mu.iter().zip(s).map(|(mu, s)| [(mu / radius).powi(2), (s / radius).powi(2)]).collect();
    let (mut lost, mut u) = (0., nodes.first);
    let (mut by_mu, mut by_s) = (vec![0.; mu.len()], vec![0.; mu.len()]);
    while u < LAST {
        let t = u.exp();
        let (log_phi, plain) = (log_phi(t, &squares), (-t).exp());
        let phi = log_phi.exp();
        // Both are 1 - t and less, of which the quadrature is to keep all digits.
        let difference = if t < 1. { plain * (log_phi + t).exp_m1() } else { phi - plain };
        let weight = nodes.step * t.sqrt() / PI.sqrt();
        lost += 0.5 * weight / t * difference;
        for ((by_mu, by_s), [mu, s]) in by_mu.iter_mut().zip(&mut by_s).zip(&squares) {
            let shrunk = 1. / (1. + 2. * t * s);
            *by_mu += weight * (phi * shrunk - plain);
            *by_s += weight * (phi * shrunk * (1. - 2. * t * mu * shrunk) - plain);
        }
        if t > 40. && phi * t.sqrt() < 1e-17 {
            break;
        }
        u += nodes.step;
    }
    for ((by_mu, by_s), (mu, s)) in by_mu.iter_mut().zip(&mut by_s).zip(mu.iter().zip(s)) {
        *by_mu = (1. + *by_mu) * mu / radius;
        *by_s = (1. + *by_s) * (s / radius) * s;
    }
    (radius * (1. - lost), by_mu, by_s)
}

/// `log E exp(-t norm(w)^2)` from the squares of means and deviations.
fn log_phi(t: f64, squares: &[[f64; 2]]) -> f64 {
    /// Factors that are multiplied before a logarithm: each is below exp(48).
    const FACTORS: usize = 8;
    let means: f64 = squares.iter().map(|[mu, s]| t * mu / (1. + 2. * t * s)).sum();
    let logs: f64 = if t < 1. {
        squares.iter().map(|[_, s]| (2. * t * s).ln_1p()).sum()
    } else {
        let product = |part: &[[f64; 2]]| part.iter().map(|[_, s]| 1. + 2. * t * s).product::<f64>().ln();
        squares.chunks(FACTORS).map(product).sum()
    };
    -means - 0.5 * logs
}

#[cfg(test)]
mod tests {
    use candle_core::cpu::erf::erf_f64;

    use super::*;

    /// Laplace's mean of an absolute value.
    fn absolute(mu: f64, s: f64) -> f64 {
        let z = mu / s;
        s * (2. / PI).sqrt() * (-0.5 * z * z).exp() + mu * erf_f64(z / 2f64.sqrt())
    }

    fn close(found: f64, expected: f64, error: f64) {
        assert!((found - expected).abs() <= error * expected.abs(), "{found} {expected}");
    }

    #[test]
    fn one_weight_is_the_absolute_value() {
        for scale in [1e-20, 1., 1e20] {
            for (mu, s) in [(0., 1.), (1., 1.), (-3., 0.5), (1., 1e-3), (1., 1e-9), (1e-3, 1.), (2., 0.)] {
                let expected = if s == 0. { 2. } else { absolute(mu, s) };
                for (nodes, error) in [(Nodes::FINE, 1e-12), (Nodes::COARSE, 2e-8)] {
                    let (value, by_mu, by_s) = expected_norm(nodes, &[scale * mu], &[scale * s]);
                    close(value, scale * expected, error);
                    let slope = if s == 0. { 1. } else { erf_f64(mu / s / 2f64.sqrt()) };
                    assert!((by_mu[0] - slope).abs() < 50. * error, "{} {slope}", by_mu[0]);
                    let slope =
                        if s == 0. { 0. } else { s * (2. / PI).sqrt() * (-0.5 * (mu / s).powi(2)).exp() };
                    assert!((by_s[0] / scale - slope).abs() < 50. * error, "{} {slope}", by_s[0]);
                }
            }
        }
    }

    #[test]
    fn equal_deviations_around_zero() {
        // The chi distribution: sqrt(2) Gamma((n + 1) / 2) / Gamma(n / 2), by the recurrence in steps of two.
        let mut means = vec![(2. / PI).sqrt(), (PI / 2.).sqrt()];
        for n in 2..200usize {
            means.push(means[n - 2] * n as f64 / (n as f64 - 1.));
        }
        for (n, mean) in (1..).zip(means) {
            let (value, by_mu, by_s) = expected_norm(Nodes::FINE, &vec![0.; n], &vec![3.; n]);
            close(value, 3. * mean, 1e-12);
            assert!(by_mu.iter().all(|v| *v == 0.));
            // The norm grows with a common deviation.
            close(by_s.iter().sum(), value, 1e-11);
        }
    }

    #[test]
    fn different_deviations() {
        // Over a plane by polar coordinates in units of the deviations, with many points of both.
        let (mu, s) = ([0.7, -0.4], [0.3, 1.1]);
        let (radii, angles, reach) = (1200, 1200, 10.);
        let mut mean = 0.;
        for i in 0..radii {
            let r = (f64::from(i) + 0.5) * reach / f64::from(radii);
            let around: f64 = (0..angles)
                .map(|k| {
                    let (sin, cos) = (2. * PI * f64::from(k) / f64::from(angles)).sin_cos();
                    (mu[0] + s[0] * r * cos).hypot(mu[1] + s[1] * r * sin)
                })
                .sum();
            mean += around / f64::from(angles) * r * (-0.5 * r * r).exp() * reach / f64::from(radii);
        }
        let (value, ..) = expected_norm(Nodes::FINE, &mu, &s);
        close(value, mean, 1e-5);
    }

    #[test]
    fn derivatives() {
        let (mu, s) = (vec![0.7, -0.4, 0., 2., 1e-3], vec![0.3f64, 1.1, 0.5, 1e-3, 0.2]);
        let (_, by_mu, by_s) = expected_norm(Nodes::FINE, &mu, &s);
        let h = 1e-5;
        for i in 0..mu.len() {
            let at = |dm: f64, ds: f64| {
                let (mut mu, mut s) = (mu.clone(), s.clone());
                mu[i] += dm;
                s[i] *= ds.exp();
                expected_norm(Nodes::FINE, &mu, &s).0
            };
            let (of_mu, of_s) = ((at(h, 0.) - at(-h, 0.)) / (2. * h), (at(0., h) - at(0., -h)) / (2. * h));
            assert!((by_mu[i] - of_mu).abs() < 1e-9, "{i}: {} {of_mu}", by_mu[i]);
            assert!((by_s[i] - of_s).abs() < 1e-9, "{i}: {} {of_s}", by_s[i]);
        }
    }
}
