//! Proximal steps in a diagonal metric.

use candle_core::{DType, Device, Result, Tensor, WithDType, bail};

use crate::gpu::Gpu;
use crate::ops::element::{Host, float_dispatch};
use crate::ops::group::{Norms, Tiles};
use crate::ops::group_host::soft;

/// A proximal step in the metric of a diagonal matrix, such as the diagonal of a damped curvature.
///
/// [`Penalty::prox`](super::Penalty::prox) is Euclidean: after a step of Newton's kind it is cheap but does not minimize the
/// step's own model. This one does, for a model whose curvature is `diag`.
pub trait ScaledProx {
    /// `argmin_x 1/2 sum_i d_i (x_i - w_i)^2 + step penalty(x)` in the shape and dtype of `w`, with `d = diag` of the shape of
    /// `w`, in units of the loss per squared weight, all of it above 0.
    ///
    /// L1 and L2 have a closed form. In a group with `a_i = soft(d_i w_i, step l1)` and `c = step c_g`, the minimum is 0 where
    /// `||a|| <= c`, and otherwise `x_i = a_i r / (d_i r + c)` with `r = ||x||` the root of `sum_i (a_i / (d_i r + c))^2 = 1`,
    /// found by Newton's method to the accuracy of f64.
    ///
    /// # Errors
    /// If shapes differ, or `step` is negative; on the CPU also if a number is NaN or infinite or an element of `diag` is not above 0. On a
    /// GPU, where nothing waits for the device, such a number's group becomes NaN.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use kronwake::penalty::{Lp, ScaledProx};
    ///
    /// let w = Tensor::new(&[1f64, 1.], &Device::Cpu)?;
    /// let curvature = Tensor::new(&[4f64, 0.5], &Device::Cpu)?;
    /// // The flat direction gives way.
    /// assert_eq!(Lp::l1().scaled_prox(&w, &curvature, 1.)?.to_vec1::<f64>()?, [0.75, 0.]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn scaled_prox(&self, w: &Tensor, diag: &Tensor, step: f64) -> Result<Tensor>;
}

/// [`ScaledProx::scaled_prox`] of a penalty made of norms.
pub(super) fn run(norms: &Norms, tiles: Tiles, w: &Tensor, diag: &Tensor, step: f64) -> Result<Tensor> {
    let name = norms.name;
    norms.check_step(step)?;
    if w.dims() != diag.dims() {
        bail!("{name}: a diagonal {:?}, expected {:?} as the weights", diag.dims(), w.dims())
    }
    let wide = |t: &Tensor| t.detach().to_device(w.device())?.to_dtype(DType::F64)?.contiguous();
    let (weights, diagonal) = (wide(w)?, wide(diag)?);
    if let Some(gpu) = Gpu::of(w.device()).filter(|_| w.elem_count() > 0) {
        return norms.scaled_prox(&gpu, tiles, [&weights, &diagonal], step)?.to_dtype(w.dtype());
    }
    let (weights, diagonal) = (Host::of(&weights), Host::of(&diagonal));
    let (weights, diagonal) = (weights.values::<f64>()?, diagonal.values::<f64>()?);
    if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
        bail!("{name}: weight {at} of {:?} is {}, expected a finite number", w.dims(), weights[at])
    }
    if let Some(at) = diagonal.iter().position(|d| !(*d > 0. && d.is_finite())) {
        bail!(
            "{name}: element {at} of the diagonal {:?} is {}, expected it finite and above 0",
            w.dims(),
            diagonal[at]
        )
    }
    // Without the groups' norm, `x_i = a_i / b_i`.
    let mut x: Vec<f64> = weights.iter().zip(&*diagonal).map(|(w, d)| soft(d * w, step * norms.l1)).collect();
    let bend = 2. * step * norms.l2;
    if norms.group == 0. {
        x.iter_mut().zip(&*diagonal).for_each(|(x, d)| *x /= d + bend);
    } else {
        for group in 0..tiles.count() {
            let c = step * norms.factor(tiles.size(group));
            let radius = radius(|| tiles.members(group).map(|at| (x[at], diagonal[at] + bend)), c);
            for at in tiles.members(group) {
                x[at] = match radius {
                    Some(r) => x[at] / (diagonal[at] + bend + c / r),
                    None => 0.,
                };
            }
        }
    }
    float_dispatch!(name, w.dtype(), T => {
        let x: Vec<T> = x.into_iter().map(T::from_f64).collect();
        Tensor::from_vec(x, w.shape(), &Device::Cpu)
    })
}

/// The `r > 0` with `sum (a / (b r + c))^2 = 1`; none if the sum is at most 1 at 0.
///
/// `1 / sqrt(sum)` is nearly linear in `r`, so that Newton's method on `1 / sqrt(sum) = 1` needs few steps; with all `b` alike it
/// needs one. The root lies between `(||a|| - c) / max b` and `(||a|| - c) / min b`, and a step that leaves what is
/// known to hold it is replaced by bisection.
fn radius<I: Iterator<Item = (f64, f64)>>(group: impl Fn() -> I, c: f64) -> Option<f64> {
    // In units of the largest `a`, so that no square overflows or vanishes.
    let unit = group().fold(0f64, |m, (a, _)| m.max(a.abs()));
    let norm = group().map(|(a, _)| (a / unit).powi(2)).sum::<f64>().sqrt() * unit;
    if unit == 0. || norm <= c {
        return None;
    }
    let (least, most) = group().fold((f64::INFINITY, 0f64), |(l, m), (_, b)| (l.min(b), m.max(b)));
    let (mut low, mut high) = ((norm - c) / most, (norm - c) / least);
    let mut r = low;
    for _ in 0..200 {
        let (mut sum, mut slope) = (0., 0.);
        for (a, b) in group() {
            let (reach, term) = (b * r + c, (a / (b * r + c)).powi(2));
            sum += term;
            slope += term * b / reach;
        }
        if sum > 1. {
            low = low.max(r)
        } else {
            high = high.min(r)
        }
        // d(1 / sqrt(sum)) / dr = slope / sum^(3/2).
        let mut next = r + (sum.sqrt() - 1.) * sum / slope;
        if !(low..=high).contains(&next) {
            next = 0.5 * (low + high);
        }
        if (next - r).abs() <= 2. * f64::EPSILON * next {
            return Some(next);
        }
        r = next;
    }
    Some(r)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{GroupLasso, Grouping, Lp, SparseGroupLasso};
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};
    use crate::penalty::Penalty;

    const GROUPINGS: [Grouping; 4] =
        [Grouping::Rows, Grouping::Columns, Grouping::Blocks { rows: 2, columns: 3 }, Grouping::Whole];

    fn all(grouping: Grouping) -> Vec<(Box<dyn ScaledProx>, Box<dyn Penalty>)> {
        fn both<P: ScaledProx + Penalty + Copy + 'static>(p: P) -> (Box<dyn ScaledProx>, Box<dyn Penalty>) {
            (Box::new(p), Box::new(p))
        }
        let (net, sparse) = (Lp::elastic_net(0.3), SparseGroupLasso::new(0.4, grouping, true));
        let mut all = vec![both(Lp::l1()), both(Lp::l2())];
        all.extend([net.ok().map(both), sparse.ok().map(both)].into_iter().flatten());
        all.push(both(GroupLasso { grouping, size_weighted: false }));
        all
    }

    /// A numeric minimizer: golden section along each coordinate until nothing moves, from several starts; it does not stop in
    /// a group's kink, since the starts lie on all sides of it and the best of all ends is taken.
    fn minimize(objective: &dyn Fn(&[f64]) -> f64, starts: &[Vec<f64>]) -> Vec<f64> {
        let ratio = 0.5 * (5f64.sqrt() - 1.);
        let descend = |start: &Vec<f64>| {
            let mut x = start.clone();
            for _ in 0..60 {
                for at in 0..x.len() {
                    let mut along = x.clone();
                    let mut f = |v: f64| {
                        along[at] = v;
                        objective(&along)
                    };
                    let (mut a, mut b) = (-6., 6.);
                    for _ in 0..45 {
                        let (c, d) = (b - ratio * (b - a), a + ratio * (b - a));
                        if f(c) < f(d) { b = d } else { a = c }
                    }
                    x[at] = [0.5 * (a + b), 0.].into_iter().min_by(|a, b| f(*a).total_cmp(&f(*b))).unwrap();
                }
            }
            x
        };
        let ends = starts.iter().map(descend);
        ends.min_by(|a, b| objective(a).total_cmp(&objective(b))).unwrap()
    }

    #[test]
    fn agrees_with_a_numeric_minimizer() -> Result<()> {
        let w = random(0, &[2, 3])?;
        let diag = (random(1, &[2, 3])?.sqr()? + 0.1)?;
        for grouping in [Grouping::Rows, Grouping::Whole] {
            for (scaled, penalty) in all(grouping) {
                for step in [0.1, 0.7] {
                    let (ws, ds) = (values(&w)?, values(&diag)?);
                    let objective = |x: &[f64]| {
                        let near: f64 = (0..6).map(|i| 0.5 * ds[i] * (x[i] - ws[i]).powi(2)).sum();
                        let t = Tensor::new(x, &Device::Cpu).and_then(|x| x.reshape((2, 3))).unwrap();
                        near + step * penalty.value(&t).unwrap().to_scalar::<f64>().unwrap()
                    };
                    let found = scaled.scaled_prox(&w, &diag, step)?;
                    let x = values(&found)?;
                    let starts = [ws.clone(), vec![0.; 6]];
                    let least = objective(&minimize(&objective, &starts));
                    // Golden section resolves a minimum to the root of the objective's accuracy; its height is sharper.
                    assert!((objective(&x) - least).abs() <= 1e-11, "{} {least}", objective(&x));
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Every other point is higher by at least half its squared distance in the metric.
        #[test]
        fn minimizes(m in 1usize..7, n in 1usize..7, spread in 0f64..4., which in 0usize..4, stream in 0u64..1000) {
            let w = random(stream, &[m, n]).unwrap();
            let diag = (random(stream + 1, &[m, n]).unwrap() * spread).unwrap().exp().unwrap();
            let (ws, ds) = (values(&w).unwrap(), values(&diag).unwrap());
            for (scaled, penalty) in all(GROUPINGS[which]) {
                for step in [0.01, 0.5] {
                    let x = scaled.scaled_prox(&w, &diag, step).unwrap();
                    let square = |x: &[f64], y: &[f64]| -> f64 {
                        (0..x.len()).map(|i| 0.5 * ds[i] * (x[i] - y[i]).powi(2)).sum()
                    };
                    let objective = |x: &Tensor| {
                        square(&values(x).unwrap(), &ws) + step * values(&penalty.value(x).unwrap()).unwrap()[0]
                    };
                    let least = objective(&x);
                    for trial in 0..20 {
                        let d = (random(2000 + trial, &[m, n]).unwrap() * 10f64.powi(-(trial as i32 % 5))).unwrap();
                        let moved = (&x + d).unwrap();
                        let away = square(&values(&moved).unwrap(), &values(&x).unwrap());
                        prop_assert!(objective(&moved) - least >= away - 1e-12 * (least + away));
                    }
                }
            }
        }
    }

    #[test]
    fn a_constant_diagonal_is_euclidean() -> Result<()> {
        let w = random(0, &[4, 6])?;
        for grouping in GROUPINGS {
            for (scaled, penalty) in all(grouping) {
                for d in [1e-3, 1., 70.] {
                    let diag = (w.ones_like()? * d)?;
                    let found = scaled.scaled_prox(&w, &diag, 0.4 * d)?;
                    assert_close(&found, &values(&penalty.prox(&w, 0.4)?)?, 1e-13);
                    for scale in [1e-20, 1e20] {
                        if penalty.name().contains('2') || penalty.name().contains("net") {
                            continue;
                        }
                        let far = scaled.scaled_prox(&(&w * scale)?, &diag, 0.4 * d * scale)?;
                        assert_close(&(far * (1. / scale))?, &values(&found)?, 1e-13);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn on_the_device_as_on_the_host() -> Result<()> {
        for (stream, dims) in [vec![1, 1], vec![5, 7], vec![9, 31], vec![0, 3]].iter().enumerate() {
            let mut w = values(&random(stream as u64, dims)?)?;
            w.iter_mut().step_by(4).for_each(|w| *w = 0.);
            let w = Tensor::from_vec(w, &dims[..], &Device::Cpu)?;
            let diag = (random(9, dims)? * 3.)?.exp()?;
            for grouping in GROUPINGS {
                for (scaled, _) in all(grouping) {
                    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 1e-2)] {
                        if dtype != DType::F64 && grouping != Grouping::Rows {
                            continue;
                        }
                        let run = || scaled.scaled_prox(&w.to_dtype(dtype)?, &diag.to_dtype(dtype)?, 0.3);
                        let (found, expected) = (emulate(run)?, run()?);
                        assert_eq!((found.dtype(), found.dims()), (dtype, &dims[..]));
                        assert_close(&found, &values(&expected)?, tolerance);
                    }
                }
            }
        }
        if !emulate(|| Gpu::emulated().is_some()) {
            return Ok(());
        }
        let (w, diag) = (Tensor::new(&[[1f64, 2.], [3., 4.]], &Device::Cpu)?, random(1, &[2, 2])?.sqr()?);
        for bad in [0., -1., f64::NAN, f64::INFINITY] {
            let broken = Tensor::new(&[[1., 1.], [1., bad]], &Device::Cpu)?;
            let x = values(&emulate(|| GroupLasso::default().scaled_prox(&w, &broken, 0.1))?)?;
            assert!(x[..2].iter().all(|x| *x > 0.) && x[2..].iter().all(|x| x.is_nan()), "{bad}: {x:?}");
            if !bad.is_finite() {
                let x = values(&emulate(|| GroupLasso::default().scaled_prox(&broken, &diag, 0.1))?)?;
                assert!(x[..2].iter().all(|x| *x > 0.) && x[2..].iter().all(|x| x.is_nan()), "{bad}: {x:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn dtypes_and_refusals() -> Result<()> {
        let (w, diag) = (random(0, &[4, 3])?, (random(1, &[4, 3])?.sqr()? + 1e-3)?);
        let lasso = GroupLasso::default();
        let expected = values(&lasso.scaled_prox(&w, &diag, 0.1)?)?;
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let found = lasso.scaled_prox(&w.to_dtype(dtype)?, &diag, 0.1)?;
            assert_eq!(found.dtype(), dtype);
            assert_close(&found, &expected, tolerance);
        }
        assert_eq!(values(&lasso.scaled_prox(&w.zeros_like()?, &diag, 0.1)?)?, [0.; 12]);
        assert!(lasso.scaled_prox(&w, &diag.neg()?, 0.1).is_err());
        assert!(lasso.scaled_prox(&w, &diag.t()?, 0.1).is_err());
        assert!(lasso.scaled_prox(&(&w * f64::NAN)?, &diag, 0.1).is_err());
        assert!(lasso.scaled_prox(&w, &diag, -0.1).is_err());
        Ok(())
    }
}
