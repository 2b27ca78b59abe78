//! What a sketch stands for, in eigenvectors: see [`super::sketch`].

use candle_core::{D, DType, Device, Result, Tensor};

use super::eigh::{Eigh, eigh, eigh_all};
use super::sketch::{diagonal_of, each, test_matrix};
use super::{next, symmetric};
use crate::gpu::Gpu;
use crate::ops::dense::product;

/// `U diag(values) U^T + rest (I - U U^T)` for each group, which stands for the matrix of a sketch and has its dtype.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// `U^T`, `[groups, k, d]`: orthonormal rows, or rows of zeros whose values are `rest`.
    pub vectors: Tensor,
    /// `[groups, k]`, none below `rest`.
    pub values: Tensor,
    /// `[groups, 1]`
    pub rest: Tensor,
}

/// What sketches stand for. On a CUDA device the host waits twice for all of them.
pub(crate) fn low_rank_all(sketches: &[(&Tensor, &str)]) -> Vec<Result<LowRank>> {
    let ranges: Vec<Result<Range>> = sketches.iter().map(|(sketch, _)| Range::new(sketch)).collect();
    let names = || sketches.iter().map(|(_, name)| *name);
    let cores =
        ranges.iter().zip(names()).filter_map(|(range, name)| Some((&range.as_ref().ok()?.core, name)));
    let mut cores = eigh_all(&cores.collect::<Vec<_>>()).into_iter();
    let halves = ranges.into_iter().map(|range| range?.half(next(&mut cores)?));
    let halves: Vec<Result<Half>> = halves.collect();
    let grams = halves.iter().zip(names()).filter_map(|(half, name)| Some((&half.as_ref().ok()?.gram, name)));
    let mut grams = eigh_all(&grams.collect::<Vec<_>>()).into_iter();
    halves.into_iter().map(|half| half?.low_rank(next(&mut grams)?)).collect()
}

/// [`low_rank_all`] of one sketch.
pub(crate) fn low_rank(sketch: &Tensor, name: &str) -> Result<LowRank> {
    next(&mut low_rank_all(&[(sketch, name)]).into_iter())
}

/// A tensor in f64, and on the host, unless its device has that.
fn working(t: &Tensor) -> Result<Tensor> {
    let near = if Gpu::of(t.device()).is_some() { t.detach() } else { t.detach().to_device(&Device::Cpu)? };
    near.to_dtype(DType::F64)
}

/// `Y^T` and `B` of a sketch, in f64.
struct Range {
    y: Tensor,
    core: Tensor,
    trace: Tensor,
    sketch: Tensor,
}

impl Range {
    fn new(sketch: &Tensor) -> Result<Self> {
        let (groups, rows, dim) = sketch.dims3()?;
        let (rank, wide) = (rows - 1, working(sketch)?);
        let y = wide.narrow(1, 0, rank)?.contiguous()?;
        let trace = diagonal_of(&wide)?.sum_keepdim(1)?;
        let omega = each(&test_matrix(dim, rank, DType::F64, y.device())?, groups)?;
        let core = symmetric(&product(&y, &omega.t()?)?)?;
        Ok(Self { y, core, trace, sketch: sketch.clone() })
    }

    /// The rows of `B^(-1/2) Y^T`, without what is rounding in `B`.
    fn half(self, Eigh { values, vectors }: Eigh) -> Result<Half> {
        let Self { y, trace, sketch, .. } = self;
        let epsilon = if sketch.dtype() == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let dim = y.dim(2)?;
        let roots = inverse_roots(&values, 10.0 * epsilon * (dim as f64).sqrt())?;
        let half = product(&vectors.t()?, &y)?.broadcast_mul(&roots.unsqueeze(2)?)?;
        let gram = symmetric(&product(&half, &half.t()?)?)?;
        Ok(Half { half, gram, trace, sketch })
    }
}

/// `B^(-1/2) Y^T`, whose squared singular values are those of Nystroem's approximation.
struct Half {
    half: Tensor,
    gram: Tensor,
    trace: Tensor,
    sketch: Tensor,
}

impl Half {
    fn low_rank(self, Eigh { values, vectors }: Eigh) -> Result<LowRank> {
        let Self { half, trace, sketch, .. } = self;
        let (groups, rank, dim) = half.dims3()?;
        let roots = inverse_roots(&values, 10.0 * f64::EPSILON * rank as f64)?;
        let vectors = product(&vectors.t()?, &half)?.broadcast_mul(&roots.unsqueeze(2)?)?;
        let values = values.relu()?;
        // Of the values in ascending order, without 0, 1, .. k of the first: what the others leave, a direction.
        let dropped = Tensor::cat(&[&values.narrow(1, 0, 1)?.zeros_like()?, &values.cumsum(1)?], 1)?;
        let others = dropped.broadcast_sub(&dropped.narrow(1, rank, 1)?)?;
        let directions: Vec<f64> = (dim - rank..=dim).map(|left| left as f64).collect();
        let directions = Tensor::from_vec(directions, (1, rank + 1), half.device())?;
        let rest =
            others.broadcast_add(&trace)?.broadcast_div(&directions)?.min_keepdim(D::Minus1)?.relu()?;
        let rests = rest.broadcast_as((groups, rank))?;
        let values = roots.gt(0.0)?.where_cond(&values, &rests.contiguous()?)?.maximum(&rests)?;
        let alike = |t: Tensor| t.to_dtype(sketch.dtype())?.to_device(sketch.device());
        Ok(LowRank { vectors: alike(vectors)?, values: alike(values)?, rest: alike(rest)? })
    }
}

/// `1 / sqrt(values)` of ascending `values` `[groups, k]`, and 0 for those that are at most `tolerance` times the last.
fn inverse_roots(values: &Tensor, tolerance: f64) -> Result<Tensor> {
    let last = values.dim(1)? - 1;
    let smallest = (values.narrow(1, last, 1)?.relu()? * tolerance)?.maximum(f64::MIN_POSITIVE)?;
    let kept = values.broadcast_gt(&smallest)?;
    let roots = values.broadcast_maximum(&smallest)?.sqrt()?.recip()?;
    kept.where_cond(&roots, &roots.zeros_like()?)
}

impl LowRank {
    /// Values and rest, `[groups, k + 1]`.
    pub fn spectrum(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.values, &self.rest], 1)
    }

    /// `tr M^2` of each group, `[groups]`.
    pub fn squares(&self) -> Result<Tensor> {
        let (squares, rest) = (self.values.sqr()?, self.rest.sqr()?);
        let beyond = (&rest * (self.vectors.dim(2)? as f64))?;
        (squares.broadcast_sub(&rest)?.sum_keepdim(1)? + beyond)?.squeeze(1)
    }

    /// `(M + shift) x` for `x` `[groups, d, columns]` and `shift` `[groups]`.
    pub fn left(&self, x: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        let (outside, inside) = self.split(shift)?;
        let turned = product(&self.vectors, x)?.broadcast_mul(&inside.unsqueeze(2)?)?;
        x.broadcast_mul(&outside)? + product(&self.vectors.t()?, &turned)?
    }

    /// `x (M + shift)` for `x` `[groups, rows, d]` and `shift` `[groups]`.
    pub fn right(&self, x: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        let (outside, inside) = self.split(shift)?;
        let turned = product(x, &self.vectors.t()?)?.broadcast_mul(&inside.unsqueeze(1)?)?;
        x.broadcast_mul(&outside)? + product(&turned, &self.vectors)?
    }

    /// What multiplies everything, `[groups, 1, 1]`, and what is added to it inside `U`, `[groups, k]`.
    fn split(&self, shift: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let outside = match shift {
            Some(shift) => (&self.rest + shift.unsqueeze(1)?)?,
            None => self.rest.clone(),
        };
        Ok((outside.unsqueeze(2)?, self.values.broadcast_sub(&self.rest)?))
    }

    /// `(M + shift)^-1`, as `c I - W W^T`: the tensor `[groups, k + 1, d]` of the rows of `W^T` and one that is `c` throughout. `shift` is
    /// `[groups]`.
    pub fn inverse(&self, shift: &Tensor) -> Result<Tensor> {
        self.falling(shift, Tensor::recip)
    }

    /// `R = (M + shift)^(-1/2)`, in the form of [`LowRank::inverse`], and `R N R` for another such matrix `N`. With the eigenvectors of both
    /// it has `2 k` of its own.
    pub fn whitened(&self, shift: &Tensor, other: &LowRank, name: &str) -> Result<(Tensor, LowRank)> {
        let root = self.falling(shift, |values| values.sqrt()?.recip())?;
        let shift = shift.unsqueeze(1)?;
        let outside = (&self.rest + &shift)?.recip()?;
        let inside = self.values.broadcast_add(&shift)?.recip()?;
        // R N R = rest + Z^T diag(weights) Z, with the eigenvectors of M and R times those of N, of about unit length, in the rows of Z.
        let rest = (&outside * &other.rest)?;
        let own = inside.broadcast_sub(&outside)?.broadcast_mul(&other.rest)?;
        let theirs = other.values.broadcast_sub(&other.rest)?.broadcast_mul(&outside)?;
        let weights = Tensor::cat(&[&own, &theirs], 1)?;
        let turned = inverse_right(&other.vectors, &root)?;
        let turned = turned.broadcast_mul(&outside.sqrt()?.recip()?.unsqueeze(2)?)?;
        let rows = Tensor::cat(&[&self.vectors, &turned], 1)?;
        let alike = |t: Tensor| t.to_dtype(root.dtype())?.to_device(root.device());
        let (rows, weights) = (working(&rows)?, working(&weights)?);
        let Eigh { values, vectors } = eigh(&symmetric(&product(&rows, &rows.t()?)?)?, name)?;
        let roots = inverse_roots(&values, 10.0 * f64::EPSILON * values.dim(1)? as f64)?;
        // Z = turn^T basis with an orthonormal basis.
        let basis = product(&vectors.t()?, &rows)?.broadcast_mul(&roots.unsqueeze(2)?)?;
        let turn = vectors.t()?.broadcast_mul(&(&values * &roots)?.unsqueeze(2)?)?;
        let small = product(&turn.broadcast_mul(&weights.unsqueeze(1)?)?, &turn.t()?)?;
        let Eigh { values, vectors } = eigh(&symmetric(&small)?, name)?;
        let vectors = alike(product(&vectors.t()?, &basis)?)?;
        let values = alike(values)?.broadcast_add(&rest)?.relu()?;
        Ok((root, LowRank { vectors, values, rest }))
    }

    /// A falling function of `M + shift`.
    fn falling(&self, shift: &Tensor, function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let shift = shift.unsqueeze(1)?;
        let (groups, _, dim) = self.vectors.dims3()?;
        let outside = function(&(&self.rest + &shift)?)?;
        let inside = function(&self.values.broadcast_add(&shift)?)?;
        let lengths = outside.broadcast_sub(&inside)?.relu()?.sqrt()?;
        let rows = self.vectors.broadcast_mul(&lengths.unsqueeze(2)?)?;
        Tensor::cat(&[&rows, &outside.unsqueeze(2)?.broadcast_as((groups, 1, dim))?.contiguous()?], 1)
    }
}

/// `m x` for the `m` of [`LowRank::inverse`] and `x` `[groups, d, columns]`.
pub(crate) fn inverse_left(m: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (outside, w) = parts(m)?;
    x.broadcast_mul(&outside)? - product(&w.t()?, &product(&w, x)?)?
}

/// `x m` for the `m` of [`LowRank::inverse`] and `x` `[groups, rows, d]`.
pub(crate) fn inverse_right(x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let (outside, w) = parts(m)?;
    x.broadcast_mul(&outside)? - product(&product(x, &w.t()?)?, &w)?
}

fn parts(m: &Tensor) -> Result<(Tensor, Tensor)> {
    let rank = m.dim(1)? - 1;
    let outside = m.narrow(1, rank, 1)?.narrow(2, 0, 1)?;
    Ok((outside, m.narrow(1, 0, rank)?.contiguous()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::kron::diagonal;
    use crate::linalg::sketch::tests::sketch_of;
    use crate::linalg::testing::{here_and_on_a_device, max_abs, spd};
    use crate::ops::testing::random;

    fn eye(groups: usize, dim: usize) -> Result<Tensor> {
        each(&Tensor::eye(dim, DType::F64, &Device::Cpu)?, groups)
    }

    /// Matrices of rank `k` or less, also none at all, are found exactly, whatever the size of their numbers.
    #[test]
    fn low_ranks_are_exact() -> Result<()> {
        here_and_on_a_device(|| {
            for (dim, rank, true_rank) in [(3, 1, 1), (30, 6, 6), (30, 6, 2), (90, 20, 0), (150, 40, 33)] {
                for scale in [1.0, 1e-8, 1e12] {
                    let x = (random(1, &[2, true_rank, dim])? * scale)?;
                    let m = x.t()?.contiguous()?.matmul(&x)?;
                    let found = low_rank(&sketch_of(&m, rank)?, "m")?;
                    let size = max_abs(&m)?.max(f64::MIN_POSITIVE);
                    assert!(
                        max_abs(&(found.left(&eye(2, dim)?, None)? - &m)?)? < 1e-10 * size,
                        "{dim} {rank}"
                    );
                    assert!(max_abs(&found.rest)? < 1e-10 * size);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn functions_of_what_is_found() -> Result<()> {
        here_and_on_a_device(|| {
            for (dim, rank, condition) in [(12, 4, 1e3), (40, 10, 1e8), (9, 7, 1.0)] {
                let m = spd(2, dim, condition, 3)?;
                for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
                    let found = low_rank(&sketch_of(&m, rank)?.to_dtype(dtype)?, "m")?;
                    let eye = eye(2, dim)?.to_dtype(dtype)?;
                    let near = |found: &Tensor, expected: &Tensor| -> Result<bool> {
                        Ok(max_abs(&(found.to_dtype(DType::F64)? - expected.to_dtype(DType::F64)?)?)?
                            < tolerance)
                    };
                    let dense = found.left(&eye, None)?;
                    assert!(near(&found.right(&eye, None)?, &dense)? && near(&dense.t()?, &dense)?);
                    // The trace is kept, and nothing is below the rest.
                    assert!(near(&diagonal(&dense)?.sum(1)?, &diagonal(&m)?.sum(1)?)?);
                    assert!(
                        found
                            .values
                            .broadcast_sub(&found.rest)?
                            .min_all()?
                            .to_dtype(DType::F64)?
                            .to_scalar::<f64>()?
                            >= 0.0
                    );
                    assert!(near(&found.squares()?, &dense.sqr()?.sum((1, 2))?)?);
                    assert_eq!(found.spectrum()?.dims(), &[2, rank + 1]);
                    let shift = Tensor::new(&[0.1, 0.3], &Device::Cpu)?.to_dtype(dtype)?;
                    let (damped, inverse) = (found.left(&eye, Some(&shift))?, found.inverse(&shift)?);
                    assert!(near(&found.right(&eye, Some(&shift))?, &damped)?);
                    assert!(near(&inverse_left(&inverse, &damped)?, &eye)?);
                    assert!(near(&inverse_right(&damped, &inverse)?, &eye)?);
                    if condition == 1.0 {
                        assert!(near(&dense, &eye)?, "of the identity, the rest is 1");
                    }
                }
            }
            Ok(())
        })
    }

    /// Two matrices of their own, twice the same, and one of few eigenvalues: some directions are in both.
    #[test]
    fn whitened_matrices() -> Result<()> {
        here_and_on_a_device(|| {
            let (dim, rank) = (40, 7);
            let shift = Tensor::new(&[1e-4, 0.3], &Device::Cpu)?;
            let few = random(1, &[2, 3, dim])?;
            let all = [spd(2, dim, 1e4, 3)?, spd(2, dim, 10.0, 4)?, few.t()?.contiguous()?.matmul(&few)?];
            for (m, other) in [(0, 1), (1, 0), (0, 0), (0, 2), (2, 0), (2, 2)] {
                for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-3)] {
                    let of = |m: &Tensor| low_rank(&sketch_of(m, rank)?.to_dtype(dtype)?, "m");
                    let (m, other) = (of(&all[m])?, of(&all[other])?);
                    let (shift, eye) = (shift.to_dtype(dtype)?, eye(2, dim)?.to_dtype(dtype)?);
                    let (root, found) = m.whitened(&shift, &other, "m")?;
                    let dense = inverse_left(&root, &eye)?;
                    let one = dense.matmul(&m.left(&dense, Some(&shift))?)?;
                    let expected = dense.matmul(&other.left(&dense, None)?)?;
                    let off = max_abs(&(found.left(&eye, None)? - &expected)?)? / max_abs(&expected)?;
                    assert!(off < tolerance && max_abs(&(one - &eye)?)? < tolerance, "{dtype:?} {off}");
                    assert_eq!(found.vectors.dims(), &[2, 2 * rank, dim]);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn an_error_names_its_matrix_and_spares_the_others() -> Result<()> {
        here_and_on_a_device(|| {
            let good = sketch_of(&spd(1, 9, 10.0, 1)?, 3)?;
            let bad = good.log()?;
            let found = low_rank_all(&[(&good, "fc1"), (&bad, "fc2"), (&good, "fc3")]);
            assert!(found[0].is_ok() && found[2].is_ok());
            let message = found[1].as_ref().err().map(ToString::to_string).unwrap_or_default();
            assert!(message.contains("fc2") && message.contains("finite"), "{message}");
            Ok(())
        })
    }
}
