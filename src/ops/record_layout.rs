//! Records `[n, t, features]` of a layer: examples, positions that share the weights (of a convolution or a sequence,
//! else 1), and the features of all groups side by side; their checks, and how they are read from memory.
use std::ops::Range;

use super::simd::vectorized;

use candle_core::{DType, Layout, Result, Storage, Tensor, WithDType, bail};
use faer::MatRef;
use faer::traits::RealField;

/// `(n, t, features of a group)`.
pub(super) fn record_shape(x: &Tensor, groups: usize, name: &str) -> Result<(usize, usize, usize)> {
    match x.dims() {
        &[n, t, width] if groups > 0 && width > 0 && width % groups == 0 && x.dtype().is_float() => {
            Ok((n, t, width / groups))
        }
        dims => bail!(
            "{name}: expected a floating point record [n, t, features] with features a multiple of {groups}, got \
             {:?} {dims:?}",
            x.dtype()
        ),
    }
}

/// Half precision to f32, in the same memory order.
pub(super) fn widen(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        _ if x.stride()[1] == 1 => x.transpose(1, 2)?.to_dtype(DType::F32)?.transpose(1, 2),
        _ => x.to_dtype(DType::F32),
    }
}

/// Whether one position, or one feature over the positions of an example, lies contiguous in memory.
pub(super) fn in_place(layout: &Layout) -> bool {
    let (dims, strides) = (layout.dims(), layout.stride());
    strides[2] == 1 || dims[2] == 1 || (strides[1] == 1 && dims[1] > 1)
}

/// `[groups, n t, d']`, contiguous.
pub(super) fn by_group(x: &Tensor, groups: usize, append_one: bool) -> Result<Tensor> {
    let (n, t, width) = x.dims3()?;
    let x = x.reshape((n * t, groups, width / groups))?.transpose(0, 1)?;
    if append_one { Tensor::cat(&[&x, &x.narrow(2, 0, 1)?.ones_like()?], 2) } else { x.contiguous() }
}

/// The numbers of a tensor in CPU memory, from the start of its storage.
pub(crate) fn cpu_slice<'a, T: WithDType>(storage: &'a Storage, name: &str) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => T::cpu_storage_as_slice(storage),
        _ => bail!("{name}: expected a record in CPU memory, got one on {:?}", storage.device()),
    }
}

/// Positions that [`Pieces`] joins.
const POSITIONS: usize = 2048;
/// Parts that a sum over positions is divided into, each with an accumulator of its own.
pub(super) const PARTS: usize = 16;
/// Multiplications that pay for a task of their own.
pub(crate) const WORTH_A_THREAD: usize = 1 << 20;

/// Where the first feature of a piece of a record lies, and how many positions the piece has.
pub(super) type Piece = (usize, usize);

/// A record in memory as matrices of features by positions with unit stride in one direction: [`in_place`] holds.
pub(super) struct Pieces<'a, T> {
    data: &'a [T],
    /// Distance between the features of a position.
    feature: usize,
    /// Distance between the positions of a piece.
    position: usize,
    /// None is empty.
    pub(super) list: Vec<Piece>,
}

impl<'a, T: WithDType + RealField> Pieces<'a, T> {
    /// Pieces of one example each, or, with `joined`, of [`POSITIONS`] where memory lets examples be joined.
    pub(super) fn new(data: &'a [T], layout: &Layout, joined: bool) -> Self {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (n, t) = (dims[0], dims[1]);
        let feature = if dims[2] == 1 { 1 } else { strides[2] };
        let data = &data[layout.start_offset()..];
        let merged = if t == 1 {
            Some(strides[0])
        } else if n == 1 || strides[0] == t * strides[1] {
            Some(strides[1])
        } else {
            None
        };
        match merged {
            Some(position) if joined => {
                let starts = (0..n * t).step_by(POSITIONS);
                let list = starts.map(|p| (p * position, POSITIONS.min(n * t - p))).collect();
                Self { data, feature, position, list }
            }
            _ => {
                let list = (0..n).filter(|_| t > 0).map(|i| (i * strides[0], t)).collect();
                Self { data, feature, position: strides[1], list }
            }
        }
    }

    /// Some features by the positions of a piece.
    pub(super) fn matrix(&self, (start, positions): Piece, features: Range<usize>) -> MatRef<'a, T> {
        let data = &self.data[start + features.start * self.feature..];
        if self.feature == 1 {
            MatRef::from_column_major_slice_with_stride(data, features.len(), positions, self.position)
        } else {
            MatRef::from_row_major_slice_with_stride(data, features.len(), positions, self.feature)
        }
    }

    /// Adds the sums of some features over the positions of a piece to `sums`.
    pub(super) fn add_sums<'b>(
        &self,
        (start, positions): Piece,
        features: Range<usize>,
        sums: impl Iterator<Item = &'b mut T>,
    ) {
        let zero = <T as WithDType>::from_f64(0.0);
        let data = &self.data[start + features.start * self.feature..];
        if self.feature == 1 {
            let mut totals = vec![zero; features.len()];
            vectorized(
                #[inline(always)]
                || {
                    for i in 0..positions {
                        let values = &data[i * self.position..][..features.len()];
                        totals.iter_mut().zip(values).for_each(|(total, v)| *total += *v);
                    }
                },
            );
            sums.zip(totals).for_each(|(sum, total)| *sum += total);
        } else {
            for (i, sum) in sums.enumerate() {
                let values = &data[i * self.feature..][..positions];
                *sum += vectorized(
                    #[inline(always)]
                    || lane_sum(values),
                );
            }
        }
    }
}

/// The sum of a slice, in an order that the compiler can vectorize.
#[inline(always)]
fn lane_sum<T: WithDType>(values: &[T]) -> T {
    const LANES: usize = 32;
    let mut lanes = [T::from_f64(0.0); LANES];
    let mut blocks = values.chunks_exact(LANES);
    for block in &mut blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, v)| *lane += *v);
    }
    lanes.iter_mut().zip(blocks.remainder()).for_each(|(lane, v)| *lane += *v);
    let mut sum = T::from_f64(0.0);
    for lane in &lanes {
        sum += *lane;
    }
    sum
}

#[cfg(test)]
pub(super) mod testing {
    //! Random records and comparisons for the tests of the operations on them.
    use candle_core::{DType, Device, Result, Tensor};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    /// A record as candle reads it.
    pub(in crate::ops) type Values = Vec<Vec<Vec<f64>>>;

    /// `[n, t, width]`, in one of three memory layouts, and its numbers as candle reads them.
    pub(in crate::ops) fn record(
        n: usize,
        t: usize,
        width: usize,
        layout: usize,
        dtype: DType,
    ) -> Result<(Tensor, Values)> {
        let mut rng = StdRng::seed_from_u64((n * 31 + t * 7 + width) as u64);
        let numbers: Vec<f64> = (0..n * t * width * 2).map(|_| rng.random_range(-1.0..1.0)).collect();
        let numbers = Tensor::from_vec(numbers, (2, n * t * width), &Device::Cpu)?.to_dtype(dtype)?.get(1)?;
        let x = match layout {
            0 => numbers.reshape((n, t, width))?,
            1 => numbers.reshape((n, width, t))?.transpose(1, 2)?,
            _ => numbers.reshape((width, t, n))?.permute((2, 1, 0))?,
        };
        let values = x.to_dtype(DType::F64)?.contiguous()?.to_vec3::<f64>()?;
        Ok((x, values))
    }

    /// The features of one group at one position, with the one.
    pub(in crate::ops) fn group(position: &[f64], group: usize, groups: usize, append_one: bool) -> Vec<f64> {
        let dim = position.len() / groups;
        let mut features = position[group * dim..(group + 1) * dim].to_vec();
        features.extend(append_one.then_some(1.0));
        features
    }

    pub(in crate::ops) fn assert_near(
        found: &Tensor,
        exact: &[f64],
        tolerance: f64,
        what: &str,
    ) -> Result<()> {
        let found = found.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        assert_eq!(found.len(), exact.len(), "{what}");
        let scale = exact.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
        for (found, exact) in found.iter().zip(exact) {
            assert!((found - exact).abs() <= tolerance * scale, "{what}: {found} {exact}");
        }
        Ok(())
    }
}
