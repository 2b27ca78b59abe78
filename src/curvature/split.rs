//! Products with a function of a Kronecker product in the eigenvectors of its factors, of which at least one is of low rank: directions
//! outside its eigenvectors share one eigenvalue, and are never formed. Its basis is `[groups, k, d]`, a vector a row, as a sketch is.

use super::factor_shape::{columns_rotated, cut, fitted, rows_rotated};
use crate::linalg::sketch::is_sketch;
use crate::ops::dense::{mix, product};
use candle_core::{Result, Tensor};

/// `x` `[groups, rows, columns]` with each part in the eigenvectors `i` of the rows and `j` of the columns times `scale[i, j]`, the part
/// outside the eigenvectors of low rank by the last row or column of `scale`.
///
/// With `P = U U^T` of the rows' low rank and the scales `s` inside and `r` outside, `r x + P (s - r) x` needs the columns' turn twice, for
/// all rows and for `k` of them.
pub(super) fn scaled(basis_g: &Tensor, x: &Tensor, basis_a: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (_, rows, columns) = x.dims3()?;
    let values = scale.dim(1)?;
    if is_sketch(basis_g) {
        let (inside, outside) = (scale.narrow(1, 0, values - 1)?, scale.narrow(1, values - 1, 1)?);
        let by = inside.broadcast_sub(&outside)?;
        let turned = along_columns(&product(basis_g, x)?, basis_a, &by)?;
        return mix(&along_columns(x, basis_a, &outside)?, 1.0, &product(&basis_g.t()?, &turned)?, 1.0);
    }
    let turned = rows_rotated(&basis_g.t()?, &fitted(x, (values, columns))?)?;
    cut(&rows_rotated(basis_g, &along_columns(&turned, basis_a, scale)?)?, (rows, columns))
}

/// [`scaled`] with rows as they are; `scale` has as many, or one.
fn along_columns(x: &Tensor, basis: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (_, rows, columns) = x.dims3()?;
    let values = scale.dim(2)?;
    if is_sketch(basis) {
        let (inside, outside) = (scale.narrow(2, 0, values - 1)?, scale.narrow(2, values - 1, 1)?);
        let turned = product(x, &basis.t()?)?.broadcast_mul(&inside.broadcast_sub(&outside)?)?;
        return mix(&x.broadcast_mul(&outside)?, 1.0, &product(&turned, basis)?, 1.0);
    }
    let turned = columns_rotated(&fitted(x, (rows, values))?, basis)?.broadcast_mul(scale)?;
    cut(&columns_rotated(&turned, &basis.t()?)?, (rows, columns))
}
