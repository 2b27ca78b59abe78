//! The CPU versions of the convolution and its gradients, on slices.

use rayon::prelude::*;

use super::{
    correlate::{Packed, Runs, SPARE, correlate, pad},
    element::Real,
    patches::{ConvShape, fold_plane, unfold_plane},
    products::products,
    simd::{Level, vectorized, with_level},
};

/// How the outputs of a convolution are sums of runs: shifts of the padded image, or rows of patches where the stride
/// forbids that, or where most positions of the image would straddle two rows.
struct Reader {
    shape: ConvShape,
    runs: Runs,
    unfold: bool,
}

impl Reader {
    fn new(shape: &ConvShape) -> Self {
        let image = Runs::of_image(shape);
        let unfold = shape.stride != (1, 1) || image.length() > 2 * shape.positions();
        let runs = if unfold { Runs::of_rows(shape, shape.group_features()) } else { image };
        Self { shape: *shape, runs, unfold }
    }

    /// The runs of one sample's group `x [c / groups, h, w]`, with spare numbers after them. `buffer` is empty or what a
    /// former call on this reader left.
    #[inline(always)]
    fn read<T: Real>(&self, x: &[T], buffer: &mut Vec<T>) {
        if !self.unfold {
            return pad(&self.shape, x, buffer);
        }
        // Padding is never written, so that zeros stay where a former call found them.
        buffer.resize(self.shape.group_features() * self.shape.positions() + SPARE, T::ZERO);
        let (h, w) = self.shape.input;
        let part = self.shape.kernel.0 * self.shape.kernel.1 * self.shape.positions();
        let planes = x.chunks_exact(h * w).zip(buffer.chunks_exact_mut(part));
        planes.for_each(|(plane, out)| unfold_plane(&self.shape, plane, out, self.shape.positions()));
    }
}

/// Where the loops below find the numbers of one sample's group.
pub(super) trait Samples<T>: Sync {
    /// Sample `index / groups`, group `index % groups`, in row-major order; `buffer` is room for it if needed, empty or
    /// what a former call left.
    fn get<'a>(&'a self, index: usize, buffer: &'a mut Vec<T>) -> &'a [T];
}

/// Parts of equal length of a slice.
struct Parts<'a, T>(&'a [T], usize);

impl<T: Real> Samples<T> for Parts<'_, T> {
    fn get<'a>(&'a self, index: usize, _: &'a mut Vec<T>) -> &'a [T] {
        &self.0[index * self.1..][..self.1]
    }
}

/// Convolution of row-major slices; `at(o, k)` is the weight of output channel `o` and feature `k` of its group.
pub(super) fn conv_slices<T: Real>(
    x: &[T],
    at: impl Fn(usize, usize) -> T,
    bias: Option<&[T]>,
    shape: &ConvShape,
    n: usize,
) -> Vec<T> {
    let x = Parts(x, shape.group_channels() * shape.input.0 * shape.input.1);
    with_level!(level => conv_samples(level, &x, at, bias, shape, n))
}

fn conv_samples<L: Level, T: Real>(
    level: L,
    x: &impl Samples<T>,
    at: impl Fn(usize, usize) -> T,
    bias: Option<&[T]>,
    shape: &ConvShape,
    n: usize,
) -> Vec<T> {
    let (outputs, features) = (shape.group_outputs(), shape.group_features());
    let reader = Reader::new(shape);
    let packed = |group: usize| {
        let bias = bias.map(|bias| &bias[group * outputs..][..outputs]);
        Packed::new(level, outputs, features, |o, k| at(group * outputs + o, k), bias)
    };
    let packed: Vec<_> = (0..shape.groups).map(packed).collect();
    let part = outputs * shape.positions();
    let mut y = vec![T::ZERO; n * shape.groups * part];
    let init = || (Vec::new(), Vec::new(), Vec::new());
    y.par_chunks_exact_mut(part).enumerate().for_each_init(init, |(sample, runs, band), (index, y)| {
        level.call(
            #[inline(always)]
            || {
                reader.read(x.get(index, sample), runs);
                correlate(&reader.runs, runs, &packed[index % shape.groups], y, band);
            },
        );
    });
    y
}

/// `dL/dx [n, c, h, w]` from row-major slices.
pub(super) fn grad_input_slices<T: Real>(gy: &[T], w: &[T], shape: &ConvShape, n: usize) -> Vec<T> {
    let gy = Parts(gy, shape.group_outputs() * shape.positions());
    with_level!(level => grad_input_samples(level, &gy, w, shape, n))
}

/// [`grad_input_slices`] from wherever the gradients `[o / groups, oh, ow]` are.
pub(super) fn grad_input_samples<L: Level, T: Real>(
    level: L,
    gy: &impl Samples<T>,
    w: &[T],
    shape: &ConvShape,
    n: usize,
) -> Vec<T> {
    let (outputs, channels, features) =
        (shape.group_outputs(), shape.group_channels(), shape.group_features());
    if let Some(adjoint) = adjoint(shape) {
        // Input and output channels of each group are exchanged, and the kernel is turned.
        let taps = shape.kernel.0 * shape.kernel.1;
        let turned = |c: usize, k: usize| {
            let o = c / channels * outputs + k / taps;
            w[o * features + c % channels * taps + taps - 1 - k % taps]
        };
        return conv_samples(level, gy, turned, None, &adjoint, n);
    }
    let (groups, t, area) = (shape.groups, shape.positions(), shape.input.0 * shape.input.1);
    let (gy_part, gx_part) = (outputs * t, channels * area);
    let runs = Runs::of_rows(shape, outputs);
    let at = |group: usize| move |k: usize, o: usize| w[(group * outputs + o) * features + k];
    let packed: Vec<_> =
        (0..groups).map(|group| Packed::new(level, features, outputs, at(group), None)).collect();
    let mut gx = vec![T::ZERO; n * groups * gx_part];
    let init = || (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let parts = gx.par_chunks_exact_mut(gx_part).enumerate();
    parts.for_each_init(init, |(sample, rows, patches, band), (index, gx)| {
        level.call(
            #[inline(always)]
            || {
                rows.resize(gy_part + SPARE, T::ZERO);
                rows[..gy_part].copy_from_slice(gy.get(index, sample));
                patches.resize(features * t, T::ZERO);
                correlate(&runs, rows, &packed[index % groups], patches, band);
                let parts = patches.chunks_exact(shape.kernel.0 * shape.kernel.1 * t);
                gx.chunks_exact_mut(area).zip(parts).for_each(
                    #[inline(always)]
                    |(gx, part)| fold_plane(shape, part, gx),
                );
            },
        );
    });
    gx
}

/// The convolution that takes `gy` to `gx` when the stride is 1 and no padding lies beyond the kernel's reach.
fn adjoint(shape: &ConvShape) -> Option<ConvShape> {
    let reach = |kernel: usize, dilation: usize| dilation * (kernel - 1);
    let padding = (
        reach(shape.kernel.0, shape.dilation.0).checked_sub(shape.padding.0)?,
        reach(shape.kernel.1, shape.dilation.1).checked_sub(shape.padding.1)?,
    );
    (shape.stride == (1, 1)).then_some(ConvShape {
        channels: shape.out_channels,
        out_channels: shape.channels,
        input: shape.output,
        output: shape.input,
        padding,
        ..*shape
    })
}

/// `dL/dw [o, c / groups, kh, kw]` from row-major slices.
pub(super) fn weight_grads<T: Real>(shape: &ConvShape, n: usize, x: &[T], gy: &[T]) -> Vec<T> {
    with_level!(level => weight_grads_at(level, shape, n, x, gy))
}

fn weight_grads_at<L: Level, T: Real>(level: L, shape: &ConvShape, n: usize, x: &[T], gy: &[T]) -> Vec<T> {
    let (groups, t) = (shape.groups, shape.positions());
    let (outputs, features) = (shape.group_outputs(), shape.group_features());
    let x_part = shape.group_channels() * shape.input.0 * shape.input.1;
    let reader = Reader::new(shape);
    // Samples whose products are added up in registers.
    let together = (1024 / t).clamp(1, 16);
    // The samples are summed in parts, in parallel, and the parts in order: their number depends on the sizes alone, so
    // the result does not depend on the number of threads.
    let length = groups * outputs * features;
    let parts = ((1 << 22) / length).clamp(1, 16);
    let samples = n.div_ceil(parts);
    let mut sums = vec![T::ZERO; parts * length];
    sums.par_chunks_exact_mut(outputs * features).enumerate().for_each_init(Vec::new, |buffers, (at, gw)| {
        let (part, group) = (at / groups, at % groups);
        let part = part * samples..((part + 1) * samples).min(n);
        buffers.resize_with(together, || (Vec::new(), Vec::new()));
        for first in part.clone().step_by(together) {
            let batch = first..(first + together).min(part.end);
            level.call(
                #[inline(always)]
                || {
                    for ((spread, runs), sample) in buffers.iter_mut().zip(batch.clone()) {
                        let at = sample * groups + group;
                        reader.runs.spread(&gy[at * outputs * t..][..outputs * t], spread);
                        reader.read(&x[at * x_part..][..x_part], runs);
                    }
                },
            );
            let batch: Vec<_> = buffers[..batch.len()].iter().map(|(g, x)| (&g[..], &x[..])).collect();
            products(level, &reader.runs, reader.runs.spread_length(), &batch, gw);
        }
    });
    add_parts(sums, length)
}

/// The sum, in order, of the parts of `sums`, each of `length` numbers.
pub(super) fn add_parts<T: Real>(mut sums: Vec<T>, length: usize) -> Vec<T> {
    let (first, rest) = sums.split_at_mut(length);
    for part in rest.chunks_exact(length) {
        vectorized(
            #[inline(always)]
            || first.iter_mut().zip(part).for_each(|(sum, &value)| *sum += value),
        );
    }
    sums.truncate(length);
    sums
}
