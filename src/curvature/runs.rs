//! Factors with too many rows to be full: in equal runs of rows, without what couples one run to another.
//!
//! A factor of `d` rows in `n` runs of `r` is a tensor `[groups n, r, r]`, a full one `[groups, d, d]`. Where runs do not divide the
//! rows, the last run is filled up with rows of zeros: an eigenvalue 0 of its own, which takes no part in anything.

use crate::linalg::kron;
use crate::ops::dense::{mix, product};
use crate::ops::factor::second_moment_into;
use candle_core::{D, Result, Tensor, bail};

use super::wide;

/// What is kept of a factor that is larger than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Beyond {
    /// Blocks on its diagonal, of equal runs of at most [`FactorLimit::rows`] inputs or outputs.
    #[default]
    BlockDiagonal,
    /// Its diagonal.
    Diagonal,
}

/// The size above which a Kronecker factor is not full, and what is kept of it then: the rest is never computed.
///
/// A factor of `d` rows takes `d^2` numbers and its decomposition about `9 d^3` multiplications; in blocks of `r` rows it takes `d r` and
/// `9 d r^2`. The factor is then that of independent groups of inputs, or of outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorLimit {
    /// Rows of the largest full factor, 1 or more; 4096 by default. The homogeneous input of a bias counts.
    pub rows: usize,
    /// What is kept of larger ones.
    pub beyond: Beyond,
}

impl Default for FactorLimit {
    fn default() -> Self {
        Self { rows: 4096, beyond: Beyond::BlockDiagonal }
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
        Ok(())
    }
}

/// How the rows of a factor are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Runs {
    /// Rows of the factor.
    pub dim: usize,
    /// Rows of a run; all of them where the factor is full.
    pub run: usize,
}

impl Runs {
    pub fn full(dim: usize) -> Self {
        Self { dim, run: dim }
    }

    pub fn diagonal(dim: usize) -> Self {
        Self { dim, run: 1 }
    }

    pub fn limited(dim: usize, limit: FactorLimit) -> Self {
        match limit.beyond {
            _ if dim <= limit.rows => Self::full(dim),
            Beyond::BlockDiagonal => Self { dim, run: dim.div_ceil(dim.div_ceil(limit.rows.max(1))) },
            Beyond::Diagonal => Self::diagonal(dim),
        }
    }

    pub fn is_full(&self) -> bool {
        self.run == self.dim
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
        [groups * self.count(), self.run, self.run]
    }

    /// The factor's numbers.
    pub fn elements(&self, groups: usize) -> usize {
        self.dims(groups).iter().product()
    }

    /// `last + weight sum_n sum_t x x^T` within each run; `x` is `[n, t, features of all groups]`, followed by a 1 with `append_one`.
    pub fn moment(
        &self,
        last: Option<&Tensor>,
        x: &Tensor,
        groups: usize,
        append_one: bool,
        weight: f64,
        name: &str,
    ) -> Result<Tensor> {
        if self.is_full() {
            return second_moment_into(last, x, groups, append_one, 1.0, weight, name);
        }
        let x = self.arranged(x, groups, append_one)?;
        if self.run > 1 {
            return second_moment_into(last, &x, groups * self.count(), false, 1.0, weight, name);
        }
        let squares = wide(&x)?.sqr()?.sum((0, 1))?.reshape(&self.dims(groups))?;
        match last {
            Some(last) => mix(last, 1.0, &squares, weight),
            None => squares * weight,
        }
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

/// `g x a` for a matrix `x` `[groups, rows, columns]` and factors of its rows and columns, full or in runs.
pub(crate) fn sandwich(g: &Tensor, x: &Tensor, a: &Tensor) -> Result<Tensor> {
    from_right(&from_left(g, x)?, a)
}

/// [`sandwich`] with bases, which are 1 where a factor is diagonal.
pub(crate) fn rotated(g: &Tensor, x: &Tensor, a: &Tensor) -> Result<Tensor> {
    let groups = x.dim(0)?;
    let turned = if is_diagonal(g, groups) { x.clone() } else { from_left(g, x)? };
    if is_diagonal(a, groups) { Ok(turned) } else { from_right(&turned, a) }
}

/// Whether a factor consists of several runs of one row.
pub(crate) fn is_diagonal(m: &Tensor, groups: usize) -> bool {
    matches!(m.dims(), &[runs, 1, 1] if runs > groups)
}

fn from_left(g: &Tensor, x: &Tensor) -> Result<Tensor> {
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

fn from_right(x: &Tensor, a: &Tensor) -> Result<Tensor> {
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

/// [`kron::pi_damped`] of factors of a matrix of shape `[groups, rows, columns]`: the traces are those of all runs of a group.
pub(crate) fn pi_damped(
    a: &Tensor,
    g: &Tensor,
    [groups, rows, columns]: [usize; 3],
    damping: f64,
    name: &str,
) -> Result<(Tensor, Tensor)> {
    if a.dim(0)? == groups && g.dim(0)? == groups {
        return kron::pi_damped(a, g, damping, name);
    }
    let mean = |m: &Tensor, dim: usize| kron::diagonal(m)?.reshape((groups, ()))?.sum(1)? / dim as f64;
    let pi = kron::pi_of_means(&mean(a, columns)?, &mean(g, rows)?)?;
    let shifted = |m: &Tensor, pi: Tensor| {
        let runs = m.dim(0)? / groups.max(1);
        let values = (pi * damping.sqrt())?.unsqueeze(1)?.broadcast_as((groups, runs))?;
        kron::add_diagonal_each(m, &values.contiguous()?.flatten_all()?, name)
    };
    Ok((shifted(a, pi.clone())?, shifted(g, pi.recip()?)?))
}
