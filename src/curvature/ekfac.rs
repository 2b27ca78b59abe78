//! The EKFAC correction: second moments of the per-example gradients in the Kronecker eigenbasis.
//!
//! K-FAC scales the direction `(i, j)` of the eigenbasis by `dg_i da_j`, a product of two averages. The average of the product,
//! `S_ij = 1/N sum_n (Qg^T D_n Qa)_ij^2` with `D_n` the n-th example's weight gradient, is the best diagonal in that basis
//! (George et al. 2018, equation 11 and theorem 2).

use super::runs::{Runs, sandwich};
use crate::ops::factor::cross_square;
use candle_core::{Result, Tensor};

/// `S` of one batch, `[groups, out, in]` with what fills up runs; `kept` are a layer's records, the columns of `basis` its
/// eigenvectors, of factors of a matrix `[groups, rows, columns]` in runs. `folded` says that inputs lack the bias's 1, and
/// `total` is what sums over loss terms are divided by.
pub(crate) fn moments(
    kept: &[(Tensor, Tensor)],
    (basis_a, columns): (&Tensor, Runs),
    (basis_g, rows): (&Tensor, Runs),
    groups: usize,
    folded: bool,
    total: f64,
) -> Result<Tensor> {
    let mut sums: Option<Tensor> = None;
    for (inputs, grads) in kept {
        let a = turn(inputs, basis_a, columns, groups, folded)?;
        let e = turn(grads, basis_g, rows, groups, false)?;
        let part = cross_square(&e, &a, groups, "ekfac")?;
        sums = Some(match sums {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    match sums {
        Some(sum) => sum / total,
        None => candle_core::bail!("ekfac: no records of this layer"),
    }
}

/// `x Q` for every group of features, with a homogeneous 1 appended to each where the bias is folded in.
fn turn(x: &Tensor, basis: &Tensor, runs: Runs, groups: usize, folded: bool) -> Result<Tensor> {
    let x = if runs.is_full() { x.clone() } else { runs.arranged(x, groups, folded)? };
    let folded = folded && runs.is_full();
    let (n, t, features) = x.dims3()?;
    let count = groups * runs.count();
    let x = x.reshape((n * t, count, features / count.max(1)))?.transpose(0, 1)?.contiguous()?;
    let columns = basis.dim(2)?;
    let turned = if folded {
        let weights = basis.narrow(1, 0, columns - 1)?.contiguous()?;
        x.matmul(&weights)?.broadcast_add(&basis.narrow(1, columns - 1, 1)?)?
    } else {
        x.matmul(basis)?
    };
    turned.transpose(0, 1)?.contiguous()?.reshape((n, t, count * columns))
}

/// Moments of one eigenbasis `(last_a, last_g)` in another: the old ones are carried over as the diagonal matrix that they are,
/// `S'_ij = sum_kl (Qg'^T Qg)_ik^2 S_kl (Qa'^T Qa)_jl^2`.
pub(crate) fn turned(
    moments: &Tensor,
    (last_a, last_g): (&Tensor, &Tensor),
    (basis_a, basis_g): (&Tensor, &Tensor),
) -> Result<Tensor> {
    if last_a.id() == basis_a.id() {
        return Ok(moments.clone());
    }
    let turn_a = basis_a.t()?.matmul(last_a)?.sqr()?;
    let turn_g = basis_g.t()?.matmul(last_g)?.sqr()?;
    sandwich(&turn_g, moments, &turn_a.t()?)
}
