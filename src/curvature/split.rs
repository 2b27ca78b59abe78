//! Products with a function of a Kronecker product in the eigenvectors of its factors, of which at least one is of low rank: directions
//! outside its eigenvectors share one eigenvalue, and are never formed. Its basis is `[groups, k, d]`, a vector a row, as a sketch is.

use super::factor_shape::{columns_rotated, cut, fitted, rows_rotated};
use crate::linalg::sketch::is_sketch;
use crate::ops::dense::{dot, mix, product};
use candle_core::{DType, Result, Tensor};

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

/// The sum of the squares of `x` in the eigenvectors, each times its `scale`: the inner product of `x` and [`scaled`], of whose products it takes
/// half.
pub(super) fn squares(basis_g: &Tensor, x: &Tensor, basis_a: &Tensor, scale: &Tensor) -> Result<f64> {
    let (values, columns) = (scale.dim(1)?, x.dim(2)?);
    if is_sketch(basis_g) {
        let (inside, outside) = (scale.narrow(1, 0, values - 1)?, scale.narrow(1, values - 1, 1)?);
        let by = inside.broadcast_sub(&outside)?;
        let turned = squares_along_columns(&product(basis_g, x)?, basis_a, &by)?;
        return Ok(turned + squares_along_columns(x, basis_a, &outside)?);
    }
    let turned = rows_rotated(&basis_g.t()?, &fitted(x, (values, columns))?)?;
    squares_along_columns(&turned, basis_a, scale)
}

/// [`squares`] with rows as they are; `scale` has as many, or one.
fn squares_along_columns(x: &Tensor, basis: &Tensor, scale: &Tensor) -> Result<f64> {
    let (rows, values) = (x.dim(1)?, scale.dim(2)?);
    let sum = |x: &Tensor, scale: &Tensor| match scale.elem_count() {
        1 => Ok(dot(x, x)? * scale.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0]),
        _ => dot(x, &x.broadcast_mul(scale)?),
    };
    if is_sketch(basis) {
        let (inside, outside) = (scale.narrow(2, 0, values - 1)?, scale.narrow(2, values - 1, 1)?);
        let turned = product(x, &basis.t()?)?;
        return Ok(sum(&turned, &inside.broadcast_sub(&outside)?)? + sum(x, &outside)?);
    }
    sum(&columns_rotated(&fitted(x, (rows, values))?, basis)?, scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::eigh::eigh;
    use crate::linalg::testing::random_symmetric;
    use crate::ops::testing::random;

    /// Both factors of low rank, one, the other: the sum against the inner product.
    #[test]
    fn squares_are_the_inner_product() -> Result<()> {
        let whole = random(1, &[2, 9, 7])?;
        let orthogonal =
            |d, seed| Ok::<_, candle_core::Error>(eigh(&random_symmetric(2, d, seed)?, "m")?.vectors);
        let few = |basis: Tensor| basis.t()?.narrow(1, 0, 4)?.contiguous();
        let (g, a) = (orthogonal(9, 2)?, orthogonal(7, 3)?);
        for (g, a, sizes) in [
            (few(g.clone())?, few(a.clone())?, [2, 5, 5]),
            (few(g.clone())?, a.clone(), [2, 5, 7]),
            (g.clone(), few(a.clone())?, [2, 9, 5]),
        ] {
            let scale = random(4, &sizes)?.abs()?;
            for groups in [1, 2] {
                let first = |t: &Tensor| t.narrow(0, 0, groups)?.contiguous();
                let (x, g, a, scale) = (first(&whole)?, first(&g)?, first(&a)?, first(&scale)?);
                let expected = dot(&x, &scaled(&g, &x, &a, &scale)?)?;
                let found = squares(&g, &x, &a, &scale)?;
                assert!((found - expected).abs() < 1e-12 * expected.abs(), "{sizes:?}: {found} {expected}");
            }
        }
        Ok(())
    }
}
