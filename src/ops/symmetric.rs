//! Products that are known to be symmetric, of which half is computed.

use candle_core::{D, DType, Result, Tensor, WithDType, bail};
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::traits::RealField;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

use super::dense::{Matrices, on_cpu_by, par_within, product};
use super::record_layout::WORTH_A_THREAD;

/// [`product`] of two matrices, or of as many of each, whose product is known to be symmetric, as `x x^T` is or that of two functions of one
/// symmetric matrix. On the CPU the half below the diagonal is computed and the other copied.
///
/// # Errors
/// As of [`product`]; also when the product is not square.
pub(crate) fn symmetric_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let on_cpu = a.device().is_cpu() && b.device().is_cpu();
    if a.rank() < 2 || b.rank() != a.rank() || a.dim(D::Minus2)? != b.dim(D::Minus1)? {
        bail!("symmetric product: expected [.., n, k] and [.., k, n], got {:?} and {:?}", a.dims(), b.dims())
    }
    let fit =
        a.dims()[..a.rank() - 2] == b.dims()[..b.rank() - 2] && a.dim(D::Minus1)? == b.dim(D::Minus2)?;
    match (on_cpu && fit && a.dtype() == b.dtype(), a.dtype()) {
        (true, DType::F32) => on_cpu_by::<f32>(a, b, symmetric_products),
        (true, DType::F64) => on_cpu_by::<f64>(a, b, symmetric_products),
        _ => product(a, b),
    }
}

/// The products of `count` pairs of matrices, each symmetric and by rows.
fn symmetric_products<T: WithDType + RealField>(
    a: &Matrices<'_, T>,
    b: &Matrices<'_, T>,
    count: usize,
) -> Vec<T> {
    let (n, k) = (a.rows, a.columns);
    let mut out = vec![<T as WithDType>::from_f64(0.0); count * n * n];
    if k == 0 || out.is_empty() {
        return out;
    }
    let whole = BlockStructure::Rectangular;
    let one = |(index, out): (usize, &mut [T]), par| {
        triangular_matmul(
            MatMut::from_row_major_slice_mut(&mut *out, n, n),
            BlockStructure::TriangularLower,
            Accum::Replace,
            a.get(index),
            whole,
            b.get(index),
            whole,
            <T as WithDType>::from_f64(1.0),
            par,
        );
        mirror_lower(out, n, n);
    };
    match (count, n * n * k > WORTH_A_THREAD) {
        (1, true) => one((0, &mut out), Par::rayon(0)),
        (_, true) => {
            let par = par_within(count);
            out.par_chunks_mut(n * n).enumerate().for_each(|chunk| one(chunk, par));
        }
        _ => out.chunks_mut(n * n).enumerate().for_each(|chunk| one(chunk, Par::Seq)),
    }
    out
}

/// Copies the half below the diagonal of an `n` x `n` matrix to the other. `stride` elements lie between the beginnings of two rows.
pub(crate) fn mirror_lower<T: Copy>(matrix: &mut [T], n: usize, stride: usize) {
    // By tiles: whole columns would miss the cache at every element.
    const TILE: usize = 32;
    for row in (0..n).step_by(TILE) {
        for column in (0..=row).step_by(TILE) {
            for i in row..n.min(row + TILE) {
                let (above, of_row) = matrix.split_at_mut(i * stride);
                let end = i.min(column + TILE);
                let below = &of_row[column.min(end)..end];
                for (above, &value) in above[column * stride..].chunks_mut(stride).zip(below) {
                    above[i] = value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::testing::max_abs;
    use crate::ops::testing::random;

    /// Against the plain product, alone and several, of one row and of sizes that tiles do not divide; what is no square is refused.
    #[test]
    fn halves_are_the_whole_product() -> Result<()> {
        for (count, n, k) in [(1, 1, 3), (1, 33, 7), (2, 65, 100), (3, 32, 32)] {
            let x = random(1, &[count, n, k])?;
            for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
                let x = x.to_dtype(dtype)?;
                let found = symmetric_product(&x, &x.t()?)?;
                let expected = product(&x, &x.t()?)?;
                assert_eq!(found.dims(), &[count, n, n]);
                assert!(max_abs(&(&found - expected)?.to_dtype(DType::F64)?)? < tolerance);
                assert_eq!(max_abs(&(&found - found.t()?)?.to_dtype(DType::F64)?)?, 0.0);
            }
        }
        let (a, b) = (random(1, &[4, 3])?, random(2, &[3, 5])?);
        assert!(symmetric_product(&a, &b).is_err());
        assert!(symmetric_product(&a, &random(2, &[2, 4])?).is_err());
        Ok(())
    }
}
