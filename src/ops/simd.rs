//! Vectors of the widest kind that the processor has, chosen when the program runs.
//!
//! A loop that is to use them is written once and compiled once for each [`Level`], of which the processor's is chosen here alone:
//!
//! - [`vectorized`] runs a loop that the compiler turns into vectors by itself. All of it has to be inlined, or it is compiled for the least
//!   that the target has: so the closure is `#[inline(always)]`, and so are the functions that it calls.
//! - [`with_level!`] is for loops that name their vectors ([`Lanes`]) or whose form depends on the level: they take a `level`, and run what is
//!   hot inside [`Level::call`].
//!
//! Neither reaches into the closures of rayon, which other threads run: it is called inside them.

use std::sync::OnceLock;

/// A kind of vectors. Whoever holds a value knows that the processor has the instructions: values are made in [`Vectors::all`] alone.
pub(crate) trait Level: Copy + Send + Sync {
    type F32s: Lanes<Item = f32, Level = Self>;
    type F64s: Lanes<Item = f64, Level = Self>;
    /// Whether there are 32 registers and not 16: how many accumulators the tiles of the convolution keep at a time.
    const MANY_REGISTERS: bool;
    /// Whether a fused product is an instruction; elsewhere it is a slow call.
    const FUSED: bool;

    /// Runs `work`, all of which is inlined, with the level's instructions.
    fn call<R>(self, work: impl FnOnce() -> R) -> R;
}

/// A vector of `WIDTH` numbers.
pub(crate) trait Lanes: Copy {
    type Item;
    type Level: Level;
    const WIDTH: usize;
    fn splat(level: Self::Level, value: Self::Item) -> Self;
    /// The first `WIDTH` numbers of `data`; panics if it holds fewer.
    fn load(level: Self::Level, data: &[Self::Item]) -> Self;
    /// `WIDTH` numbers from `at` on.
    ///
    /// # Safety
    /// `data` holds at least `at + WIDTH` numbers.
    unsafe fn load_at(level: Self::Level, data: &[Self::Item], at: usize) -> Self;
    /// Writes to the first `WIDTH` numbers of `data`; panics if it holds fewer.
    fn store(self, data: &mut [Self::Item]);
    /// `self + a b`.
    fn add_product(self, a: Self, b: Self) -> Self;
}

/// What every processor of the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Baseline(());

/// Vectors of 256 bits with fused products.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx2(());

/// Vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512(());

/// The kinds of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Baseline(Baseline),
}

impl Vectors {
    /// Those that the processor has, the widest first.
    fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let wider = {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw");
            let avx2 = avx2.then_some(Self::Avx2(Avx2(())));
            avx512.then_some(Self::Avx512(Avx512(()))).into_iter().chain(avx2)
        };
        #[cfg(not(target_arch = "x86_64"))]
        let wider = std::iter::empty();
        wider.chain([Self::Baseline(Baseline(()))])
    }

    /// Those to use.
    #[inline]
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Vectors> = OnceLock::new();
        #[cfg(test)]
        if let Some(forced) = forced::get() {
            return forced;
        }
        *CHOSEN.get_or_init(|| Self::all().next().unwrap_or(Self::Baseline(Baseline(()))))
    }
}

/// `$body` with `$level` the [`Level`] to use; the code is there once for each.
macro_rules! with_level {
    ($level:ident => $body:expr) => {
        match $crate::ops::simd::Vectors::chosen() {
            #[cfg(target_arch = "x86_64")]
            $crate::ops::simd::Vectors::Avx512($level) => $body,
            #[cfg(target_arch = "x86_64")]
            $crate::ops::simd::Vectors::Avx2($level) => $body,
            $crate::ops::simd::Vectors::Baseline($level) => $body,
        }
    };
}
pub(crate) use with_level;

/// Runs `work`, all of which is inlined, with the widest vectors.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    with_level!(level => level.call(work))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Avx2, Avx512, Lanes, Level};
    use std::arch::x86_64::*;

    macro_rules! level {
        ($level:ident, $features:literal, $f32s:ident, $f64s:ident, $many_registers:literal) => {
            impl Level for $level {
                type F32s = $f32s;
                type F64s = $f64s;
                const MANY_REGISTERS: bool = $many_registers;
                const FUSED: bool = true;

                #[inline(always)]
                fn call<R>(self, work: impl FnOnce() -> R) -> R {
                    #[target_feature(enable = $features)]
                    fn run<R>(work: impl FnOnce() -> R) -> R {
                        work()
                    }
                    // SAFETY: `self` is made only where the processor has these instructions.
                    unsafe { run(work) }
                }
            }
        };
    }
    level!(Avx512, "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma", __m512, __m512d, true);
    level!(Avx2, "avx2,fma", __m256, __m256d, false);

    macro_rules! lanes {
        ($vector:ident, $item:ident, $width:literal, $level:ident, $splat:ident, $load:ident, $store:ident, $fma:ident) => {
            impl Lanes for $vector {
                type Item = $item;
                type Level = $level;
                const WIDTH: usize = $width;
                #[inline(always)]
                fn splat(_: $level, value: $item) -> Self {
                    // SAFETY: there is a level only where the processor has the instruction.
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                fn load(_: $level, data: &[$item]) -> Self {
                    // SAFETY: as above; the slice is at least as long as the (unaligned) load.
                    unsafe { $load(data[..$width].as_ptr()) }
                }
                #[inline(always)]
                unsafe fn load_at(_: $level, data: &[$item], at: usize) -> Self {
                    // SAFETY: as above, and the caller's promise.
                    unsafe { $load(data.as_ptr().add(at)) }
                }
                #[inline(always)]
                fn store(self, data: &mut [$item]) {
                    // SAFETY: vectors are made with a level; the slice is at least as long as the (unaligned) store.
                    unsafe { $store(data[..$width].as_mut_ptr(), self) }
                }
                #[inline(always)]
                fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $fma(a, b, self) }
                }
            }
        };
    }
    lanes!(__m512, f32, 16, Avx512, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
    lanes!(__m512d, f64, 8, Avx512, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);
    lanes!(__m256, f32, 8, Avx2, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    lanes!(__m256d, f64, 4, Avx2, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);
}

impl Level for Baseline {
    type F32s = Few<f32, 4>;
    type F64s = Few<f64, 2>;
    const MANY_REGISTERS: bool = false;
    const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

    #[inline(always)]
    fn call<R>(self, work: impl FnOnce() -> R) -> R {
        // A function of its own, as at the other levels.
        #[inline(never)]
        fn run<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        run(work)
    }
}

/// Four numbers or two: 128 bits, which the compiler turns into one register.
#[derive(Clone, Copy)]
pub(crate) struct Few<T, const N: usize>([T; N]);

macro_rules! few {
    ($item:ident, $width:literal) => {
        impl Lanes for Few<$item, $width> {
            type Item = $item;
            type Level = Baseline;
            const WIDTH: usize = $width;
            #[inline(always)]
            fn splat(_: Baseline, value: $item) -> Self {
                Self([value; $width])
            }
            #[inline(always)]
            fn load(_: Baseline, data: &[$item]) -> Self {
                Self(std::array::from_fn(|i| data[i]))
            }
            #[inline(always)]
            unsafe fn load_at(level: Baseline, data: &[$item], at: usize) -> Self {
                Self::load(level, &data[at..])
            }
            #[inline(always)]
            fn store(self, data: &mut [$item]) {
                data[..$width].copy_from_slice(&self.0)
            }
            #[inline(always)]
            fn add_product(self, a: Self, b: Self) -> Self {
                Self(std::array::from_fn(|i| match Baseline::FUSED {
                    true => a.0[i].mul_add(b.0[i], self.0[i]),
                    false => self.0[i] + a.0[i] * b.0[i],
                }))
            }
        }
    };
}
few!(f32, 4);
few!(f64, 2);

/// For tests: levels other than the widest.
#[cfg(test)]
pub(crate) mod forced {
    use super::Vectors;
    use std::cell::Cell;
    use std::sync::OnceLock;

    thread_local! {
        static FORCED: Cell<Option<Vectors>> = const { Cell::new(None) };
    }

    /// Of this thread, or of all: at most what the environment variable `KRONWAKE_TEST_VECTORS` says, `avx512`, `avx2` or `baseline`.
    pub(super) fn get() -> Option<Vectors> {
        static FOR_ALL: OnceLock<Option<Vectors>> = OnceLock::new();
        let named = || {
            let name = std::env::var("KRONWAKE_TEST_VECTORS").ok()?;
            let names = ["avx512", "avx2", "baseline"];
            let Some(most) = names.iter().position(|known| *known == name) else {
                panic!("KRONWAKE_TEST_VECTORS is {name:?}, expected one of {names:?}")
            };
            let fits = |v: &Vectors| {
                let found = format!("{v:?}").to_lowercase();
                names[most..].iter().any(|name| found.starts_with(name))
            };
            Vectors::all().find(fits)
        };
        FORCED.get().or_else(|| *FOR_ALL.get_or_init(named))
    }

    /// What `f` gives at each level that the processor has, the widest first, with the level's name. It runs in a pool of its own, all threads of
    /// which are at the level.
    pub(crate) fn each_level<R: Send>(f: impl Fn() -> R + Sync) -> Vec<(String, R)> {
        let run = |vectors: Vectors| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(2)
                .start_handler(move |_| FORCED.set(Some(vectors)))
                .build()
                .unwrap_or_else(|error| panic!("{error}"));
            (format!("{vectors:?}"), pool.install(&f))
        };
        Vectors::all().map(run).collect()
    }
}

#[cfg(test)]
mod tests;
