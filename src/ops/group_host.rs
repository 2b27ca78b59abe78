//! The loops of `group.rs` on the CPU.

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::element::Element;
use super::group::Tiles;
use super::memory::keep_freed_blocks;
use super::simd::vectorized;

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
    // Without a way out at the first that is not, so that the loop vectorizes.
    let all = |w: &[T]| {
        vectorized(
            #[inline(always)]
            || w.iter().fold(true, |all, w| all & finite(w)),
        )
    };
    if w.par_chunks(SHARE).all(all) {
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
    /// Several vectors of partial sums, so that one addition does not wait for the other.
    const PARTS: usize = 32;
    let (chunks, rest) = w.as_chunks::<PARTS>();
    let (mut squares, mut sums) = ([0.; PARTS], [0.; PARTS]);
    for chunk in chunks {
        for at in 0..PARTS {
            let size = beyond(chunk[at], threshold);
            squares[at] += size * size;
            sums[at] += size;
        }
    }
    for (at, w) in rest.iter().enumerate() {
        let size = beyond(*w, threshold);
        squares[at] += size * size;
        sums[at] += size;
    }
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
                len if len > SHARE => w
                    .par_chunks(SHARE)
                    .map(|w| {
                        vectorized(
                            #[inline(always)]
                            || sum_run(w, threshold),
                        )
                    })
                    .collect(),
                _ => {
                    return *sum = vectorized(
                        #[inline(always)]
                        || sum_run(w, threshold),
                    );
                }
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
            let (mut squares, mut sums) = (vec![0.; height * across], vec![0.; height * across]);
            vectorized(
                #[inline(always)]
                || {
                    for (i, row) in w.chunks_exact(tiles.n).enumerate() {
                        let group = ((part * rows + i) / tiles.rows - above) * across;
                        let groups = squares[group..][..across].iter_mut().zip(&mut sums[group..][..across]);
                        if tiles.columns == 1 {
                            for ((square, sum), w) in groups.zip(row) {
                                let size = beyond(*w, threshold);
                                *square += size * size;
                                *sum += size;
                            }
                        } else {
                            for ((square, sum), w) in groups.zip(row.chunks(tiles.columns)) {
                                let more = sum_run(w, threshold);
                                *square += more[0];
                                *sum += more[1];
                            }
                        }
                    }
                },
            );
            (above * across, squares, sums)
        })
        .collect();
    for (first, squares, more) in parts {
        let groups = sums[first..].iter_mut().zip(squares.into_iter().zip(more));
        groups.for_each(|(sum, (square, more))| plus(sum, [square, more]));
    }
    sums
}

/// `f(w, factor)` of adjacent weights. What `f` holds is a copy here, which is not read again after every weight that is written.
#[inline(always)]
fn each<'a, T: Element>(
    out: &mut [T],
    w: &[T],
    factors: impl Iterator<Item = &'a f64>,
    f: impl Fn(f64, f64) -> f64,
) {
    for ((out, w), factor) in out.iter_mut().zip(w).zip(factors) {
        *out = T::rounded(f(wide(*w), *factor));
    }
}

/// `f(w, factor of its group)`, the factor `fill` where there are none.
pub(super) fn map<T: Element>(
    w: &[T],
    tiles: Tiles,
    factors: &[f64],
    fill: f64,
    f: impl Fn(f64, f64) -> f64 + Copy + Sync,
) -> Vec<T> {
    keep_freed_blocks();
    let mut out = vec![T::from_f64(0.); w.len()];
    let run = |out: &mut [T], w: &[T], factor: f64| each(out, w, std::iter::repeat(&factor), f);
    if factors.is_empty() {
        let shares = out.par_chunks_mut(SHARE).zip(w.par_chunks(SHARE));
        shares.for_each(|(out, w)| {
            vectorized(
                #[inline(always)]
                || run(out, w, fill),
            )
        });
        return out;
    }
    let rows = (SHARE / tiles.n).max(1);
    let parts = out.par_chunks_mut(rows * tiles.n).zip(w.par_chunks(rows * tiles.n)).enumerate();
    parts.for_each(|(part, (out, w))| {
        vectorized(
            #[inline(always)]
            || {
                for (i, (out, w)) in out.chunks_exact_mut(tiles.n).zip(w.chunks_exact(tiles.n)).enumerate() {
                    let factors =
                        &factors[(part * rows + i) / tiles.rows * tiles.across()..][..tiles.across()];
                    if tiles.columns == 1 {
                        each(out, w, factors.iter(), f);
                        continue;
                    }
                    let segments = out.chunks_mut(tiles.columns).zip(w.chunks(tiles.columns));
                    segments.zip(factors).for_each(|((out, w), factor)| run(out, w, *factor));
                }
            },
        )
    });
    out
}
