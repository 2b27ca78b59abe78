//! Lagrange multipliers of constraints on weights.

use super::ball::finite;
use super::cells::Cells;
use super::groups::Grouping;
use crate::gpu::{Gpu, tensor_of};
use crate::ops::element::{Element, Host, float_dispatch};
use crate::ops::group::{scaled, sums, value_dtype};
use crate::ops::known;
use candle_core::{DType, Device, Layout, Result, Storage, Tensor, bail};

/// In messages.
const NAME: &str = "multiplier";

/// A function of each group of weights, `Omega_g(w)`, that a multiplier keeps at or below its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Omega {
    /// `||w_g||_2`.
    Norm(Grouping),
    /// `sum w_i^2`: with this one a multiplier is a factor of the L2 penalty, twice it a weight decay.
    SquaredNorm(Grouping),
    /// `sum |w_i|`. With blocks of one element it bounds every weight, with a multiplier for each.
    L1(Grouping),
}

impl Omega {
    /// `d Omega_g / d v` of a member `v` of a group with this value; zero at kinks.
    #[inline(always)]
    fn slope(self, v: f64, value: f64) -> f64 {
        match self {
            _ if v == 0.0 => 0.0,
            Self::Norm(_) => v / value,
            Self::SquaredNorm(_) => 2.0 * v,
            Self::L1(_) => v.signum(),
        }
    }
}

/// How multipliers follow the excess `e = Omega(w) - k`: the controller nuPI of Sohrabi et al. 2024, `alpha = [kappa_p xi + I]_+` with
/// `I <- [I + kappa_i e]_+` and `xi <- nu xi + (1 - nu) e`, which starts as the first `e`.
///
/// Whatever its parameters, it rests only where `e = 0`, or `e < 0` and `alpha = 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dual {
    /// Factor of the averaged excess. It damps the oscillation of multiplier and weights about the solution.
    pub kappa_p: f64,
    /// Rate of ascent.
    pub kappa_i: f64,
    /// Weight of the past in the average, in `[0, 1)`.
    pub nu: f64,
    /// `c` of the augmented term `c/2 [e]_+^2` in the loss; 0 leaves it out.
    pub augmented: f64,
}

impl Dual {
    /// Projected gradient ascent, `alpha <- [alpha + rate e]_+` (Platt and Barr 1987).
    pub fn ascent(rate: f64) -> Self {
        Self { kappa_p: 0.0, kappa_i: rate, nu: 0.0, augmented: 0.0 }
    }

    /// The controller nuPI.
    pub fn nu_pi(kappa_p: f64, kappa_i: f64, nu: f64) -> Self {
        Self { kappa_p, kappa_i, nu, augmented: 0.0 }
    }
}

/// The multipliers of the constraints `Omega_g(w) <= k`, one a group, for one tensor of weights.
///
/// The weights descend the Lagrangian `J(w) + sum_g alpha_g (Omega_g(w) - k)`, the multipliers ascend it (Goodfellow, Bengio,
/// Courville, *Deep Learning*, section 7.2; Gallego-Posada et al. 2025). Add [`Multiplier::term`] to the loss, and call
/// [`Multiplier::update`] after each step of the optimizer. At the solution `alpha` is the factor with which a plain penalty has the
/// same optimum.
///
/// The multipliers of weights on a GPU are there too, and no step of theirs waits for it. What would be an error, weights that are NaN or
/// infinite, makes the term NaN then; and the weights' squares are to be within f64.
#[derive(Debug, Clone)]
pub struct Multiplier {
    omega: Omega,
    bound: f64,
    dual: Dual,
    dims: Vec<usize>,
    cells: Cells,
    /// `[groups]` in f64, where the weights were last.
    alpha: Tensor,
    integral: Tensor,
    /// None before the first update.
    average: Option<Tensor>,
}

/// Multipliers and constraints at some weights, one number a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The multipliers.
    pub alpha: Vec<f64>,
    /// `Omega - k`; above zero is a violation.
    pub excess: Vec<f64>,
    /// Complementary slackness, `alpha (Omega - k)`: zero at a solution.
    pub slackness: Vec<f64>,
}

/// How far weights and multipliers are from the conditions of Karush, Kuhn and Tucker. Multipliers are never negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kkt {
    /// Norm of the least `grad J + sum alpha_g grad Omega_g`, over the subgradients where `Omega_g` has a kink.
    pub stationarity: f64,
    /// Largest `[Omega_g - k]_+`.
    pub violation: f64,
    /// Largest `|alpha_g (Omega_g - k)|`.
    pub complementarity: f64,
}

impl Multiplier {
    /// Multipliers of zero for weights of these dimensions.
    ///
    /// # Errors
    /// If the bound, or a parameter of `dual`, is negative or not finite, `nu` is not below 1, or the grouping makes no sense.
    pub fn new(omega: Omega, bound: f64, dual: Dual, dims: &[usize]) -> Result<Self> {
        let Dual { kappa_p, kappa_i, nu, augmented } = dual;
        for (name, value) in [
            ("bound", bound),
            ("kappa_p", kappa_p),
            ("kappa_i", kappa_i),
            ("nu", nu),
            ("augmented", augmented),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                bail!("multiplier: {name}: expected a finite number of zero or more, got {value}")
            }
        }
        if nu >= 1.0 {
            bail!("multiplier: nu: expected less than 1, got {nu}")
        }
        if kappa_i == 0.0 {
            bail!("multiplier: kappa_i: expected more than 0, without which no multiplier finds its value")
        }
        let (Omega::Norm(grouping) | Omega::SquaredNorm(grouping) | Omega::L1(grouping)) = omega;
        let cells = Cells::of(grouping, dims)?;
        let zeros = Tensor::zeros(cells.count(), DType::F64, &Device::Cpu)?;
        let dims = dims.to_vec();
        Ok(Self { omega, bound, dual, dims, cells, alpha: zeros.clone(), integral: zeros, average: None })
    }

    /// The multipliers, one a group, read from the weights' device.
    pub fn alpha(&self) -> Result<Vec<f64>> {
        self.alpha.to_vec1()
    }

    /// `sum_g alpha_g e_g + c/2 [e_g]_+^2`, `e = Omega(w) - k`: a scalar in f32 (f64 for f64), differentiable once with respect to
    /// `w`, which is to be what it was until the backward pass.
    ///
    /// # Errors
    /// If `w` has other dimensions, is not a floating point tensor, or, on the CPU, holds NaN or an infinity.
    pub fn term(&self, w: &Tensor) -> Result<Tensor> {
        let (value, slope) = self.evaluate(w)?;
        known::of_one(NAME, w, value, move |grad| slope.times(Some(grad)))
    }

    /// [`Multiplier::term`] and its gradient, outside of candle's graph.
    ///
    /// # Errors
    /// As for [`Multiplier::term`].
    pub fn term_and_gradient(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let (value, slope) = self.evaluate(w)?;
        Ok((tensor_of(value, ()), slope.times(None)?))
    }

    fn evaluate(&self, w: &Tensor) -> Result<(Storage, Slope)> {
        /// The gradient of a norm below it is shorter than 1, which also is a subgradient at zero.
        const LEAST: f64 = 1e-290;
        let weights = w.detach().contiguous()?;
        let values = self.omegas(&weights)?;
        let excess = (&values - self.bound)?;
        let (alpha, over) = (self.alpha.to_device(w.device())?, excess.relu()?);
        let value = ((&alpha * &excess)? + (over.sqr()? * (0.5 * self.dual.augmented))?)?.sum_all()?;
        let factors = (alpha + (over * self.dual.augmented)?)?;
        let (weights, factors) = match self.omega {
            Omega::Norm(_) => {
                (weights, (factors / values.broadcast_maximum(&Tensor::new(LEAST, w.device())?)?)?)
            }
            Omega::SquaredNorm(_) => (weights, (factors * 2.0)?),
            Omega::L1(_) => (weights.sign()?, factors),
        };
        let value = value.to_dtype(value_dtype(w.dtype()))?;
        let (storage, _) = value.storage_and_layout();
        Ok((storage.try_clone(&Layout::contiguous(()))?, Slope { weights, factors, cells: self.cells }))
    }

    /// One step of the multipliers at the weights `w`, which the optimizer has stepped.
    ///
    /// # Errors
    /// As for [`Multiplier::term`]; nothing has changed then.
    pub fn update(&mut self, w: &Tensor) -> Result<()> {
        let Dual { kappa_p, kappa_i, nu, .. } = self.dual;
        let excess = (self.omegas(w)? - self.bound)?;
        let average = match &self.average {
            Some(average) => ((average.to_device(w.device())? * nu)? + (&excess * (1.0 - nu))?)?,
            None => excess.clone(),
        };
        let integral = (self.integral.to_device(w.device())? + (excess * kappa_i)?)?.relu()?;
        self.alpha = ((&average * kappa_p)? + &integral)?.relu()?;
        (self.integral, self.average) = (integral, Some(average));
        Ok(())
    }

    /// Multipliers, excesses and slackness at `w`.
    ///
    /// # Errors
    /// As for [`Multiplier::term`].
    pub fn report(&self, w: &Tensor) -> Result<Report> {
        let excess = (self.omegas(w)? - self.bound)?.to_vec1::<f64>()?;
        let alpha = self.alpha()?;
        let slackness = alpha.iter().zip(&excess).map(|(a, e)| a * e).collect();
        Ok(Report { alpha, excess, slackness })
    }

    /// What is missing to a solution at `w`, where `gradient` is that of the loss without [`Multiplier::term`].
    ///
    /// # Errors
    /// As for [`Multiplier::term`], of `w` and of `gradient`; and if their dtypes differ.
    pub fn kkt(&self, w: &Tensor, gradient: &Tensor) -> Result<Kkt> {
        if w.dtype() != gradient.dtype() {
            bail!("multiplier: expected a gradient in {:?}, got {:?}", w.dtype(), gradient.dtype())
        }
        let report = self.report(w)?;
        let stationarity = float_dispatch!(NAME, w.dtype(), T => {
            self.read(w, |x: &[T]| self.read(gradient, |g: &[T]| self.stationarity(&report.alpha, x, g)))
        })?;
        let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let slack: Vec<f64> = report.slackness.iter().map(|s| s.abs()).collect();
        Ok(Kkt { stationarity, violation: largest(&report.excess), complementarity: largest(&slack) })
    }

    /// `Omega_g`, `[groups]` in f64 on the device of `w`.
    fn omegas(&self, w: &Tensor) -> Result<Tensor> {
        self.check(w)?;
        if Gpu::of(w.device()).is_none() || w.elem_count() == 0 {
            let values = float_dispatch!(NAME, w.dtype(), T => self.read(w, |x: &[T]| self.values(x)))?;
            return Tensor::from_vec(values, self.cells.count(), w.device());
        }
        let sums = sums(NAME, &w.detach().contiguous()?, self.cells.tiles(), 0.0)?;
        let column = |at: usize| sums.narrow(1, at, 1)?.contiguous()?.flatten_all();
        match self.omega {
            Omega::Norm(_) => column(0)?.sqrt(),
            Omega::SquaredNorm(_) => column(0),
            Omega::L1(_) => column(1),
        }
    }

    /// What is bounded, for comparison with a file's.
    pub(super) fn kind(&self) -> String {
        format!("{:?} <= {}", self.omega, self.bound)
    }

    /// The number of groups.
    pub(super) fn count(&self) -> usize {
        self.cells.count()
    }

    /// All that a step changes; no average before the first.
    pub(super) fn state(&self) -> [(&'static str, Option<&Tensor>); 3] {
        [("alpha", Some(&self.alpha)), ("integral", Some(&self.integral)), ("average", self.average.as_ref())]
    }

    /// Takes over the tensors of [`Multiplier::state`].
    pub(super) fn set_state(&mut self, alpha: Tensor, integral: Tensor, average: Option<Tensor>) {
        (self.alpha, self.integral, self.average) = (alpha, integral, average);
    }

    fn check(&self, w: &Tensor) -> Result<()> {
        if w.dims() != self.dims {
            bail!("multiplier: expected dimensions {:?}, got {:?}", self.dims, w.dims())
        }
        Ok(())
    }

    /// Gives `f` the elements of a tensor that has passed the checks.
    fn read<T: Element, R>(&self, w: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
        self.check(w)?;
        let w = w.detach().to_device(&Device::Cpu)?;
        let host = Host::of(&w);
        let x = host.values::<T>()?;
        finite(&x)?;
        f(&x)
    }

    /// `Omega_g`.
    fn values<T: Element>(&self, x: &[T]) -> Result<Vec<f64>> {
        let values = match self.omega {
            Omega::Norm(_) => self.cells.norms(x),
            Omega::SquaredNorm(_) => self.cells.sums(x, |v| v * v),
            Omega::L1(_) => self.cells.sums(x, f64::abs),
        };
        if let Some(group) = values.iter().position(|v| !v.is_finite()) {
            bail!("multiplier: {:?} of group {group} is beyond f64", self.omega)
        }
        Ok(values)
    }

    /// The norm of the least subgradient of the Lagrangian: where `Omega_g` has a kink, that part of the loss's gradient `g` which
    /// `alpha_g` times a subgradient (a ball for norms, an interval for L1) cannot cancel.
    fn stationarity<T: Element>(&self, alpha: &[f64], x: &[T], g: &[T]) -> Result<f64> {
        let (values, slopes) = (self.values(x)?, self.cells.norms(g));
        let mut square = 0.0;
        self.cells.each(|group, run| {
            let alpha = alpha[group];
            for (v, g) in x[run.clone()].iter().zip(&g[run]) {
                let (v, g) = (v.to_f64(), g.to_f64());
                let rest = match self.omega {
                    Omega::L1(_) if v == 0.0 => (g.abs() - alpha).max(0.0),
                    Omega::Norm(_) if values[group] == 0.0 => {
                        if g == 0.0 {
                            0.0
                        } else {
                            g * (1.0 - alpha / slopes[group]).max(0.0)
                        }
                    }
                    _ => g + alpha * self.omega.slope(v, values[group]),
                };
                square += rest * rest;
            }
        });
        Ok(square.sqrt())
    }
}

/// The gradient of a [`Multiplier::term`]: each weight, or its sign, times the factor of its group.
struct Slope {
    weights: Tensor,
    factors: Tensor,
    cells: Cells,
}

impl Slope {
    fn times(&self, scale: Option<&Tensor>) -> Result<Tensor> {
        let factors = match scale {
            Some(scale) => self.factors.broadcast_mul(&scale.to_dtype(DType::F64)?)?,
            None => self.factors.clone(),
        };
        scaled(&self.weights, self.cells.tiles(), 0.0, &factors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};
    use candle_core::Var;

    /// Steps of weights and multipliers, and all that is seen of them.
    fn steps(omega: Omega, start: &Tensor) -> Result<Vec<Tensor>> {
        let dual = Dual { augmented: 0.7, ..Dual::nu_pi(0.5, 0.3, 0.4) };
        let mut multiplier = Multiplier::new(omega, 0.9, dual, start.dims())?;
        let (mut w, mut seen) = (start.clone(), vec![]);
        for _ in 0..4 {
            multiplier.update(&w)?;
            let var = Var::from_tensor(&w)?;
            let term = (multiplier.term(&var)? * 3.0)?;
            let (value, gradient) = multiplier.term_and_gradient(&w)?;
            seen.extend(term.backward()?.get(&var).cloned());
            seen.push((&w - (&gradient * 1e-4)?)?);
            w = seen[seen.len() - 1].clone();
            seen.extend([term, value, gradient, Tensor::new(multiplier.report(&w)?.slackness, w.device())?]);
        }
        Ok(seen)
    }

    #[test]
    fn on_the_device_as_on_the_host() -> Result<()> {
        for (dims, grouping) in [
            (vec![5, 7], Grouping::Rows),
            (vec![5, 7], Grouping::Columns),
            (vec![3, 4, 3, 3], Grouping::InputChannels),
            (vec![6, 5], Grouping::Blocks { rows: 1, columns: 1 }),
            (vec![40, 30], Grouping::Whole),
            (vec![0, 3], Grouping::Rows),
        ] {
            for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 3e-2)] {
                let mut start = values(&random(0, &dims)?)?;
                start.iter_mut().step_by(4).for_each(|w| *w = 0.0);
                let start = Tensor::from_vec(start, &dims[..], &Device::Cpu)?.to_dtype(dtype)?;
                for omega in [Omega::Norm(grouping), Omega::SquaredNorm(grouping), Omega::L1(grouping)] {
                    let (found, expected) = (emulate(|| steps(omega, &start))?, steps(omega, &start)?);
                    assert_eq!((found.len(), expected.len()), (24, 24));
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_eq!(found.dtype(), expected.dtype());
                        assert_close(found, &values(expected)?, tolerance);
                    }
                    // Of one evaluation, and with the factor of the backward pass.
                    for seen in expected.chunks(6) {
                        assert_close(&(&seen[4] * 3.0)?, &values(&seen[0])?, tolerance);
                        assert_close(&(&seen[3] * 3.0)?, &values(&seen[2])?, 1e-6);
                    }
                }
            }
        }
        Ok(())
    }
}
