//! Eigenvalue damping that is small beside the rounding of f32.
//!
//! A factor in f32 has errors of about `u sqrt(m_ii m_jj)` in its elements, `u = 6e-8`, and its decomposition in f32 adds errors of
//! `u |m|` to every eigenvalue. With inputs whose mean is large beside their spread, or features of very different sizes, eigenvalues that
//! matter are below that, and what is found in their place is noise: zero or less for a direction in which the curvature is thousands of
//! times the damping, so that a step is as many times too long. Where `u |A| |G|` comes near the damping, three things keep the step right:
//!
//! * the decomposition is made in f64, which leaves the elements' own errors alone;
//! * these are of the size of the elements. So the eigenvectors of small features are as exact as those of large ones, and stay so when
//!   they are rounded to f32;
//! * an eigenvalue counts at least as the elements' errors along its vector `v`, `noise sum_i v_i^2 m_ii`: below that nothing is known
//!   of it, and a short step in an unknown direction is safe. For features of different sizes that is far below `u |m|`.

use super::damping::DampingKind;
use super::factor_shape::is_diagonal;
use super::inverse::Task;
use crate::linalg::eigh::Eigh;
use crate::linalg::sketch::{diagonal_of, is_sketch};
use candle_core::{DType, Result, Tensor};

/// The unit roundoff of f32.
pub(super) const ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;

/// The share of the damping above which rounding shows.
const SHOWS: f64 = 0.1;

/// Which tasks have an eigenvalue damping that is small beside the rounding of their factors.
pub(super) fn below_rounding(tasks: &[Task]) -> Result<Vec<bool>> {
    // Of a positive matrix the largest eigenvalue is at most the Frobenius norm.
    let square = |m: &Tensor| match is_sketch(m) {
        true => diagonal_of(m)?.sum_all()?.sqr(),
        false => m.sqr()?.sum_all(),
    };
    let single = |task: &&Task| task.recipe.kind == DampingKind::Eigenvalue && task.a.dtype() != DType::F64;
    let squares = tasks.iter().filter(single).flat_map(|task| [square(&task.a), square(&task.g)]);
    let squares = squares.collect::<Result<Vec<_>>>()?;
    if squares.is_empty() {
        return Ok(vec![false; tasks.len()]);
    }
    let squares = Tensor::stack(&squares, 0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let mut squares = squares.chunks(2);
    let shows = |task: &Task| {
        single(&task) && {
            let [a, g] = squares.next().and_then(|pair| pair.try_into().ok()).unwrap_or([0.0, 0.0]);
            let error = ROUNDOFF * a.sqrt() * g.sqrt();
            // What is not finite in f32 may be so in f64.
            error.is_nan() || error > SHOWS * task.recipe.damping
        }
    };
    Ok(tasks.iter().map(shows).collect())
}

/// What is not known of an eigenvalue of a factor of `dim` rows, as a share of the factor's elements.
pub(super) fn unknown_share(dim: usize) -> f64 {
    4.0 * ROUNDOFF * (dim as f64).sqrt()
}

/// The decomposition of `m`, whose elements were rounded to f32, with no eigenvalue below what is known of it.
pub(super) fn above_rounding(Eigh { values, vectors }: Eigh, m: &Tensor) -> Result<Eigh> {
    let (_, dim, _) = m.dims3()?;
    let sizes = (diagonal_of(m)? * unknown_share(dim))?.unsqueeze(1)?;
    let least = sizes.matmul(&vectors.sqr()?)?.squeeze(1)?;
    Ok(Eigh { values: values.maximum(&least)?, vectors })
}

/// Second moments in the eigenbases of two factors, `[groups, rows, columns]`, none below what rounding leaves of it: that of each
/// projection in f32 is in proportion to the sizes of what it adds up, and so the error of its square is to the square of that.
pub(crate) fn moments_above_rounding(
    moments: &Tensor,
    (a, basis_a): (&Tensor, &Tensor),
    (g, basis_g): (&Tensor, &Tensor),
) -> Result<Tensor> {
    if moments.dtype() == DType::F64 {
        return Ok(moments.clone());
    }
    let groups = moments.dim(0)?;
    let sizes = |m: &Tensor, basis: &Tensor| -> Result<Tensor> {
        diagonal_of(m)?.unsqueeze(1)?.matmul(&basis.sqr()?)?.reshape((groups, ()))
    };
    let noise = 16.0 * ROUNDOFF;
    let (a, g) = ((sizes(a, basis_a)? * noise)?, (sizes(g, basis_g)? * noise)?);
    moments.maximum(&g.unsqueeze(2)?.broadcast_mul(&a.unsqueeze(1)?)?)
}

/// A factor in f64, unless it needs no decomposition or is made in f64 in any case.
pub(super) fn widened(m: &Tensor, groups: usize) -> Result<Tensor> {
    if is_sketch(m) || is_diagonal(m, groups) { Ok(m.clone()) } else { m.to_dtype(DType::F64) }
}

#[cfg(test)]
mod tests;
