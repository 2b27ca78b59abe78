//! The CPU convolution for few output channels and stride 1: no patches are stored.
//!
//! A plane with its padding is one run of numbers. Over that run, kernel element `(ki, kj)` is the plane shifted by
//! `ki dilation width + kj dilation`, so the outputs of whole rows are sums of shifted runs; the few sums that straddle
//! two rows are computed and dropped. A tile of `O` output channels and `L` positions stays in registers.

use super::{element::Real, patches::ConvShape};

/// Output channels of a tile: as many as 32 (AVX-512) or 16 vector registers hold.
const MAX_CHANNELS: usize = if cfg!(target_feature = "avx512vl") { 8 } else { 6 };

/// The widest tile; the padded input has as many spare elements at its end.
const MAX_POSITIONS: usize = 64;

/// Output elements of a band of rows, chosen to stay in the first-level cache.
const BAND: usize = 1024;

/// A convolution's weights in the order the tiles read them.
pub(crate) struct Direct<T> {
    shape: ConvShape,
    /// For every group and block of output channels, `[features, channels of the block]`.
    weights: Vec<T>,
    /// Start of each kernel element's run within the padded channels of a group.
    shifts: Vec<usize>,
    padded_width: usize,
}

/// Buffers of one thread.
pub(crate) struct Scratch<T> {
    padded: Vec<T>,
    band: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { padded: Vec::new(), band: Vec::new() }
    }
}

/// The sizes of the blocks that `channels` are cut into.
fn blocks(channels: usize) -> impl Iterator<Item = usize> {
    let count = channels.div_ceil(MAX_CHANNELS);
    (0..count).map(move |i| channels / count + usize::from(i < channels % count))
}

/// Whether this path computes the shape, and faster than patches and a matrix product do.
pub(crate) fn direct_suits(shape: &ConvShape) -> bool {
    shape.stride == (1, 1) && shape.group_outputs() <= 16
}

impl<T: Real> Direct<T> {
    /// `w` in `[o, c / groups, kh, kw]` order.
    pub(crate) fn new(shape: ConvShape, w: &[T]) -> Self {
        let (features, (kh, kw)) = (shape.group_features(), shape.kernel);
        let padded_width = shape.input.1 + 2 * shape.padding.1;
        let plane = padded_width * (shape.input.0 + 2 * shape.padding.0);
        let shift = |c: usize, i: usize, j: usize| {
            c * plane + i * shape.dilation.0 * padded_width + j * shape.dilation.1
        };
        let shifts = (0..features).map(|k| shift(k / (kh * kw), k / kw % kh, k % kw)).collect();
        let mut weights = Vec::with_capacity(w.len());
        for group in w.chunks_exact(features * shape.group_outputs()) {
            let mut rest = group;
            for size in blocks(shape.group_outputs()) {
                let (block, after) = rest.split_at(size * features);
                weights.extend((0..size * features).map(|i| block[i % size * features + i / size]));
                rest = after;
            }
        }
        Self { shape, weights, shifts, padded_width }
    }

    /// Adds to `out [o / groups, oh, ow]` the convolution of the channels `x [c / groups, h, w]` of group `group`.
    pub(crate) fn add(&self, group: usize, x: &[T], out: &mut [T], scratch: &mut Scratch<T>) {
        self.pad(x, &mut scratch.padded);
        let (oh, ow) = self.shape.output;
        let of_group = self.shape.group_features() * self.shape.group_outputs();
        let weights = &self.weights[group * of_group..][..of_group];
        let rows_of_band = (BAND / self.padded_width).clamp(1, oh);
        for first in (0..oh).step_by(rows_of_band) {
            let rows = rows_of_band.min(oh - first);
            let run = (rows - 1) * self.padded_width + ow;
            let x = &scratch.padded[first * self.padded_width..];
            let (mut weights, mut channel) = (weights, 0);
            for size in blocks(self.shape.group_outputs()) {
                let (block, after) = weights.split_at(size * self.shape.group_features());
                let stride = self.run(size, x, block, run, &mut scratch.band);
                for sums in scratch.band.chunks_exact(stride).take(size) {
                    let out = &mut out[(channel * oh + first) * ow..];
                    for (dst, src) in out.chunks_mut(ow).zip(sums.chunks(self.padded_width)).take(rows) {
                        dst.iter_mut().zip(src).for_each(|(d, &s)| *d += s);
                    }
                    channel += 1;
                }
                weights = after;
            }
        }
    }

    /// Copies the channels of a group between zeros, with spare elements for the last tile to read.
    fn pad(&self, x: &[T], padded: &mut Vec<T>) {
        let ((h, w), (ph, pw)) = (self.shape.input, self.shape.padding);
        let plane = self.padded_width * (h + 2 * ph);
        // Only the inside is ever written, so that what a former call left around it is still zero.
        padded.resize(plane * self.shape.group_channels() + MAX_POSITIONS, T::ZERO);
        if w == 0 || h == 0 {
            return;
        }
        for (src, dst) in x.chunks_exact(h * w).zip(padded.chunks_exact_mut(plane)) {
            let rows = dst[ph * self.padded_width..].chunks_exact_mut(self.padded_width);
            src.chunks_exact(w).zip(rows).for_each(|(src, dst)| dst[pw..pw + w].copy_from_slice(src));
        }
    }

    /// Sums over `run` positions for the `size` channels of a block, each channel's at a multiple of the length that is
    /// returned.
    fn run(&self, size: usize, x: &[T], weights: &[T], run: usize, band: &mut Vec<T>) -> usize {
        match size {
            1 => self.tiles::<1, 64>(x, weights, run, band),
            2 => self.tiles::<2, 32>(x, weights, run, band),
            3 => self.tiles::<3, 32>(x, weights, run, band),
            4 => self.tiles::<4, 16>(x, weights, run, band),
            5 => self.tiles::<5, 16>(x, weights, run, band),
            6 => self.tiles::<6, 16>(x, weights, run, band),
            7 => self.tiles::<7, 16>(x, weights, run, band),
            _ => self.tiles::<8, 16>(x, weights, run, band),
        }
    }

    fn tiles<const O: usize, const L: usize>(
        &self,
        x: &[T],
        weights: &[T],
        run: usize,
        band: &mut Vec<T>,
    ) -> usize {
        let stride = run.next_multiple_of(L);
        band.resize(stride * O, T::ZERO);
        for at in (0..run).step_by(L) {
            let sums = tile::<T, O, L>(&x[at..], weights, &self.shifts);
            for (o, sums) in sums.iter().enumerate() {
                band[o * stride + at..][..L].copy_from_slice(sums);
            }
        }
        stride
    }
}

/// `sums[o][l] = sum_k weights[k][o] x[shifts[k] + l]`.
#[inline(always)]
fn tile<T: Real, const O: usize, const L: usize>(x: &[T], weights: &[T], shifts: &[usize]) -> [[T; L]; O] {
    let mut sums = [[T::ZERO; L]; O];
    for (weights, &shift) in weights.chunks_exact(O).zip(shifts) {
        let x = &x[shift..shift + L];
        for (sums, &weight) in sums.iter_mut().zip(weights) {
            for (sum, &x) in sums.iter_mut().zip(x) {
                *sum = sum.add_product(weight, x);
            }
        }
    }
    sums
}
