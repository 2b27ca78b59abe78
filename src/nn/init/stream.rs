//! Random numbers from a counter.

/// An endless list of random numbers that can be read at any place: number `i` depends on the list's seed, name and index and on `i` alone, so
/// that initial values, the order of examples and masks are the same on every machine, and after a resume.
#[derive(Debug, Clone)]
pub struct Stream {
    key: u64,
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes them thoroughly.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    /// The stream called `name` number `index` (an epoch, a step) of this `seed`.
    pub fn new(seed: u64, name: &str, index: usize) -> Self {
        let mut key = mix(seed.wrapping_add(GOLDEN));
        for byte in name.bytes() {
            key = mix(key ^ u64::from(byte)).wrapping_add(GOLDEN);
        }
        Self { key: mix(key ^ index as u64) }
    }

    /// 64 random bits at place `i`.
    fn bits(&self, i: usize) -> u64 {
        mix(self.key.wrapping_add((i as u64 + 1).wrapping_mul(GOLDEN)))
    }

    /// A number in `[0, 1)` at place `i`, a multiple of 2^-53.
    pub fn uniform(&self, i: usize) -> f64 {
        (self.bits(i) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Brings `list` into a random order (Fisher and Yates).
    pub fn shuffle<T>(&self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let other = (u128::from(self.bits(i)) * (i as u128 + 1)) >> 64;
            list.swap(i, other as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_has_the_moments_of_the_unit_interval() {
        let stream = Stream::new(7, "test", 0);
        let n = 100_000;
        let mean = (0..n).map(|i| stream.uniform(i)).sum::<f64>() / n as f64;
        let square = (0..n).map(|i| stream.uniform(i).powi(2)).sum::<f64>() / n as f64;
        // Five standard errors of the mean: 5 * sqrt(1/12 / n), and of the square: 5 * sqrt(4/45 / n).
        assert!((mean - 0.5).abs() < 0.0046, "{mean}");
        assert!((square - 1.0 / 3.0).abs() < 0.0048, "{square}");
    }

    #[test]
    fn streams_differ_by_seed_name_and_index() {
        let first = |seed, name, index| Stream::new(seed, name, index).bits(0);
        let all = [first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1), first(0, "", 0)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{all:?}");
        }
        assert_eq!(first(3, "x", 2), first(3, "x", 2));
    }

    #[test]
    fn every_order_of_three_is_as_likely() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..6000 {
            let mut list = [0, 1, 2];
            Stream::new(seed, "shuffle", 0).shuffle(&mut list);
            *counts.entry(list).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 1000 expected, standard deviation 29.
        assert!(counts.values().all(|c| (850..1150).contains(c)), "{counts:?}");
    }
}
