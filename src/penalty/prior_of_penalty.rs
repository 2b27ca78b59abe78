//! Whether a penalty is the divergence of a variational posterior from some prior, and from which.
//!
//! Source: Wolinski, Charpiat, Ollivier, arXiv 2002.00178. For posteriors that are translates `q(w - mu)` of a density of
//! scale `s` and entropy `H`, `r(mu, s)` is `KL(q || alpha)` up to a constant exactly when
//!
//! `A = -Finv[F(r(., s) + H(s)) / F(q(-.))]`
//!
//! is a function, is the same for all `s`, and `exp(A)` is integrable; the prior is `alpha = exp(A) / integral exp(A)`.

use std::f64::consts::{E, TAU};

use candle_core::{Result, bail, cpu::erf::erf_f64};

use super::{
    admissibility::{Admissibility, ends},
    fft::{Complex, frequency, inverse, transform},
};

/// The posteriors of one weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PosteriorFamily<'a> {
    /// All at one point (maximum a posteriori): `A = -r(mu, 0)`.
    Dirac,
    /// `N(mu, s^2)` for two or more of these `s`.
    Gaussian(&'a [f64]),
}

/// Where a prior is looked for, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// The prior is found from `-half_width` to `half_width`, from penalties at twice those: at least 20 times the largest
    /// `s`.
    pub half_width: f64,
    /// Points at which a penalty is evaluated, from `-2 half_width` to `2 half_width`: a power of two from 64 to 4096, and
    /// so many that two lie within the smallest `s`.
    pub points: usize,
    /// Frequencies `w` at which a posterior's transform `exp(-s^2 w^2 / 2)` is below it are left out, as the quotient is
    /// rounding there: from 1e-9 to 1e-2.
    pub regularization: f64,
}

impl Grid {
    /// 4096 points and a regularization of 1e-6.
    pub fn new(half_width: f64) -> Self {
        Self { half_width, points: 4096, regularization: 1e-6 }
    }

    fn check(&self, posterior: PosteriorFamily) -> Result<()> {
        let Self { half_width, points, regularization } = *self;
        if !(half_width.is_finite() && half_width > 0.) {
            bail!("grid of a prior: expected a positive finite half_width, got {half_width}")
        }
        if !points.is_power_of_two() || !(64..=4096).contains(&points) {
            bail!("grid of a prior: expected a power of two of points from 64 to 4096, got {points}")
        }
        if !(1e-9..=1e-2).contains(&regularization) {
            bail!("grid of a prior: expected a regularization from 1e-9 to 1e-2, got {regularization}")
        }
        let scales = match posterior {
            PosteriorFamily::Dirac => None,
            PosteriorFamily::Gaussian(scales) => Some(scales),
        };
        if let Some(scales) = scales {
            if scales.len() < 2 {
                bail!("grid of a prior: {} scales of posteriors found, expected two or more", scales.len())
            }
            let (least, most) = (8. * half_width / points as f64, half_width / 20.);
            if let Some(s) = scales.iter().find(|s| !(least..=most).contains(*s)) {
                bail!("grid of a prior: expected scales of posteriors from {least} to {most}, got {s}")
            }
        }
        Ok(())
    }

    fn step(&self) -> f64 {
        4. * self.half_width / self.points as f64
    }

    /// Point `j` of all; the prior's are the inner half.
    fn at(&self, j: usize) -> f64 {
        j as f64 * self.step() - 2. * self.half_width
    }
}

/// Deconvolves the penalty `r(mu, s)` of one weight (`s = 0` for a Dirac).
///
/// # Errors
/// Where the grid does not fit the posteriors, and where a penalty is NaN or beyond 1e100.
///
/// ```
/// use candle_core::Result;
/// use kronwake::penalty::{Grid, PosteriorFamily, deconvolve};
///
/// # fn main() -> Result<()> {
/// let absolute = |mu: f64, _s: f64| 3. * mu.abs();
/// assert!(deconvolve(absolute, PosteriorFamily::Dirac, Grid::new(5.))?.admissible());
/// let report = deconvolve(absolute, PosteriorFamily::Gaussian(&[0.1, 0.2]), Grid::new(5.))?;
/// println!("not admissible: {}", report.failures[0]);
/// # assert!(!report.admissible());
/// # Ok(())
/// # }
/// ```
pub fn deconvolve(
    penalty: impl Fn(f64, f64) -> f64,
    posterior: PosteriorFamily,
    grid: Grid,
) -> Result<Admissibility> {
    /// So that no transform overflows.
    const LARGEST: f64 = 1e100;
    grid.check(posterior)?;
    let inner = grid.points / 4..=3 * grid.points / 4;
    let evaluate = |s: f64| -> Result<Vec<f64>> {
        let at = |j: usize| match penalty(grid.at(j), s) {
            r if r.abs() <= LARGEST => Ok(r),
            r => bail!("penalty at mu = {} and s = {s}: expected at most {LARGEST:e}, got {r}", grid.at(j)),
        };
        (0..grid.points).map(at).collect()
    };
    let (prior, change, deviation) = match posterior {
        PosteriorFamily::Dirac => {
            (evaluate(0.)?[inner.clone()].iter().map(|r| -r).collect::<Vec<_>>(), 0., 0.)
        }
        PosteriorFamily::Gaussian(scales) => {
            let widest = scales.iter().copied().fold(0., f64::max);
            let finest = scales.iter().copied().fold(f64::INFINITY, f64::min);
            let (mut range, mut change) = (0f64, 0f64);
            let (mut prior, mut least, mut most) = (vec![], vec![], vec![]);
            for &s in scales {
                let r = evaluate(s)?;
                let (low, high) = ends(&r[inner.clone()]);
                range = range.max(high - low);
                let spectrum = quotient(&grid, &r, s);
                let band = |regularization: f64, s: f64| (-2. * regularization.ln()).sqrt() / s;
                let within = |cutoff: f64| function(&grid, &spectrum, cutoff);
                let full = within(band(grid.regularization, s));
                let coarse = within(band(grid.regularization.sqrt(), s));
                change = full.iter().zip(&coarse).fold(change, |m, (a, b)| m.max((a - b).abs()));
                // At the resolution that all scales have.
                let common = within(band(grid.regularization, widest));
                if least.is_empty() {
                    (least, most) = (common.clone(), common);
                } else {
                    least.iter_mut().zip(&common).for_each(|(l, a)| *l = l.min(*a));
                    most.iter_mut().zip(&common).for_each(|(m, a)| *m = m.max(*a));
                }
                if s == finest {
                    prior = full;
                }
            }
            let deviation = most.iter().zip(&least).fold(0f64, |m, (a, b)| m.max(a - b));
            (prior, change / (1. + range), deviation / (1. + range))
        }
    };
    let x: Vec<f64> = inner.map(|j| grid.at(j)).collect();
    Ok(Admissibility::of(x, prior, change, deviation))
}

/// `-F(W (r + H)) / F(q)` where the quotient is finite in f64.
///
/// `W` is 1 on the inner half and falls to 0 towards the ends, so that the data are periodic: a box smoothed by a Gaussian of
/// deviation `width / 14`. The deconvolution makes that deviation smaller, and `W` stays 1 inside, up to 1e-12.
fn quotient(grid: &Grid, r: &[f64], s: f64) -> Vec<Complex> {
    let entropy = 0.5 * (TAU * E).ln() + s.ln();
    let (edge, soft) = (1.5 * grid.half_width, grid.half_width / 14. * 2f64.sqrt());
    let window = |x: f64| 0.5 * (erf_f64((x + edge) / soft) - erf_f64((x - edge) / soft));
    let windowed = r.iter().enumerate().map(|(j, r)| [-(r + entropy) * window(grid.at(j)), 0.]);
    let mut spectrum: Vec<Complex> = windowed.collect();
    transform(&mut spectrum);
    for (k, value) in spectrum.iter_mut().enumerate() {
        let gain = (0.5 * (s * angular(grid, k)).powi(2)).min(600.).exp();
        *value = [value[0] * gain, value[1] * gain];
    }
    spectrum
}

/// Place `k`'s frequency in radians per unit of a weight.
fn angular(grid: &Grid, k: usize) -> f64 {
    TAU * frequency(k, grid.points) / (4. * grid.half_width)
}

/// The function on the inner half of the grid whose transform is `spectrum` up to the frequency `cutoff` and zero beyond.
fn function(grid: &Grid, spectrum: &[Complex], cutoff: f64) -> Vec<f64> {
    let kept = |(k, v): (usize, &Complex)| if angular(grid, k).abs() <= cutoff { *v } else { [0.; 2] };
    let mut values: Vec<Complex> = spectrum.iter().enumerate().map(kept).collect();
    inverse(&mut values);
    values[grid.points / 4..=3 * grid.points / 4].iter().map(|v| v[0]).collect()
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;
    use crate::penalty::norms::{Nodes, expected_norm};
    use crate::penalty::{Failure, Prior};

    const SCALES: PosteriorFamily = PosteriorFamily::Gaussian(&[0.05, 0.1, 0.2]);

    fn entropy(s: f64) -> f64 {
        0.5 * (TAU * E).ln() + s.ln()
    }

    fn absolute(mu: f64, s: f64) -> f64 {
        let z = mu / s;
        s * (2. / PI).sqrt() * (-0.5 * z * z).exp() + mu * erf_f64(z / 2f64.sqrt())
    }

    /// Which conditions fail: function, scale, integral.
    fn failed(report: &Admissibility) -> [bool; 3] {
        let any = |f: fn(&Failure) -> bool| report.failures.iter().any(f);
        [
            any(|f| matches!(f, Failure::NotAFunction { .. })),
            any(|f| matches!(f, Failure::DependsOnScale { .. })),
            any(|f| matches!(f, Failure::NotIntegrable { .. })),
        ]
    }

    #[test]
    fn admissibility_under_a_dirac() -> Result<()> {
        let grid = Grid::new(8.);
        for (name, penalty, expected) in [
            ("L2", (|w, _| 2. * w * w) as fn(f64, f64) -> f64, [false; 3]),
            ("L1", |w, _| 2. * w.abs(), [false; 3]),
            ("Cauchy", |w, _| (1. + w * w).ln(), [false; 3]),
            ("cosine", |w, _| (3. * w).cos(), [false, false, true]),
            ("none", |_, _| 1., [false, false, true]),
            ("square root of Cauchy", |w, _| 0.4 * (1. + w * w).ln(), [false, false, true]),
            ("L2 on one side", |w, _| if w > 0. { w * w } else { 0. }, [false, false, true]),
        ] {
            assert_eq!(failed(&deconvolve(penalty, PosteriorFamily::Dirac, grid)?), expected, "{name}");
        }
        Ok(())
    }

    #[test]
    fn admissibility_under_gaussians() -> Result<()> {
        for (name, penalty, expected) in [
            ("L2", (|m, s| 2. * (m * m + s * s) - entropy(s)) as fn(f64, f64) -> f64, [false; 3]),
            ("L2 and a constant", |m, s| 7. + 2. * (m * m + s * s) - entropy(s), [false; 3]),
            ("L2 of the mean", |m, s| 2. * m * m - entropy(s), [false, true, false]),
            ("L2 without entropy", |m, s| 2. * (m * m + s * s), [false, true, false]),
            ("L1's mean", |m, s| 2. * absolute(m, s) - entropy(s), [false; 3]),
            ("L1 of the mean", |m, s| 2. * m.abs() - entropy(s), [true, true, false]),
            ("cosine", |m, s| (-4.5 * s * s).exp() * (3. * m).cos() - entropy(s), [false, false, true]),
            ("cosine of one amplitude", |m, s| (3. * m).cos() - entropy(s), [false, true, true]),
            (
                "cosine and L2",
                |m, s| (-4.5 * s * s).exp() * (3. * m).cos() + m * m + s * s - entropy(s),
                [false; 3],
            ),
        ] {
            let report = deconvolve(penalty, SCALES, Grid::new(8.))?;
            let [function, scale, integral] = failed(&report);
            // What is no function has no tails to judge.
            assert_eq!([function, scale, integral && !function], expected, "{name}: {report:?}");
        }
        Ok(())
    }

    #[test]
    fn a_group_of_three_by_its_radius() -> Result<()> {
        // In space `m f(m)` of a radial function `f` is smoothed by a Gaussian as a function on the line is (both solve the heat
        // equation): the norm of the mean has no prior, the mean of the norm has group lasso's. Odd functions fail to be
        // integrable on one side, which says nothing here.
        let of_mean = |m: f64, s: f64| 2. * m * m.abs() - entropy(s);
        assert!(failed(&deconvolve(of_mean, SCALES, Grid::new(8.))?)[0]);
        let mean = |m: f64, s: f64| 2. * m * expected_norm(Nodes::FINE, &[m, 0., 0.], &[s; 3]).0 - entropy(s);
        let report = deconvolve(mean, SCALES, Grid { points: 2048, ..Grid::new(8.) })?;
        assert_eq!(failed(&report), [false, false, true], "{:?}", report.failures);
        Ok(())
    }

    #[test]
    fn from_a_prior_to_its_penalty_and_back() -> Result<()> {
        let grid = Grid::new(8.);
        let compare =
            |penalty: &dyn Fn(f64, f64) -> f64, prior: Prior, error: f64, kink: f64| -> Result<()> {
                let report = deconvolve(penalty, SCALES, grid)?;
                assert!(report.admissible(), "{prior:?} {:?}", report.failures);
                for (&x, &found) in report.x.iter().zip(&report.log_density) {
                    let expected = prior.log_density(&[x])?;
                    let near = (found - expected).abs() < if x.abs() < 0.5 { kink } else { error };
                    assert!(near, "{prior:?} at {x}: {found} {expected}");
                }
                Ok(())
            };
        compare(&|m, s| 0.8 * (m * m + s * s) - entropy(s), Prior::l2(0.8)?, 1e-4, 1e-4)?;
        // The kink of Laplace's density is smoothed at the posterior's scale.
        compare(&|m, s| 3. * absolute(m, s) - entropy(s), Prior::l1(3.)?, 3e-3, 3e-2)?;
        let waves =
            |m: f64, s: f64| 1.5 * (-2. * s * s).exp() * (2. * m).cos() + 0.8 * (m * m + s * s) - entropy(s);
        compare(&waves, Prior::cosine(1.5, 2., 0.8)?, 1e-4, 1e-4)
    }

    #[test]
    fn the_limits_of_scales() -> Result<()> {
        let l2 = |m: f64, s: f64| 2. * (m * m + s * s) - entropy(s);
        let l1 = |m: f64, s: f64| 2. * absolute(m, s) - entropy(s);
        for (points, scales) in
            [(4096, [0.0157, 0.4]), (4096, [0.39, 0.4]), (512, [0.125, 0.4]), (256, [0.25, 0.4])]
        {
            let (grid, scales) = (Grid { points, ..Grid::new(8.) }, PosteriorFamily::Gaussian(&scales));
            for report in [deconvolve(l2, scales, grid)?, deconvolve(l1, scales, grid)?] {
                assert!(report.admissible(), "{scales:?} {points} {:?}", report.failures);
            }
            let of_mean = |m: f64, _: f64| 2. * m.abs();
            assert!(failed(&deconvolve(of_mean, scales, grid)?)[0]);
        }
        for regularization in [1e-9, 1e-2] {
            let grid = Grid { regularization, ..Grid::new(8.) };
            for report in [deconvolve(l2, SCALES, grid)?, deconvolve(l1, SCALES, grid)?] {
                assert!(report.admissible(), "{regularization} {:?}", report.failures);
            }
        }
        Ok(())
    }

    #[test]
    fn mass_outside() -> Result<()> {
        // Cauchy's: 1 - 2 / pi atan(x) outside, the power 2 alone would give 2 / (pi x).
        let report = deconvolve(|w, _| (1. + w * w).ln(), PosteriorFamily::Dirac, Grid::new(30.))?;
        let expected = 1. - 2. / PI * 30f64.atan();
        assert!((report.outside / expected - 1.).abs() < 0.02, "{} {expected}", report.outside);
        let narrow = deconvolve(|w, _| 2. * w.abs(), PosteriorFamily::Dirac, Grid::new(2.))?;
        assert!(narrow.outside > (-4f64).exp() && narrow.outside < 0.2, "{}", narrow.outside);
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        let square = |m: f64, _: f64| m * m;
        let grid = Grid::new(8.);
        for bad in [
            Grid { half_width: 0., ..grid },
            Grid { half_width: f64::NAN, ..grid },
            Grid { points: 1000, ..grid },
            Grid { points: 8192, ..grid },
            Grid { points: 32, ..grid },
            Grid { regularization: 0., ..grid },
        ] {
            assert!(deconvolve(square, PosteriorFamily::Dirac, bad).is_err(), "{bad:?}");
        }
        for bad in [&[][..], &[0.1], &[0.1, 0.], &[0.1, 0.5], &[0.1, f64::NAN], &[0.01, 0.1]] {
            assert!(deconvolve(square, PosteriorFamily::Gaussian(bad), grid).is_err(), "{bad:?}");
        }
        assert!(deconvolve(|m, _| 1. / m, PosteriorFamily::Dirac, grid).is_err());
        assert!(deconvolve(|_, _| f64::NAN, SCALES, grid).is_err());
        Ok(())
    }
}
