//! What is reported of a penalty that was deconvolved.

use std::fmt;

/// What keeps a penalty from having a prior.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Failure {
    /// The quotient of transforms is no function's: the deconvolution changes by `change` where the regularization becomes
    /// its own square root, relative to 1 plus the penalty's range on the grid. Refused above 0.02. Details of the prior
    /// finer than a third of `s` count as this too.
    NotAFunction {
        /// Relative.
        change: f64,
    },
    /// The deconvolutions at two scales differ by `deviation`, relative to 1 plus the penalty's range on the grid. Refused
    /// above 1e-5.
    DependsOnScale {
        /// Relative.
        deviation: f64,
    },
    /// The density falls on one side no faster than `1 / x`, as far as the grid reaches.
    NotIntegrable {
        /// Between the grid's outer half and the next, the density falls like `x^-exponent`.
        exponent: f64,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NotAFunction { change } => {
                write!(
                    f,
                    "its deconvolution is not a function: it changes by {change:.2e} with the regularization"
                )
            }
            Self::DependsOnScale { deviation } => {
                write!(f, "the prior would depend on the posterior's scale: by {deviation:.2e}")
            }
            Self::NotIntegrable { exponent } => {
                write!(f, "the prior has no integral: it falls like x^-{exponent:.2}")
            }
        }
    }
}

/// What was found of a penalty. Numbers are relative as in [`Failure`].
#[derive(Debug, Clone, PartialEq)]
pub struct Admissibility {
    /// The inner half of the grid's points.
    pub x: Vec<f64>,
    /// The logarithm of the prior's density there, for the smallest scale, normalized together with the mass outside. Without
    /// meaning where the penalty is not admissible.
    pub log_density: Vec<f64>,
    /// How much the deconvolution changes with the regularization; 0 for a Dirac.
    pub change: f64,
    /// The largest difference between the deconvolutions at two scales; 0 for a Dirac.
    pub deviation: f64,
    /// The exponent with which the density falls at the slower end.
    pub exponent: f64,
    /// The part of the mass that lies outside, if the density goes on with that power: an upper bound for tails that fall
    /// faster and faster. Infinite where there is no integral.
    pub outside: f64,
    /// Every condition that fails.
    pub failures: Vec<Failure>,
}

impl Admissibility {
    /// Judges the logarithm `a` of an unnormalized density at `x`.
    pub(super) fn of(x: Vec<f64>, mut a: Vec<f64>, change: f64, deviation: f64) -> Self {
        let last = x.len() - 1;
        let (quarter, half) = (last / 8, last / 4);
        // By how much the largest value falls from the second quarter of the way outwards to the outer half.
        let fall = |outer: &[f64], next: &[f64]| (ends(next).1 - ends(outer).1) / 2f64.ln();
        let left = fall(&a[..=half], &a[half..=half + quarter]);
        let right = fall(&a[last - half..], &a[last - half - quarter..=last - half]);
        let exponent = left.min(right);
        let top = ends(&a).1;
        let step = x[1] - x[0];
        let edges = [(a[0], left), (a[last], right)];
        let inside = step * a.iter().map(|v| (v - top).exp()).sum::<f64>()
            - 0.5 * step * edges.iter().map(|(v, _)| (v - top).exp()).sum::<f64>();
        // The integral of (x / x_last)^-p from there on.
        let tail =
            |(v, p): (f64, f64)| if p > 1. { (v - top).exp() * x[last] / (p - 1.) } else { f64::INFINITY };
        let beyond = edges.map(tail).iter().sum::<f64>();
        let total = inside + if beyond.is_finite() { beyond } else { 0. };
        let normalizer = top + total.ln();
        a.iter_mut().for_each(|v| *v -= normalizer);
        let mut failures = vec![];
        if change > 0.02 {
            failures.push(Failure::NotAFunction { change });
        }
        if deviation > 1e-5 {
            failures.push(Failure::DependsOnScale { deviation });
        }
        if exponent <= 1. {
            failures.push(Failure::NotIntegrable { exponent });
        }
        let outside = if beyond.is_finite() { beyond / total } else { f64::INFINITY };
        Self { x, log_density: a, change, deviation, exponent, outside, failures }
    }

    /// Whether the penalty has a prior.
    pub fn admissible(&self) -> bool {
        self.failures.is_empty()
    }
}

/// The least and the largest number.
pub(super) fn ends(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)))
}
