//! The gradients of a convolution whose outputs are pooled, on slices.

use rayon::prelude::*;
use std::ops::Range;

use super::{
    conv_pool::{CUT, PooledShape},
    conv_slices::{Samples, add_parts, grad_input_samples},
    correlate::{blocks, pad},
    element::{Real, total},
    simd::{Lanes, Level, with_level},
};

/// The gradient `[.., oh, ow]` of the convolution's outputs from that of the pooled ones.
pub(super) fn unpool<T: Copy + Send + Sync>(gy: &[T], at: &[u8], shape: &PooledShape, zero: T) -> Vec<T> {
    let (t, pooled) = (shape.conv.positions(), shape.positions());
    let mut wide = vec![zero; gy.len() / pooled * t];
    let places = Places::new(shape, shape.conv.output.1, (1, 1));
    wide.par_chunks_exact_mut(t)
        .zip(gy.par_chunks_exact(pooled).zip(at.par_chunks_exact(pooled)))
        .with_min_len(shape.conv.out_channels)
        .for_each(|(wide, (gy, at))| places.scatter(gy, at, wide));
    wide
}

/// Where the elements of the windows lie in an image.
struct Places {
    output: (usize, usize),
    /// From one window to the next below and beside it.
    step: (usize, usize),
    /// From a window's first element to each; 0 for bytes that stand for none.
    elements: [u32; 256],
    /// The largest place.
    last: usize,
}

impl Places {
    /// In an image of rows of `width`, in which neighbouring outputs of the convolution are `stride` apart.
    fn new(shape: &PooledShape, width: usize, stride: (usize, usize)) -> Self {
        let (kh, kw) = shape.kernel;
        let mut elements = [0; 256];
        for (e, place) in elements.iter_mut().enumerate().take(kh * kw) {
            *place = (e / kw * stride.0 * width + e % kw * stride.1) as u32;
        }
        let step = (shape.stride.0 * stride.0 * width, shape.stride.1 * stride.1);
        let window = (shape.output.0 - 1) * step.0 + (shape.output.1 - 1) * step.1;
        let last = window + (kh - 1) * stride.0 * width + (kw - 1) * stride.1;
        Self { output: shape.output, step, elements, last }
    }

    /// Calls `f` with the place, gradient and byte of each output of a channel.
    #[inline(always)]
    fn each<T: Copy>(&self, gy: &[T], at: &[u8], mut f: impl FnMut(u32, T, u8)) {
        let rows = gy.chunks_exact(self.output.1).zip(at.chunks_exact(self.output.1));
        let mut row = 0;
        for (gy, at) in rows {
            let mut window = row;
            for (&g, &at) in gy.iter().zip(at) {
                f(window + self.elements[usize::from(at)], g, at);
                window += self.step.1 as u32;
            }
            row += self.step.0 as u32;
        }
    }

    /// Writes the gradients of a channel's outputs that were not cut to their places.
    fn scatter<T: Copy>(&self, gy: &[T], at: &[u8], wide: &mut [T]) {
        self.each(gy, at, |place, g, at| {
            if at != CUT {
                wide[place as usize] = g;
            }
        });
    }

    /// Places and gradients of a channel's outputs that were not cut, at the start of `list`, and their number.
    fn list<T: Real>(&self, gy: &[T], at: &[u8], list: &mut [(u32, T)]) -> usize {
        let mut count = 0;
        self.each(gy, at, |place, g, at| {
            // Without a branch, which would be mispredicted: what was cut is written over.
            if let Some(next) = list.get_mut(count) {
                *next = (place, g);
            }
            count += usize::from(at != CUT);
        });
        count
    }
}

/// `dL/dx [n, c, h, w]` from row-major slices.
pub(super) fn pooled_grad_input<T: Real>(
    gy: &[T],
    at: &[u8],
    w: &[T],
    shape: &PooledShape,
    n: usize,
) -> Vec<T> {
    let places = Places::new(shape, shape.conv.output.1, (1, 1));
    let gy = Unpooled { gy, at, shape, places };
    with_level!(level => grad_input_samples(level, &gy, w, &shape.conv, n))
}

/// The gradients of the convolution's outputs, made from the pooled ones a sample at a time.
struct Unpooled<'a, T> {
    gy: &'a [T],
    at: &'a [u8],
    shape: &'a PooledShape,
    places: Places,
}

impl<T: Real> Samples<T> for Unpooled<'_, T> {
    fn get<'a>(&'a self, index: usize, wide: &'a mut Vec<T>) -> &'a [T] {
        let (t, pooled) = (self.shape.conv.positions(), self.shape.positions());
        let outputs = self.shape.conv.group_outputs();
        wide.clear();
        wide.resize(outputs * t, T::ZERO);
        let part = index * outputs * pooled..(index + 1) * outputs * pooled;
        let rows = self.gy[part.clone()].chunks_exact(pooled).zip(self.at[part].chunks_exact(pooled));
        for ((gy, at), wide) in rows.zip(wide.chunks_exact_mut(t)) {
            self.places.scatter(gy, at, wide);
        }
        wide
    }
}

/// Kernel rows, cut into pieces that a vector holds, that a task multiplies by each gradient at a time.
const ROWS: usize = 8;

/// The pieces of the kernel's rows: the start of each in the padded image, its first feature and how many it has.
fn kernel_rows<L: Level, T: Real>(shape: &PooledShape) -> Vec<(usize, Range<usize>)> {
    let conv = &shape.conv;
    let width = conv.input.1 + 2 * conv.padding.1;
    let plane = width * (conv.input.0 + 2 * conv.padding.0);
    let (kh, kw) = conv.kernel;
    // Elements of a row that lie side by side.
    let piece = if conv.dilation.1 == 1 { T::Lanes::<L>::WIDTH } else { 1 };
    let rows = (0..conv.group_channels() * kh).flat_map(|row| {
        (0..kw).step_by(piece).map(move |first| {
            let start = row / kh * plane + row % kh * conv.dilation.0 * width + first * conv.dilation.1;
            (start, row * kw + first..row * kw + kw.min(first + piece))
        })
    });
    rows.collect()
}

/// Inputs, gradients of the pooled outputs, and which output of a window each belongs to.
type Given<'a, T> = (&'a [T], &'a [T], &'a [u8]);

/// `dL/dw [o, c / groups, kh, kw]` and `dL/db [o]` from row-major slices.
pub(super) fn pooled_weight_grads<T: Real>(
    given: Given<'_, T>,
    shape: &PooledShape,
    n: usize,
) -> (Vec<T>, Vec<T>) {
    with_level!(level => weight_grads(level, given, shape, n))
}

fn weight_grads<L: Level, T: Real>(
    level: L,
    given: Given<'_, T>,
    shape: &PooledShape,
    n: usize,
) -> (Vec<T>, Vec<T>) {
    let rows = kernel_rows::<L, T>(shape);
    // The samples are summed in parts, in parallel, and the parts in order: their number depends on the sizes alone, so
    // the result does not depend on the number of threads. Where the sums are too large for that, the channels are divided.
    let parts = ((1 << 22) / (shape.conv.out_channels * room::<L, T>(&rows))).clamp(1, 16);
    let sums = sums_of_parts(level, given, shape, &rows, (n, parts));
    let sums = add_parts(sums, shape.conv.out_channels * room::<L, T>(&rows));
    gathered::<L, T>(&sums, shape, &rows)
}

/// `dL/dw [n, o, c / groups, kh, kw]` and `dL/db [n, o]` of each sample, from row-major slices.
pub(super) fn pooled_sample_grads<T: Real>(
    given: Given<'_, T>,
    shape: &PooledShape,
    n: usize,
) -> (Vec<T>, Vec<T>) {
    with_level!(level => sample_grads(level, given, shape, n))
}

fn sample_grads<L: Level, T: Real>(
    level: L,
    given: Given<'_, T>,
    shape: &PooledShape,
    n: usize,
) -> (Vec<T>, Vec<T>) {
    let (x, gy, at) = given;
    let rows = kernel_rows::<L, T>(shape);
    let channels = shape.conv.out_channels;
    // A vector a row of a kernel may be many times what it becomes: no more samples at once than these numbers allow.
    let at_once = ((1 << 22) / (channels * room::<L, T>(&rows))).max(1);
    let (of_x, of_gy) = (x.len() / n.max(1), gy.len() / n.max(1));
    let mut weights = Vec::with_capacity(n * channels * shape.conv.group_features());
    let mut biases = Vec::with_capacity(n * channels);
    for first in (0..n).step_by(at_once) {
        let samples = at_once.min(n - first);
        let part = |of: usize| first * of..(first + samples) * of;
        let tensors = (&x[part(of_x)], &gy[part(of_gy)], &at[part(of_gy)]);
        let sums = sums_of_parts(level, tensors, shape, &rows, (samples, samples));
        let (weight, bias) = gathered::<L, T>(&sums, shape, &rows);
        weights.extend(weight);
        biases.extend(bias);
    }
    (weights, biases)
}

/// Room for a vector of each row of a kernel, and for the bias.
fn room<L: Level, T: Real>(rows: &[(usize, Range<usize>)]) -> usize {
    rows.len() * T::Lanes::<L>::WIDTH + 1
}

/// The sums over each of `parts` of the `n` samples: a vector for each row of a channel's kernel, and the bias.
fn sums_of_parts<L: Level, T: Real>(
    level: L,
    (x, gy, at): Given<'_, T>,
    shape: &PooledShape,
    rows: &[(usize, Range<usize>)],
    (n, parts): (usize, usize),
) -> Vec<T> {
    let conv = &shape.conv;
    let (groups, outputs, pooled) = (conv.groups, conv.group_outputs(), shape.positions());
    let x_part = conv.group_channels() * conv.input.0 * conv.input.1;
    let places = Places::new(shape, conv.input.1 + 2 * conv.padding.1, conv.stride);
    let room = room::<L, T>(rows);
    let channels = outputs.div_ceil((16 / parts.max(1)).max(1));
    let samples = n.div_ceil(parts.max(1));
    let mut sums = vec![T::ZERO; parts * conv.out_channels * room];
    let of_groups = sums.par_chunks_exact_mut(outputs * room).enumerate();
    let tasks = of_groups.flat_map(|(index, sums)| {
        sums.par_chunks_mut(channels * room)
            .enumerate()
            .map(move |(block, sums)| (index, block * channels, sums))
    });
    tasks.for_each_init(
        || (Vec::new(), Vec::new()),
        |(image, list), (index, channel, sums)| {
            let (part, group) = (index / groups, index % groups);
            level.call(
                #[inline(always)]
                || {
                    for sample in part * samples..((part + 1) * samples).min(n) {
                        pad(conv, &x[(sample * groups + group) * x_part..][..x_part], image);
                        let first = ((sample * groups + group) * outputs + channel) * pooled;
                        let channels = gy[first..].chunks_exact(pooled).zip(at[first..].chunks_exact(pooled));
                        for ((gy, at), sums) in channels.zip(sums.chunks_exact_mut(room)) {
                            list.resize(pooled, (0, T::ZERO));
                            let count = places.list(gy, at, list);
                            let list = &list[..count];
                            if let Some((bias, sums)) = sums.split_last_mut() {
                                *bias += kept_sum(gy, at);
                                add_rows(level, list, image, rows, places.last, sums);
                            }
                        }
                    }
                },
            );
        },
    );
    sums
}

/// Kernels and biases out of sums of a channel after the other.
fn gathered<L: Level, T: Real>(
    sums: &[T],
    shape: &PooledShape,
    rows: &[(usize, Range<usize>)],
) -> (Vec<T>, Vec<T>) {
    let (features, room) = (shape.conv.group_features(), room::<L, T>(rows));
    let channels = sums.len() / room;
    let (mut gw, mut gb) = (vec![T::ZERO; channels * features], vec![T::ZERO; channels]);
    for ((gw, gb), sums) in gw.chunks_exact_mut(features).zip(&mut gb).zip(sums.chunks_exact(room)) {
        for ((_, features), lanes) in rows.iter().zip(sums.chunks_exact(T::Lanes::<L>::WIDTH)) {
            gw[features.clone()].copy_from_slice(&lanes[..features.len()]);
        }
        *gb = sums[room - 1];
    }
    (gw, gb)
}

/// The sum of the gradients that were not cut, in parts that vectorize.
#[inline(always)]
fn kept_sum<T: Real>(gy: &[T], at: &[u8]) -> T {
    let ((gy, gy_rest), (at, at_rest)) = (gy.as_chunks::<16>(), at.as_chunks::<16>());
    let kept = |g: T, at: u8| if at == CUT { T::ZERO } else { g };
    let mut parts = [T::ZERO; 16];
    for (gy, at) in gy.iter().zip(at) {
        for i in 0..16 {
            parts[i] += kept(gy[i], at[i]);
        }
    }
    let mut sum = total(parts);
    for (&g, &at) in gy_rest.iter().zip(at_rest) {
        sum += kept(g, at);
    }
    sum
}

/// Adds to a vector for each row of a kernel the sum over `list` of gradient times what the row sees at its place.
#[inline(always)]
fn add_rows<L: Level, T: Real>(
    level: L,
    list: &[(u32, T)],
    image: &[T],
    rows: &[(usize, Range<usize>)],
    last: usize,
    sums: &mut [T],
) {
    let mut rows = rows;
    let mut sums = sums;
    for size in blocks(rows.len(), ROWS) {
        let (block, sums_of_block);
        (block, rows) = rows.split_at(size);
        (sums_of_block, sums) = sums.split_at_mut(size * T::Lanes::<L>::WIDTH);
        match size {
            1 => row_tile::<L, T, 1>(level, list, image, block, last, sums_of_block),
            2 => row_tile::<L, T, 2>(level, list, image, block, last, sums_of_block),
            3 => row_tile::<L, T, 3>(level, list, image, block, last, sums_of_block),
            4 => row_tile::<L, T, 4>(level, list, image, block, last, sums_of_block),
            5 => row_tile::<L, T, 5>(level, list, image, block, last, sums_of_block),
            6 => row_tile::<L, T, 6>(level, list, image, block, last, sums_of_block),
            7 => row_tile::<L, T, 7>(level, list, image, block, last, sums_of_block),
            _ => row_tile::<L, T, 8>(level, list, image, block, last, sums_of_block),
        }
    }
}

/// [`add_rows`] for `R` rows; no place lies behind `last`.
#[inline(always)]
fn row_tile<L: Level, T: Real, const R: usize>(
    level: L,
    list: &[(u32, T)],
    image: &[T],
    rows: &[(usize, Range<usize>)],
    last: usize,
    sums: &mut [T],
) {
    let width = T::Lanes::<L>::WIDTH;
    let (mut acc, mut runs) = ([T::Lanes::<L>::splat(level, T::ZERO); R], [&image[..0]; R]);
    for r in 0..R {
        acc[r] = T::Lanes::<L>::load(level, &sums[r * width..]);
        runs[r] = &image[rows[r].0..][..last + width];
    }
    for &(place, g) in list {
        let g = T::Lanes::<L>::splat(level, g);
        for r in 0..R {
            // SAFETY: `place` is at most `last`, so that a vector follows in every run.
            acc[r] = acc[r].add_product(g, unsafe { T::Lanes::<L>::load_at(level, runs[r], place as usize) });
        }
    }
    for r in 0..R {
        acc[r].store(&mut sums[r * width..]);
    }
}
