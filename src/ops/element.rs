//! What the CPU versions of the operations share: element types, their accumulators, contiguous views of storages.

use std::borrow::Cow;

use candle_core::{
    CpuStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail, cpu_backend::unary_map,
};
use half::{bf16, f16};

use super::elementary::{self, Distribution};
use super::simd::{Lanes, Level};

/// f32 or f64: a type that sums are kept in.
pub(crate) trait Real: Element<Acc = Self> {
    /// Vectors of a level.
    type Lanes<L: Level>: Lanes<Item = Self, Level = L>;
    const ZERO: Self;
    const NEG_INFINITY: Self;
    /// `e` to this power, in loops of which it does not keep the compiler from making vectors; in f32 its relative error is below 1e-7.
    fn exp_in<L: Level>(self, level: L) -> Self;
    fn ln(self) -> Self;
    /// The standard normal distribution, likewise; within 1e-7 in f32.
    fn normal<L: Level>(self, level: L) -> Distribution<Self>;
    /// The logarithm of a positive finite number, in loops of which it does not keep the compiler from making vectors; something finite
    /// or infinite of any other. Its relative error is below 2e-7 in f32; of numbers within 1e-3 of 1 the error is below 2e-10.
    fn ln_positive<L: Level>(self, level: L) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    /// The numbers of a storage of this type.
    fn from_storage(storage: CpuStorage) -> Option<Vec<Self>>;
}

/// A floating-point element of a tensor, computed with in `Acc`: f32 for f16, bf16 and f32, f64 for f64.
pub(crate) trait Element: WithDType {
    type Acc: Real;
    fn widen(self) -> Self::Acc;
    fn narrow(value: Self::Acc) -> Self;
    /// `from_f64`, for inner loops: candle's is a call, and a loop with one does not vectorize.
    fn rounded(value: f64) -> Self;
    /// `data` in the accumulator type; borrowed where that is the type it has.
    fn widen_slice(data: &[Self]) -> Cow<'_, [Self::Acc]>;
    /// `data` in the element type; moved where that is the type it has.
    fn narrow_vec(data: Vec<Self::Acc>) -> Vec<Self>;
}

macro_rules! real {
    ($t:ident, $lanes:ident, $exp:expr, $normal:expr, $ln:expr, $storage:ident) => {
        impl Real for $t {
            type Lanes<L: Level> = L::$lanes;
            const ZERO: Self = 0.;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            #[inline(always)]
            fn ln(self) -> Self {
                $t::ln(self)
            }
            #[inline(always)]
            fn exp_in<L: Level>(self, _: L) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn normal<L: Level>(self, _: L) -> Distribution<Self> {
                $normal(self)
            }
            #[inline(always)]
            fn ln_positive<L: Level>(self, _: L) -> Self {
                $ln(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $t::abs(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            fn from_storage(storage: CpuStorage) -> Option<Vec<Self>> {
                if let CpuStorage::$storage(data) = storage { Some(data) } else { None }
            }
        }

        impl Element for $t {
            type Acc = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(value: $t) -> Self {
                value
            }
            #[inline(always)]
            fn rounded(value: f64) -> Self {
                value as $t
            }
            fn widen_slice(data: &[Self]) -> Cow<'_, [$t]> {
                Cow::Borrowed(data)
            }
            fn narrow_vec(data: Vec<$t>) -> Vec<Self> {
                data
            }
        }
    };
}
real!(f32, F32s, elementary::exp::<L>, elementary::normal::<L>, elementary::ln_positive::<L>, F32);
real!(f64, F64s, f64::exp, elementary::normal_f64, f64::ln, F64);

macro_rules! short {
    ($t:ident) => {
        impl Element for $t {
            type Acc = f32;
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(value: f32) -> Self {
                $t::from_f32(value)
            }
            #[inline(always)]
            fn rounded(value: f64) -> Self {
                $t::from_f64(value)
            }
            fn widen_slice(data: &[Self]) -> Cow<'_, [f32]> {
                Cow::Owned(data.iter().map(|v| v.to_f32()).collect())
            }
            fn narrow_vec(data: Vec<f32>) -> Vec<Self> {
                data.into_iter().map($t::from_f32).collect()
            }
        }
    };
}
short!(f16);
short!(bf16);

/// Runs `$body` with the type `$T` that `$dtype` stands for, or fails naming `$op` and the dtype.
macro_rules! float_dispatch {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => candle_core::bail!("{}: dtype {other:?} found, expected f32, f64, f16 or bf16", $op),
        }
    };
}
pub(crate) use float_dispatch;

/// Partial sums that a sum is kept in, so that it vectorizes.
const PARTS: usize = 16;

/// The sum of partial sums, in order. A plain loop: iterators over arrays are not inlined everywhere.
#[inline(always)]
pub(super) fn total<A: Real, const N: usize>(parts: [A; N]) -> A {
    let mut total = A::ZERO;
    for part in &parts {
        total += *part;
    }
    total
}

/// `sum f(x)` in the accumulator type.
#[inline(always)]
pub(crate) fn sum<T: Element>(x: &[T], f: impl Fn(T::Acc) -> T::Acc) -> T::Acc {
    let (chunks, rest) = x.as_chunks::<PARTS>();
    let mut parts = [T::Acc::ZERO; PARTS];
    for chunk in chunks {
        for i in 0..PARTS {
            parts[i] += f(chunk[i].widen());
        }
    }
    let mut sum = total(parts);
    for v in rest {
        sum += f(v.widen());
    }
    sum
}

/// `sum x y` in the accumulator type.
#[inline(always)]
pub(crate) fn dot<T: Element>(x: &[T], y: &[T]) -> T::Acc {
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<PARTS>(), y.as_chunks::<PARTS>());
    let mut parts = [T::Acc::ZERO; PARTS];
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..PARTS {
            parts[i] += x[i].widen() * y[i].widen();
        }
    }
    let mut sum = total(parts);
    for (x, y) in x_rest.iter().zip(y_rest) {
        sum += x.widen() * y.widen();
    }
    sum
}

/// The elements of a CPU storage in row-major order of `layout`; borrowed where they already lie so.
pub(crate) fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [T]>> {
    let data = T::cpu_storage_as_slice(storage)?;
    Ok(match layout.contiguous_offsets() {
        Some((start, end)) => Cow::Borrowed(&data[start..end]),
        None => Cow::Owned(unary_map(data, layout, |v| v)),
    })
}

/// A read lock on a CPU tensor's storage.
pub(crate) struct Host<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Host<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// The tensor's elements in row-major order.
    pub(crate) fn values<T: WithDType>(&self) -> Result<Cow<'_, [T]>> {
        match &*self.storage {
            Storage::Cpu(storage) => contiguous(storage, self.layout),
            _ => bail!("expected a tensor on the CPU"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn views_follow_the_layout() -> Result<()> {
        let x = Tensor::arange(0f32, 6f32, &Device::Cpu)?.reshape((2, 3))?;
        assert_eq!(&*Host::of(&x.narrow(0, 1, 1)?).values::<f32>()?, &[3., 4., 5.]);
        assert_eq!(&*Host::of(&x.t()?).values::<f32>()?, &[0., 3., 1., 4., 2., 5.]);
        let row = x.narrow(0, 0, 1)?.broadcast_as((2, 3))?;
        assert_eq!(&*Host::of(&row).values::<f32>()?, &[0., 1., 2., 0., 1., 2.]);
        assert!(Host::of(&x).values::<f64>().is_err());
        Ok(())
    }
}
