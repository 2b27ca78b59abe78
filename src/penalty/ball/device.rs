//! Projections of weights on a GPU: they stay there, and sums of their groups come to the host.

use super::{FeasibleSet, at_most, below, slack, within};
use crate::ops::element::float_dispatch;
use crate::ops::group::{Tiles, scaled, sums};
use candle_core::{DType, Result, Tensor};

/// In messages.
const NAME: &str = "project";

/// An L1 ball's radius may be smaller than the weights' sum by this: what f64 keeps of a threshold beside them.
const FAR: f64 = 1e6;

/// What [`FeasibleSet::moved`] has on the host; nothing where only that can tell.
pub(super) fn moved(set: &FeasibleSet, w: &Tensor) -> Result<Option<Option<Tensor>>> {
    let Some(seen) = Seen::of(set, w)? else { return Ok(None) };
    let excess = seen.excess(set)?;
    let enough = match *set {
        FeasibleSet::Sphere { radius, .. } => slack(w.dtype(), w.elem_count(), radius),
        FeasibleSet::L2 { .. }
        | FeasibleSet::Box { .. }
        | FeasibleSet::L1 { .. }
        | FeasibleSet::GroupBall { .. }
        | FeasibleSet::Simplex { .. }
        | FeasibleSet::MaxNorm { .. } => 0.0,
    };
    if excess <= enough {
        return Ok(Some(None));
    }
    let near = match *set {
        FeasibleSet::L2 { radius } | FeasibleSet::MaxNorm { radius, .. } => {
            Some(seen.shrink(&vec![radius; seen.norms.len()])?)
        }
        FeasibleSet::Box { bound } => {
            let bound = float_dispatch!("project", w.dtype(), T => at_most::<T>(bound));
            Some(seen.w.clamp(-bound, bound)?)
        }
        FeasibleSet::L1 { radius } => seen.in_l1(radius)?,
        FeasibleSet::GroupBall { radius, .. } => {
            let lengths = below(seen.norms.iter().copied(), radius);
            let attempt = |keep: f64| -> Result<Option<Tensor>> {
                let lengths: Vec<f64> = lengths.iter().map(|length| length * keep).collect();
                let out = seen.shrink(&lengths)?;
                Ok((norms(&out, seen.tiles)?.iter().sum::<f64>() <= radius).then_some(out))
            };
            Some(within(w.dtype(), |keep| attempt(keep).transpose())?)
        }
        FeasibleSet::Sphere { .. } if seen.norms.contains(&0.0) => None,
        FeasibleSet::Sphere { radius, .. } => {
            let factors: Vec<f64> = seen.norms.iter().map(|norm| radius / norm).collect();
            Some(seen.scaled(0.0, &factors)?)
        }
        FeasibleSet::Simplex { .. } => None,
    };
    Ok(near.map(Some))
}

/// What [`FeasibleSet::violation`] has on the host; nothing where only that can tell.
pub(super) fn violation(set: &FeasibleSet, w: &Tensor) -> Result<Option<f64>> {
    Seen::of(set, w)?.map(|seen| seen.excess(set)).transpose()
}

/// Contiguous finite weights, and their groups' norms and sums of sizes.
struct Seen {
    w: Tensor,
    tiles: Tiles,
    norms: Vec<f64>,
    sizes: Vec<f64>,
}

impl Seen {
    /// Nothing where sums of squares do not say it all, or are not finite: the host finds the place.
    fn of(set: &FeasibleSet, w: &Tensor) -> Result<Option<Self>> {
        let tiles = set.check_for(w.dims())?.tiles();
        let by_sums = match set {
            FeasibleSet::Simplex { .. } => false,
            FeasibleSet::L2 { .. }
            | FeasibleSet::Box { .. }
            | FeasibleSet::L1 { .. }
            | FeasibleSet::GroupBall { .. }
            | FeasibleSet::MaxNorm { .. }
            | FeasibleSet::Sphere { .. } => true,
        };
        if !by_sums || w.elem_count() == 0 || !w.dtype().is_float() {
            return Ok(None);
        }
        let w = w.detach().contiguous()?;
        let sums = sums(NAME, &w, tiles, 0.0)?.to_vec2::<f64>()?;
        let plain = |sum: &Vec<f64>| matches!(sum[..], [squares, size] if squares.is_finite() && (squares > 1e-290 || size == 0.0));
        if !sums.iter().all(plain) {
            return Ok(None);
        }
        let (norms, sizes) = sums.iter().map(|sum| (sum[0].sqrt(), sum[1])).unzip();
        Ok(Some(Self { w, tiles, norms, sizes }))
    }

    fn excess(&self, set: &FeasibleSet) -> Result<f64> {
        Ok(match *set {
            FeasibleSet::Box { bound } => (largest(&self.w)? - bound).max(0.0),
            FeasibleSet::L1 { radius } => (self.sizes.iter().sum::<f64>() - radius).max(0.0),
            FeasibleSet::L2 { .. }
            | FeasibleSet::GroupBall { .. }
            | FeasibleSet::Simplex { .. }
            | FeasibleSet::MaxNorm { .. }
            | FeasibleSet::Sphere { .. } => set.excess_of(&self.norms),
        })
    }

    fn scaled(&self, threshold: f64, factors: &[f64]) -> Result<Tensor> {
        let factors = Tensor::from_slice(factors, factors.len(), self.w.device())?;
        scaled(&self.w, self.tiles, threshold, &factors)
    }

    /// As on the host: every group that is longer than its `length` scaled to it, and rounded so that it is not longer.
    fn shrink(&self, lengths: &[f64]) -> Result<Tensor> {
        // A group that is short enough after an attempt keeps its factor.
        let mut factors = vec![1.0; lengths.len()];
        let mut long: Vec<bool> =
            self.norms.iter().zip(lengths).map(|(norm, length)| norm > length).collect();
        let mut attempt = |keep: f64| -> Result<Option<Tensor>> {
            for (group, factor) in factors.iter_mut().enumerate().filter(|(group, _)| long[*group]) {
                *factor = lengths[group] * keep / self.norms[group];
            }
            let out = self.scaled(0.0, &factors)?;
            let now = norms(&out, self.tiles)?;
            long.iter_mut()
                .zip(now.iter().zip(lengths))
                .for_each(|(long, (norm, length))| *long = norm > length);
            Ok(long.iter().all(|long| !long).then_some(out))
        };
        within(self.w.dtype(), |keep| attempt(keep).transpose())
    }

    /// The threshold by Newton's method from 0: the sum beyond it is convex and falls, so that no step goes too far, and the last one is
    /// exact.
    fn in_l1(&self, radius: f64) -> Result<Option<Tensor>> {
        let total: f64 = self.sizes.iter().sum();
        if radius == 0.0 {
            return Ok(Some(self.w.zeros_like()?));
        }
        if total > FAR * radius {
            return Ok(None);
        }
        let sizes = self.w.abs()?;
        let (mut threshold, mut sum) = (0.0, total);
        while sum > radius {
            let below = float_dispatch!("project", self.w.dtype(), T => at_most::<T>(threshold));
            let count = sizes.gt(below)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
            let next = threshold + (sum - radius) / count.max(1.0);
            if next <= threshold {
                break;
            }
            threshold = next;
            sum = self.sum_of(&self.w, threshold)?;
        }
        let attempt = |keep: f64| -> Result<Option<Tensor>> {
            let out = self.scaled(threshold, &[keep])?;
            Ok((self.sum_of(&out, 0.0)? <= radius).then_some(out))
        };
        within(self.w.dtype(), |keep| attempt(keep).transpose()).map(Some)
    }

    /// The sum of what sizes have beyond a threshold.
    fn sum_of(&self, w: &Tensor, threshold: f64) -> Result<f64> {
        let sums = sums(NAME, w, self.tiles, threshold)?;
        sums.narrow(1, 1, 1)?.sum_all()?.to_scalar()
    }
}

/// The norms of the groups.
fn norms(w: &Tensor, tiles: Tiles) -> Result<Vec<f64>> {
    let squares =
        sums(NAME, w, tiles, 0.0)?.narrow(1, 0, 1)?.contiguous()?.flatten_all()?.to_vec1::<f64>()?;
    Ok(squares.into_iter().map(f64::sqrt).collect())
}

fn largest(w: &Tensor) -> Result<f64> {
    w.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar()
}
