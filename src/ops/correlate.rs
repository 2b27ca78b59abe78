//! The loop that a convolution and its gradient for the input consist of.
//!
//! An image with its padding is one run of numbers, a channel after the other. Over that run, kernel element
//! `(c, ki, kj)` is the image shifted by some `s_k`, so all outputs `y_o[i] = sum_k w[k][o] x[s_k + i]` of whole rows are
//! sums of shifted runs, and no patches need to be stored; the few positions that straddle two rows are computed and
//! dropped. Where the stride is not 1, patches are stored and their rows take the place of the shifted runs.

use super::{
    element::Real,
    patches::ConvShape,
    simd::{Lanes, Level},
};

/// Numbers that may be read behind the last one that counts; no vector is longer.
pub(crate) const SPARE: usize = 16;

/// Copies `src` to the start of `dst`: for the few numbers that a row of an image has, faster than a call.
#[inline(always)]
pub(crate) fn copy<T: Copy>(src: &[T], dst: &mut [T]) {
    /// The first `N` numbers, and the last `N`.
    #[inline(always)]
    fn ends<T: Copy, const N: usize>(src: &[T], dst: &mut [T]) {
        let last = src.len() - N;
        dst[..N].copy_from_slice(&src[..N]);
        dst[last..last + N].copy_from_slice(&src[last..]);
    }
    let dst = &mut dst[..src.len()];
    match src.len() {
        33.. => dst.copy_from_slice(src),
        16.. => ends::<T, 16>(src, dst),
        8.. => ends::<T, 8>(src, dst),
        4.. => ends::<T, 4>(src, dst),
        2.. => ends::<T, 2>(src, dst),
        1 => dst[0] = src[0],
        0 => {}
    }
}

/// The shifted runs of one sample's group, and where its outputs lie in them.
pub(crate) struct Runs {
    /// `s_k` for each feature.
    pub(super) shifts: Vec<usize>,
    /// Rows of the output, the outputs in a row, and the distance from one row to the next.
    rows: usize,
    cols: usize,
    row_step: usize,
}

impl Runs {
    /// Shifts of the padded input of a convolution of stride 1.
    pub(crate) fn of_image(shape: &ConvShape) -> Self {
        let (kh, kw) = shape.kernel;
        let row_step = shape.input.1 + 2 * shape.padding.1;
        let plane = row_step * (shape.input.0 + 2 * shape.padding.0);
        let shift = |k: usize| {
            let (c, i, j) = (k / (kh * kw), k / kw % kh, k % kw);
            c * plane + i * shape.dilation.0 * row_step + j * shape.dilation.1
        };
        let shifts = (0..shape.group_features()).map(shift).collect();
        Self { shifts, rows: shape.output.0, cols: shape.output.1, row_step }
    }

    /// The rows of a `[features, t]` matrix with a column for each output.
    pub(crate) fn of_rows(shape: &ConvShape, features: usize) -> Self {
        let (rows, cols) = shape.output;
        let shifts = (0..features).map(|k| k * shape.positions()).collect();
        Self { shifts, rows, cols, row_step: cols }
    }

    /// From the first output to behind the last.
    pub(crate) fn length(&self) -> usize {
        (self.rows - 1) * self.row_step + self.cols
    }

    /// The length of a channel that [`Runs::spread`] writes.
    pub(crate) fn spread_length(&self) -> usize {
        self.length().next_multiple_of(SPARE)
    }

    /// Copies outputs `[channels, t]` to where they lie in the runs, with zeros between and behind the rows:
    /// `[channels, spread_length]`. `spread` is empty or what a former call left.
    pub(crate) fn spread<T: Real>(&self, outputs: &[T], spread: &mut Vec<T>) {
        let (t, length) = (self.rows * self.cols, self.spread_length());
        // The zeros are never written to again.
        spread.resize(outputs.len() / t * length, T::ZERO);
        for (src, dst) in outputs.chunks_exact(t).zip(spread.chunks_exact_mut(length)) {
            let rows = src.chunks_exact(self.cols).zip(dst.chunks_mut(self.row_step));
            rows.for_each(|(src, dst)| copy(src, dst));
        }
    }
}

/// Copies the channels of a sample's group between the zeros of the padding, and spare numbers after them.
pub(crate) fn pad<T: Real>(shape: &ConvShape, x: &[T], padded: &mut Vec<T>) {
    let ((h, w), (ph, pw)) = (shape.input, shape.padding);
    let width = w + 2 * pw;
    let plane = width * (h + 2 * ph);
    // Only the inside is ever written, so that what a former call for this shape left around it is still zero.
    padded.resize(plane * shape.group_channels() + SPARE, T::ZERO);
    // Without padding at its sides, an image is one row.
    let (row, step) = if pw == 0 { (h * w, h * w) } else { (w, width) };
    for (src, dst) in x.chunks_exact(h * w).zip(padded.chunks_exact_mut(plane)) {
        let rows = dst[ph * width..].chunks_exact_mut(step);
        src.chunks_exact(row).zip(rows).for_each(|(src, dst)| copy(src, &mut dst[pw..]));
    }
}

/// The sizes of the nearly equal blocks of at most `max` that `count` is cut into.
pub(crate) fn blocks(count: usize, max: usize) -> impl Iterator<Item = usize> {
    let parts = count.div_ceil(max);
    (0..parts).map(move |i| count / parts + usize::from(i < count % parts))
}

/// Output channels of a tile: as many as the level has registers for.
const fn tile_channels<L: Level>() -> usize {
    if L::MANY_REGISTERS { 8 } else { 6 }
}

/// The weights of some output channels in the order the tiles read them, and their biases.
pub(crate) struct Packed<L, T> {
    level: L,
    features: usize,
    /// For each block of channels, `[features, channels of the block]`.
    weights: Vec<T>,
    bias: Vec<T>,
}

impl<L: Level, T: Real> Packed<L, T> {
    /// `at(o, k)` is the weight of channel `o` and feature `k`; no bias is one of zeros.
    pub(crate) fn new(
        level: L,
        channels: usize,
        features: usize,
        at: impl Fn(usize, usize) -> T,
        bias: Option<&[T]>,
    ) -> Self {
        let mut weights = Vec::with_capacity(channels * features);
        let mut first = 0;
        for size in blocks(channels, tile_channels::<L>()) {
            weights.extend((0..size * features).map(|i| at(first + i % size, i / size)));
            first += size;
        }
        let bias = bias.map_or_else(|| vec![T::ZERO; channels], |bias| bias.to_vec());
        Self { level, features, weights, bias }
    }

    /// The blocks in which the channels are computed: weights and biases of each.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (&[T], &[T])> {
        let (mut weights, mut bias) = (&self.weights[..], &self.bias[..]);
        blocks(self.bias.len(), tile_channels::<L>()).map(move |size| {
            let (block, biases);
            (block, weights) = weights.split_at(size * self.features);
            (biases, bias) = bias.split_at(size);
            (block, biases)
        })
    }
}

/// Rows of an image that are computed at a time, so that what the blocks of channels read again is still in the cache.
pub(crate) fn rows_of_band(features: usize, row_step: usize) -> usize {
    ((1 << 16) / features).clamp(64, 1024).div_ceil(row_step)
}

/// Writes to `out [channels, rows, cols]` the sums `b_o + sum_k w[k][o] x[s_k + i]`. `x` has `SPARE` numbers behind the
/// last run; `band` is a buffer.
#[inline(always)]
pub(crate) fn correlate<L: Level, T: Real>(
    runs: &Runs,
    x: &[T],
    packed: &Packed<L, T>,
    out: &mut [T],
    band: &mut Vec<T>,
) {
    let channel = runs.rows * runs.cols;
    let rows_of_band = rows_of_band(runs.shifts.len(), runs.row_step).min(runs.rows);
    for first in (0..runs.rows).step_by(rows_of_band) {
        let rows = rows_of_band.min(runs.rows - first);
        let length = (rows - 1) * runs.row_step + runs.cols;
        let step = length.next_multiple_of(SPARE);
        let x = &x[first * runs.row_step..];
        let mut out = &mut out[..];
        for (weights, bias) in packed.blocks() {
            let (block, next) = out.split_at_mut(bias.len() * channel);
            out = next;
            band.resize(bias.len() * step, T::ZERO);
            run_sums(packed.level, &runs.shifts, x, (weights, bias), length, band, step);
            for (sums, out) in band.chunks_exact(step).zip(block.chunks_exact_mut(channel)) {
                let out = out[first * runs.cols..].chunks_exact_mut(runs.cols);
                let rows = out.zip(sums.chunks(runs.row_step)).take(rows);
                rows.for_each(|(dst, src)| copy(&src[..runs.cols], dst));
            }
        }
    }
}

/// Writes the sums `bias[o] + sum_k weights[k][o] x[shifts[k] + i]` of a block of channels to `sums[o step + i]` for
/// `i < length`, and numbers without meaning up to the next multiple of a vector's length, at most `step`.
#[inline(always)]
pub(crate) fn run_sums<L: Level, T: Real>(
    level: L,
    shifts: &[usize],
    x: &[T],
    (weights, bias): (&[T], &[T]),
    length: usize,
    sums: &mut [T],
    step: usize,
) {
    // As many vectors a tile as fit into the registers together with the channels.
    let tiles = if L::MANY_REGISTERS {
        match bias.len() {
            1 => tiles::<L, T, 1, 8>,
            2 => tiles::<L, T, 2, 8>,
            3 => tiles::<L, T, 3, 6>,
            4 => tiles::<L, T, 4, 4>,
            5 => tiles::<L, T, 5, 4>,
            6 => tiles::<L, T, 6, 4>,
            7 => tiles::<L, T, 7, 3>,
            _ => tiles::<L, T, 8, 3>,
        }
    } else {
        match bias.len() {
            1 => tiles::<L, T, 1, 8>,
            2 => tiles::<L, T, 2, 4>,
            3 => tiles::<L, T, 3, 3>,
            4 => tiles::<L, T, 4, 2>,
            5 => tiles::<L, T, 5, 2>,
            _ => tiles::<L, T, 6, 2>,
        }
    };
    tiles(level, shifts, x, (weights, bias), length, sums, step)
}

/// [`run_sums`] of `O` channels, `V` vectors at a time and then the rest.
#[inline(never)]
fn tiles<L: Level, T: Real, const O: usize, const V: usize>(
    level: L,
    shifts: &[usize],
    x: &[T],
    (weights, bias): (&[T], &[T]),
    length: usize,
    sums: &mut [T],
    step: usize,
) {
    let width = T::Lanes::<L>::WIDTH;
    level.call(
        #[inline(always)]
        || {
            let mut left = length.div_ceil(width);
            let mut at = 0;
            while left > 0 {
                let (x, sums) = (&x[at..], &mut sums[at..]);
                let done = match left {
                    _ if left >= V => tile::<L, T, O, V>(level, x, weights, bias, shifts, sums, step),
                    4.. => tile::<L, T, O, 4>(level, x, weights, bias, shifts, sums, step),
                    3 => tile::<L, T, O, 3>(level, x, weights, bias, shifts, sums, step),
                    2 => tile::<L, T, O, 2>(level, x, weights, bias, shifts, sums, step),
                    _ => tile::<L, T, O, 1>(level, x, weights, bias, shifts, sums, step),
                };
                left -= done;
                at += done * width;
            }
        },
    )
}

/// [`run_sums`] for `O` channels and `V` vectors of positions; returns `V`.
#[inline(always)]
fn tile<L: Level, T: Real, const O: usize, const V: usize>(
    level: L,
    x: &[T],
    weights: &[T],
    bias: &[T],
    shifts: &[usize],
    sums: &mut [T],
    step: usize,
) -> usize {
    let width = T::Lanes::<L>::WIDTH;
    let mut acc = [[T::Lanes::<L>::splat(level, T::ZERO); V]; O];
    for o in 0..O {
        acc[o] = [T::Lanes::<L>::splat(level, bias[o]); V];
    }
    for (weights, &shift) in weights.chunks_exact(O).zip(shifts) {
        let run = &x[shift..shift + V * width];
        let mut x = [T::Lanes::<L>::splat(level, T::ZERO); V];
        // Plain loops: the closures of iterators are not always inlined here, and the sums then leave the registers.
        for v in 0..V {
            x[v] = T::Lanes::<L>::load(level, &run[v * width..]);
        }
        for o in 0..O {
            let weight = T::Lanes::<L>::splat(level, weights[o]);
            for v in 0..V {
                acc[o][v] = acc[o][v].add_product(weight, x[v]);
            }
        }
    }
    for (o, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            acc.store(&mut sums[o * step + v * width..]);
        }
    }
    V
}
