//! How far weights and multipliers are from a solution.

use super::omega::read;
use super::{Multiplier, NAME, Omega};
use crate::ops::element::{Element, float_dispatch};
use candle_core::{Result, Tensor, bail};

/// How far weights and multipliers are from the conditions of Karush, Kuhn and Tucker. Multipliers of inequalities are never negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kkt {
    /// Norm of the least `grad J + sum alpha_g grad Omega_g`, over the subgradients where `Omega_g` has a kink.
    pub stationarity: f64,
    /// Largest `[Omega_g - k]_+`, of equalities `|Omega_g - k|`.
    pub violation: f64,
    /// Largest `|alpha_g (Omega_g - k)|`.
    pub complementarity: f64,
}

impl Multiplier {
    /// What is missing to a solution at `w`, where `gradient` is that of the loss without [`Multiplier::term`].
    ///
    /// # Errors
    /// As for [`Multiplier::term`], of `w` and of `gradient`; and if their dtypes differ.
    pub fn kkt(&self, w: &Tensor, gradient: &Tensor) -> Result<Kkt> {
        if w.dtype() != gradient.dtype() {
            bail!("multiplier: expected a gradient in {:?}, got {:?}", w.dtype(), gradient.dtype())
        }
        let report = self.report(w)?;
        self.check(&[gradient])?;
        let stationarity = float_dispatch!(NAME, w.dtype(), T => {
            read(w, |x: &[T]| read(gradient, |g: &[T]| self.stationarity(&report.alpha, x, g)))
        })?;
        let violation = |excess: &f64| if self.bound.is_equality() { excess.abs() } else { *excess };
        Ok(Kkt {
            stationarity,
            violation: report.excess.iter().map(violation).fold(0.0, f64::max),
            complementarity: report.slackness.iter().map(|s| s.abs()).fold(0.0, f64::max),
        })
    }

    /// The norm of the least subgradient of the Lagrangian: where `Omega_g` has a kink, that part of the loss's gradient `g` which
    /// `alpha_g` times a subgradient (a ball for norms, an interval for L1) cannot cancel.
    fn stationarity<T: Element>(&self, alpha: &[f64], x: &[T], g: &[T]) -> Result<f64> {
        let layout = &self.parts[0].layout;
        let (values, slopes) = (self.values(0, x)?, layout.norms(g));
        let mut square = 0.0;
        layout.each(|group, run| {
            let (alpha, value, slope) = (alpha[group], values[group], slopes[group]);
            for (v, g) in x[run.clone()].iter().zip(&g[run]) {
                let (v, g) = (v.to_f64(), g.to_f64());
                let rest = match self.omega {
                    Omega::L1(_) if v == 0.0 => (g.abs() - alpha.abs()).max(0.0),
                    Omega::L1(_) => g + alpha * v.signum(),
                    Omega::Norm(_) if value > 0.0 => g + alpha * v / value,
                    Omega::Norm(_) if g == 0.0 => 0.0,
                    Omega::Norm(_) => g * (1.0 - alpha.abs() / slope).max(0.0),
                    Omega::SquaredNorm(_) => g + alpha * 2.0 * v,
                };
                square += rest * rest;
            }
        });
        Ok(square.sqrt())
    }
}
