//! Lagrange multipliers of constraints on weights.

use super::group_layout::GroupLayout;
use crate::gpu::tensor_of;
use crate::ops::dual::{NONE, Row};
use candle_core::{Device, Result, Tensor, bail};
use std::fmt;

mod dual;
mod kkt;
mod omega;
mod term;
#[cfg(test)]
mod tests;

pub use dual::{AugmentedLagrangian, Dual};
pub use kkt::Kkt;
pub use omega::Omega;

/// In messages.
const NAME: &str = "multiplier";

/// What a multiplier holds an [`Omega`] to. A number is an upper bound: `1.0.into()` is `Bound::AtMost(1.0)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// `Omega_g(w) <= k`, with multipliers of zero or more.
    AtMost(f64),
    /// `Omega_g(w) = k`, with multipliers of either sign: below zero they lengthen the weights.
    Equal(f64),
}

impl Bound {
    /// The number `k`.
    pub fn value(self) -> f64 {
        match self {
            Self::AtMost(value) | Self::Equal(value) => value,
        }
    }

    fn is_equality(self) -> bool {
        match self {
            Self::AtMost(_) => false,
            Self::Equal(_) => true,
        }
    }
}

impl From<f64> for Bound {
    fn from(value: f64) -> Self {
        Self::AtMost(value)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(value) => write!(f, "<= {value}"),
            Self::Equal(value) => write!(f, "= {value}"),
        }
    }
}

/// The multipliers of the constraints `Omega_g(w) <= k` or `Omega_g(w) = k`, one a group, for one tensor of weights.
///
/// The weights descend the Lagrangian `J(w) + sum_g alpha_g (Omega_g(w) - k)`, the multipliers ascend it (Goodfellow, Bengio,
/// Courville, *Deep Learning*, section 7.2; Gallego-Posada et al. 2025). Add [`Multiplier::term`] to the loss, and call
/// [`Multiplier::update`] after each step of the optimizer. At the solution `alpha` is the factor with which a plain penalty has the
/// same optimum.
///
/// The multipliers of weights on a GPU are there too, and no step of theirs waits for it. What would be an error, weights that are NaN or
/// infinite, makes the term NaN then and leaves the multiplier as it is; and the weights' squares are to be within f64.
///
/// One multiplier for several tensors together is [`Rule::LagrangianTotal`](super::Rule::LagrangianTotal).
#[derive(Debug, Clone)]
pub struct Multiplier {
    omega: Omega,
    bound: Bound,
    dual: Dual,
    /// Tensors whose groups of the same index are one.
    parts: Vec<Part>,
    /// See [`crate::ops::dual::DualStep`]; where the weights were last.
    state: Tensor,
    /// Whether there was an update, before which there is no average.
    started: bool,
}

/// One of a multiplier's tensors.
#[derive(Debug, Clone)]
struct Part {
    dims: Vec<usize>,
    layout: GroupLayout,
}

/// Multipliers and constraints at some weights, one number a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The multipliers.
    pub alpha: Vec<f64>,
    /// `Omega - k`; above zero is a violation, of an equality also below zero.
    pub excess: Vec<f64>,
    /// Complementary slackness, `alpha (Omega - k)`: zero at a solution.
    pub slackness: Vec<f64>,
    /// The factor `c` of the quadratic term, which grows under [`AugmentedLagrangian::growth`]; else [`Dual::augmented`].
    pub penalty: Vec<f64>,
    /// For how many updates the constraint has been violated, by more than a thousandth of the bound or of Omega, without its least violation
    /// falling by a hundredth: 0 while constraints hold or come nearer.
    pub stalled: Vec<u64>,
}

impl Report {
    /// The groups that show a sign of an infeasible constraint: for `patience` updates or more their violation has not fallen, although the
    /// multiplier has grown all the while. Either no weights satisfy all that is asked for (a sphere of radius 2 with a norm of at
    /// most 1), or the multiplier is at its [`cap`](Dual::cap), or it is too slow.
    ///
    /// As `patience` take the steps in which training is to answer a multiplier: an epoch, say. A multiplier whose cap or rate is right
    /// needs far fewer.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use kronwake::penalty::{Dual, Grouping, Multiplier, Omega};
    ///
    /// let w = Tensor::new(&[0f64, 2.], &Device::Cpu)?;
    /// let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 1.0, Dual::ascent(0.1), w.dims())?;
    /// for _ in 0..100 {
    ///     multiplier.update(&w)?; // weights that do not answer
    /// }
    /// assert_eq!(multiplier.report(&w)?.infeasible(50), [0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn infeasible(&self, patience: u64) -> Vec<usize> {
        let groups = self.stalled.iter().enumerate();
        groups.filter(|(_, stalled)| **stalled >= patience.max(1)).map(|(group, _)| group).collect()
    }
}

impl Multiplier {
    /// Multipliers of zero for weights of these dimensions. A number as `bound` is an upper one.
    ///
    /// # Errors
    /// If the bound is negative or not finite, an option of `dual` is not in its range or contradicts another, which the message names, or the
    /// grouping makes no sense.
    pub fn new(omega: Omega, bound: impl Into<Bound>, dual: Dual, dims: &[usize]) -> Result<Self> {
        Self::total(omega, bound.into(), dual, &[dims])
    }

    /// Multipliers for several tensors: their groups of the same index are one group.
    ///
    /// # Errors
    /// As for [`Multiplier::new`], and if the tensors have different numbers of groups.
    pub(super) fn total(omega: Omega, bound: Bound, dual: Dual, dims: &[&[usize]]) -> Result<Self> {
        let k = bound.value();
        if !(k.is_finite() && k >= 0.0) {
            bail!("multiplier: bound: expected a finite number of zero or more, got {k}")
        }
        dual.check(bound)?;
        let part = |dims: &&[usize]| {
            Ok(Part { dims: dims.to_vec(), layout: GroupLayout::of(omega.grouping(), dims)? })
        };
        let parts = dims.iter().map(part).collect::<Result<Vec<_>>>()?;
        let counts: Vec<usize> = parts.iter().map(|part| part.layout.count()).collect();
        let groups = counts.first().copied().unwrap_or(0);
        if counts.iter().any(|count| *count != groups) {
            bail!(
                "multiplier: {omega:?} of several tensors joins groups of the same index, expected as many of each tensor, got {counts:?} of \
                 tensors {dims:?}"
            )
        }
        let initial = |row: Row| match row {
            Row::Penalty => dual.step(bound).penalty,
            Row::Least => NONE,
            Row::Alpha | Row::Integral | Row::Average | Row::Stalled => 0.0,
        };
        let rows: Vec<f64> =
            Row::ALL.into_iter().flat_map(|row| std::iter::repeat_n(initial(row), groups)).collect();
        let state = Tensor::from_vec(rows, (Row::ALL.len(), groups), &Device::Cpu)?;
        Ok(Self { omega, bound, dual, parts, state, started: false })
    }

    /// The multipliers, one a group, read from the weights' device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn alpha(&self) -> Result<Vec<f64>> {
        Row::Alpha.of(&self.state)?.to_vec1()
    }

    /// What [`Dual`] makes of the multipliers' excess, in the loss: `sum_g alpha_g e_g + c/2 [e_g]_+^2`, `e = Omega(w) - k`, of an equality
    /// `c/2 e_g^2`, or the [`AugmentedLagrangian`]'s. A scalar in f32 (f64 for f64), differentiable once with respect to `w`, which is to be
    /// what it was until the backward pass.
    ///
    /// # Errors
    /// If `w` has other dimensions, is not a floating point tensor, or, on the CPU, holds NaN or an infinity.
    pub fn term(&self, w: &Tensor) -> Result<Tensor> {
        self.total_term(&[w])
    }

    /// [`Multiplier::term`] and its gradient, outside of candle's graph.
    ///
    /// # Errors
    /// As for [`Multiplier::term`].
    pub fn term_and_gradient(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let (value, slopes) = self.evaluate(&[w])?;
        Ok((tensor_of(value, ()), slopes.of(0, None)?))
    }

    /// One step of the multipliers at the weights `w`, which the optimizer has stepped.
    ///
    /// # Errors
    /// As for [`Multiplier::term`]; nothing has changed then.
    pub fn update(&mut self, w: &Tensor) -> Result<()> {
        self.total_update(&[w])
    }

    /// [`Multiplier::update`] of several tensors.
    pub(super) fn total_update(&mut self, weights: &[&Tensor]) -> Result<()> {
        let omegas = self.omegas(weights)?;
        let state = self.state.to_device(omegas.device())?;
        self.state = self.dual.step(self.bound).run(&omegas, &state, !self.started)?;
        self.started = true;
        Ok(())
    }

    /// Multipliers, excesses, slackness and signs of infeasibility at `w`.
    ///
    /// # Errors
    /// As for [`Multiplier::term`].
    pub fn report(&self, w: &Tensor) -> Result<Report> {
        self.total_report(&[w])
    }

    /// [`Multiplier::report`] of several tensors.
    pub(super) fn total_report(&self, weights: &[&Tensor]) -> Result<Report> {
        let excess = (self.omegas(weights)? - self.bound.value())?.to_vec1::<f64>()?;
        let [alpha, _, _, penalty, _, stalled] = self.rows()?;
        let slackness = alpha.iter().zip(&excess).map(|(a, e)| a * e).collect();
        let stalled = stalled.into_iter().map(|steps| steps as u64).collect();
        Ok(Report { alpha, excess, slackness, penalty, stalled })
    }

    /// The rows of the state, in the order of [`Row::ALL`].
    fn rows(&self) -> Result<[Vec<f64>; Row::ALL.len()]> {
        let all = self.state.to_vec2::<f64>()?;
        let found = all.len();
        all.try_into().or_else(|_| bail!("multiplier: a state of {found} rows, expected {}", Row::ALL.len()))
    }

    /// What is bounded, for comparison with a file's.
    pub(super) fn kind(&self) -> String {
        format!("{:?} {}", self.omega, self.bound)
    }

    /// The number of groups.
    pub(super) fn count(&self) -> usize {
        self.parts.first().map_or(0, |part| part.layout.count())
    }

    /// All that a step changes, `[groups]` in f64 each on the CPU, by the names that files have; no average before the first step.
    pub(super) fn state(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let state = self.state.to_device(&Device::Cpu)?;
        let kept = |row: &Row| self.started || *row != Row::Average;
        Row::ALL.into_iter().filter(kept).map(|row| Ok((slot(row), row.of(&state)?.copy()?))).collect()
    }

    /// The multiplier `name` with what `read` finds of the tensors of [`Multiplier::state`], `[groups]` in f64. What files of older versions lack begins
    /// anew, and so does the factor of the quadratic term where it has not grown: it is an option then.
    ///
    /// # Errors
    /// Those of `read`, and if there is no multiplier or no integral.
    pub(super) fn resumed(
        &self,
        name: &str,
        mut read: impl FnMut(&'static str) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        let mut rows = vec![];
        let mut started = false;
        let fresh = Self { started: false, ..Self::total(self.omega, self.bound, self.dual, &self.dims())? };
        for row in Row::ALL {
            let found = read(slot(row))?;
            let needed = match row {
                Row::Alpha | Row::Integral => true,
                Row::Average | Row::Penalty | Row::Least | Row::Stalled => false,
            };
            if needed && found.is_none() {
                bail!("{name}.{} is missing", slot(row))
            }
            started |= row == Row::Average && found.is_some();
            let option = row == Row::Penalty && self.dual.augmented_lagrangian.is_none();
            rows.push(match found {
                Some(values) if !option => values,
                Some(_) | None => row.of(&fresh.state)?,
            });
        }
        Ok(Self { state: Tensor::stack(&rows, 0)?, started, ..fresh })
    }

    fn dims(&self) -> Vec<&[usize]> {
        self.parts.iter().map(|part| &part.dims[..]).collect()
    }

    fn check(&self, weights: &[&Tensor]) -> Result<()> {
        for (part, w) in self.parts.iter().zip(weights) {
            if w.dims() != part.dims {
                bail!("multiplier: expected dimensions {:?}, got {:?}", part.dims, w.dims())
            }
        }
        Ok(())
    }
}

/// The name of a row in files.
fn slot(row: Row) -> &'static str {
    match row {
        Row::Alpha => "alpha",
        Row::Integral => "integral",
        Row::Average => "average",
        Row::Penalty => "penalty",
        Row::Least => "least",
        Row::Stalled => "stalled",
    }
}
