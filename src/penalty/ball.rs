//! Euclidean projections onto sets of weights.

use super::group_layout::{GroupLayout, sum};
use super::groups::Grouping;
use super::simplex::height;
use crate::gpu::Gpu;
use crate::ops::element::{Host, float_dispatch};
use candle_core::{DType, Device, Result, Tensor, WithDType, bail};

/// A closed set of weights, and the nearest point of it.
///
/// A norm penalty that is a *constraint*: take the optimizer's step, then move the weights to the nearest point with a norm of at
/// most `k` (Goodfellow, Bengio, Courville, *Deep Learning*, section 7.2; norms of units: Srebro and Shraibman 2005, Hinton et al.
/// 2012). The projection is Euclidean after every optimizer, also after steps in a natural-gradient metric.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::penalty::{Grouping, FeasibleSet};
///
/// let w = Tensor::new(&[[3f32, 4.], [0.3, 0.4]], &Device::Cpu)?;
/// let set = FeasibleSet::MaxNorm { grouping: Grouping::Rows, radius: 1.0 };
/// assert!((set.violation(&w)? - 4.0).abs() < 1e-6);
/// let inside = set.project(&w)?; // the first row is scaled to norm 1, the second stays
/// assert_eq!(set.violation(&inside)?, 0.0);
/// assert_eq!(inside.to_vec2::<f32>()?[1], [0.3, 0.4]);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FeasibleSet {
    /// `||w||_2 <= radius` over the whole tensor.
    L2 {
        /// Largest norm.
        radius: f64,
    },
    /// `|w_i| <= bound`.
    Box {
        /// Largest magnitude of an element.
        bound: f64,
    },
    /// `sum |w_i| <= radius`: a soft threshold (Duchi et al. 2008).
    L1 {
        /// Largest sum.
        radius: f64,
    },
    /// `sum_g ||w_g||_2 <= radius`, the ball of the L1,2 norm: a soft threshold on the groups' norms.
    GroupBall {
        /// The groups.
        grouping: Grouping,
        /// Largest sum of norms.
        radius: f64,
    },
    /// `w_i >= 0`, `sum w_i = sum`.
    Simplex {
        /// The sum.
        sum: f64,
    },
    /// `||w_g||_2 <= radius` of every group. For the weights into each hidden unit take rows, candle's layout being `(out, in)`.
    MaxNorm {
        /// The groups.
        grouping: Grouping,
        /// Largest norm of a group.
        radius: f64,
    },
    /// `||w_g||_2 = radius` of every group. The set is not convex, and a group of zeros is equally far from all of it: it becomes
    /// the point with equal elements.
    Sphere {
        /// The groups.
        grouping: Grouping,
        /// The norm of a group.
        radius: f64,
    },
}

impl FeasibleSet {
    /// Checks radius, bound or sum, as [`FeasibleSet::project`] does too.
    ///
    /// # Errors
    /// If it is negative, infinite or NaN.
    pub fn check(&self) -> Result<()> {
        let (Self::L2 { radius: k }
        | Self::Box { bound: k }
        | Self::L1 { radius: k }
        | Self::GroupBall { radius: k, .. }
        | Self::Simplex { sum: k }
        | Self::MaxNorm { radius: k, .. }
        | Self::Sphere { radius: k, .. }) = *self;
        if !(k.is_finite() && k >= 0.0) {
            bail!("{self:?}: expected a finite number of zero or more, got {k}")
        }
        Ok(())
    }

    /// [`FeasibleSet::check`], also of the grouping, for weights of these dimensions.
    pub(crate) fn check_for(&self, dims: &[usize]) -> Result<GroupLayout> {
        self.check()?;
        GroupLayout::of(self.grouping(), dims)
    }

    /// The nearest point of the set, in `w`'s shape, dtype and device; not differentiable. `w` itself, bit for bit, if it lies in the
    /// set, and nothing else, so that a second projection changes nothing.
    ///
    /// Norms and sums are computed in f64. What is scaled is rounded so that it stays within the radius; [`FeasibleSet::Simplex`] and
    /// [`FeasibleSet::Sphere`], which are equalities, are met to the rounding of `w`'s dtype. Weights on a GPU stay there, and only sums and norms
    /// of groups come to the host; but [`FeasibleSet::Simplex`], a sphere's groups of zeros, and weights whose squares f64 does not hold or whose
    /// sum is above a million times an L1 ball's radius, are projected on the host.
    ///
    /// # Errors
    /// If the set makes no sense ([`FeasibleSet::check`]) or not for this shape, if `w` is not a floating point tensor, or holds NaN or an
    /// infinity.
    pub fn project(&self, w: &Tensor) -> Result<Tensor> {
        match self.moved(w)? {
            Some(moved) => Ok(moved),
            None => w.detach().copy(),
        }
    }

    /// How far `w` is outside: norm or sum above the radius, the largest of all groups; of [`FeasibleSet::Simplex`] the larger of the sum's
    /// deviation and the most negative element. Zero in the set.
    ///
    /// # Errors
    /// As for [`FeasibleSet::project`].
    pub fn violation(&self, w: &Tensor) -> Result<f64> {
        if Gpu::of(w.device()).is_some()
            && let Some(excess) = device::violation(self, w)?
        {
            return Ok(excess);
        }
        float_dispatch!("violation", w.dtype(), T => self.with(w, |x: &[T], layout| Ok(self.excess(x, layout))))
    }

    /// The projection, where it is not `w`.
    pub(crate) fn moved(&self, w: &Tensor) -> Result<Option<Tensor>> {
        if Gpu::of(w.device()).is_some()
            && let Some(moved) = device::moved(self, w)?
        {
            return Ok(moved);
        }
        float_dispatch!("project", w.dtype(), T => {
            let out = self.with(w, |x: &[T], layout| {
                if self.holds(x, layout) { Ok(None) } else { self.nearest(x, layout).map(Some) }
            })?;
            out.map(|out| Tensor::from_vec(out, w.shape(), w.device())).transpose()
        })
    }

    fn with<T: WithDType, R>(
        &self,
        w: &Tensor,
        f: impl FnOnce(&[T], &GroupLayout) -> Result<R>,
    ) -> Result<R> {
        let layout = self.check_for(w.dims())?;
        let w = w.detach().to_device(&Device::Cpu)?;
        let host = Host::of(&w);
        let x = host.values::<T>()?;
        finite(&x)?;
        f(&x, &layout)
    }

    fn grouping(&self) -> Grouping {
        match *self {
            Self::GroupBall { grouping, .. }
            | Self::MaxNorm { grouping, .. }
            | Self::Sphere { grouping, .. } => grouping,
            Self::L2 { .. } | Self::Box { .. } | Self::L1 { .. } | Self::Simplex { .. } => Grouping::Whole,
        }
    }

    fn excess<T: WithDType>(&self, x: &[T], layout: &GroupLayout) -> f64 {
        let worst = |excess: &mut dyn Iterator<Item = f64>| excess.fold(0.0, f64::max);
        match *self {
            Self::Box { bound } => worst(&mut x.iter().map(|v| v.to_f64().abs() - bound)),
            Self::L1 { radius } => (sum(x, f64::abs) - radius).max(0.0),
            Self::Simplex { sum: total } => {
                worst(&mut x.iter().map(|v| -v.to_f64())).max((sum(x, |v| v) - total).abs())
            }
            Self::L2 { .. } | Self::GroupBall { .. } | Self::MaxNorm { .. } | Self::Sphere { .. } => {
                self.excess_of(&layout.norms(x))
            }
        }
    }

    /// That of sets of norms.
    fn excess_of(&self, norms: &[f64]) -> f64 {
        let worst =
            |excess: &dyn Fn(f64) -> f64| norms.iter().fold(0.0, |worst, &n| f64::max(worst, excess(n)));
        match *self {
            Self::GroupBall { radius, .. } => (norms.iter().sum::<f64>() - radius).max(0.0),
            Self::Sphere { radius, .. } => worst(&|n| (n - radius).abs()),
            Self::L2 { radius } | Self::MaxNorm { radius, .. } => worst(&|n| n - radius),
            Self::Box { .. } | Self::L1 { .. } | Self::Simplex { .. } => 0.0,
        }
    }

    /// Whether `x` lies in the set; for equalities to rounding.
    fn holds<T: WithDType>(&self, x: &[T], layout: &GroupLayout) -> bool {
        let slack = |k: f64| slack(T::DTYPE, x.len(), k);
        match *self {
            Self::Simplex { sum: total } => {
                x.iter().all(|v| v.to_f64() >= 0.0) && (sum(x, |v| v) - total).abs() <= slack(total)
            }
            Self::Sphere { radius, .. } => self.excess(x, layout) <= slack(radius),
            Self::L2 { .. }
            | Self::Box { .. }
            | Self::L1 { .. }
            | Self::GroupBall { .. }
            | Self::MaxNorm { .. } => self.excess(x, layout) == 0.0,
        }
    }

    fn nearest<T: WithDType>(&self, x: &[T], layout: &GroupLayout) -> Result<Vec<T>> {
        match *self {
            Self::L2 { radius } | Self::MaxNorm { radius, .. } => {
                let norms = norms(x, layout)?;
                Ok(shrink(x, layout, &norms, &vec![radius; norms.len()]))
            }
            Self::Box { bound } => {
                let bound = at_most::<T>(bound);
                let clamp = |v: &T| T::from_f64(v.to_f64().clamp(-bound, bound));
                Ok(x.iter().map(clamp).collect())
            }
            Self::L1 { radius } => {
                let lengths = below(x.iter().map(|v| v.to_f64().abs()), radius);
                Ok(within(T::DTYPE, |keep| {
                    let signed = |(v, length): (&T, &f64)| T::from_f64(length.copysign(v.to_f64()) * keep);
                    let out: Vec<T> = x.iter().zip(&lengths).map(signed).collect();
                    (sum(&out, f64::abs) <= radius).then_some(out)
                }))
            }
            Self::GroupBall { radius, .. } => {
                let norms = norms(x, layout)?;
                let lengths = below(norms.iter().copied(), radius);
                Ok(within(T::DTYPE, |keep| {
                    let lengths: Vec<f64> = lengths.iter().map(|length| length * keep).collect();
                    let out = shrink(x, layout, &norms, &lengths);
                    (layout.norms(&out).iter().sum::<f64>() <= radius).then_some(out)
                }))
            }
            Self::Simplex { sum: total } => {
                if x.is_empty() && total > 0.0 {
                    bail!("{self:?}: a tensor without elements has no such sum")
                }
                Ok(below(x.iter().map(|v| v.to_f64()), total).into_iter().map(T::from_f64).collect())
            }
            Self::Sphere { radius, .. } => {
                let norms = norms(x, layout)?;
                let mut out = x.to_vec();
                layout.each(|group, run| {
                    let equal = radius / (layout.size(group) as f64).sqrt();
                    for v in &mut out[run] {
                        let scaled = v.to_f64() / norms[group] * radius;
                        *v = T::from_f64(if norms[group] > 0.0 { scaled } else { equal });
                    }
                });
                Ok(out)
            }
        }
    }
}

/// Refuses NaN and infinities.
pub(crate) fn finite<T: WithDType>(x: &[T]) -> Result<()> {
    if let Some(i) = x.iter().position(|v| !v.to_f64().is_finite()) {
        bail!("expected finite weights, got {} at place {i}", x[i].to_f64())
    }
    Ok(())
}

fn norms<T: WithDType>(x: &[T], layout: &GroupLayout) -> Result<Vec<f64>> {
    let norms = layout.norms(x);
    if let Some(group) = norms.iter().position(|n| !n.is_finite()) {
        bail!("the norm of group {group} is beyond f64")
    }
    Ok(norms)
}

/// What the equality with `k` may be off by: every element's rounding, relative or to a multiple of the smallest number, and the sum's.
fn slack(dtype: DType, count: usize, k: f64) -> f64 {
    let (unit, smallest) = rounding(dtype);
    (4.0 * unit + count as f64 * f64::EPSILON) * k + count as f64 * smallest
}

/// A dtype's largest relative rounding, and its smallest number.
fn rounding(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (2f64.powi(-11), 2f64.powi(-24)),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-133)),
        DType::F32 => (2f64.powi(-24), 2f64.powi(-149)),
        _ => (2f64.powi(-53), f64::from_bits(1)),
    }
}

/// The first result of `attempt(keep)` for `keep` from just under one downwards, to undo what rounding added; zero at last.
fn within<R>(dtype: DType, mut attempt: impl FnMut(f64) -> Option<R>) -> R {
    let mut cut = rounding(dtype).0;
    loop {
        if let Some(found) = attempt((1.0 - cut).max(0.0)) {
            return found;
        }
        cut *= 2.0;
    }
}

/// The largest magnitude of `T` that is at most `bound`.
fn at_most<T: WithDType>(bound: f64) -> f64 {
    let nearest = T::from_f64(bound).to_f64();
    if nearest <= bound {
        return nearest;
    }
    within(T::DTYPE, |keep| Some(T::from_f64(bound * keep).to_f64()).filter(|&v| v <= bound))
}

/// `[t - (largest - v)]_+`, with `t` such that the sum is `total`.
fn below(values: impl Iterator<Item = f64> + Clone, total: f64) -> Vec<f64> {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    let level = if total > 0.0 {
        height(&mut values.clone().map(|v| largest - v).collect::<Vec<_>>(), total)
    } else {
        0.0
    };
    values.map(|v| (level - (largest - v)).max(0.0)).collect()
}

/// Every group that is longer than its `length` scaled to it, and rounded so that it is not longer.
fn shrink<T: WithDType>(x: &[T], layout: &GroupLayout, norms: &[f64], lengths: &[f64]) -> Vec<T> {
    let mut out = x.to_vec();
    let mut long: Vec<bool> = norms.iter().zip(lengths).map(|(norm, length)| norm > length).collect();
    within(T::DTYPE, |keep| {
        layout.each(|group, run| {
            if long[group] {
                let length = lengths[group] * keep;
                for (out, v) in out[run.clone()].iter_mut().zip(&x[run]) {
                    *out = T::from_f64(v.to_f64() / norms[group] * length);
                }
            }
        });
        let now = layout.norms(&out);
        long.iter_mut()
            .zip(now.iter().zip(lengths))
            .for_each(|(long, (norm, length))| *long &= norm > length);
        long.iter().all(|long| !long).then_some(())
    });
    out
}

mod device;
#[cfg(test)]
mod tests;
