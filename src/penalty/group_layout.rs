//! Where the members of a [`Grouping`]'s groups lie in a tensor's row-major memory, and the groups' norms.

use super::groups::Grouping;
use crate::ops::group::Tiles;
use candle_core::{Result, WithDType};
use std::ops::Range;

/// A grouping of a tensor of known shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupLayout(Tiles);

impl GroupLayout {
    /// # Errors
    /// If blocks have no rows or no columns.
    pub fn of(grouping: Grouping, dims: &[usize]) -> Result<Self> {
        Ok(Self(grouping.tiles(dims)?))
    }

    pub fn tiles(&self) -> Tiles {
        self.0
    }

    /// The number of groups.
    pub fn count(&self) -> usize {
        self.0.count()
    }

    /// Calls `f` with the contiguous runs that the groups consist of, in memory order: group and places.
    #[inline]
    pub fn each(&self, mut f: impl FnMut(usize, Range<usize>)) {
        let Tiles { m, n, rows, columns } = self.0;
        if columns == n {
            for group in 0..m.div_ceil(rows) {
                f(group, group * rows * n..m.min((group + 1) * rows) * n);
            }
            return;
        }
        let across = self.0.across();
        for i in 0..m {
            for j in 0..across {
                f(i / rows * across + j, i * n + j * columns..i * n + n.min((j + 1) * columns));
            }
        }
    }

    /// `sum_i f(x_i)` of every group.
    pub fn sums<T: WithDType>(&self, x: &[T], f: impl Fn(f64) -> f64) -> Vec<f64> {
        let mut sums = vec![0.0; self.count()];
        self.each(|group, run| sums[group] += sum(&x[run], &f));
        sums
    }

    /// The number of a group's members.
    pub fn size(&self, group: usize) -> usize {
        self.0.size(group)
    }

    /// The Euclidean norm of every group, of finite `x`.
    pub fn norms<T: WithDType>(&self, x: &[T]) -> Vec<f64> {
        let squares = self.sums(x, |v| v * v);
        if squares.iter().all(|&s| s == 0.0 || (s > 1e-290 && s.is_finite()))
            && !self.hides_zeros(x, &squares)
        {
            return squares.into_iter().map(f64::sqrt).collect();
        }
        // Squares that overflow or underflow: relative to the groups' largest members.
        let mut largest = vec![0.0_f64; self.count()];
        self.each(|group, run| {
            for v in &x[run] {
                largest[group] = largest[group].max(v.to_f64().abs());
            }
        });
        let mut sums = vec![0.0; self.count()];
        self.each(|group, run| {
            let unit = largest[group];
            if unit > 0.0 {
                sums[group] += sum(&x[run], |v| (v / unit) * (v / unit));
            }
        });
        sums.into_iter().zip(largest).map(|(s, unit)| unit * s.sqrt()).collect()
    }

    /// Whether a sum of squares is zero only because the squares are too small for f64, as only f64's can be.
    fn hides_zeros<T: WithDType>(&self, x: &[T], squares: &[f64]) -> bool {
        let mut hidden = false;
        if T::DTYPE == candle_core::DType::F64 && squares.contains(&0.0) {
            self.each(|group, run| {
                hidden |= squares[group] == 0.0 && x[run].iter().any(|v| v.to_f64() != 0.0)
            });
        }
        hidden
    }
}

/// Partial sums that a sum is kept in, so that it vectorizes.
const PARTS: usize = 8;

/// `sum f(x)`.
#[inline]
pub(crate) fn sum<T: WithDType>(x: &[T], f: impl Fn(f64) -> f64) -> f64 {
    let (chunks, rest) = x.as_chunks::<PARTS>();
    let mut parts = [0.0; PARTS];
    for chunk in chunks {
        for (part, v) in parts.iter_mut().zip(chunk) {
            *part += f(v.to_f64());
        }
    }
    let rest: f64 = rest.iter().map(|v| f(v.to_f64())).sum();
    parts.into_iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The group of every element.
    fn map(grouping: Grouping, dims: &[usize]) -> Vec<usize> {
        let mut groups = vec![usize::MAX; dims.iter().product()];
        let layout = GroupLayout::of(grouping, dims).unwrap();
        layout.each(|group, run| groups[run].fill(group));
        assert_eq!(groups.iter().max().map_or(0, |g| g + 1), layout.count());
        assert!((0..layout.count()).all(|g| layout.size(g) == groups.iter().filter(|&&h| h == g).count()));
        groups
    }

    #[test]
    fn every_element_has_its_group() {
        assert_eq!(map(Grouping::Rows, &[2, 3]), [0, 0, 0, 1, 1, 1]);
        assert_eq!(map(Grouping::Columns, &[2, 3]), [0, 1, 2, 0, 1, 2]);
        assert_eq!(map(Grouping::Columns, &[1, 2, 2]), [0, 1, 2, 3]);
        assert_eq!(map(Grouping::Filters, &[2, 1, 1, 2]), [0, 0, 1, 1]);
        assert_eq!(map(Grouping::InputChannels, &[2, 2, 1, 2]), [0, 0, 1, 1, 0, 0, 1, 1]);
        assert_eq!(map(Grouping::Whole, &[]), [0]);
        assert_eq!(map(Grouping::Rows, &[3]), [0, 1, 2]);
        let blocks = Grouping::Blocks { rows: 2, columns: 2 };
        assert_eq!(map(blocks, &[3, 3]), [0, 0, 1, 0, 0, 1, 2, 2, 3]);
        assert_eq!(map(Grouping::InputChannels, &[2, 2]), [0, 1, 0, 1]);
        assert_eq!(map(Grouping::Columns, &[3]), [0, 0, 0]);
        assert_eq!(map(Grouping::Rows, &[]), [0]);
        assert!(GroupLayout::of(Grouping::Blocks { rows: 0, columns: 1 }, &[2, 2]).is_err());
        assert_eq!(GroupLayout::of(Grouping::Rows, &[2, 0]).unwrap().sums(&[0f32; 0], |v| v), [0.0; 0]);
    }

    #[test]
    fn norms_at_every_scale() {
        let layout = GroupLayout::of(Grouping::Rows, &[3, 2]).unwrap();
        for unit in [1e-320, 1e-170, 1e-20, 1.0, 1e20, 1e200, 1e307] {
            let norms = layout.norms(&[3.0 * unit, -4.0 * unit, 0.0, 0.0, 0.0, 5.0 * unit]);
            for (norm, expected) in norms.iter().zip([5.0, 0.0, 5.0]) {
                assert!(
                    (norm - expected * unit).abs() <= 1e-3 * 1e-320 + 1e-15 * expected * unit,
                    "{unit} {norm}"
                );
            }
        }
    }
}
