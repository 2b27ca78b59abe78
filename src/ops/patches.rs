//! The geometry of a 2-D convolution and its input patches (im2col), with the adjoint (col2im).

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::correlate::copy;
use super::element::{Host, float_dispatch};
use super::patches_device::gpu_patches;
use super::simd::vectorized;
use crate::gpu::Gpu;

/// The sizes of a 2-D convolution of `[n, c, h, w]` with weights `[o, c / groups, kh, kw]`; pairs are (height, width).
/// The batch size `n` is not part of it. A 1-D convolution is one of height 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Input channels `c`.
    pub channels: usize,
    /// Output channels `o`.
    pub out_channels: usize,
    /// Input size `(h, w)`.
    pub input: (usize, usize),
    /// Output size `(oh, ow)`: `(h + 2 padding - dilation (kh - 1) - 1) / stride + 1`, rounded down.
    pub output: (usize, usize),
    /// Kernel size `(kh, kw)`.
    pub kernel: (usize, usize),
    /// Step between two output positions, in input elements.
    pub stride: (usize, usize),
    /// Zeros put on each side of the input.
    pub padding: (usize, usize),
    /// Step between two kernel elements, in input elements.
    pub dilation: (usize, usize),
    /// Output channels `[i o / groups, (i + 1) o / groups)` see input channels `[i c / groups, (i + 1) c / groups)`.
    pub groups: usize,
}

impl ConvShape {
    /// The shape for an input and a weight of these dimensions. `layer` names the layer in errors.
    ///
    /// # Errors
    /// On wrong ranks, channels that do not fit the groups, a zero stride, dilation or size, and a kernel larger than the padded input.
    pub fn new(
        layer: &str,
        x: &[usize],
        w: &[usize],
        stride: (usize, usize),
        padding: (usize, usize),
        dilation: (usize, usize),
        groups: usize,
    ) -> Result<Self> {
        let &[_, channels, height, width] = x else {
            bail!("layer {layer}: expected an input [batch, channels, height, width], got {x:?}")
        };
        let &[out_channels, group_channels, kh, kw] = w else {
            bail!("layer {layer}: expected a weight [out, channels / groups, height, width], got {w:?}")
        };
        if groups == 0 || channels % groups != 0 || out_channels % groups != 0 {
            bail!(
                "layer {layer}: {groups} groups do not divide {channels} input and {out_channels} output channels"
            )
        }
        if channels / groups != group_channels {
            bail!(
                "layer {layer}: weight {w:?} with {groups} groups expects {} input channels, got {channels}",
                group_channels * groups
            )
        }
        if height == 0 || width == 0 {
            bail!("layer {layer}: input {x:?} has no elements")
        }
        if group_channels == 0 || out_channels == 0 || kh == 0 || kw == 0 {
            bail!("layer {layer}: weight {w:?} has no elements")
        }
        let steps = [stride.0, stride.1, dilation.0, dilation.1];
        if steps.contains(&0) {
            bail!(
                "layer {layer}: expected stride and dilation of at least 1, got {stride:?} and {dilation:?}"
            )
        }
        let out = |size: usize, kernel: usize, stride: usize, padding: usize, dilation: usize| {
            let span = dilation * (kernel - 1) + 1;
            (size + 2 * padding).checked_sub(span).map(|room| room / stride + 1)
        };
        let sizes = (
            out(height, kh, stride.0, padding.0, dilation.0),
            out(width, kw, stride.1, padding.1, dilation.1),
        );
        let (Some(oh), Some(ow)) = sizes else {
            bail!(
                "layer {layer}: kernel {:?} with dilation {dilation:?} is larger than input {:?} with padding {padding:?}",
                (kh, kw),
                (height, width)
            )
        };
        Ok(Self {
            channels,
            out_channels,
            input: (height, width),
            output: (oh, ow),
            kernel: (kh, kw),
            stride,
            padding,
            dilation,
            groups,
        })
    }

    /// Input channels a group sees, `c / groups`.
    pub fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// Output channels of a group, `o / groups`.
    pub fn group_outputs(&self) -> usize {
        self.out_channels / self.groups
    }

    /// Weights that one output channel has, `c / groups * kh * kw`: the length of a patch within a group.
    pub fn group_features(&self) -> usize {
        self.group_channels() * self.kernel.0 * self.kernel.1
    }

    /// The length of a patch over all groups, `c * kh * kw`.
    pub fn features(&self) -> usize {
        self.group_features() * self.groups
    }

    /// Output positions, `oh * ow`.
    pub fn positions(&self) -> usize {
        self.output.0 * self.output.1
    }

    /// The dimensions of the weight, `[o, c / groups, kh, kw]`.
    pub fn weight_dims(&self) -> [usize; 4] {
        [self.out_channels, self.group_channels(), self.kernel.0, self.kernel.1]
    }

    /// Checks that `dims` are `[n, c, h, w]` and returns `n`; `what` names the caller in the error.
    pub(crate) fn input_batch(&self, what: &str, dims: &[usize]) -> Result<usize> {
        let (c, (h, w)) = (self.channels, self.input);
        match *dims {
            [n, dims_c, dims_h, dims_w] if [dims_c, dims_h, dims_w] == [c, h, w] => Ok(n),
            _ => bail!("{what}: expected an input [n, {c}, {h}, {w}], got {dims:?}"),
        }
    }

    /// Checks that `dims` are `[n, o, oh, ow]` and returns `n`.
    pub(crate) fn output_batch(&self, what: &str, dims: &[usize]) -> Result<usize> {
        let (o, (h, w)) = (self.out_channels, self.output);
        match *dims {
            [n, dims_o, dims_h, dims_w] if [dims_o, dims_h, dims_w] == [o, h, w] => Ok(n),
            _ => bail!("{what}: expected an output gradient [n, {o}, {h}, {w}], got {dims:?}"),
        }
    }

    /// Checks that `dims` are those of the weight.
    pub(crate) fn check_weight(&self, what: &str, dims: &[usize]) -> Result<()> {
        if dims != self.weight_dims() {
            bail!("{what}: expected a weight {:?}, got {dims:?}", self.weight_dims())
        }
        Ok(())
    }

    /// The input rows (or columns) that kernel element `k` reads: the range of output positions for which they lie
    /// inside the input, and the input index of the first of them.
    fn span(&self, k: usize, axis: fn((usize, usize)) -> usize) -> (std::ops::Range<usize>, usize) {
        let (stride, padding, shift) = (axis(self.stride), axis(self.padding), k * axis(self.dilation));
        // Position p reads input p * stride + shift - padding, which must be in 0..size.
        let start = padding.saturating_sub(shift).div_ceil(stride);
        let end = (axis(self.input) + padding).saturating_sub(shift).div_ceil(stride).min(axis(self.output));
        if start < end { (start..end, start * stride + shift - padding) } else { (0..0, 0) }
    }
}

/// The patches of one channel plane, as `[kh * kw, oh * ow]` with rows `step` apart. `out` holds zeros where the patches
/// reach into the padding.
#[inline(always)]
pub(crate) fn unfold_plane<T: Copy>(shape: &ConvShape, plane: &[T], out: &mut [T], step: usize) {
    let (width, out_width) = (shape.input.1, shape.output.1);
    let mut rows = out.chunks_mut(step);
    for ki in 0..shape.kernel.0 {
        let (outs, first) = shape.span(ki, |p| p.0);
        for kj in 0..shape.kernel.1 {
            let (cols, first_col) = shape.span(kj, |p| p.1);
            let Some(row) = rows.next() else { return };
            for (at, p) in outs.clone().enumerate() {
                let src = (first + at * shape.stride.0) * width + first_col;
                let dst = &mut row[p * out_width..][cols.clone()];
                if shape.stride.1 == 1 {
                    copy(&plane[src..src + dst.len()], dst);
                } else {
                    let src = plane[src..].iter().step_by(shape.stride.1);
                    dst.iter_mut().zip(src).for_each(|(d, &s)| *d = s);
                }
            }
        }
    }
}

/// Adds patches `[kh * kw, oh * ow]` to the channel plane that they were read from: the adjoint of `unfold_plane`.
#[inline(always)]
pub(crate) fn fold_plane<T: Copy + std::ops::AddAssign>(shape: &ConvShape, patches: &[T], plane: &mut [T]) {
    let (width, out_width) = (shape.input.1, shape.output.1);
    let mut rows = patches.chunks_exact(shape.positions());
    for ki in 0..shape.kernel.0 {
        let (outs, first) = shape.span(ki, |p| p.0);
        for kj in 0..shape.kernel.1 {
            let (cols, first_col) = shape.span(kj, |p| p.1);
            let Some(row) = rows.next() else { return };
            for (at, p) in outs.clone().enumerate() {
                let dst = (first + at * shape.stride.0) * width + first_col;
                let src = &row[p * out_width..][cols.clone()];
                if shape.stride.1 == 1 {
                    plane[dst..dst + src.len()].iter_mut().zip(src).for_each(|(d, &s)| *d += s);
                } else {
                    let dst = plane[dst..].iter_mut().step_by(shape.stride.1);
                    dst.zip(src).for_each(|(d, &s)| *d += s);
                }
            }
        }
    }
}

/// The input patches of every output position of `x [n, c, h, w]`, in weight order: `[n, t, c * kh * kw]` with
/// `t = oh * ow` and zeros for the padding; with groups, the patch of group `i` is the `i`-th part of the features.
///
/// It is the transposed view of a contiguous `[n, c * kh * kw, t]`, which is also how the factors read it fastest. Not
/// differentiable: the result is detached.
///
/// # Errors
/// When `x` has other dimensions than `shape` says.
pub fn patches(x: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let n = shape.input_batch("patches", x.dims())?;
    if let Some(gpu) = Gpu::of(x.device()) {
        return gpu_patches(&gpu, x, n, shape)?.transpose(1, 2);
    }
    if !x.device().is_cpu() {
        return unfold_compose(&x.detach(), shape)?.transpose(1, 2);
    }
    let (area, taps) = (shape.input.0 * shape.input.1, shape.kernel.0 * shape.kernel.1);
    let dims = (n, shape.features(), shape.positions());
    float_dispatch!("patches", x.dtype(), T => {
        let host = Host::of(x);
        let x = host.values::<T>()?;
        let mut out = vec![T::default(); dims.0 * dims.1 * dims.2];
        out.par_chunks_exact_mut(taps * shape.positions())
            .zip(x.par_chunks_exact(area))
            .with_min_len(shape.channels)
            .for_each(|(out, plane)| {
                vectorized(#[inline(always)] || unfold_plane(shape, plane, out, shape.positions()))
            });
        Tensor::from_vec(out, dims, &candle_core::Device::Cpu)?.transpose(1, 2)
    })
}

/// Input index of each (kernel element, output position), kernel element first, counted in the padded input.
fn taps(x: &Tensor, shape: &ConvShape, axis: fn((usize, usize)) -> usize) -> Result<Tensor> {
    let (kernel, out) = (axis(shape.kernel), axis(shape.output));
    let at = |k: usize, p: usize| (p * axis(shape.stride) + k * axis(shape.dilation)) as u32;
    let taps: Vec<u32> = (0..kernel).flat_map(|k| (0..out).map(move |p| at(k, p))).collect();
    Tensor::from_vec(taps, kernel * out, x.device())
}

/// Patches `[n, c * kh * kw, t]` from candle's own operations; differentiable, on any device.
pub(crate) fn unfold_compose(x: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let ((kh, kw), (oh, ow)) = (shape.kernel, shape.output);
    let (n, c) = (x.dim(0)?, shape.channels);
    x.pad_with_zeros(2, shape.padding.0, shape.padding.0)?
        .pad_with_zeros(3, shape.padding.1, shape.padding.1)?
        .contiguous()?
        .index_select(&taps(x, shape, |p| p.0)?, 2)?
        .index_select(&taps(x, shape, |p| p.1)?, 3)?
        .reshape(&[n, c, kh, oh, kw, ow])?
        .permute([0, 1, 2, 4, 3, 5])?
        .contiguous()?
        .reshape((n, shape.features(), shape.positions()))
}

/// The adjoint of `unfold_compose`: patches `[n, c * kh * kw, t]` added up into `[n, c, h, w]`.
pub(crate) fn fold_compose(patches: &Tensor, shape: &ConvShape) -> Result<Tensor> {
    let ((kh, kw), (oh, ow), (h, w)) = (shape.kernel, shape.output, shape.input);
    let (n, c, (ph, pw)) = (patches.dim(0)?, shape.channels, shape.padding);
    let spread = patches
        .reshape(&[n, c, kh, kw, oh, ow])?
        .permute([0, 1, 2, 4, 3, 5])?
        .contiguous()?
        .reshape((n, c, kh * oh, kw * ow))?;
    let zeros = |dims: (usize, usize, usize, usize)| Tensor::zeros(dims, patches.dtype(), patches.device());
    let cols = zeros((n, c, kh * oh, w + 2 * pw))?.index_add(&taps(patches, shape, |p| p.1)?, &spread, 3)?;
    zeros((n, c, h + 2 * ph, w + 2 * pw))?
        .index_add(&taps(patches, shape, |p| p.0)?, &cols, 2)?
        .narrow(2, ph, h)?
        .narrow(3, pw, w)?
        .contiguous()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn patches_by_hand() -> Result<()> {
        let x = Tensor::arange(1f64, 13f64, &Device::Cpu)?.reshape((1, 1, 3, 4))?;
        let shape = ConvShape::new("test", &[1, 1, 3, 4], &[1, 1, 2, 2], (2, 1), (1, 0), (2, 3), 1)?;
        assert_eq!((shape.output, shape.positions(), shape.features()), ((2, 1), 2, 4));
        let p = patches(&x, &shape)?;
        assert_eq!(p.to_vec3::<f64>()?, [[[0., 0., 5., 8.], [5., 8., 0., 0.]]]);
        assert!(p.transpose(1, 2)?.is_contiguous());
        Ok(())
    }

    #[test]
    fn both_versions_agree() -> Result<()> {
        let x = Tensor::arange(0f32, 2. * 3. * 7. * 5., &Device::Cpu)?.reshape((2, 3, 7, 5))?;
        for (stride, padding, dilation) in
            [((1, 1), (0, 0), (1, 1)), ((2, 3), (1, 2), (2, 1)), ((3, 1), (2, 0), (1, 2))]
        {
            let shape = ConvShape::new("test", x.dims(), &[6, 1, 3, 2], stride, padding, dilation, 3)?;
            let native = patches(&x, &shape)?.transpose(1, 2)?;
            let composed = unfold_compose(&x, &shape)?;
            assert_eq!(native.to_vec3::<f32>()?, composed.to_vec3::<f32>()?);
            let folded = fold_compose(&composed, &shape)?.flatten_all()?.to_vec1::<f32>()?;
            let mut by_plane = vec![0f32; folded.len()];
            let patches = composed.flatten_all()?.to_vec1::<f32>()?;
            for (plane, patches) in by_plane.chunks_mut(35).zip(patches.chunks(6 * shape.positions())) {
                fold_plane(&shape, patches, plane);
            }
            assert_eq!(folded, by_plane);
        }
        Ok(())
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let one = (1, 1);
        let new = |x: &[usize], w: &[usize], stride, dilation, groups| {
            ConvShape::new("conv1", x, w, stride, (0, 0), dilation, groups)
        };
        let (x, w) = ([1, 4, 5, 5], [6, 4, 3, 3]);
        assert!(new(&x, &w, one, one, 1).is_ok());
        for refused in [
            new(&x[1..], &w, one, one, 1),
            new(&x, &w[1..], one, one, 1),
            new(&x, &w, one, one, 2),
            new(&x, &w, one, one, 0),
            new(&x, &[6, 1, 3, 3], one, one, 4),
            new(&x, &w, (0, 1), one, 1),
            new(&x, &w, one, (1, 0), 1),
            new(&x, &[6, 4, 0, 3], one, one, 1),
            new(&x, &w, one, (3, 1), 1),
            new(&[1, 4, 0, 5], &w, one, one, 1),
        ] {
            let message = refused.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains("layer conv1"), "{message}");
        }
    }
}
