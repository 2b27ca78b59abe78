//! Damped inverses of Kronecker products, in the form in which they multiply a gradient.

use super::damping::DampingKind;
use crate::linalg::cholesky::inverse_spd;
use crate::linalg::eigh::{Eigh, eigh, generalized_eigh};
use crate::linalg::kron::{add_diagonal_each, pi_split};
use crate::linalg::newton::{NewtonOptions, newton_inverse};
use crate::ops::dense::{mix, product};
use candle_core::{Result, Tensor};

/// How the damped factors are inverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Inverse {
    /// By eigendecomposition; works with every damping.
    #[default]
    Eigen,
    /// By Cholesky factorization, cheaper than an eigendecomposition; with [`DampingKind::Pi`] only.
    Cholesky,
    /// By Newton's iteration from the last inverse, matrix products alone; with [`DampingKind::Pi`] only.
    Newton,
}

/// A damped inverse of `A (x) G`, for gradients of shape `[groups, out, in]`.
#[derive(Debug, Clone)]
pub(crate) enum Preconditioner {
    /// `V = G^-1 g A^-1`.
    Factors { inv_a: Tensor, inv_g: Tensor },
    /// `V = Kg [(Kg^T g Ka) * scale] Ka^T`; `K` are eigenvectors, orthogonal or of a generalized problem.
    Basis { basis_a: Tensor, basis_g: Tensor, scale: Tensor },
}

impl Preconditioner {
    /// `V`, the gradient times the inverse.
    pub fn apply(&self, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Factors { inv_a, inv_g } => sandwich(inv_g, gradient, inv_a),
            Self::Basis { basis_a, basis_g, scale } => {
                let inside = sandwich(&basis_g.t()?, gradient, basis_a)?;
                sandwich(basis_g, &(inside * scale)?, &basis_a.t()?)
            }
        }
    }

    /// Every tensor with its name, for saving and for counting bytes.
    pub fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Factors { inv_a, inv_g } => vec![("inv_a", inv_a), ("inv_g", inv_g)],
            Self::Basis { basis_a, basis_g, scale } => {
                vec![("basis_a", basis_a), ("basis_g", basis_g), ("scale", scale)]
            }
        }
    }
}

/// `g x a` for matrices `[groups, out, out]`, `[groups, out, in]` and `[groups, in, in]`.
pub(crate) fn sandwich(g: &Tensor, x: &Tensor, a: &Tensor) -> Result<Tensor> {
    product(&product(g, x)?, a)
}

/// The outer products `dg da^T` of two spectra, `[groups, out, in]`; values at or below `floor` count as 0, and rounding
/// may have made a zero eigenvalue negative.
pub(crate) fn spectrum(values_a: &Tensor, values_g: &Tensor, floor: f64) -> Result<Tensor> {
    let clean = |v: &Tensor| -> Result<Tensor> { v.gt(floor.max(0.0))?.to_dtype(v.dtype())?.mul(v) };
    clean(values_g)?.unsqueeze(2)?.broadcast_mul(&clean(values_a)?.unsqueeze(1)?)
}

/// What a damped inverse is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub kind: DampingKind,
    pub damping: f64,
    pub inverse: Inverse,
    pub floor: f64,
}

/// `(A (x) G + damping)^-1`. `last` is the previous inverse of the same block, where Newton starts.
pub(crate) fn damped_inverse(
    a: &Tensor,
    g: &Tensor,
    recipe: Recipe,
    last: Option<&Preconditioner>,
    name: &str,
) -> Result<Preconditioner> {
    let Recipe { kind, damping, inverse, floor } = recipe;
    match (kind, inverse) {
        (DampingKind::Eigenvalue, _) => {
            let (a, g) = rayon::join(|| eigh(a, name), || eigh(g, name));
            let Eigh { values: da, vectors: basis_a } = a?;
            let Eigh { values: dg, vectors: basis_g } = g?;
            let scale = (spectrum(&da, &dg, floor)? + damping)?.recip()?;
            Ok(Preconditioner::Basis { basis_a, basis_g, scale })
        }
        (DampingKind::Pi, inverse) => {
            let (a, g) = pi_damped(a, g, damping, name)?;
            let invert = |m: &Tensor, last: Option<&Tensor>| match inverse {
                Inverse::Eigen => {
                    let Eigh { values, vectors } = eigh(m, name)?;
                    product(&vectors.broadcast_mul(&values.recip()?.unsqueeze(1)?)?, &vectors.t()?)
                }
                Inverse::Cholesky => inverse_spd(m, name),
                Inverse::Newton => Ok(newton_inverse(m, last, NewtonOptions::new(m.dtype()), name)?.inverse),
            };
            let (last_a, last_g) = match last {
                Some(Preconditioner::Factors { inv_a, inv_g }) => (Some(inv_a), Some(inv_g)),
                _ => (None, None),
            };
            let (inv_a, inv_g) = rayon::join(|| invert(&a, last_a), || invert(&g, last_g));
            Ok(Preconditioner::Factors { inv_a: inv_a?, inv_g: inv_g? })
        }
    }
}

/// `A + pi sqrt(la) I` and `G + sqrt(la) / pi I`.
pub(crate) fn pi_damped(a: &Tensor, g: &Tensor, damping: f64, name: &str) -> Result<(Tensor, Tensor)> {
    let pi = pi_split(a, g, name)?;
    let root = damping.sqrt();
    Ok((add_diagonal_each(a, &(&pi * root)?, name)?, add_diagonal_each(g, &(pi.recip()? * root)?, name)?))
}

/// `(A (x) G + damping) x` for `x` of shape `[groups, out, in]`.
pub(crate) fn damped_product(
    a: &Tensor,
    g: &Tensor,
    kind: DampingKind,
    damping: f64,
    x: &Tensor,
    name: &str,
) -> Result<Tensor> {
    match kind {
        DampingKind::Eigenvalue => mix(&sandwich(g, x, a)?, 1.0, x, damping),
        DampingKind::Pi => {
            let (a, g) = pi_damped(a, g, damping, name)?;
            sandwich(&g, x, &a)
        }
    }
}

/// `(A_bar (x) G_bar + lr A (x) G)^-1` with pi-damped averages: the exact solve of the quadratic wake. Two generalized
/// eigenproblems make both terms diagonal at once.
pub(crate) fn sum_inverse(
    bar: (&Tensor, &Tensor),
    current: (&Tensor, &Tensor),
    lr: f64,
    damping: f64,
    name: &str,
) -> Result<Preconditioner> {
    let (bar_a, bar_g) = pi_damped(bar.0, bar.1, damping, name)?;
    let Eigh { values: da, vectors: basis_a } = generalized_eigh(&bar_a, current.0, name)?;
    let Eigh { values: dg, vectors: basis_g } = generalized_eigh(&bar_g, current.1, name)?;
    let scale = ((spectrum(&da, &dg, 0.0)? * lr)? + 1.0)?.recip()?;
    Ok(Preconditioner::Basis { basis_a, basis_g, scale })
}
