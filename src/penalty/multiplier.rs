//! Lagrange multipliers of constraints on weights.

use super::ball::finite;
use super::cells::Cells;
use super::groups::Grouping;
use crate::ops::element::{Element, Host, float_dispatch};
use crate::ops::group::value_dtype;
use crate::ops::known;
use candle_core::{DType, Device, Result, Tensor, WithDType, bail};

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
#[derive(Debug, Clone)]
pub struct Multiplier {
    omega: Omega,
    bound: f64,
    dual: Dual,
    dims: Vec<usize>,
    cells: Cells,
    alpha: Vec<f64>,
    integral: Vec<f64>,
    /// Empty before the first update.
    average: Vec<f64>,
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
        let zeros = vec![0.0; cells.count()];
        let dims = dims.to_vec();
        Ok(Self { omega, bound, dual, dims, cells, alpha: zeros.clone(), integral: zeros, average: vec![] })
    }

    /// The multipliers, one a group.
    pub fn alpha(&self) -> &[f64] {
        &self.alpha
    }

    /// `sum_g alpha_g e_g + c/2 [e_g]_+^2`, `e = Omega(w) - k`: a scalar in f32 (f64 for f64), differentiable once with respect to
    /// `w`, which is to be what it was until the backward pass. Weights on a GPU are read by the host.
    ///
    /// # Errors
    /// If `w` has other dimensions, is not a floating point tensor, or holds NaN or an infinity.
    pub fn term(&self, w: &Tensor) -> Result<Tensor> {
        let weights = w.detach().to_device(&Device::Cpu)?.contiguous()?;
        let values = self.omegas(&weights)?;
        let (omega, cells, c) = (self.omega, self.cells, self.dual.augmented);
        let (mut total, mut factors) = (0.0, Vec::with_capacity(values.len()));
        for (alpha, value) in self.alpha.iter().zip(&values) {
            let excess = value - self.bound;
            let over = excess.max(0.0);
            total += alpha * excess + 0.5 * c * over * over;
            factors.push(alpha + c * over);
        }
        let value = Tensor::new(total, w.device())?.to_dtype(value_dtype(w.dtype()))?;
        let (storage, layout) = value.storage_and_layout();
        known::of_one(NAME, w, storage.try_clone(layout)?, move |grad| {
            let scale: f64 = grad.to_dtype(DType::F64)?.to_scalar()?;
            let gradient = float_dispatch!(NAME, weights.dtype(), T => {
                let host = Host::of(&weights);
                let x = host.values::<T>()?;
                let mut gradient = vec![<T as WithDType>::from_f64(0.0); x.len()];
                cells.each(|group, run| {
                    let (factor, value) = (scale * factors[group], values[group]);
                    for (out, v) in gradient[run.clone()].iter_mut().zip(&x[run]) {
                        *out = T::rounded(factor * omega.slope(v.to_f64(), value));
                    }
                });
                Tensor::from_vec(gradient, weights.shape(), &Device::Cpu)?
            });
            gradient.to_device(grad.device())
        })
    }

    /// One step of the multipliers at the weights `w`, which the optimizer has stepped.
    ///
    /// # Errors
    /// As for [`Multiplier::term`]; nothing has changed then.
    pub fn update(&mut self, w: &Tensor) -> Result<()> {
        let Dual { kappa_p, kappa_i, nu, .. } = self.dual;
        let excess = self.excess(w)?;
        if self.average.is_empty() {
            self.average.clone_from(&excess);
        }
        for (group, e) in excess.into_iter().enumerate() {
            let (average, integral) = (&mut self.average[group], &mut self.integral[group]);
            *average = nu * *average + (1.0 - nu) * e;
            *integral = (*integral + kappa_i * e).max(0.0);
            self.alpha[group] = (kappa_p * *average + *integral).max(0.0);
        }
        Ok(())
    }

    /// Multipliers, excesses and slackness at `w`.
    ///
    /// # Errors
    /// As for [`Multiplier::term`].
    pub fn report(&self, w: &Tensor) -> Result<Report> {
        let excess = self.excess(w)?;
        let slackness = self.alpha.iter().zip(&excess).map(|(a, e)| a * e).collect();
        Ok(Report { alpha: self.alpha.clone(), excess, slackness })
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
            self.read(w, |x: &[T]| self.read(gradient, |g: &[T]| self.stationarity(x, g)))
        })?;
        let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let slack: Vec<f64> = report.slackness.iter().map(|s| s.abs()).collect();
        Ok(Kkt { stationarity, violation: largest(&report.excess), complementarity: largest(&slack) })
    }

    fn excess(&self, w: &Tensor) -> Result<Vec<f64>> {
        Ok(self.omegas(w)?.into_iter().map(|v| v - self.bound).collect())
    }

    fn omegas(&self, w: &Tensor) -> Result<Vec<f64>> {
        float_dispatch!(NAME, w.dtype(), T => self.read(w, |x: &[T]| self.values(x)))
    }

    /// What is bounded, for comparison with a file's.
    pub(super) fn kind(&self) -> String {
        format!("{:?} <= {}", self.omega, self.bound)
    }

    /// All that a step changes; the average is empty before the first.
    pub(super) fn state(&self) -> [(&'static str, &[f64]); 3] {
        [("alpha", &self.alpha), ("integral", &self.integral), ("average", &self.average)]
    }

    /// Takes over the values of [`Multiplier::state`], in its order.
    pub(super) fn set_state(&mut self, values: Vec<Vec<f64>>) {
        for (slot, values) in [&mut self.alpha, &mut self.integral, &mut self.average].into_iter().zip(values)
        {
            *slot = values;
        }
    }

    /// Gives `f` the elements of a tensor that has passed the checks.
    fn read<T: Element, R>(&self, w: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
        if w.dims() != self.dims {
            bail!("multiplier: expected dimensions {:?}, got {:?}", self.dims, w.dims())
        }
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
    fn stationarity<T: Element>(&self, x: &[T], g: &[T]) -> Result<f64> {
        let (values, slopes) = (self.values(x)?, self.cells.norms(g));
        let mut square = 0.0;
        self.cells.each(|group, run| {
            let alpha = self.alpha[group];
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
