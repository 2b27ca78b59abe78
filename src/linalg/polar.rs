//! The orthogonal factor of matrices, by matrix products alone.

use crate::ops::dense::{mix, product};
use candle_core::{Result, Tensor};

/// The polynomial `a x + b x^3 + c x^5` of a Newton-Schulz step: steep at 0, and within about 0.3 of 1 after five steps from anywhere in
/// (0.01, 1] (Jordan et al. 2024).
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// Norms below are taken for this one.
const LEAST_NORM: f64 = 1e-20;

/// `U p(S) V^T` of every matrix `U S V^T` of `[.., rows, columns]`, where `p` takes singular values between 0 and 1, in units of the
/// matrix's norm, close to 1: with enough `iterations` about the orthogonal matrix that is nearest to it. A matrix of zeros stays one.
///
/// The products are those of the smaller side: with `A = X X^T` an iteration is `X <- a X + (b A + c A^2) X`, of a tall matrix the same with
/// `A = X^T X` from the right.
///
/// # Errors
/// When the tensor has fewer than two dimensions, or a device fails.
pub(crate) fn orthogonalized(matrices: &Tensor, iterations: usize) -> Result<Tensor> {
    let (rows, columns) = matrices.dims().split_last_chunk::<2>().map_or((1, 1), |(_, [r, c])| (*r, *c));
    let last = matrices.rank().saturating_sub(2);
    let norm = matrices.sqr()?.sum_keepdim((last, last + 1))?.sqrt()?.maximum(LEAST_NORM)?;
    let mut x = matrices.broadcast_div(&norm)?;
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..iterations {
        let transposed = x.transpose(last, last + 1)?;
        let gram = if rows > columns { product(&transposed, &x)? } else { product(&x, &transposed)? };
        let power = mix(&gram, b, &product(&gram, &gram)?, c)?;
        let higher = if rows > columns { product(&x, &power)? } else { product(&power, &x)? };
        x = mix(&x, a, &higher, 1.0)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::testing::{max_abs, random_symmetric};
    use candle_core::{DType, Device};

    /// The polynomial by plain numbers.
    fn polynomial(mut x: f64, iterations: usize) -> f64 {
        let (a, b, c) = COEFFICIENTS;
        for _ in 0..iterations {
            x = a * x + b * x.powi(3) + c * x.powi(5);
        }
        x
    }

    #[test]
    fn singular_values_go_through_the_polynomial() -> Result<()> {
        // Two orthogonal bases, and a matrix whose singular vectors and values are therefore known.
        let basis = |seed| -> Result<Tensor> {
            let found = crate::linalg::eigh::eigh_all(&[(&random_symmetric(1, 4, seed)?, "m")]);
            crate::linalg::next(&mut found.into_iter())?.vectors.to_dtype(DType::F64)
        };
        let (u, v) = (basis(1)?, basis(2)?.narrow(1, 0, 4)?);
        for columns in [4, 3] {
            let values: Vec<f64> = vec![3.0, 0.7, 0.02, 0.4][..columns].to_vec();
            let norm = values.iter().map(|s| s * s).sum::<f64>().sqrt();
            let scaled = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
                let f = Tensor::from_iter(values.iter().map(|&s| f(s)), &Device::Cpu)?;
                let left = u.narrow(2, 0, columns)?.broadcast_mul(&f)?;
                left.matmul(&v.narrow(1, 0, columns)?.narrow(2, 0, columns)?.contiguous()?)
            };
            // With a part of a basis alone, the right side is no orthogonal matrix: only square ones are compared so.
            if columns == 4 {
                for iterations in [1, 5] {
                    let expected = scaled(&|s| polynomial(s / norm, iterations))?;
                    let found = orthogonalized(&scaled(&|s| s)?, iterations)?;
                    assert!(max_abs(&(found - expected)?)? < 1e-12);
                }
            }
            let wide = scaled(&|s| s)?;
            let tall = wide.transpose(1, 2)?.contiguous()?;
            let off = (orthogonalized(&wide, 5)?.transpose(1, 2)? - orthogonalized(&tall, 5)?)?;
            assert!(max_abs(&off)? < 1e-12);
        }
        assert_eq!(max_abs(&orthogonalized(&u.zeros_like()?, 5)?)?, 0.0);
        Ok(())
    }
}
