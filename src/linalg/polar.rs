//! The orthogonal factor of matrices, by matrix products alone.

use crate::ops::dense::{mix, product};
use crate::ops::symmetric::symmetric_product;
use candle_core::{D, Result, Tensor};

/// The polynomial `a x + b x^3 + c x^5` of a Newton-Schulz step: steep at 0, and within about 0.3 of 1 after five steps from anywhere in
/// (0.01, 1] (Jordan et al. 2024).
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// Norms below are taken for this one.
const LEAST_NORM: f64 = 1e-20;

/// The smaller side from which on symmetric products are made by halves, and iterations where they are cheapest.
const LARGE: usize = 128;
/// Iterations of one Gram matrix; each makes twelve times as much of the rounding of its smallest eigenvalues.
const ITERATIONS_OF_A_GRAM: usize = 3;

/// `U p(S) V^T` of every matrix `U S V^T` of `[.., rows, columns]`, where `p` takes singular values between 0 and 1, in units of the
/// matrix's norm, close to 1: with enough `iterations` about the orthogonal matrix that is nearest to it. A matrix of zeros stays one.
///
/// The products are those of the smaller side: with `A = X X^T` an iteration is `X <- a X + (b A + c A^2) X`, of a tall matrix the same with
/// `A = X^T X` from the right. Of large matrices whose larger side is twice the smaller one or more, up to three iterations
/// multiply `X` only twice: see [`by_gram`].
///
/// # Errors
/// When the tensor has fewer than two dimensions, or a device fails.
pub(crate) fn orthogonalized(matrices: &Tensor, iterations: usize) -> Result<Tensor> {
    let (rows, columns) = matrices.dims().split_last_chunk::<2>().map_or((1, 1), |(_, [r, c])| (*r, *c));
    let last = matrices.rank().saturating_sub(2);
    let norm = matrices.sqr()?.sum_keepdim((last, last + 1))?.sqrt()?.maximum(LEAST_NORM)?;
    let mut x = matrices.broadcast_div(&norm)?;
    let (tall, small) = (rows > columns, rows.min(columns));
    let symmetric = if small >= LARGE { symmetric_product } else { product };
    let gram = |x: &Tensor| {
        let transposed = x.transpose(last, last + 1)?;
        if tall { symmetric(&transposed, x) } else { symmetric(x, &transposed) }
    };
    let times = |x: &Tensor, m: &Tensor| if tall { product(x, m) } else { product(m, x) };
    if small >= LARGE && rows.max(columns) >= 2 * small {
        let mut left = iterations;
        while left > 0 {
            let now = left.min(ITERATIONS_OF_A_GRAM);
            x = times(&x, &by_gram(gram(&x)?, now)?)?;
            left -= now;
        }
        return Ok(x);
    }
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..iterations {
        let gram = gram(&x)?;
        let power = mix(&gram, b, &symmetric(&gram, &gram)?, c)?;
        x = mix(&x, a, &times(&x, &power)?, 1.0)?;
    }
    Ok(x)
}

/// What multiplies `X` in all `iterations`, from `A = X X^T` alone: the product of the factors `P = a + b A + c A^2` of the iterations, with
/// `A <- P A P`. All are functions of the first `A`: they are symmetric, and their order does not matter.
fn by_gram(mut gram: Tensor, iterations: usize) -> Result<Tensor> {
    let (a, b, c) = COEFFICIENTS;
    let size = gram.dim(D::Minus1)?;
    let eye = Tensor::eye(size, gram.dtype(), gram.device())?.broadcast_as(gram.shape())?;
    let mut all = None;
    for left in (0..iterations).rev() {
        let power = mix(&gram, b, &symmetric_product(&gram, &gram)?, c)?;
        let factor = (&eye * a)?.add(&power)?;
        if left > 0 {
            gram = symmetric_product(&symmetric_product(&factor, &gram)?, &factor)?;
        }
        all = Some(match all {
            None => factor,
            Some(all) => symmetric_product(&factor, &all)?,
        });
    }
    all.map_or_else(|| eye.contiguous(), Ok)
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

    /// Large matrices, wide, tall and square, in several groups: from the polynomial of their Gram matrices' eigenvalues.
    #[test]
    fn large_matrices() -> Result<()> {
        use crate::linalg::eigh::{Eigh, eigh_all};
        use crate::ops::testing::random;
        for (rows, columns) in [(320, 330), (130, 260), (1000, 320)] {
            for (iterations, dtype, tolerance) in [
                (3, DType::F64, 1e-11),
                (4, DType::F64, 1e-11),
                (3, DType::F32, 2e-5),
                (5, DType::F64, 1e-10),
                (5, DType::F32, 5e-5),
            ] {
                // Singular values from about 0.08 of the norm down to a thousandth of that.
                let x = random(3, &[2, rows, columns])?;
                let fall = Tensor::from_iter(
                    (0..columns).map(|i| 1e-3f64.powf(i as f64 / columns as f64)),
                    &Device::Cpu,
                )?;
                let x = x.broadcast_mul(&fall)?;
                let small = if rows > columns { x.t()?.contiguous()? } else { x.clone() };
                let norm = x.sqr()?.sum_keepdim((1, 2))?.sqrt()?;
                let small = small.broadcast_div(&norm)?;
                let gram = small.matmul(&small.t()?)?;
                let Eigh { values, vectors } =
                    crate::linalg::next(&mut eigh_all(&[(&gram, "gram")]).into_iter())?;
                // p(s) / s for each singular value s.
                let values: Vec<f64> = values.flatten_all()?.to_vec1()?;
                let factors = values.iter().map(|g| {
                    let s = g.max(1e-30).sqrt();
                    polynomial(s, iterations) / s
                });
                let factors = Tensor::from_iter(factors, &Device::Cpu)?.reshape((2, 1, ()))?;
                let function = vectors.broadcast_mul(&factors)?.matmul(&vectors.t()?)?;
                let expected = function.matmul(&small)?;
                let expected = if rows > columns { expected.t()?.contiguous()? } else { expected };
                let found = orthogonalized(&x.to_dtype(dtype)?, iterations)?.to_dtype(DType::F64)?;
                let off = max_abs(&(found - expected)?)?;
                assert!(off < tolerance, "{rows} x {columns}, {iterations} iterations, {dtype:?}: {off}");
            }
        }
        Ok(())
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
