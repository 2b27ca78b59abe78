//! The forward pass of a convolution whose outputs are pooled, on slices.

use rayon::prelude::*;

use super::{
    conv_pool::{CUT, PooledShape},
    correlate::{Packed, SPARE, copy, rows_of_band, run_sums},
    element::Real,
    simd::{Level, with_level},
};

/// A sample's group of channels cut up such that the outputs that fall on one element of every window are sums of runs.
///
/// With `S` the distance between windows in the padded image, its plane `(r, s)` has the image's rows `r, r + S, ..` and
/// columns `s, s + S, ..`. In those planes neighbouring windows are neighbours, so that for each element of the window,
/// and each feature, the numbers that all windows read are one run.
struct Phases {
    shape: PooledShape,
    stride: (usize, usize),
    /// Rows and columns of a plane.
    plane: (usize, usize),
    /// For each element of a window, the run of each feature.
    shifts: Vec<Vec<usize>>,
}

impl Phases {
    fn new(shape: &PooledShape) -> Self {
        let conv = &shape.conv;
        let stride = (conv.stride.0 * shape.stride.0, conv.stride.1 * shape.stride.1);
        let plane = (
            (conv.input.0 + 2 * conv.padding.0).div_ceil(stride.0),
            (conv.input.1 + 2 * conv.padding.1).div_ceil(stride.1),
        );
        let ((kh, kw), dilation) = (conv.kernel, conv.dilation);
        let shift = |element: usize, k: usize| {
            let (a, b) = (element / shape.kernel.1, element % shape.kernel.1);
            let row = a * conv.stride.0 + k / kw % kh * dilation.0;
            let col = b * conv.stride.1 + k % kw * dilation.1;
            let phase = (k / (kh * kw) * stride.0 + row % stride.0) * stride.1 + col % stride.1;
            (phase * plane.0 + row / stride.0) * plane.1 + col / stride.1
        };
        let shifts = (0..shape.kernel.0 * shape.kernel.1)
            .map(|element| (0..conv.group_features()).map(|k| shift(element, k)).collect())
            .collect();
        Self { shape: *shape, stride, plane, shifts }
    }

    /// The planes of `x [c / groups, h, w]`, with spare numbers after them. `planes` is empty or what a former call left.
    #[inline(always)]
    fn read<T: Real>(&self, x: &[T], planes: &mut Vec<T>) {
        let conv = &self.shape.conv;
        let ((h, w), (sh, sw)) = (conv.input, self.stride);
        let area = self.plane.0 * self.plane.1;
        // Padding is never written to, so that zeros stay where a former call found them.
        planes.resize(conv.group_channels() * sh * sw * area + SPARE, T::ZERO);
        // Where the columns of each remainder start in a row of the image, and in a row of their plane.
        let starts =
            |first: usize| (first, (first + conv.padding.1) % sw * area + (first + conv.padding.1) / sw);
        for (x, planes) in x.chunks_exact(h * w).zip(planes.chunks_exact_mut(sh * sw * area)) {
            for (row, x) in x.chunks_exact(w).enumerate().map(|(row, x)| (row + conv.padding.0, x)) {
                let planes = &mut planes[row % sh * sw * area + row / sh * self.plane.1..];
                match sw {
                    1 => copy(x, &mut planes[starts(0).1..]),
                    2 if w > 1 => split(x, planes, starts(0).1, starts(1).1),
                    _ => (0..sw.min(w)).map(starts).for_each(|(src, dst)| {
                        let every = x[src..].iter().step_by(sw);
                        planes[dst..].iter_mut().zip(every).for_each(|(d, &s)| *d = s);
                    }),
                }
            }
        }
    }
}

/// Copies the numbers at even places of `src` to `dst` from `even` on, and the others from `odd` on.
#[inline(always)]
fn split<T: Copy>(src: &[T], dst: &mut [T], even: usize, odd: usize) {
    /// `N` pairs from the `at`-th on.
    #[inline(always)]
    fn some<T: Copy, const N: usize>(src: &[[T; 2]], dst: &mut [T], at: usize, (even, odd): (usize, usize)) {
        let Some(pairs) = src[at..].first_chunk::<N>() else { return };
        dst[even + at..][..N].copy_from_slice(&pairs.map(|pair| pair[0]));
        dst[odd + at..][..N].copy_from_slice(&pairs.map(|pair| pair[1]));
    }
    let (pairs, rest) = src.as_chunks::<2>();
    let places = (even, odd);
    let count = pairs.len();
    match count {
        // Vectors, the last of which may overlap with the one before.
        8.. => {
            (0..count / 8).for_each(|i| some::<T, 8>(pairs, dst, 8 * i, places));
            some::<T, 8>(pairs, dst, count - 8, places);
        }
        4.. => [0, count - 4].into_iter().for_each(|at| some::<T, 4>(pairs, dst, at, places)),
        _ => (0..count).for_each(|at| some::<T, 1>(pairs, dst, at, places)),
    }
    if let Some(&last) = rest.first() {
        dst[even + count] = last;
    }
}

/// The pooled outputs and the byte of each, from row-major slices.
pub(super) fn pooled_sums<T: Real>(
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    shape: &PooledShape,
    relu: bool,
    n: usize,
) -> (Vec<T>, Vec<u8>) {
    with_level!(level => sums(level, x, w, bias, shape, relu, n))
}

fn sums<L: Level, T: Real>(
    level: L,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    shape: &PooledShape,
    relu: bool,
    n: usize,
) -> (Vec<T>, Vec<u8>) {
    let conv = &shape.conv;
    let (groups, outputs, features) = (conv.groups, conv.group_outputs(), conv.group_features());
    let (x_part, y_part) = (conv.group_channels() * conv.input.0 * conv.input.1, outputs * shape.positions());
    let packed = |group: usize| {
        let bias = bias.map(|bias| &bias[group * outputs..][..outputs]);
        Packed::new(level, outputs, features, |o, k| w[(group * outputs + o) * features + k], bias)
    };
    let packed: Vec<_> = (0..groups).map(packed).collect();
    let phases = Phases::new(shape);
    let (mut y, mut at) = (vec![T::ZERO; n * groups * y_part], vec![0; n * groups * y_part]);
    y.par_chunks_exact_mut(y_part)
        .zip(at.par_chunks_exact_mut(y_part))
        .zip(x.par_chunks_exact(x_part))
        .enumerate()
        .for_each_init(Buffers::default, |buffers, (index, ((y, at), x))| {
            level.call(
                #[inline(always)]
                || {
                    phases.read(x, &mut buffers.planes);
                    pool_sample(level, &phases, &packed[index % groups], relu, buffers, y, at);
                },
            );
        });
    (y, at)
}

struct Buffers<T> {
    planes: Vec<T>,
    /// For each element of a window, the sums of a block of channels.
    sums: Vec<T>,
    places: Vec<u8>,
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        Self { planes: Vec::new(), sums: Vec::new(), places: Vec::new() }
    }
}

/// The pooled outputs `[o / groups, ph, pw]` of one sample's group, from its planes in `buffers`.
#[inline(always)]
fn pool_sample<L: Level, T: Real>(
    level: L,
    phases: &Phases,
    packed: &Packed<L, T>,
    relu: bool,
    buffers: &mut Buffers<T>,
    y: &mut [T],
    at: &mut [u8],
) {
    let Buffers { planes, sums, places } = buffers;
    let ((rows, cols), row_step, elements) = (phases.shape.output, phases.plane.1, phases.shifts.len());
    let together = rows_of_band(phases.shape.conv.group_features() * elements, row_step);
    for first in (0..rows).step_by(together) {
        let count = together.min(rows - first);
        let length = (count - 1) * row_step + cols;
        let step = length.next_multiple_of(SPARE);
        let planes = &planes[first * row_step..];
        let mut channel = 0;
        for (weights, bias) in packed.blocks() {
            let part = bias.len() * step;
            sums.resize(elements * part, T::ZERO);
            for (shifts, sums) in phases.shifts.iter().zip(sums.chunks_exact_mut(part)) {
                run_sums(level, shifts, planes, (weights, bias), length, sums, step);
            }
            places.clear();
            places.resize(part, 0);
            let (best, others) = sums.split_at_mut(part);
            for (place, sums) in (1..).zip(others.chunks_exact(part)) {
                keep_larger(best, places, sums, place);
            }
            if relu {
                cut(best, places);
            }
            for (best, places) in best.chunks_exact(step).zip(places.chunks_exact(step)) {
                let from = channel * rows * cols + first * cols;
                let to = from + count * cols;
                let y = y[from..to].chunks_exact_mut(cols).zip(best.chunks(row_step));
                y.for_each(|(y, best)| copy(&best[..cols], y));
                let at = at[from..to].chunks_exact_mut(cols).zip(places.chunks(row_step));
                at.for_each(|(at, places)| copy(&places[..cols], at));
                channel += 1;
            }
        }
    }
}

/// Where `values` are larger than `best`, or NaN, they and `place` take the place of what was there.
#[inline(always)]
fn keep_larger<T: Real>(best: &mut [T], places: &mut [u8], values: &[T], place: u8) {
    for ((best, at), &value) in best.iter_mut().zip(places).zip(values) {
        // Without a branch, which would be mispredicted. `value != value` only for a NaN.
        #[allow(clippy::eq_op)]
        let larger = (value > *best) | (value != value);
        *best = if larger { value } else { *best };
        *at = if larger { place } else { *at };
    }
}

/// The rectifier. A NaN is not below zero, so that it passes.
#[inline(always)]
fn cut<T: Real>(best: &mut [T], places: &mut [u8]) {
    for (best, at) in best.iter_mut().zip(places) {
        let below = *best <= T::ZERO;
        *best = if below { T::ZERO } else { *best };
        *at = if below { CUT } else { *at };
    }
}
