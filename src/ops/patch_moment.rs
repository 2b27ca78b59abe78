//! Second moments of small features that lie sample by sample as `[features, t]`: the patches of a convolution, made one
//! sample at a time and never stored, and the gradients of its outputs where they are.

use candle_core::{Device, Layout, Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

use super::{
    conv_slices::add_parts,
    element::{Element, Host, Real, float_dispatch},
    factor::{mirror_upper, second_moment},
    moment_queue::{Average, Moments},
    patches::{ConvShape, patches, unfold_plane},
    products::square_products,
    simd::{Level, vectorized, with_level},
};

/// Numbers in the moments of all groups up to which every part of a sum has moments of its own.
const SMALL: usize = 1 << 18;

/// [`second_moment`] of the [`patches`] of `x [n, c, h, w]`: `[groups, d', d']` with `d = c / groups * kh * kw`. On the CPU
/// the patches are not stored, unless the moments are so large that little would be saved; on a GPU never.
///
/// # Errors
/// If `x` is not a floating point tensor of the dimensions that `shape` says.
pub fn patch_moment(x: &Tensor, shape: &ConvShape, append_one: bool, name: &str) -> Result<Tensor> {
    let mut moments = Moments::default();
    let moment = moments.of_patches(Average::times(1.0), x, shape, append_one, name)?;
    moments.run()?;
    Ok(moment)
}

pub(super) fn host_patch_moment(
    x: &Tensor,
    n: usize,
    shape: &ConvShape,
    append_one: bool,
    name: &str,
) -> Result<Tensor> {
    let size = shape.group_features() + usize::from(append_one);
    if !x.device().is_cpu() || shape.groups * size * size > SMALL {
        return second_moment(&patches(x, shape)?, shape.groups, append_one, name);
    }
    float_dispatch!(name, x.dtype(), T => {
        let host = Host::of(x);
        let x = host.values::<T>()?;
        let x = T::widen_slice(&x);
        moments(&Patches { x: &x, shape, size }, n, shape.groups, size, shape.positions())
    })
}

/// The second moments `[groups, d, d]` of `x [n, t, groups * d]` where its features lie as `[n, groups * d, t]` in memory
/// and are few, else `None`.
pub(super) fn moment_in_place(x: &Tensor, groups: usize) -> Result<Option<Tensor>> {
    let (n, t, width) = x.dims3()?;
    let size = width / groups;
    if !lies_in_rows(x.layout()) || groups * size * size > SMALL {
        return Ok(None);
    }
    let x = x.transpose(1, 2)?;
    float_dispatch!("factor", x.dtype(), T => {
        let host = Host::of(&x);
        let x = host.values::<T>()?;
        let x = T::widen_slice(&x);
        moments(&InPlace { x: &x, groups, size, t }, n, groups, size, t).map(Some)
    })
}

/// Whether `[n, t, features]` is the transpose of a contiguous `[n, features, t]` of rows long enough for vectors.
fn lies_in_rows(layout: &Layout) -> bool {
    match *layout.dims() {
        [_, t, features] => layout.stride() == [t * features, 1, t] && t >= 16,
        _ => false,
    }
}

/// Where [`moments`] finds the rows of one group of some samples.
trait Rows<T>: Sync {
    /// The samples side by side, or one by one: matrices of rows that are all as long as the number says. `buffer` is
    /// room for them if needed, empty or what a former call left.
    fn get<'a>(
        &'a self,
        samples: Range<usize>,
        group: usize,
        buffer: &'a mut Vec<T>,
    ) -> (usize, Vec<&'a [T]>);
}

/// Rows `[groups * d, t]` of each sample, read in place.
struct InPlace<'a, T> {
    x: &'a [T],
    groups: usize,
    size: usize,
    t: usize,
}

impl<T: Real> Rows<T> for InPlace<'_, T> {
    fn get<'a>(&'a self, samples: Range<usize>, group: usize, _: &'a mut Vec<T>) -> (usize, Vec<&'a [T]>) {
        let part = self.size * self.t;
        let of_sample = |sample| &self.x[(sample * self.groups + group) * part..][..part];
        (self.t, samples.map(of_sample).collect())
    }
}

/// The patches `[d, t]` of each sample, and a row of ones where `size` has room for it.
struct Patches<'a, T> {
    x: &'a [T],
    shape: &'a ConvShape,
    size: usize,
}

impl<T: Real> Rows<T> for Patches<'_, T> {
    fn get<'a>(&'a self, samples: Range<usize>, group: usize, rows: &'a mut Vec<T>) -> (usize, Vec<&'a [T]>) {
        let shape = self.shape;
        let (t, area) = (shape.positions(), shape.input.0 * shape.input.1);
        let (part, taps) = (shape.group_channels() * area, shape.kernel.0 * shape.kernel.1);
        let length = samples.len() * t;
        if rows.len() != self.size * length {
            rows.clear();
        }
        // Padding is never written to, so that zeros stay where a former call of this length found them.
        rows.resize(self.size * length, T::ZERO);
        for (at, sample) in samples.enumerate() {
            let x = &self.x[(sample * shape.groups + group) * part..][..part];
            vectorized(
                #[inline(always)]
                || {
                    for (plane, rows) in x.chunks_exact(area).zip(rows.chunks_mut(taps * length)) {
                        unfold_plane(shape, plane, &mut rows[at * t..], length);
                    }
                },
            );
        }
        rows[shape.group_features() * length..].fill(T::from_f64(1.));
        (length, vec![rows])
    }
}

/// `sum_n x x^T` of the rows `[size, t]` of each group.
fn moments<T: Real>(x: &impl Rows<T>, n: usize, groups: usize, size: usize, t: usize) -> Result<Tensor> {
    let sums = with_level!(level => sums(level, x, n, groups, size, t));
    Tensor::from_vec(sums, (groups, size, size), &Device::Cpu)
}

fn sums<L: Level, T: Real>(
    level: L,
    x: &impl Rows<T>,
    n: usize,
    groups: usize,
    size: usize,
    t: usize,
) -> Vec<T> {
    let area = size * size;
    // Samples whose products are added up in registers, while their rows are in the cache.
    let together = ((1 << 16) / (size * t).max(1)).clamp(1, 16);
    // Parts are summed in parallel and added in order; that there are always as many makes the result independent of
    // the number of threads.
    const PARTS: usize = 16;
    let samples = n.div_ceil(PARTS);
    let mut sums = vec![T::ZERO; PARTS * groups * area];
    sums.par_chunks_exact_mut(area).enumerate().for_each_init(Vec::new, |buffer, (at, sums)| {
        let (part, group) = (at / groups, at % groups);
        let end = ((part + 1) * samples).min(n);
        for first in (part * samples..end).step_by(together) {
            let (length, rows) = x.get(first..end.min(first + together), group, buffer);
            square_products(level, size, length, &rows, sums);
        }
    });
    let mut sums = add_parts(sums, groups * area);
    sums.chunks_exact_mut(area).for_each(|sums| mirror_upper(sums, size));
    sums
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::testing::{assert_close, random, values};

    #[test]
    pub(in crate::ops) fn moments_of_patches_are_those_of_the_stored_ones() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups]) in [
            ([3, 1, 28, 28], [5, 1, 5, 5], [1, 0, 1, 1]),
            ([35, 5, 12, 12], [7, 5, 5, 5], [1, 0, 1, 1]),
            ([2, 4, 9, 8], [6, 2, 3, 2], [2, 1, 1, 2]),
            ([2, 6, 10, 7], [6, 1, 3, 3], [1, 2, 2, 6]),
            ([2, 3, 5, 5], [4, 3, 1, 1], [1, 2, 1, 1]),
            ([2, 64, 4, 4], [4, 64, 3, 3], [1, 1, 1, 1]),
            ([0, 2, 4, 4], [3, 2, 3, 3], [1, 1, 1, 1]),
        ] {
            let pair = |v| (v, v);
            let shape = ConvShape::new("test", &x, &w, pair(stride), pair(padding), pair(dilation), groups)?;
            let x = random(0, &x)?;
            for append_one in [false, true] {
                let rows = patches(&x, &shape)?.contiguous()?;
                let exact = values(&second_moment(&rows, groups, append_one, "test")?)?;
                for (dtype, tolerance) in
                    [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 5e-2)]
                {
                    let found = patch_moment(&x.to_dtype(dtype)?, &shape, append_one, "test")?;
                    assert_eq!(found.dtype(), if dtype == DType::F64 { dtype } else { DType::F32 });
                    assert_close(&found, &exact, tolerance);
                    let turned = values(&found.transpose(1, 2)?)?;
                    assert_close(&found, &turned, 0.);
                }
            }
        }
        Ok(())
    }

    #[test]
    pub(in crate::ops) fn gradients_are_read_where_they_are() -> Result<()> {
        for (n, t, d, groups) in
            [(3, 576, 5, 1), (40, 64, 7, 1), (17, 16, 6, 3), (2, 25, 1, 1), (0, 16, 2, 1)]
        {
            let x = random(0, &[n, d, t])?.transpose(1, 2)?;
            let exact = values(&second_moment(&x.contiguous()?, groups, false, "test")?)?;
            let found = moment_in_place(&x, groups)?;
            assert_close(&found.expect("in place"), &exact, 1e-13);
        }
        assert!(moment_in_place(&random(0, &[2, 3, 20])?, 1)?.is_none());
        assert!(moment_in_place(&random(0, &[2, 3, 8])?.transpose(1, 2)?, 1)?.is_none());
        Ok(())
    }
}
