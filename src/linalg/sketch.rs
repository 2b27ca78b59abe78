//! Symmetric positive semi-definite matrices of which a few random products are kept, and what is made of those.
//!
//! Of a matrix `F` `[d, d]` the *sketch of rank `k`* is the tensor `[k + 1, d]` of the rows of `Omega^T F` and of the diagonal of `F`.
//! `Omega` `[d, k]` is random and fixed: it follows from `d` and `k` alone and is stored nowhere. The sketch is linear in `F`, so sums and
//! averages of sketches are sketches of sums and averages, and that of `X^T X` takes two thin products, `(X Omega)^T X`.
//!
//! With `Y = F Omega` and `B = Omega^T Y`, Nystroem's approximation `Y B^+ Y^T = U diag(lambda) U^T` is the largest positive semi-definite
//! matrix below `F` with that range; it is `F` itself where `F` has rank `k` or less. What it leaves out has the trace
//! `tr F - sum lambda`, which is spread evenly over all other directions:
//!
//! ```text
//! F ~ U diag(lambda) U^T + tau (I - U U^T),   tau = (tr F - sum lambda) / (d - r),   r the columns of U
//! ```
//!
//! It has the trace of `F`, and any function of it costs products with `U` alone. Eigenvalues below `tau` are badly known (a sketch sees
//! the last ones too small) and count among the rest: of the leading `r <= k`, as many are taken as make `tau` the smallest, and none is
//! below it then.
//!
//! Sources: Halko, Martinsson & Tropp 2011, algorithm 5.5; Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3 (a pseudo-inverse of `B`
//! stands for their shift, since eigenvectors of `B` are at hand on any device); for K-FAC, Puiu 2022, "Randomized K-FACs".

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::kron::diagonal;
use crate::ops::dense::product;
use crate::ops::rng::bits;

/// `Omega^T`, `[rank, dim]`: elements uniform in (-1, 1), which any floating point type of 24 bits or more holds exactly.
///
/// Element `(i, j)` is `(2 w + 1 - 2^23) / 2^23` with `w` the upper 23 bits of word `e mod 4` of `bits(0, dim, e / 4)`,
/// `e = i dim + j`. Only the span of its rows matters.
///
/// # Errors
/// When the device cannot hold it, or `dtype` is no floating point type.
pub fn test_matrix(dim: usize, rank: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    const SHARE: usize = 1 << 12;
    const HALF: f32 = (1 << 23) as f32;
    let mut elements = vec![0f32; rank * dim];
    elements.par_chunks_mut(SHARE).enumerate().for_each(|(nth, share)| {
        for (at, four) in share.chunks_mut(4).enumerate() {
            let words = bits(0, dim as u64, (nth * SHARE / 4 + at) as u64);
            for (element, word) in four.iter_mut().zip(words) {
                *element = ((word >> 9) as f32 * 2.0 + 1.0 - HALF) / HALF;
            }
        }
    });
    Tensor::from_vec(elements, (rank, dim), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Whether a tensor of three dimensions is a sketch, or made of one, and not a square matrix: `[groups, k + 1, d]` with `k + 1 < d`.
pub(crate) fn is_sketch(m: &Tensor) -> bool {
    matches!(m.dims(), &[_, rows, columns] if rows < columns)
}

/// The diagonals `[n, d]` of matrices `[n, d, d]`, or of sketches' matrices.
pub(crate) fn diagonal_of(m: &Tensor) -> Result<Tensor> {
    if is_sketch(m) { m.narrow(1, m.dim(1)? - 1, 1)?.squeeze(1) } else { diagonal(m) }
}

/// The sketch `[groups, rank + 1, d]` of `sum_n sum_t x x^T`; `x` is `[n, t, groups d]` in f32 or f64, or
/// `[n, t, groups (d - 1)]` and followed by a 1 with `append_one`.
pub(crate) fn sketch(x: &Tensor, (groups, append_one): (usize, bool), rank: usize) -> Result<Tensor> {
    let (n, t, width) = x.dims3()?;
    let (rows, features) = (n * t, width / groups.max(1));
    let dim = features + usize::from(append_one);
    if rows == 0 {
        return Tensor::zeros((groups, rank + 1, dim), x.dtype(), x.device());
    }
    let omega = test_matrix(dim, rank, x.dtype(), x.device())?;
    let x = x.reshape((rows, groups, features))?.transpose(0, 1)?.contiguous()?;
    // [rank, d] times [d, rows], in every group.
    let weights = each(&omega.narrow(1, 0, features)?, groups)?;
    let mut seen = product(&weights, &x.t()?)?;
    let mut squares = x.sqr()?.sum_keepdim(1)?;
    if append_one {
        seen = seen.broadcast_add(&omega.narrow(1, features, 1)?.unsqueeze(0)?)?;
    }
    let mut sketch = product(&seen, &x)?;
    if append_one {
        sketch = Tensor::cat(&[&sketch, &seen.sum_keepdim(2)?], 2)?;
        let count = Tensor::full(rows as f64, (groups, 1, 1), x.device())?.to_dtype(x.dtype())?;
        squares = Tensor::cat(&[&squares, &count], 2)?;
    }
    Tensor::cat(&[&sketch, &squares], 1)
}

/// The same matrix for every group.
pub(crate) fn each(m: &Tensor, groups: usize) -> Result<Tensor> {
    let (rows, columns) = m.dims2()?;
    m.unsqueeze(0)?.broadcast_as((groups, rows, columns))?.contiguous()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::factor::second_moment;
    use crate::ops::testing::{assert_close, random, values};

    /// The sketch of a matrix by its definition.
    pub(crate) fn sketch_of(m: &Tensor, rank: usize) -> Result<Tensor> {
        let (groups, dim, _) = m.dims3()?;
        let omega = each(&test_matrix(dim, rank, DType::F64, &Device::Cpu)?, groups)?;
        Tensor::cat(&[omega.matmul(m)?, diagonal(m)?.unsqueeze(1)?], 1)
    }

    #[test]
    fn test_matrices_are_what_they_are_said_to_be() -> Result<()> {
        let (dim, rank) = (2000, 3);
        let found = test_matrix(dim, rank, DType::F64, &Device::Cpu)?;
        let word = |e: usize| bits(0, dim as u64, (e / 4) as u64)[e % 4] >> 9;
        let half = f64::from(1 << 23);
        let expected: Vec<f64> =
            (0..dim * rank).map(|e| (2.0 * f64::from(word(e)) + 1.0 - half) / half).collect();
        assert_eq!(values(&found)?, expected);
        assert_eq!(
            values(&test_matrix(dim, rank, DType::F32, &Device::Cpu)?.to_dtype(DType::F64)?)?,
            expected
        );
        // Elements of one sign, or columns alike, would see nothing.
        let gram = (found.matmul(&found.t()?)? / dim as f64)?;
        assert_close(&gram, &[1. / 3., 0., 0., 0., 1. / 3., 0., 0., 0., 1. / 3.], 0.05);
        Ok(())
    }

    #[test]
    fn sketches_are_linear_and_those_of_second_moments() -> Result<()> {
        for (n, t, groups, features, append_one) in
            [(4, 3, 1, 6, false), (4, 1, 2, 5, true), (0, 1, 2, 5, true), (5, 2, 1, 40, true)]
        {
            let x = random(0, &[n, t, groups * features])?;
            let moment = second_moment(&x, groups, append_one, "x")?;
            let expected = sketch_of(&moment, 3)?;
            let found = sketch(&x, (groups, append_one), 3)?;
            assert!(is_sketch(&found) && !is_sketch(&moment));
            assert_close(&found, &values(&expected)?, 1e-12);
            assert_close(&diagonal_of(&found)?, &values(&diagonal_of(&moment)?)?, 1e-12);
            // Transposed records, as of patches.
            let turned = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
            assert_close(&sketch(&turned, (groups, append_one), 3)?, &values(&found)?, 1e-12);
        }
        Ok(())
    }
}
