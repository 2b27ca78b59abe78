//! The discrete Fourier transform of a power of two of numbers.

use std::f64::consts::TAU;

/// Real and imaginary part.
pub(super) type Complex = [f64; 2];

/// `X_k = sum_j x_j exp(-2 pi i j k / n)` in place; `n` is a power of two (Cooley and Tukey 1965: halves that are combined,
/// after a reordering by reversed bits).
pub(super) fn transform(x: &mut [Complex]) {
    let n = x.len();
    debug_assert!(n.is_power_of_two());
    let bits = n.trailing_zeros();
    for i in 1..n {
        let j = i.reverse_bits() >> (usize::BITS - bits);
        if i < j {
            x.swap(i, j);
        }
    }
    let mut half = 1;
    while half < n {
        let turns: Vec<Complex> = (0..half)
            .map(|k| {
                let (sin, cos) = (-TAU * k as f64 / (2 * half) as f64).sin_cos();
                [cos, sin]
            })
            .collect();
        for part in x.chunks_exact_mut(2 * half) {
            let (low, high) = part.split_at_mut(half);
            for ((a, b), [cos, sin]) in low.iter_mut().zip(high).zip(&turns) {
                let turned = [b[0] * cos - b[1] * sin, b[0] * sin + b[1] * cos];
                (*a, *b) = ([a[0] + turned[0], a[1] + turned[1]], [a[0] - turned[0], a[1] - turned[1]]);
            }
        }
        half *= 2;
    }
}

/// The inverse of [`transform`], in place.
pub(super) fn inverse(x: &mut [Complex]) {
    // The transform of the conjugate is the conjugate of the inverse, times n.
    let n = x.len() as f64;
    x.iter_mut().for_each(|v| v[1] = -v[1]);
    transform(x);
    x.iter_mut().for_each(|v| *v = [v[0] / n, -v[1] / n]);
}

/// The frequency of place `k` of `n`, in turns per length of the data: from `-n / 2` on.
pub(super) fn frequency(k: usize, n: usize) -> f64 {
    if k < n.div_ceil(2) { k as f64 } else { k as f64 - n as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng;

    #[test]
    fn equals_the_sum_and_inverts() {
        for n in [1, 2, 4, 64, 512] {
            let x: Vec<Complex> = (0..n).map(|i| [rng::normal(0, 0, i), rng::normal(0, 1, i)]).collect();
            let mut fast = x.clone();
            transform(&mut fast);
            for (k, found) in fast.iter().enumerate() {
                let mut sum = [0.; 2];
                for (j, v) in x.iter().enumerate() {
                    let (sin, cos) = (-TAU * (j * k % n as usize) as f64 / n as f64).sin_cos();
                    sum = [sum[0] + v[0] * cos - v[1] * sin, sum[1] + v[0] * sin + v[1] * cos];
                }
                assert!((found[0] - sum[0]).hypot(found[1] - sum[1]) < 1e-12 * n as f64);
            }
            inverse(&mut fast);
            assert!(fast.iter().zip(&x).all(|(a, b)| (a[0] - b[0]).hypot(a[1] - b[1]) < 1e-13));
        }
    }

    #[test]
    fn frequencies() {
        let of = |n| (0..n).map(|k| frequency(k, n)).collect::<Vec<_>>();
        assert_eq!(of(4), [0., 1., -2., -1.]);
        assert_eq!(of(1), [0.]);
    }
}
