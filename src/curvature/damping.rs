//! Damping: what is added to the curvature before it is inverted.

use candle_core::{Result, bail};
use std::fmt;

/// Where the damping enters a Kronecker product `A (x) G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DampingKind {
    /// `A (x) G + la I`, exact, in the eigenbasis: `V = Qg [(Qg^T g Qa) / (dg da^T + la)] Qa^T`.
    ///
    /// In f32, where `la` is small beside the rounding of `A (x) G` (below about `6e-7 |A| |G|` in Frobenius norms), as for inputs with a
    /// large mean or features of very different sizes, the decomposition is made in f64, and eigenvalues count at least as the rounding
    /// of their factor's elements. So features of different sizes are stepped on as in f64. Directions in which the inputs vary
    /// less than a few `1e-7` of their mean square are below that rounding, and take short steps; centred inputs have none.
    Eigenvalue,
    /// `(A + pi sqrt(la) I) (x) (G + sqrt(la) / pi I)` with `pi^2 = (tr A / dim A) / (tr G / dim G)`
    /// (Martens & Grosse 2015, section 6.3): needs no eigenbasis, and damps the cross terms too.
    Pi,
}

/// The damping rule of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Damping {
    /// [`DampingKind::Eigenvalue`] with a fixed `la`.
    Eigenvalue(f64),
    /// [`DampingKind::Pi`] with a fixed `la`.
    Pi(f64),
    /// Levenberg-Marquardt: `la` follows how well the quadratic model predicts the loss.
    Adaptive(Adaptive),
    /// From the factors themselves; see [`Relative`].
    Relative(Relative),
}

/// Damping without a knob: `la = fraction tr(F_bar^2) / tr(F_bar)`, over all blocks, at each update of the inverses.
///
/// Gradient noise has a covariance proportional to `F`, so `tr(F^2) / tr(F)` is the mean curvature that a step of pure noise
/// meets. It scales with the loss as the eigenvalues do, and is blind to the many directions without curvature in which
/// large models differ from small ones (a mean or a quantile of the eigenvalues is not: it falls by two orders of magnitude
/// from a small convolutional net to LeNet-300-100, where the damping that trains best stays).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Relative {
    /// Where the damping enters.
    pub kind: DampingKind,
    /// The fraction, 0.02 by default; anything from 0.006 to 0.06 does.
    pub fraction: f64,
}

impl Default for Relative {
    fn default() -> Self {
        Self { kind: DampingKind::Eigenvalue, fraction: 0.02 }
    }
}

impl Relative {
    /// The damping for `squares = tr(F^2)` and `trace = tr(F)`.
    pub(crate) fn of(&self, squares: f64, trace: f64) -> f64 {
        // Without any curvature every direction is as good; it only has to be finite.
        if trace > 0.0 { (self.fraction * squares / trace).max(SMALLEST) } else { SMALLEST }
    }
}

const SMALLEST: f64 = 1e-10;

/// Levenberg-Marquardt damping (Martens & Grosse 2015, section 6.5).
///
/// Every `every` steps the change of the loss over the step, on the step's own batch, is divided by the change that the
/// model `<g, s> + 1/2 s^T (F_bar + la I) s` predicted. Above 3/4 the damping is multiplied by `factor`, below 1/4 divided
/// by it. The new value enters with the next update of the inverses. The loss after the step has to be measured by the
/// caller: see `NaturalGradient::wants_loss_after` and `NaturalGradient::adapt_damping`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adaptive {
    /// Where the damping enters.
    pub kind: DampingKind,
    /// The value at the start.
    pub initial: f64,
    /// Steps from one measurement to the next.
    pub every: usize,
    /// Multiplies the damping after a good prediction; in (0, 1).
    pub factor: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self { kind: DampingKind::Eigenvalue, initial: 0.01, every: 5, factor: 0.9, min: 1e-6, max: 10.0 }
    }
}

impl fmt::Display for DampingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eigenvalue => "eigenvalue",
            Self::Pi => "pi",
        })
    }
}

impl fmt::Display for Damping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Self::Eigenvalue(la) | Self::Pi(la) => write!(f, "{kind} damping of {la}"),
            Self::Adaptive(Adaptive { initial, .. }) => {
                write!(f, "{kind} damping of {initial} at first, adapted to the loss")
            }
            Self::Relative(Relative { fraction, .. }) => {
                write!(f, "{kind} damping of {fraction} times the factors' mean curvature")
            }
        }
    }
}

impl Damping {
    /// Where it enters.
    pub fn kind(&self) -> DampingKind {
        match self {
            Damping::Eigenvalue(_) => DampingKind::Eigenvalue,
            Damping::Pi(_) => DampingKind::Pi,
            Damping::Adaptive(adaptive) => adaptive.kind,
            Damping::Relative(relative) => relative.kind,
        }
    }

    /// The value at the first step; 0 where it is not known before.
    pub fn initial(&self) -> f64 {
        match self {
            Damping::Eigenvalue(la) | Damping::Pi(la) => *la,
            Damping::Adaptive(adaptive) => adaptive.initial,
            Damping::Relative(_) => 0.0,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if let Damping::Relative(Relative { fraction, .. }) = self {
            if !(fraction.is_finite() && *fraction > 0.0) {
                bail!("damping: expected a positive fraction, got {fraction}")
            }
            return Ok(());
        }
        let la = self.initial();
        if !(la.is_finite() && la > 0.0) {
            bail!("damping: expected a positive number, got {la}")
        }
        if let Damping::Adaptive(a) = self {
            if !(a.factor > 0.0 && a.factor < 1.0) {
                bail!("damping: expected an adaptation factor in (0, 1), got {}", a.factor)
            }
            if a.every == 0 {
                bail!("damping: expected an adaptation period of at least one step, got 0")
            }
            if !(a.min > 0.0 && a.min <= la && la <= a.max && a.max.is_finite()) {
                bail!("damping: expected 0 < min <= initial <= max, got {} <= {la} <= {}", a.min, a.max)
            }
        }
        Ok(())
    }
}

impl Adaptive {
    /// The damping after a step whose loss changed by `actual` where `predicted` (negative) was predicted.
    pub(crate) fn next(&self, damping: f64, actual: f64, predicted: f64) -> f64 {
        let ratio = actual / predicted;
        let next = if !ratio.is_finite() || ratio < 0.25 {
            damping / self.factor
        } else if ratio > 0.75 {
            damping * self.factor
        } else {
            damping
        };
        next.clamp(self.min, self.max)
    }
}
