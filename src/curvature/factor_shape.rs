//! Factors with too many rows to be full: in equal runs of rows, without what couples one run to another, or of low rank.
//!
//! A factor of `d` rows in `n` runs of `r` is a tensor `[groups n, r, r]`, a full one `[groups, d, d]`. Where runs do not divide the
//! rows, the last run is filled up with rows of zeros: an eigenvalue 0 of its own, which takes no part in anything. Of a factor of low
//! rank `k` its sketch is kept, `[groups, k + 1, d]` (see [`crate::linalg::sketch`]), which is no square.

use crate::linalg::kron;
use crate::linalg::low_rank::{inverse_left, inverse_right, low_rank};
use crate::linalg::sketch::{diagonal_of, is_sketch, sketch};
use crate::ops::dense::product;
use crate::ops::moment_queue::{Average, Moments};
use candle_core::{D, DType, Result, Tensor, bail};

use super::exact::joint_vectors;
use super::wide;

/// What is kept of a factor that is larger than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Beyond {
    /// Blocks on its diagonal, of equal runs of at most [`FactorLimit::rows`] inputs or outputs.
    #[default]
    BlockDiagonal,
    /// Its diagonal.
    Diagonal,
    /// Its products with `rank` random vectors that never change, and its diagonal: of these are made its leading eigenvectors, `rank` at
    /// most, and one eigenvalue for all other directions, which keeps the trace. See [`crate::linalg::sketch`].
    ///
    /// Takes `(rank + 1) d` numbers, `2 rank d` multiplications for each row of a batch, `4 rank^2 d + 18 rank^3` for a decomposition and
    /// `2 rank` for each element of a gradient. Exact where no more than `rank` eigenvalues differ from 0, and close where the others are
    /// small beside the damping: 64 to 256 are common choices. From a rank of `d - 1` on, the factor is full.
    ///
    /// Nearest to full factors of all that is smaller. An MLP 784-4096-10 on MNIST (K-FAC, pi damping, 60 steps of 512 images) comes to a loss
    /// of 0.145 with full factors and inverses of 261 MiB, 0.147 with a rank of 128 and 9 MiB, 0.173 with blocks of 512 rows and 33 MiB, and
    /// 0.352 with diagonals.
    ///
    /// Works with every optimizer, damping and inverse, but not with [`Params::ekfac`](crate::optim::Params::ekfac). Q, QE,
    /// [`Carry::Literal`](crate::optim::Carry), and adaptive or relative damping decompose sketches once more wherever they take undamped
    /// factors: in each step, but for the dampings. Orthogonal directions of other members measure their divergence in the decomposition of the
    /// last inverse, but under pi damping and where inputs are far from standard, where they decompose too. [`QSolve::Exact`](crate::optim::QSolve) takes the eigenvectors of two factors at once.
    LowRank {
        /// Random vectors, 1 or more.
        rank: usize,
    },
    /// All of it where that is affordable, else what [`Beyond::LowRank`] keeps, with a rank of 128 or, where that is not affordable either, of 64. It is
    /// decided by shapes alone, for all factors together, when the optimizer is built: full are those of up to so many rows, of 4096, 2048, 1024,
    /// 512 and 256, that curvature takes the share of [`Params::budget`](crate::optim::Params::budget). With
    /// [`Params::ekfac`](crate::optim::Params::ekfac), which needs all eigenvectors, larger ones have blocks of so many rows.
    ByCost,
}

/// The size above which a Kronecker factor is not full, and what is kept of it then: the rest is never computed.
///
/// A factor of `d` rows takes `d^2` numbers and its decomposition about `9 d^3` multiplications; in blocks of `r` rows it takes `d r` and
/// `9 d r^2`. The factor is then that of independent groups of inputs, or of outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorLimit {
    /// Rows of the largest factor that is full in any case, 1 or more; 256 by default. The homogeneous input of a bias counts.
    pub rows: usize,
    /// What is kept of larger ones; [`Beyond::ByCost`] by default.
    pub beyond: Beyond,
}

impl Default for FactorLimit {
    fn default() -> Self {
        Self { rows: 256, beyond: Beyond::ByCost }
    }
}

impl FactorLimit {
    /// Full factors, however large.
    pub const NONE: Self = Self { rows: usize::MAX, beyond: Beyond::BlockDiagonal };
    /// Diagonal factors, however small.
    pub const DIAGONAL: Self = Self { rows: 1, beyond: Beyond::Diagonal };

    pub(crate) fn check(&self) -> Result<()> {
        if self.rows == 0 {
            bail!("factor limit: expected at least one row, got 0")
        }
        if self.beyond == (Beyond::LowRank { rank: 0 }) {
            bail!("factor limit: expected a rank of at least one, got 0")
        }
        Ok(())
    }
}

/// How the rows of a factor are divided, or its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FactorShape {
    /// Rows of the factor.
    pub dim: usize,
    /// Rows of a run; all of them where the factor is full or of low rank.
    pub run: usize,
    /// The rank, where that is low.
    pub rank: Option<usize>,
}

impl FactorShape {
    pub fn of(dim: usize, run: usize) -> Self {
        Self { dim, run, rank: None }
    }

    pub fn full(dim: usize) -> Self {
        Self::of(dim, dim)
    }

    pub fn diagonal(dim: usize) -> Self {
        Self::of(dim, 1)
    }

    pub fn limited(dim: usize, limit: FactorLimit) -> Self {
        match limit.beyond {
            _ if dim <= limit.rows => Self::full(dim),
            Beyond::BlockDiagonal => Self::of(dim, dim.div_ceil(dim.div_ceil(limit.rows.max(1)))),
            Beyond::Diagonal => Self::diagonal(dim),
            // What is affordable is known when all factors are.
            Beyond::ByCost => Self::full(dim),
            Beyond::LowRank { rank } if rank.saturating_add(1) >= dim => Self::full(dim),
            Beyond::LowRank { rank } => Self { rank: Some(rank), ..Self::full(dim) },
        }
    }

    /// The shape of a factor of `dim` rows that is a tensor `[groups, r, r]`, `[groups n, r, r]` or `[groups, rank + 1, dim]`, if it can be one.
    pub fn of_dims(dim: usize, groups: usize, dims: &[usize]) -> Option<Self> {
        let &[_, rows, columns] = dims else { return None };
        let shape = match rows < columns {
            true => Self { rank: Some(rows.checked_sub(1)?), ..Self::full(dim) },
            false => Self::of(dim, rows),
        };
        (rows > 0 && rows <= dim && shape.dims(groups) == dims).then_some(shape)
    }

    pub fn is_full(&self) -> bool {
        self.run == self.dim && self.rank.is_none()
    }

    pub fn count(&self) -> usize {
        self.dim.div_ceil(self.run.max(1))
    }

    /// Rows with those that fill up the last run.
    pub fn padded(&self) -> usize {
        self.count() * self.run
    }

    /// The factor's shape.
    pub fn dims(&self, groups: usize) -> [usize; 3] {
        match self.rank {
            Some(rank) => [groups, rank + 1, self.dim],
            None => [groups * self.count(), self.run, self.run],
        }
    }

    /// The shape of its eigenvectors; of those of two such factors where the solve is exact.
    pub fn basis(&self, groups: usize, exact: bool) -> [usize; 3] {
        match self.rank {
            Some(rank) if exact => [groups, joint_vectors(rank, self.dim), self.dim],
            Some(rank) => [groups, rank, self.dim],
            None => self.dims(groups),
        }
    }

    /// Whether an exact solve has a root of it.
    pub fn has_root(&self) -> bool {
        self.rank.is_some_and(|rank| joint_vectors(rank, self.dim) < self.dim)
    }

    /// Whether it is decomposed as it is: neither diagonal nor of low rank.
    pub fn is_decomposed(&self) -> bool {
        self.rank.is_none() && self.run > 1
    }

    /// Multiplications of a decomposition, to leading order: a symmetric one into eigenvectors takes about `9 d^3`, a Cholesky inverse
    /// `d^3`.
    pub fn decomposing(&self, eigen: bool) -> usize {
        match self.rank {
            Some(rank) => 4 * self.dim * rank.pow(2) + 18 * rank.pow(3),
            None => self.dim * self.run.pow(2) * if eigen { 9 } else { 1 },
        }
    }

    /// Multiplications for each element of a gradient, times the inverse.
    pub fn multiplying(&self, eigen: bool) -> usize {
        self.rank.map_or(self.run * if eigen { 2 } else { 1 }, |rank| 2 * rank)
    }

    /// Bytes of a number in a decomposition, where those of the factor have `element`: sketches are decomposed in f64.
    pub fn working(&self, element: usize) -> usize {
        if self.rank.is_some() { DType::F64.size_in_bytes() } else { element }
    }

    /// The eigenvalues of [`FactorShape::basis`], those that fill up the last run included; of low rank, with the one of all directions that are
    /// left.
    pub fn values(&self, exact: bool) -> usize {
        match (self.rank, self.basis(1, exact)) {
            (None, _) => self.padded(),
            (_, [_, vectors, dim]) => vectors + usize::from(vectors < dim),
        }
    }

    /// The factor's numbers.
    pub fn elements(&self, groups: usize) -> usize {
        self.dims(groups).iter().product()
    }

    /// The average with `sum_n sum_t x x^T` within each run, or its sketch, as [`Moments::of_rows`] gives it; `x` is
    /// `[n, t, features of all groups]`, followed by a 1 with `append_one`.
    pub fn moment(
        &self,
        moments: &mut Moments,
        average: Average,
        x: &Tensor,
        groups: usize,
        append_one: bool,
        name: &str,
    ) -> Result<Tensor> {
        if self.is_full() {
            return moments.of_rows(average, x, groups, append_one, name);
        }
        if let Some(rank) = self.rank {
            return average.add(sketch(&wide(x)?.detach(), (groups, append_one), rank)?);
        }
        let x = self.arranged(x, groups, append_one)?;
        if self.run > 1 {
            return moments.of_rows(average, &x, groups * self.count(), false, name);
        }
        average.add(wide(&x)?.sqr()?.sum((0, 1))?.reshape(&self.dims(groups))?)
    }

    /// `[n, t, features of all groups]` as `[n, t, groups count run]`, with the 1 and the zeros that belong to it.
    pub fn arranged(&self, x: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
        let zeros = self.padded() - self.dim;
        if !append_one && zeros == 0 {
            return Ok(x.clone());
        }
        let (n, t, features) = x.dims3()?;
        let mut x = x.reshape((n, t, groups, features / groups.max(1)))?;
        if append_one {
            x = Tensor::cat(&[&x, &x.narrow(3, 0, 1)?.ones_like()?], 3)?;
        }
        x.pad_with_zeros(D::Minus1, 0, zeros)?.reshape((n, t, ()))
    }
}

/// `g x a` for a matrix `x` `[groups, rows, columns]` and matrices of its rows and columns, full, in runs, or inverses of low rank.
pub(crate) fn sandwich(g: &Tensor, x: &Tensor, a: &Tensor) -> Result<Tensor> {
    from_right(&from_left(g, x)?, a)
}

/// [`sandwich`] with bases, which are 1 where a factor is diagonal.
pub(crate) fn rotated(g: &Tensor, x: &Tensor, a: &Tensor) -> Result<Tensor> {
    columns_rotated(&rows_rotated(g, x)?, a)
}

pub(super) fn rows_rotated(basis: &Tensor, x: &Tensor) -> Result<Tensor> {
    if is_diagonal(basis, x.dim(0)?) { Ok(x.clone()) } else { from_left(basis, x) }
}

pub(super) fn columns_rotated(x: &Tensor, basis: &Tensor) -> Result<Tensor> {
    if is_diagonal(basis, x.dim(0)?) { Ok(x.clone()) } else { from_right(x, basis) }
}

/// Whether a factor consists of several runs of one row.
pub(crate) fn is_diagonal(m: &Tensor, groups: usize) -> bool {
    matches!(m.dims(), &[runs, 1, 1] if runs > groups)
}

pub(super) fn from_left(g: &Tensor, x: &Tensor) -> Result<Tensor> {
    if is_sketch(g) {
        return inverse_left(g, x);
    }
    let (groups, rows, columns) = x.dims3()?;
    let (runs, run, _) = g.dims3()?;
    if runs == groups {
        return product(g, x);
    }
    let padded = runs / groups.max(1) * run;
    let x = fitted(x, (padded, columns))?;
    let y = if run == 1 {
        x.broadcast_mul(&g.reshape((groups, padded, 1))?)?
    } else {
        product(g, &x.reshape((runs, run, columns))?)?.reshape((groups, padded, columns))?
    };
    cut(&y, (rows, columns))
}

pub(super) fn from_right(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    if is_sketch(a) {
        return inverse_right(x, a);
    }
    let (groups, rows, columns) = x.dims3()?;
    let (runs, run, _) = a.dims3()?;
    if runs == groups {
        return product(x, a);
    }
    let count = runs / groups.max(1);
    let padded = count * run;
    let x = fitted(x, (rows, padded))?;
    let y = if run == 1 {
        x.broadcast_mul(&a.reshape((groups, 1, padded))?)?
    } else {
        let apart = x.reshape((groups, rows, count, run))?.transpose(1, 2)?.contiguous()?;
        let y = product(&apart.reshape((runs, rows, run))?, a)?;
        y.reshape((groups, count, rows, run))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((groups, rows, padded))?
    };
    cut(&y, (rows, columns))
}

/// `x` `[groups, rows, columns]`, filled up with zeros to as many rows and columns.
pub(crate) fn fitted(x: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
    let (_, from_rows, from_columns) = x.dims3()?;
    x.pad_with_zeros(1, 0, rows.saturating_sub(from_rows))?.pad_with_zeros(
        2,
        0,
        columns.saturating_sub(from_columns),
    )
}

/// The first rows and columns of `x`, contiguous.
pub(crate) fn cut(x: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
    if x.dims()[1..] == [rows, columns] {
        return Ok(x.clone());
    }
    x.narrow(1, 0, rows)?.narrow(2, 0, columns)?.contiguous()
}

/// A factor with its damping.
#[derive(Debug, Clone)]
pub(crate) struct Damped {
    /// The damped factor, or a sketch without damping.
    pub m: Tensor,
    /// What is to be added to the eigenvalues of a sketch's matrix, `[groups]`.
    pub shift: Option<Tensor>,
}

impl Damped {
    /// A factor as it is.
    pub fn plain(m: &Tensor) -> Self {
        Self { m: m.clone(), shift: None }
    }

    /// The damped factor times `x`.
    fn left(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        match is_sketch(&self.m) {
            true => low_rank(&self.m, name)?.left(x, self.shift.as_ref()),
            false => from_left(&self.m, x),
        }
    }

    /// `x` times the damped factor.
    fn right(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        match is_sketch(&self.m) {
            true => low_rank(&self.m, name)?.right(x, self.shift.as_ref()),
            false => from_right(x, &self.m),
        }
    }
}

/// `g x a` for factors `a` and `g`, full, in runs or sketches.
pub(crate) fn curved(g: &Damped, x: &Tensor, a: &Damped, name: &str) -> Result<Tensor> {
    a.right(&g.left(x, name)?, name)
}

/// [`kron::pi_damped`] of factors of a matrix of shape `[groups, rows, columns]`: the traces are those of all runs of a group.
pub(crate) fn pi_damped(
    a: &Tensor,
    g: &Tensor,
    [groups, rows, columns]: [usize; 3],
    damping: f64,
    name: &str,
) -> Result<(Damped, Damped)> {
    let full = |m: &Tensor| Ok::<_, candle_core::Error>(m.dim(0)? == groups && !is_sketch(m));
    if full(a)? && full(g)? {
        let (a, g) = kron::pi_damped(a, g, damping, name)?;
        return Ok((Damped::plain(&a), Damped::plain(&g)));
    }
    let mean = |m: &Tensor, dim: usize| diagonal_of(m)?.reshape((groups, ()))?.sum(1)? / dim as f64;
    let pi = kron::pi_of_means(&mean(a, columns)?, &mean(g, rows)?)?;
    let shifted = |m: &Tensor, pi: Tensor| -> Result<Damped> {
        let shift = (pi * damping.sqrt())?;
        if is_sketch(m) {
            return Ok(Damped { m: m.clone(), shift: Some(shift) });
        }
        let runs = m.dim(0)? / groups.max(1);
        let values = shift.unsqueeze(1)?.broadcast_as((groups, runs))?.contiguous()?.flatten_all()?;
        Ok(Damped::plain(&kron::add_diagonal_each(m, &values, name)?))
    };
    Ok((shifted(a, pi.clone())?, shifted(g, pi.recip()?)?))
}
