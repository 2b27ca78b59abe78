//! The loops of `group.rs` on the CPU.

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::element::Element;
use super::group::Tiles;

/// Elements that are worth a task of their own. Sums are cut by it alone, so that they do not depend on the number of threads.
const SHARE: usize = 1 << 16;

/// What a weight has beyond `threshold`; NaN of NaN.
#[inline(always)]
fn beyond<T: Element>(w: T, threshold: f64) -> f64 {
    let size = wide(w).abs() - threshold;
    if size < 0. { 0. } else { size }
}

/// `w` moved towards 0 by `threshold`, and not past it.
#[inline(always)]
pub(crate) fn soft(w: f64, threshold: f64) -> f64 {
    beyond(w, threshold).copysign(w)
}

#[inline(always)]
fn wide<T: Element>(w: T) -> f64 {
    w.to_f64()
}

/// An error that names the first weight that is NaN or infinite.
pub(super) fn check<T: Element>(name: &str, dims: &[usize], w: &[T]) -> Result<()> {
    let finite = |w: &T| wide(*w).is_finite();
    if w.par_chunks(SHARE).all(|w| w.iter().all(finite)) {
        return Ok(());
    }
    match w.iter().position(|w| !finite(w)) {
        Some(at) => bail!("{name}: weight {at} of {dims:?} is {}, expected a finite number", wide(w[at])),
        None => Ok(()),
    }
}

/// The sums of adjacent weights.
#[inline(always)]
fn sum_run<T: Element>(w: &[T], threshold: f64) -> [f64; 2] {
    const PARTS: usize = 8;
    let (chunks, rest) = w.as_chunks::<PARTS>();
    let (mut squares, mut sums) = ([0.; PARTS], [0.; PARTS]);
    let mut add = |at: usize, w: T| {
        let size = beyond(w, threshold);
        squares[at] += size * size;
        sums[at] += size;
    };
    for chunk in chunks {
        chunk.iter().enumerate().for_each(|(at, w)| add(at, *w));
    }
    rest.iter().enumerate().for_each(|(at, w)| add(at, *w));
    [squares.iter().sum(), sums.iter().sum()]
}

fn plus(to: &mut [f64; 2], more: [f64; 2]) {
    to[0] += more[0];
    to[1] += more[1];
}

/// The sums `(sum s^2, sum |s|)` of each group, of the softly thresholded weights `s`.
pub(super) fn sums<T: Element>(w: &[T], tiles: Tiles, threshold: f64) -> Vec<[f64; 2]> {
    let mut sums = vec![[0.; 2]; tiles.count()];
    if sums.is_empty() {
        return sums;
    }
    if tiles.columns == tiles.n {
        let groups = sums.par_iter_mut().zip(w.par_chunks(tiles.run()));
        groups.with_min_len((SHARE / tiles.run()).max(1)).for_each(|(sum, w)| {
            let parts: Vec<_> = match w.len() {
                len if len > SHARE => w.par_chunks(SHARE).map(|w| sum_run(w, threshold)).collect(),
                _ => return *sum = sum_run(w, threshold),
            };
            parts.into_iter().for_each(|part| plus(sum, part));
        });
        return sums;
    }
    let across = tiles.across();
    let rows = (SHARE / tiles.n).max(1);
    let parts: Vec<_> = w
        .par_chunks(rows * tiles.n)
        .enumerate()
        .map(|(part, w)| {
            let above = part * rows / tiles.rows;
            let height = (part * rows + w.len() / tiles.n).div_ceil(tiles.rows) - above;
            let mut sums = vec![[0.; 2]; height * across];
            for (i, row) in w.chunks_exact(tiles.n).enumerate() {
                let group = ((part * rows + i) / tiles.rows - above) * across;
                let sums = sums[group..][..across].iter_mut();
                if tiles.columns == 1 {
                    for (sum, w) in sums.zip(row) {
                        let size = beyond(*w, threshold);
                        plus(sum, [size * size, size]);
                    }
                } else {
                    for (sum, w) in sums.zip(row.chunks(tiles.columns)) {
                        plus(sum, sum_run(w, threshold));
                    }
                }
            }
            (above * across, sums)
        })
        .collect();
    for (first, part) in parts {
        sums[first..].iter_mut().zip(part).for_each(|(sum, part)| plus(sum, part));
    }
    sums
}

/// `f(w, factor of its group)`, the factor `fill` where there are none.
pub(super) fn map<T: Element>(
    w: &[T],
    tiles: Tiles,
    factors: &[f64],
    fill: f64,
    f: impl Fn(f64, f64) -> f64 + Sync,
) -> Vec<T> {
    let mut out = vec![T::from_f64(0.); w.len()];
    let run = |out: &mut [T], w: &[T], factor: f64| {
        for (out, w) in out.iter_mut().zip(w) {
            *out = T::from_f64(f(wide(*w), factor));
        }
    };
    if factors.is_empty() {
        out.par_chunks_mut(SHARE).zip(w.par_chunks(SHARE)).for_each(|(out, w)| run(out, w, fill));
        return out;
    }
    let rows = (SHARE / tiles.n).max(1);
    let parts = out.par_chunks_mut(rows * tiles.n).zip(w.par_chunks(rows * tiles.n)).enumerate();
    parts.for_each(|(part, (out, w))| {
        for (i, (out, w)) in out.chunks_exact_mut(tiles.n).zip(w.chunks_exact(tiles.n)).enumerate() {
            let factors = &factors[(part * rows + i) / tiles.rows * tiles.across()..][..tiles.across()];
            let segments = out.chunks_mut(tiles.columns).zip(w.chunks(tiles.columns));
            segments.zip(factors).for_each(|((out, w), factor)| run(out, w, *factor));
        }
    });
    out
}
