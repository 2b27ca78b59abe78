//! The EKFAC correction: second moments of the per-example gradients in the Kronecker eigenbasis.
//!
//! K-FAC scales the direction `(i, j)` of the eigenbasis by `dg_i da_j`, a product of two averages. The average of the product,
//! `S_ij = 1/N sum_n (Qg^T D_n Qa)_ij^2` with `D_n` the n-th example's weight gradient, is the best diagonal in that basis
//! (George et al. 2018, equation 11 and theorem 2).

use crate::ops::factor::cross_square;
use candle_core::{Result, Tensor};

/// `S` of one batch, `[groups, out, in]`; `kept` are a layer's records, the columns of `basis` its eigenvectors.
pub(crate) fn moments(
    kept: &[(Tensor, Tensor)],
    basis_a: &Tensor,
    basis_g: &Tensor,
    folded: bool,
    terms: usize,
) -> Result<Tensor> {
    let groups = basis_a.dim(0)?;
    let mut total: Option<Tensor> = None;
    for (inputs, grads) in kept {
        let a = rotate(inputs, basis_a, groups, folded)?;
        let e = rotate(grads, basis_g, groups, false)?;
        let part = cross_square(&e, &a, groups, "ekfac")?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    match total {
        Some(total) => total / terms.max(1) as f64,
        None => candle_core::bail!("ekfac: no records of this layer"),
    }
}

/// `x Q` for every group of features, with a homogeneous 1 appended to each where the bias is folded in.
fn rotate(x: &Tensor, basis: &Tensor, groups: usize, folded: bool) -> Result<Tensor> {
    let (n, t, features) = x.dims3()?;
    let x = x.reshape((n * t, groups, features / groups.max(1)))?.transpose(0, 1)?.contiguous()?;
    let columns = basis.dim(2)?;
    let rotated = if folded {
        let weights = basis.narrow(1, 0, columns - 1)?.contiguous()?;
        x.matmul(&weights)?.broadcast_add(&basis.narrow(1, columns - 1, 1)?)?
    } else {
        x.matmul(basis)?
    };
    rotated.transpose(0, 1)?.contiguous()?.reshape((n, t, groups * columns))
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
    turn_g.matmul(moments)?.matmul(&turn_a.t()?)
}
