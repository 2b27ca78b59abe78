//! Elementary functions for loops of which they do not keep the compiler from making vectors: without branches, tables or calls. Of f64 they
//! are the standard library's, which are calls.

use super::simd::Level;

/// `a + b c`, fused where that is an instruction.
#[inline(always)]
fn add_product<L: Level>(a: f32, b: f32, c: f32) -> f32 {
    if L::FUSED { b.mul_add(c, a) } else { a + b * c }
}

/// The polynomial with these coefficients, that of the constant first.
#[inline(always)]
pub(super) fn polynomial<L: Level>(x: f32, coefficients: &[f32]) -> f32 {
    let mut value = 0.;
    for &c in coefficients.iter().rev() {
        value = add_product::<L>(c, value, x);
    }
    value
}

/// `e^x` with a relative error below 1e-7 (numbers below f32's normal range have its rounding besides): `2^k e^r` with `k` the nearest number to
/// `x / ln 2` and the series of `e^r`, `|r| < 0.347`, of which less than 6e-9 is left out.
#[inline(always)]
pub(super) fn exp<L: Level>(x: f32) -> f32 {
    /// Added to a small number it leaves the nearest whole one in the last bits.
    const ROUND: f32 = 12_582_912.;
    /// `ln 2` in two parts; multiples of the first by such `k` are exact.
    const LN_2: [f32; 2] = [355. / 512., -2.121_944_4e-4];
    const SERIES: [f32; 6] = [1. / 2., 1. / 6., 1. / 24., 1. / 120., 1. / 720., 1. / 5040.];
    // What is beyond is infinite or 0 all the same. A NaN is neither and stays one.
    let x = if x > 89. { 89. } else { x };
    let x = if x < -105. { -105. } else { x };
    let rounded = add_product::<L>(ROUND, x, std::f32::consts::LOG2_E);
    let k = rounded - ROUND;
    let r = add_product::<L>(add_product::<L>(x, -k, LN_2[0]), -k, LN_2[1]);
    let value = 1. + add_product::<L>(r, r * r, polynomial::<L>(r, &SERIES));
    // In two factors, as 2^128 is no f32, and 2^-150 neither.
    let power = |k: i32| f32::from_bits(((k + 127) << 23).cast_unsigned());
    let k = rounded.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    value * power(k >> 1) * power(k - (k >> 1))
}

/// A distribution function and its density at a point. The function's value is `step + rest`, with a step of 0 below 0 and of 1 above: what is
/// added to `rest` before the step loses nothing to a rounding near 1.
#[derive(Clone, Copy)]
pub(crate) struct Distribution<T> {
    pub step: T,
    pub rest: T,
    pub density: T,
}

/// The standard normal distribution within 1e-7: with `u = |x|`,
/// `Phi(-u) = e^(-u^2 / 2) P(t) / (u + 2)`, where `P` is a polynomial of `t = u / (u + 3)` that interpolates at Chebyshev's points for `u` up to
/// 15, with a relative error of 3e-9. Beyond, the exponential is 0.
#[inline(always)]
pub(super) fn normal<L: Level>(x: f32) -> Distribution<f32> {
    const TAIL: [f32; 11] = [
        1.,
        -0.893_654_35,
        0.015_896_639,
        0.493_847_76,
        -0.098_908_074,
        -0.195_931_4,
        0.092_493_005,
        -0.173_490_29,
        0.331_851_54,
        -0.225_909_5,
        0.052_744_23,
    ];
    const ONE_OVER_ROOT_TAU: f32 = 0.398_942_3;
    let u = x.abs();
    // Of what is infinite the quotient would be NaN.
    let u = if u > 20. { 20. } else { u };
    let e = exp::<L>(-0.5 * u * u);
    let tail = e * polynomial::<L>(u / (u + 3.), &TAIL) / (u + 2.);
    let (step, rest) = if x < 0. { (0., tail) } else { (1., -tail) };
    Distribution { step, rest, density: e * ONE_OVER_ROOT_TAU }
}

/// [`normal`] in f64.
#[inline(always)]
pub(super) fn normal_f64(x: f64) -> Distribution<f64> {
    let below = 0.5 * candle_core::cpu::erf::erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2);
    Distribution { step: 0., rest: below, density: (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt() }
}

/// `e ln 2 + ln m`, `x = 2^e m` with `m` from `sqrt(1/2)` to `sqrt(2)`, by the series of `ln m = 2 atanh s`, `s = (m - 1) / (m + 1)`: as
/// `s^2 < 0.0295`, what is left out is below `2e-9 ln m`.
#[inline(always)]
pub(super) fn ln_positive<L: Level>(x: f32) -> f32 {
    /// The bits of `sqrt(1/2)`, above which a mantissa counts to the next power of two.
    const HALF: u32 = 0x3f35_04f3;
    const SERIES: [f32; 4] = [2. / 3., 2. / 5., 2. / 7., 2. / 9.];
    let small = x < f32::MIN_POSITIVE;
    let bits = (if small { x * (1 << 23) as f32 } else { x }).to_bits();
    let power = bits.wrapping_sub(HALF).cast_signed() >> 23;
    let m = f32::from_bits(bits.wrapping_sub(power.cast_unsigned() << 23));
    let power = power as f32 - if small { 23. } else { 0. };
    let s = (m - 1.) / (m + 1.);
    let q = s * s;
    let series = q * polynomial::<L>(q, &SERIES);
    add_product::<L>(add_product::<L>(2. * s, s, series), power, std::f32::consts::LN_2)
}

#[cfg(test)]
mod tests {
    use crate::ops::element::Real;
    use crate::ops::simd::{Level, forced::each_level, with_level};

    /// `f` of every so many of the numbers of f32 between `from` and `to`, at each level.
    fn sweep(from: f32, to: f32, f: impl Fn(&[f32], &mut [f32]) + Sync, check: impl Fn(f32, f32, &str)) {
        let (mut x, step) = (Vec::new(), 9973);
        let sign = from.to_bits() & 0x8000_0000;
        let [first, last] = [from, to].map(|v| v.to_bits() & 0x7fff_ffff);
        x.extend((first..=last).step_by(step).map(|bits| f32::from_bits(bits | sign)));
        let found = each_level(|| {
            let mut y = vec![0.; x.len()];
            f(&x, &mut y);
            y
        });
        for (level, y) in found {
            x.iter().zip(y).for_each(|(&x, y)| check(x, y, &level));
        }
    }

    #[inline(always)]
    fn map<L: Level>(level: L, x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
        level.call(
            #[inline(always)]
            || x.iter().zip(y).for_each(|(x, y)| *y = f(*x)),
        );
    }

    #[test]
    fn exponentials() {
        let f = |x: &[f32], y: &mut [f32]| with_level!(level => map(level, x, y, |x| x.exp_in(level)));
        let check = |x: f32, y: f32, level: &str| {
            let (y, exact) = (f64::from(y), f64::from(x).exp());
            // Half of the smallest number, where it is all that counts.
            let error = (y - exact).abs() - 0.71e-45;
            assert!(
                error <= 1e-7 * exact || y == f64::from(exact as f32),
                "{level} {x}: {y}, expected {exact}"
            );
        };
        sweep(0., f32::INFINITY, f, check);
        sweep(-0., f32::NEG_INFINITY, f, check);
        let ends = each_level(|| {
            let mut y = [0.; 5];
            f(&[0., f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 88.722], &mut y);
            y
        });
        for (level, y) in ends {
            assert_eq!((y[0], y[1], y[2], y[3].is_nan()), (1., f32::INFINITY, 0., true), "{level}");
            assert!(y[4].is_finite());
        }
    }

    #[test]
    fn logarithms() {
        let f = |x: &[f32], y: &mut [f32]| with_level!(level => map(level, x, y, |x| x.ln_positive(level)));
        let check = |x: f32, y: f32, level: &str| {
            let (found, expected) = (f64::from(y), f64::from(x).ln());
            let error = (found - expected).abs();
            assert!(error <= 2e-7 * expected.abs().max(1e-3), "{level} {x:e}: {found} {expected}");
        };
        sweep(f32::from_bits(1), f32::MAX, f, check);
        let near = [1f32, 0.999_999_94, 1.000_000_1, 0.707, 0.7072, 1.414, 1.4143];
        for (level, y) in each_level(|| {
            let mut y = [0.; 7];
            f(&near, &mut y);
            y
        }) {
            for (x, y) in near.iter().zip(y) {
                let (found, expected) = (f64::from(y), f64::from(*x).ln());
                assert!((found - expected).abs() <= 2e-7 * expected.abs(), "{level} {x}: {found} {expected}");
            }
        }
    }
}
