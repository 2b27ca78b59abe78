//! Which examples are taken together.

use super::examples::Examples;
use crate::ops::rng::bits;
use crate::ops::simd::vectorized;
use candle_core::{Result, bail};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// How the examples are divided. Every example is in one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// All together.
    Whole,
    /// In their order, so many each; the last may have fewer.
    Consecutive(usize),
    /// In a random order, so many each; the last may have fewer.
    Random(usize),
    /// By class number, at most so many each, in a random order within a class.
    ByLabel(usize),
}

/// Streams of random numbers, apart from those of outputs.
const ORDER: u64 = 1 << 32;
const DRAW: u64 = 2 << 32;

/// `list` in random order (Fisher and Yates).
fn shuffle<T>(list: &mut [T], seed: u64, stream: u64) {
    // A place is a function of its number alone: all of them at once, in vectors and on all threads, and then the exchanges.
    let place = |i: usize| {
        let [a, b, ..] = bits(seed, stream, i as u64);
        let random = u128::from(u64::from(b) << 32 | u64::from(a));
        ((random * (i as u128 + 1)) >> 64) as u32
    };
    const RUN: usize = 4096;
    let mut places = vec![0u32; list.len()];
    places.par_chunks_mut(RUN).enumerate().for_each(|(run, places)| {
        vectorized(
            #[inline(always)]
            || places.iter_mut().enumerate().for_each(|(i, to)| *to = place(run * RUN + i)),
        );
    });
    for (i, &to) in places.iter().enumerate().skip(1).rev() {
        list.swap(i, to as usize);
    }
}

impl Parts {
    /// The parts, or `draws` of them, each with the weight by which it stands for those that were not: the number of parts over `draws`,
    /// and of random batches of `b` examples `N / (b draws)`, as in Han's inequality.
    ///
    /// # Errors
    /// When a part has no examples or more than there are, or draws exceed the parts.
    pub(crate) fn of(
        &self,
        examples: &Examples,
        draws: Option<usize>,
        seed: u64,
    ) -> Result<Vec<(f64, Vec<usize>)>> {
        let n = examples.len();
        let all: Vec<usize> = (0..n).collect();
        if let Parts::Consecutive(size) | Parts::Random(size) | Parts::ByLabel(size) = *self
            && (size == 0 || size > n)
        {
            bail!("evidence: a batch of {size}, expected 1 to the {n} examples there are")
        }
        let chunked =
            |list: &[usize], size: usize| list.chunks(size).map(<[usize]>::to_vec).collect::<Vec<_>>();
        let mut parts = match *self {
            Parts::Whole => vec![all],
            Parts::Consecutive(size) => chunked(&all, size),
            Parts::Random(size) => {
                let mut order = all;
                shuffle(&mut order, seed, ORDER);
                chunked(&order, size)
            }
            Parts::ByLabel(size) => {
                let mut members: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
                for (example, class) in examples.classes()?.into_iter().enumerate() {
                    members.entry(class).or_default().push(example);
                }
                let mut parts = Vec::new();
                for (class, mut members) in members {
                    shuffle(&mut members, seed, (ORDER + 1).wrapping_add(class as u64));
                    parts.extend(chunked(&members, size));
                }
                parts
            }
        };
        let count = parts.len();
        let Some(draws) = draws else { return Ok(parts.into_iter().map(|part| (1.0, part)).collect()) };
        if draws == 0 || draws > count {
            bail!("evidence: {draws} draws, expected 1 to the {count} batches there are")
        }
        if let Parts::Random(size) = *self {
            // Whole batches alone: a smaller one would count as much and say less. Each stands for all examples.
            parts.retain(|part| part.len() == size);
            if draws > parts.len() {
                bail!("evidence: {draws} batches of {size}, and {n} examples have but {}", parts.len())
            }
            parts.truncate(draws);
            let weight = n as f64 / (size * draws) as f64;
            return Ok(parts.into_iter().map(|part| (weight, part)).collect());
        }
        shuffle(&mut parts, seed, DRAW);
        parts.truncate(draws);
        let weight = count as f64 / draws as f64;
        Ok(parts.into_iter().map(|part| (weight, part)).collect())
    }
}
