//! Sums over positions of products of runs: what the gradient of a weight and the second moments of patches consist of.

use super::{
    correlate::{Runs, SPARE, blocks},
    element::Real,
    simd::{Lanes, Level},
};

/// Channels, and runs, that a tile of [`products`] multiplies by each other: as many as the registers hold sums for.
const fn tile_sizes<L: Level>() -> (usize, usize) {
    if L::MANY_REGISTERS { (5, 4) } else { (2, 4) }
}

/// Runs whose numbers stay in the cache while all channels pass by.
const NEAR: usize = 16;

/// Adds to `sums [channels, features]` the products `sum_{i < length} g[o][i] x[s_k + i]` of some samples, each given as
/// (`g [channels, length]`, `x`).
pub(crate) fn products<L: Level, T: Real>(
    level: L,
    runs: &Runs,
    length: usize,
    samples: &[(&[T], &[T])],
    sums: &mut [T],
) {
    let features = runs.shifts.len();
    all_products(level, &runs.shifts, sums.len() / features, false, length, samples, sums);
}

/// Adds to `sums [features, features]`, on the diagonal and to its right, the products `sum_{i < length} x_j[i] x_k[i]` of
/// the rows of some samples `x [features, length]`; below the diagonal it leaves what it likes.
pub(crate) fn square_products<L: Level, T: Real>(
    level: L,
    features: usize,
    length: usize,
    samples: &[&[T]],
    sums: &mut [T],
) {
    let pairs: Vec<_> = samples.iter().map(|&x| (x, x)).collect();
    let shifts: Vec<_> = (0..features).map(|k| k * length).collect();
    all_products(level, &shifts, features, true, length, &pairs, sums);
}

/// [`products`] for runs at `shifts`, or those of a channel with a run of no smaller number alone.
fn all_products<L: Level, T: Real>(
    level: L,
    shifts: &[usize],
    channels: usize,
    triangle: bool,
    length: usize,
    samples: &[(&[T], &[T])],
    sums: &mut [T],
) {
    let mut near = 0;
    for count in blocks(shifts.len(), NEAR) {
        let mut channel = 0;
        for channels in blocks(channels, tile_sizes::<L>().0) {
            let mut first = near;
            for runs in blocks(count, tile_sizes::<L>().1) {
                if !triangle || channel < first + runs {
                    let sums = &mut sums[channel * shifts.len() + first..];
                    let runs = &shifts[first..first + runs];
                    some_products(level, (channels, channel), length, samples, runs, sums, shifts.len());
                }
                first += runs;
            }
            channel += channels;
        }
        near += count;
    }
}

/// The products of some runs with some channels (how many, and the first); `sums` steps by `features` from one channel to
/// the next.
fn some_products<L: Level, T: Real>(
    level: L,
    (channels, first): (usize, usize),
    length: usize,
    samples: &[(&[T], &[T])],
    shifts: &[usize],
    sums: &mut [T],
    features: usize,
) {
    let tile = match (channels, shifts.len()) {
        (1, 1) => product_tile::<L, T, 1, 1>,
        (1, 2) => product_tile::<L, T, 1, 2>,
        (1, 3) => product_tile::<L, T, 1, 3>,
        (1, _) => product_tile::<L, T, 1, 4>,
        (2, 1) => product_tile::<L, T, 2, 1>,
        (2, 2) => product_tile::<L, T, 2, 2>,
        (2, 3) => product_tile::<L, T, 2, 3>,
        _ if !L::MANY_REGISTERS => product_tile::<L, T, 2, 4>,
        (2, _) => product_tile::<L, T, 2, 4>,
        (3, 1) => product_tile::<L, T, 3, 1>,
        (3, 2) => product_tile::<L, T, 3, 2>,
        (3, 3) => product_tile::<L, T, 3, 3>,
        (3, _) => product_tile::<L, T, 3, 4>,
        (4, 1) => product_tile::<L, T, 4, 1>,
        (4, 2) => product_tile::<L, T, 4, 2>,
        (4, 3) => product_tile::<L, T, 4, 3>,
        (4, _) => product_tile::<L, T, 4, 4>,
        (_, 1) => product_tile::<L, T, 5, 1>,
        (_, 2) => product_tile::<L, T, 5, 2>,
        (_, 3) => product_tile::<L, T, 5, 3>,
        _ => product_tile::<L, T, 5, 4>,
    };
    tile(level, length, samples, first, shifts, sums, features);
}

/// The products of `O` channels from `first` on with `K` runs.
#[inline(never)]
fn product_tile<L: Level, T: Real, const O: usize, const K: usize>(
    level: L,
    length: usize,
    samples: &[(&[T], &[T])],
    first: usize,
    shifts: &[usize],
    sums: &mut [T],
    features: usize,
) {
    let width = T::Lanes::<L>::WIDTH;
    level.call(
        #[inline(always)]
        || {
            let whole = length - length % width;
            let mut acc = [[T::Lanes::<L>::splat(level, T::ZERO); K]; O];
            for &(g, x) in samples {
                let (mut gs, mut xs) = ([g; O], [x; K]);
                for o in 0..O {
                    gs[o] = &g[(first + o) * length..][..length];
                }
                for k in 0..K {
                    xs[k] = &x[shifts[k]..][..length];
                }
                acc = add_products::<L, T, O, K>(level, acc, gs, xs);
                if whole < length {
                    // The rest, with zeros behind it.
                    let (gs, xs) = (gs.map(|g| rest(&g[whole..])), xs.map(|x| rest(&x[whole..])));
                    acc = add_products::<L, T, O, K>(
                        level,
                        acc,
                        gs.each_ref().map(|g| &g[..width]),
                        xs.each_ref().map(|x| &x[..width]),
                    );
                }
            }
            for (o, acc) in acc.iter().enumerate() {
                for (k, acc) in acc.iter().enumerate() {
                    let mut lanes = [T::ZERO; SPARE];
                    acc.store(&mut lanes);
                    // By halves, which the processor adds side by side.
                    let mut half = width / 2;
                    while half > 0 {
                        for i in 0..half {
                            lanes[i] += lanes[half + i];
                        }
                        half /= 2;
                    }
                    sums[o * features + k] += lanes[0];
                }
            }
        },
    )
}

/// Adds to `acc` the products of whole vectors; all slices have the same length. By value, which keeps the sums in
/// registers.
#[inline(always)]
fn add_products<L: Level, T: Real, const O: usize, const K: usize>(
    level: L,
    mut acc: [[T::Lanes<L>; K]; O],
    gs: [&[T]; O],
    xs: [&[T]; K],
) -> [[T::Lanes<L>; K]; O] {
    let length = gs[0].len();
    for run in gs.iter().chain(&xs) {
        assert!(run.len() == length);
    }
    let mut at = 0;
    while at + T::Lanes::<L>::WIDTH <= length {
        let mut xv = [T::Lanes::<L>::splat(level, T::ZERO); K];
        for k in 0..K {
            // SAFETY: a whole vector follows in every slice; so too below.
            xv[k] = unsafe { T::Lanes::<L>::load_at(level, xs[k], at) };
        }
        for o in 0..O {
            let gv = unsafe { T::Lanes::<L>::load_at(level, gs[o], at) };
            for k in 0..K {
                acc[o][k] = acc[o][k].add_product(gv, xv[k]);
            }
        }
        at += T::Lanes::<L>::WIDTH;
    }
    acc
}

/// Fewer numbers than a vector holds, and zeros.
#[inline(always)]
fn rest<T: Real>(data: &[T]) -> [T; SPARE] {
    let mut lanes = [T::ZERO; SPARE];
    lanes[..data.len()].copy_from_slice(data);
    lanes
}
