//! The inverse of one positive definite matrix on the host, by blocks: nearly all of it is matrix products.

use super::host::Real;
use crate::ops::simd::vectorized;
use crate::ops::symmetric::mirror_lower;
use candle_core::WithDType;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};

/// Matrices up to this size are inverted element by element.
const SMALL: usize = 16;

/// Replaces what is on and below the diagonal of a positive definite `n` x `n` matrix by the same of its inverse. Above the diagonal, where
/// nothing is read, it leaves what it likes. `stride` elements lie between the beginnings of two rows.
///
/// With the matrix in blocks and `S = C - B A^-1 B^T`,
///
/// ```text
/// [A B^T]^-1   [A^-1 + W^T S^-1 W   ..  ]
/// [B C  ]    = [-S^-1 W             S^-1],   W = B A^-1
/// ```
///
/// takes `n^3` operations in all, as the way through a Cholesky factor does, but in larger products. Of an ill-conditioned matrix it loses more digits:
/// this is for matrices whose condition is known to be far below `1 / epsilon`. What is not positive definite gives numbers that mean nothing.
pub(crate) fn invert_lower<T: Real>(m: &mut [T], n: usize, stride: usize, par: Par) {
    if n <= SMALL {
        return vectorized(
            #[inline(always)]
            || invert_small(m, n, stride),
        );
    }
    // A multiple of what is inverted element by element, so that this is done as seldom as possible.
    let first = (n / 2).next_multiple_of(SMALL);
    let rest = n - first;
    let (one, minus) = (<T as WithDType>::from_f64(1.0), <T as WithDType>::from_f64(-1.0));
    let whole = BlockStructure::Rectangular;
    let lower = BlockStructure::TriangularLower;
    let mut w = vec![<T as WithDType>::from_f64(0.0); rest * first];
    let mut w = MatMut::from_row_major_slice_mut(&mut w, rest, first);
    let (top, bottom) = m.split_at_mut(first * stride);

    invert_lower(top, first, stride, par);
    mirror_lower(top, first, stride);
    let a = MatRef::from_row_major_slice_with_stride(top, first, first, stride);
    let (b, c) = rows_mut(bottom, rest, n, stride).split_at_col_mut(first);
    matmul(w.rb_mut(), Accum::Replace, b.rb(), a, one, par);
    triangular_matmul(c, lower, Accum::Add, w.rb(), whole, b.rb().transpose(), whole, minus, par);
    invert_lower(&mut bottom[first..], rest, stride, par);
    mirror_lower(&mut bottom[first..], rest, stride);
    let (mut b, s) = rows_mut(bottom, rest, n, stride).split_at_col_mut(first);
    matmul(b.rb_mut(), Accum::Replace, s.rb(), w.rb(), minus, par);
    let a = rows_mut(top, first, first, stride);
    triangular_matmul(a, lower, Accum::Add, w.rb().transpose(), whole, b.rb(), whole, minus, par);
}

/// The first `columns` of some rows.
fn rows_mut<T>(data: &mut [T], rows: usize, columns: usize, stride: usize) -> MatMut<'_, T> {
    // By columns and turned: faer 0.24 takes the stride of its constructor by rows for one of columns.
    MatMut::from_column_major_slice_with_stride_mut(data, columns, rows, stride).transpose_mut()
}

/// Sweeps over one row and column after the other (Gauss-Jordan), of which each makes minus the inverse of one more row and column.
#[inline(always)]
fn invert_small<T: Real>(m: &mut [T], n: usize, stride: usize) {
    let (zero, one) = (<T as WithDType>::from_f64(0.0), <T as WithDType>::from_f64(1.0));
    let mut swept = [[zero; SMALL]; SMALL];
    for i in 0..n {
        for j in 0..=i {
            swept[i][j] = m[i * stride + j];
            swept[j][i] = swept[i][j];
        }
    }
    for k in 0..n {
        let row = swept[k];
        let pivot = one / row[k];
        for i in 0..n {
            let factor = row[i] * pivot;
            for j in 0..SMALL {
                swept[i][j] -= factor * row[j];
            }
            swept[i][k] = factor;
        }
        swept[k] = row.map(|value| value * pivot);
        swept[k][k] = zero - pivot;
    }
    for i in 0..n {
        for j in 0..=i {
            m[i * stride + j] = zero - swept[i][j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::cholesky::inverse_spd;
    use crate::linalg::testing::spd;
    use candle_core::Result;

    /// Against the way through a Cholesky factor, within a larger matrix of which nothing else changes.
    #[test]
    fn inverses_as_by_a_cholesky_factor() -> Result<()> {
        for n in [1, 2, 15, 16, 17, 31, 33, 64, 100, 257] {
            let m = spd(1, n, 100.0, 3)?;
            let expected = inverse_spd(&m, "m")?.flatten_all()?.to_vec1::<f64>()?;
            let m = m.flatten_all()?.to_vec1::<f64>()?;
            for beside in [0, 3] {
                let stride = n + beside;
                let mut inverse = vec![7.0; n * stride];
                for i in 0..n {
                    // What is above the diagonal is not read.
                    inverse[i * stride..=i * stride + i].copy_from_slice(&m[i * n..=i * n + i]);
                }
                let mut narrow: Vec<f32> = inverse.iter().map(|&value| value as f32).collect();
                invert_lower(&mut inverse, n, stride, Par::Seq);
                invert_lower(&mut narrow, n, stride, Par::rayon(0));
                for i in 0..n {
                    for j in 0..=i {
                        let (at, expected) = (i * stride + j, expected[i * n + j]);
                        assert!((inverse[at] - expected).abs() < 1e-10, "{n} {i} {j}");
                        assert!((f64::from(narrow[at]) - expected).abs() < 1e-2, "{n} {i} {j}");
                    }
                    assert!(inverse[i * stride + n..(i + 1) * stride].iter().all(|&value| value == 7.0));
                }
            }
        }
        Ok(())
    }
}
