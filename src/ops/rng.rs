//! Random numbers from a counter: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2,
//! 3", SC 2011).
//!
//! A number is a function of where it is used (seed, stream, index), not of what was drawn before, so that results do not
//! depend on the order of evaluation, on threads, or on whether a run was resumed.

/// The round multipliers and the key increments of the paper.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox 4x32: 128 random bits for a 128-bit counter under a 64-bit key.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(a);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c);
        (a, b, c, d) = ((p1 >> 32) as u32 ^ b ^ k0, p1 as u32, (p0 >> 32) as u32 ^ d ^ k1, p0 as u32);
        k0 = k0.wrapping_add(INCREMENTS[0]);
        k1 = k1.wrapping_add(INCREMENTS[1]);
    }
    [a, b, c, d]
}

/// The 128 bits of place `index` in `stream` under `seed`.
#[inline(always)]
pub fn bits(seed: u64, stream: u64, index: u64) -> [u32; 4] {
    let words = |v: u64| [v as u32, (v >> 32) as u32];
    let ([i0, i1], [s0, s1]) = (words(index), words(stream));
    philox([i0, i1, s0, s1], words(seed))
}

/// 53 bits of two words as a multiple of 2^-53 in [0, 1).
fn unit(low: u32, high: u32) -> f64 {
    ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 / (1u64 << 53) as f64
}

/// A uniform number in [0, 1).
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    let [a, b, ..] = bits(seed, stream, index);
    unit(a, b)
}

/// A standard normal number (Box and Muller's transform of two uniform numbers of the same place).
pub fn normal(seed: u64, stream: u64, index: u64) -> f64 {
    let [a, b, c, d] = bits(seed, stream, index);
    let radius = (-2.0 * (1.0 - unit(a, b)).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(c, d)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // The vectors published with the reference implementation (Random123, kat_vectors).
        let ones = u32::MAX;
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn moments() {
        // Means of n draws lie within 5 standard errors of the expectation.
        let n = 200_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        let near = |value: f64, expected: f64, deviation: f64| {
            let error = 5. * deviation / (n as f64).sqrt();
            assert!((value - expected).abs() < error, "{value} against {expected} +- {error}");
        };
        let u = |i| uniform(7, 3, i);
        near(mean(&u), 0.5, (1. / 12f64).sqrt());
        near(mean(&|i| u(i).powi(2)), 1. / 3., (4. / 45f64).sqrt());
        near(mean(&|i| u(i) * u(i + 1)), 0.25, (7. / 144f64).sqrt());
        let z = |i| normal(7, 4, i);
        near(mean(&z), 0., 1.);
        near(mean(&|i| z(i).powi(2)), 1., 2f64.sqrt());
        near(mean(&|i| z(i).powi(3)), 0., 15f64.sqrt());
        near(mean(&|i| z(i).powi(4)), 3., 96f64.sqrt());
        assert!((0..n).all(|i| (0. ..1.).contains(&u(i)) && z(i).is_finite()));
        assert_ne!(uniform(7, 3, 0), uniform(8, 3, 0));
        assert_ne!(uniform(7, 3, 0), uniform(7, 4, 0));
    }
}
