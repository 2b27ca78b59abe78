//! The inner loops of [`attention`](super::attention): one head, block by block.

use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};

use super::element::{Real, sum};
use super::simd::{Level, with_level};
use super::softmax::largest;

/// What is the same for all heads.
pub(super) struct Part<T> {
    pub scale: T,
    /// With a causal mask, how many keys there are before the first query's.
    pub before: Option<usize>,
    /// Queries and keys of a block.
    pub block: [usize; 2],
}

/// One head's queries `[queries, d]`, keys `[keys, d]` and values `[keys, dv]`.
#[derive(Clone, Copy)]
pub(super) struct Head<'a, T> {
    pub q: MatRef<'a, T>,
    pub k: MatRef<'a, T>,
    pub v: MatRef<'a, T>,
    pub mask: Option<MaskRows<'a, T>>,
}

/// Rows of what is added to the scores, one a query.
#[derive(Clone, Copy)]
pub(super) struct MaskRows<'a, T> {
    pub data: &'a [T],
    pub step: usize,
    pub length: usize,
}

impl<'a, T> MaskRows<'a, T> {
    fn get(&self, row: usize) -> &'a [T] {
        &self.data[row * self.step..][..self.length]
    }
}

/// A head's outputs `[queries, dv]`, and of each query its largest score, or 0 where all are -inf, and one over the sum of the exponentials,
/// or 0 where that is 0.
pub(super) struct Forward<T> {
    pub y: Vec<T>,
    pub largest: Vec<T>,
    pub one_over_sum: Vec<T>,
}

/// The gradients of a head of keys and values, and of the queries of the heads that it serves, one after the other.
pub(super) struct Backward<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

/// A block of queries and one of keys.
#[derive(Clone, Copy)]
struct Tile {
    query: usize,
    queries: usize,
    key: usize,
    keys: usize,
}

impl<T: Real> Part<T> {
    /// Keys that the queries before `end` see.
    fn seen(&self, end: usize, keys: usize) -> usize {
        self.before.map_or(keys, |before| (before + end).min(keys))
    }

    /// The blocks of `queries` queries and `keys` keys in which something is seen, those of a query one after the other.
    fn tiles(&self, queries: usize, keys: usize) -> impl Iterator<Item = Tile> {
        let [rows, columns] = self.block;
        (0..queries).step_by(rows).flat_map(move |query| {
            let count = rows.min(queries - query);
            let seen = self.seen(query + count, keys);
            (0..seen).step_by(columns).map(move |key| Tile {
                query,
                queries: count,
                key,
                keys: columns.min(seen - key),
            })
        })
    }
}

fn product<T: Real + RealField>(
    out: MatMut<'_, T>,
    accumulate: Accum,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    factor: T,
) {
    matmul(out, accumulate, a, b, factor, Par::Seq);
}

fn rows<T>(data: &[T], rows: usize, columns: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(&data[..rows * columns], rows, columns)
}

fn rows_mut<T>(data: &mut [T], rows: usize, columns: usize) -> MatMut<'_, T> {
    MatMut::from_row_major_slice_mut(&mut data[..rows * columns], rows, columns)
}

/// The scores of a block, to which the mask is not added yet.
fn scores<T: Real + RealField>(part: &Part<T>, head: &Head<'_, T>, tile: Tile, out: &mut [T]) {
    let q = head.q.subrows(tile.query, tile.queries);
    let k = head.k.subrows(tile.key, tile.keys);
    product(rows_mut(out, tile.queries, tile.keys), Accum::Replace, q, k.transpose(), part.scale);
}

/// Adds the mask to the part of a row that query `query` sees, and gives that part; what follows is 0.
#[inline(always)]
fn masked<'a, T: Real>(
    part: &Part<T>,
    mask: Option<MaskRows<'_, T>>,
    tile: Tile,
    query: usize,
    row: &'a mut [T],
) -> &'a mut [T] {
    let seen = part.seen(tile.query + query + 1, tile.key + tile.keys).saturating_sub(tile.key);
    let (row, hidden) = row.split_at_mut(seen);
    hidden.fill(T::ZERO);
    if let Some(mask) = mask {
        let mask = &mask.get(tile.query + query)[tile.key..][..seen];
        for (score, mask) in row.iter_mut().zip(mask) {
            *score += *mask;
        }
    }
    row
}

/// Turns a block's scores into exponentials, and brings what is known of its queries up to date.
#[inline(always)]
fn softmax<L: Level, T: Real>(
    level: L,
    part: &Part<T>,
    mask: Option<MaskRows<'_, T>>,
    tile: Tile,
    (scores, y): (&mut [T], &mut [T]),
    (most, sums): (&mut [T], &mut [T]),
) {
    let dv = y.len() / tile.queries;
    for (i, row) in scores.chunks_exact_mut(tile.keys).enumerate() {
        let row = masked(part, mask, tile, i, row);
        let here = largest(row);
        let before = most[i];
        let now = if here > before { here } else { before };
        // Less -inf all would be NaN.
        let shift = if now == T::NEG_INFINITY { T::ZERO } else { now };
        for score in row.iter_mut() {
            *score = (*score - shift).exp_in(level);
        }
        let total = sum(row, |v| v);
        if tile.key == 0 {
            sums[i] = total;
        } else {
            let factor = (before - shift).exp_in(level);
            sums[i] = sums[i] * factor + total;
            for y in &mut y[i * dv..(i + 1) * dv] {
                *y *= factor;
            }
        }
        most[i] = now;
    }
}

pub(super) fn forward<T: Real + RealField>(part: &Part<T>, head: Head<'_, T>) -> Forward<T> {
    let (queries, keys, dv) = (head.q.nrows(), head.k.nrows(), head.v.ncols());
    let mut y = vec![T::ZERO; queries * dv];
    let mut most = vec![T::NEG_INFINITY; queries];
    let mut sums = vec![T::ZERO; queries];
    let mut block = vec![T::ZERO; part.block[0].min(queries) * part.block[1].min(keys)];
    for tile in part.tiles(queries, keys) {
        let of_tile = tile.query..tile.query + tile.queries;
        let y = &mut y[of_tile.start * dv..of_tile.end * dv];
        let (most, sums) = (&mut most[of_tile.clone()], &mut sums[of_tile]);
        let block = &mut block[..tile.queries * tile.keys];
        scores(part, &head, tile, block);
        with_level!(level => level.call(
            #[inline(always)]
            || softmax(level, part, head.mask, tile, (&mut *block, &mut *y), (most, sums)),
        ));
        let accumulate = if tile.key == 0 { Accum::Replace } else { Accum::Add };
        let v = head.v.subrows(tile.key, tile.keys);
        let block = rows(block, tile.queries, tile.keys);
        product(rows_mut(y, tile.queries, dv), accumulate, block, v, T::rounded(1.));
    }
    for (most, (sum, y)) in most.iter_mut().zip(sums.iter_mut().zip(y.chunks_exact_mut(dv))) {
        if *most == T::NEG_INFINITY {
            *most = T::ZERO;
        }
        if *sum != T::ZERO {
            *sum = T::rounded(1.) / *sum;
        }
        y.iter_mut().for_each(|y| *y *= *sum);
    }
    Forward { y, largest: most, one_over_sum: sums }
}

/// Turns a block's scores into probabilities.
#[inline(always)]
fn probabilities<L: Level, T: Real>(
    level: L,
    part: &Part<T>,
    mask: Option<MaskRows<'_, T>>,
    tile: Tile,
    scores: &mut [T],
    [most, one_over_sum]: [&[T]; 2],
) {
    for (i, row) in scores.chunks_exact_mut(tile.keys).enumerate() {
        let row = masked(part, mask, tile, i, row);
        let (shift, factor) = (most[tile.query + i], one_over_sum[tile.query + i]);
        for score in row {
            *score = (*score - shift).exp_in(level) * factor;
        }
    }
}

/// `d_i = <g_i, y_i>`.
fn slopes<T: Real>(y: MatRef<'_, T>, gy: MatRef<'_, T>, slopes: &mut Vec<T>) {
    slopes.clear();
    slopes.extend((0..y.nrows()).map(|i| {
        let mut sum = T::ZERO;
        for f in 0..y.ncols() {
            sum += y[(i, f)] * gy[(i, f)];
        }
        sum
    }));
}

/// The gradients of a head of keys and values, from the heads that it serves: each with its outputs and their gradient, and with what the
/// forward pass kept of its queries.
pub(super) fn backward<'a, T: Real + RealField>(
    part: &Part<T>,
    served: impl Iterator<Item = (Head<'a, T>, [MatRef<'a, T>; 2], [&'a [T]; 2])>,
) -> Backward<T> {
    let mut grads = Backward { q: Vec::new(), k: Vec::new(), v: Vec::new() };
    let (mut p, mut ds, mut d_rows) = (Vec::new(), Vec::new(), Vec::new());
    let one = T::rounded(1.);
    for (head, [y, gy], kept) in served {
        let (queries, d) = (head.q.nrows(), head.q.ncols());
        let (keys, dv) = (head.v.nrows(), head.v.ncols());
        let first = grads.q.len();
        grads.q.resize(first + queries * d, T::ZERO);
        grads.k.resize(keys * d, T::ZERO);
        grads.v.resize(keys * dv, T::ZERO);
        slopes(y, gy, &mut d_rows);
        for tile in part.tiles(queries, keys) {
            let count = tile.queries * tile.keys;
            p.resize(count, T::ZERO);
            ds.resize(count, T::ZERO);
            scores(part, &head, tile, &mut p);
            with_level!(level => level.call(
                #[inline(always)]
                || probabilities(level, part, head.mask, tile, &mut p, kept),
            ));
            let (q, gy) = (head.q.subrows(tile.query, tile.queries), gy.subrows(tile.query, tile.queries));
            let (k, v) = (head.k.subrows(tile.key, tile.keys), head.v.subrows(tile.key, tile.keys));
            let gv = &mut grads.v[tile.key * dv..];
            let of_p = rows(&p, tile.queries, tile.keys);
            product(rows_mut(gv, tile.keys, dv), Accum::Add, of_p.transpose(), gy, one);
            product(rows_mut(&mut ds, tile.queries, tile.keys), Accum::Replace, gy, v.transpose(), one);
            let slopes = &d_rows[tile.query..];
            with_level!(level => level.call(
                #[inline(always)]
                || {
                    let rows = ds.chunks_exact_mut(tile.keys).zip(p.chunks_exact(tile.keys)).zip(slopes);
                    for ((ds, p), slope) in rows {
                        for (ds, p) in ds.iter_mut().zip(p) {
                            *ds = *p * (*ds - *slope);
                        }
                    }
                },
            ));
            let of_ds = rows(&ds, tile.queries, tile.keys);
            let gq = &mut grads.q[first + tile.query * d..];
            product(rows_mut(gq, tile.queries, d), Accum::Add, of_ds, k, part.scale);
            let gk = &mut grads.k[tile.key * d..];
            product(rows_mut(gk, tile.keys, d), Accum::Add, of_ds.transpose(), q, part.scale);
        }
    }
    grads
}
