//! Vectors of the widest kind that the build's target processor has, for the few loops that the compiler does not keep
//! in registers by itself.

/// A vector of `WIDTH` numbers.
pub(crate) trait Lanes: Copy {
    type Item;
    const WIDTH: usize;
    fn splat(value: Self::Item) -> Self;
    /// The first `WIDTH` numbers of `data`; panics if it holds fewer.
    fn load(data: &[Self::Item]) -> Self;
    /// `WIDTH` numbers from `at` on.
    ///
    /// # Safety
    /// `data` holds at least `at + WIDTH` numbers.
    unsafe fn load_at(data: &[Self::Item], at: usize) -> Self;
    /// Writes to the first `WIDTH` numbers of `data`; panics if it holds fewer.
    fn store(self, data: &mut [Self::Item]);
    /// `self + a b`.
    fn add_product(self, a: Self, b: Self) -> Self;
}

/// Accumulators that the tiles of the convolution keep in registers at a time.
pub(crate) const MANY_REGISTERS: bool = cfg!(target_feature = "avx512f");

// Not for every target.
#[allow(unused_macros)]
macro_rules! x86 {
    ($vector:ident, $item:ident, $width:literal, $splat:ident, $load:ident, $store:ident, $fma:ident) => {
        impl Lanes for std::arch::x86_64::$vector {
            type Item = $item;
            const WIDTH: usize = $width;
            #[inline(always)]
            fn splat(value: $item) -> Self {
                // SAFETY: the module is compiled only where the target has the instruction.
                unsafe { std::arch::x86_64::$splat(value) }
            }
            #[inline(always)]
            fn load(data: &[$item]) -> Self {
                // SAFETY: as above; the slice is at least as long as the (unaligned) load.
                unsafe { std::arch::x86_64::$load(data[..$width].as_ptr()) }
            }
            #[inline(always)]
            unsafe fn load_at(data: &[$item], at: usize) -> Self {
                // SAFETY: the caller's promise.
                unsafe { std::arch::x86_64::$load(data.as_ptr().add(at)) }
            }
            #[inline(always)]
            fn store(self, data: &mut [$item]) {
                // SAFETY: as above; the slice is at least as long as the (unaligned) store.
                unsafe { std::arch::x86_64::$store(data[..$width].as_mut_ptr(), self) }
            }
            #[inline(always)]
            fn add_product(self, a: Self, b: Self) -> Self {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$fma(a, b, self) }
            }
        }
    };
}

#[cfg(all(target_arch = "x86_64", target_feature = "avx512f"))]
mod widest {
    use super::Lanes;
    x86!(__m512, f32, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
    x86!(__m512d, f64, 8, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);
    pub(crate) type F32s = std::arch::x86_64::__m512;
    pub(crate) type F64s = std::arch::x86_64::__m512d;
}

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx",
    target_feature = "fma",
    not(target_feature = "avx512f")
))]
mod widest {
    use super::Lanes;
    x86!(__m256, f32, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    x86!(__m256d, f64, 4, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);
    pub(crate) type F32s = std::arch::x86_64::__m256;
    pub(crate) type F64s = std::arch::x86_64::__m256d;
}

#[cfg(not(all(
    target_arch = "x86_64",
    any(target_feature = "avx512f", all(target_feature = "avx", target_feature = "fma"))
)))]
mod widest {
    use super::Lanes;

    /// Four numbers or two: 128 bits, which the compiler turns into one register.
    #[derive(Clone, Copy)]
    pub(crate) struct Few<T, const N: usize>([T; N]);

    macro_rules! few {
        ($item:ident, $width:literal) => {
            impl Lanes for Few<$item, $width> {
                type Item = $item;
                const WIDTH: usize = $width;
                #[inline(always)]
                fn splat(value: $item) -> Self {
                    Self([value; $width])
                }
                #[inline(always)]
                fn load(data: &[$item]) -> Self {
                    Self(std::array::from_fn(|i| data[i]))
                }
                #[inline(always)]
                unsafe fn load_at(data: &[$item], at: usize) -> Self {
                    Self::load(&data[at..])
                }
                #[inline(always)]
                fn store(self, data: &mut [$item]) {
                    data[..$width].copy_from_slice(&self.0)
                }
                #[inline(always)]
                fn add_product(self, a: Self, b: Self) -> Self {
                    // A fused product is a slow library call where the target has no instruction for it.
                    Self(std::array::from_fn(|i| match cfg!(target_arch = "aarch64") {
                        true => a.0[i].mul_add(b.0[i], self.0[i]),
                        false => self.0[i] + a.0[i] * b.0[i],
                    }))
                }
            }
        };
    }
    few!(f32, 4);
    few!(f64, 2);
    pub(crate) type F32s = Few<f32, 4>;
    pub(crate) type F64s = Few<f64, 2>;
}

pub(crate) use widest::{F32s, F64s};
