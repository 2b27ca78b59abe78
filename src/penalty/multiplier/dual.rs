//! How multipliers follow their constraints.

use super::Bound;
use crate::ops::dual::DualStep;
use candle_core::{Result, bail};

/// How multipliers follow the excess `e = Omega(w) - k`: the controller nuPI of Sohrabi et al. 2024, `alpha = [kappa_p xi + I]_+` with
/// `I <- [I + kappa_i e]_+` and `xi <- nu xi + (1 - nu) e`, which starts as the first `e`; or the method of multipliers. Of an equality
/// nothing is cut off at zero.
///
/// Whatever its parameters, it rests only where `e = 0`, or `e < 0` and `alpha = 0`.
///
/// A multiplier integrates: while a constraint is violated for long, it *winds up*, and takes as long to come down. With a rate of 0.1, a
/// thousand steps at a norm of 100 with a bound of 1 lead to 9,900, and 990,000 steps at a norm of 0.9 back to zero. [`Dual::restart`] makes it
/// zero at once where the constraint holds with room to spare, and [`Dual::cap`] does not let it grow so far:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::penalty::{Dual, Grouping, Multiplier, Omega};
///
/// let (far, inside) = (Tensor::new(&[100f64], &Device::Cpu)?, Tensor::new(&[0.9f64], &Device::Cpu)?);
/// let dual = Dual { cap: Some(50.0), restart: Some(0.05), ..Dual::ascent(0.1) };
/// let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 1.0, dual, &[1])?;
/// for _ in 0..1000 {
///     multiplier.update(&far)?;
/// }
/// assert_eq!(multiplier.alpha()?, [50.0]);
/// multiplier.update(&inside)?;
/// assert_eq!(multiplier.alpha()?, [0.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dual {
    /// Factor of the averaged excess. It damps the oscillation of multiplier and weights about the solution. The constructors without
    /// it have 0.
    pub kappa_p: f64,
    /// Rate of ascent, per update and unit of Omega.
    pub kappa_i: f64,
    /// Weight of the past in the average, in `[0, 1)`; 0 where a constructor has none.
    pub nu: f64,
    /// `c` of the augmented term `c/2 [e]_+^2` in the loss, of an equality `c/2 e^2`; 0, the constructors' default, leaves it out.
    pub augmented: f64,
    /// The method of multipliers in place of all of the above, which are to be 0 then; None is the constructors' default. See
    /// [`Dual::augmented_lagrangian`].
    pub augmented_lagrangian: Option<AugmentedLagrangian>,
    /// Where `e < -restart`, so that Omega is inside by more than this, multiplier, integral and average begin anew from zero. In Omega's unit.
    /// 0 is every feasible step, also those that swing past the bound on the way to a solution at it; a few hundredths of the bound let those
    /// pass. None, the constructors' default, never. An equality has no inside.
    pub restart: Option<f64>,
    /// The largest multiplier, of an equality the largest magnitude; its integral is kept within it too, so that it comes down as soon as the
    /// sign of the excess changes. A constraint that needs a larger one stays violated, and the report's
    /// [`stalled`](super::Report::stalled) counts. None, the constructors' default, is no cap.
    pub cap: Option<f64>,
}

/// The method of multipliers (Hestenes 1969; Powell 1969; of inequalities Rockafellar 1974): the loss gets `([alpha + c e]_+^2 - alpha^2) / 2c`,
/// of an equality `alpha e + c/2 e^2`, and the multiplier becomes `[alpha + c e]_+`, of an equality `alpha + c e`.
///
/// That the term is smooth at `e = 0` and bends upwards with `c` makes a saddle point of the solution also where the Lagrangian itself is flat or
/// bends downwards there. Steps of length `lr` along the gradient are stable while `lr c ||grad Omega||^2` is below about 1.
///
/// The penalty `c` may grow: it is multiplied by `growth` after each update at which the violation is above `tolerance`, up to `limit`, each
/// group's for itself (Nocedal and Wright, *Numerical Optimization*, framework 17.4). [`Dual::restart`] makes it what it was at first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AugmentedLagrangian {
    /// `c` at first, above 0, in units of the loss per Omega squared; 1 by default.
    pub penalty: f64,
    /// At least 1; 1, the default, keeps the penalty.
    pub growth: f64,
    /// Violations up to it do not make the penalty grow; 1e-4 by default, in Omega's unit.
    pub tolerance: f64,
    /// Largest penalty, at least the first one; 1e4 by default.
    pub limit: f64,
}

impl Default for AugmentedLagrangian {
    fn default() -> Self {
        Self { penalty: 1.0, growth: 1.0, tolerance: 1e-4, limit: 1e4 }
    }
}

impl Dual {
    /// Projected gradient ascent, `alpha <- [alpha + rate e]_+` (Platt and Barr 1987), without cap and restart.
    pub fn ascent(rate: f64) -> Self {
        Self::nu_pi(0.0, rate, 0.0)
    }

    /// The controller nuPI, without cap and restart.
    pub fn nu_pi(kappa_p: f64, kappa_i: f64, nu: f64) -> Self {
        let augmented_lagrangian = None;
        Self { kappa_p, kappa_i, nu, augmented: 0.0, augmented_lagrangian, restart: None, cap: None }
    }

    /// The method of multipliers, without cap and restart.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use kronwake::penalty::{AugmentedLagrangian, Dual, Grouping, Multiplier, Omega};
    ///
    /// // The least -w with |w| <= 2, whose Lagrangian is flat: w = 2, and alpha = 1 balances the slope of the loss.
    /// let dual = Dual::augmented_lagrangian(AugmentedLagrangian { penalty: 5.0, ..Default::default() });
    /// let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 2.0, dual, &[1])?;
    /// let w = Var::new(&[0.5f64], &Device::Cpu)?;
    /// for _ in 0..400 {
    ///     let grads = (multiplier.term(&w)? - w.sum_all()?)?.backward()?;
    ///     w.set(&(w.as_detached_tensor() - (grads.get(&w).unwrap() * 0.1)?)?)?;
    ///     multiplier.update(&w)?;
    /// }
    /// assert!((w.to_vec1::<f64>()?[0] - 2.0).abs() < 1e-9 && (multiplier.alpha()?[0] - 1.0).abs() < 1e-9);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn augmented_lagrangian(options: AugmentedLagrangian) -> Self {
        Self { augmented_lagrangian: Some(options), ..Self::ascent(0.0) }
    }

    /// Refuses what is out of its range, or contradicts another option or the kind of constraint.
    pub(super) fn check(&self, bound: Bound) -> Result<()> {
        let Self { kappa_p, kappa_i, nu, augmented, augmented_lagrangian, restart, cap } = *self;
        let plain = [("kappa_p", kappa_p), ("kappa_i", kappa_i), ("nu", nu), ("augmented", augmented)];
        for (name, value) in plain.into_iter().chain(restart.map(|value| ("restart", value))) {
            if !(value.is_finite() && value >= 0.0) {
                bail!("multiplier: {name}: expected a finite number of zero or more, got {value}")
            }
        }
        if nu >= 1.0 {
            bail!("multiplier: nu: expected less than 1, got {nu}")
        }
        if let Some(cap) = cap
            && !(cap.is_finite() && cap > 0.0)
        {
            bail!("multiplier: cap: expected a finite number above 0, or None, got {cap}")
        }
        if let (Some(restart), Bound::Equal(_)) = (restart, bound) {
            bail!("multiplier: restart: an equality is never feasible by {restart}; expected None")
        }
        let Some(AugmentedLagrangian { penalty, growth, tolerance, limit }) = augmented_lagrangian else {
            if kappa_i == 0.0 {
                bail!(
                    "multiplier: kappa_i: expected more than 0, without which no multiplier finds its value"
                )
            }
            return Ok(());
        };
        if let Some((name, value)) = plain.into_iter().find(|(_, value)| *value != 0.0) {
            bail!(
                "multiplier: {name}: an augmented Lagrangian goes by its penalty alone; expected 0, got {value}"
            )
        }
        if !(penalty.is_finite() && penalty > 0.0) {
            bail!("multiplier: penalty: expected a finite number above 0, got {penalty}")
        }
        if !(growth.is_finite() && growth >= 1.0) {
            bail!("multiplier: growth: expected a finite number of 1 or more, got {growth}")
        }
        if !(tolerance.is_finite() && tolerance >= 0.0) {
            bail!("multiplier: tolerance: expected a finite number of zero or more, got {tolerance}")
        }
        if !(limit.is_finite() && limit >= penalty) {
            bail!(
                "multiplier: limit: expected a finite number of at least the first penalty {penalty}, got {limit}"
            )
        }
        Ok(())
    }

    /// The step of the multipliers.
    pub(super) fn step(&self, bound: Bound) -> DualStep {
        let Self { kappa_p, kappa_i, nu, augmented, augmented_lagrangian, restart, cap } = *self;
        let kept = AugmentedLagrangian { penalty: augmented, growth: 1.0, tolerance: 0.0, limit: augmented };
        let AugmentedLagrangian { penalty, growth, tolerance, limit } = augmented_lagrangian.unwrap_or(kept);
        DualStep {
            bound: bound.value(),
            kappa_p,
            kappa_i,
            nu,
            cap: cap.unwrap_or(f64::INFINITY),
            restart: restart.unwrap_or(f64::INFINITY),
            penalty,
            growth,
            tolerance,
            limit,
            equality: bound.is_equality(),
            by_penalty: augmented_lagrangian.is_some(),
        }
    }
}
