//! How the second moments of a GPU are divided among its blocks.

use std::collections::BTreeMap;

use candle_core::DType;

/// Products of f32 numbers on tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Precision {
    /// Each in three TF32 products: a relative error below 1e-6.
    Full,
    /// Each in one: about 1e-3.
    Tf32,
}

impl Precision {
    /// What candle's own products of f32 matrices are allowed.
    pub fn chosen() -> Self {
        let reduced = cfg!(feature = "cuda") && candle_core::cuda::gemm_reduced_precision_f32();
        if reduced { Self::Tf32 } else { Self::Full }
    }
}

/// A kernel's tile: its side, the rows it takes at a time, its threads, and how many blocks a multiprocessor holds.
pub(super) struct Tile {
    pub side: usize,
    pub rows: usize,
    pub threads: u32,
    pub resident: usize,
}

impl Tile {
    /// The tile whose triangle of tiles costs least, given that large tiles read less per product.
    pub fn of(dtype: DType, precision: Precision, dim: usize) -> Self {
        let narrow = if matches!(dtype, DType::F16 | DType::BF16) { 2 } else { 1 };
        let full = dtype == DType::F32 && precision == Precision::Full;
        let cost = |side: usize, each: usize| {
            let tiles = dim.div_ceil(side);
            tiles * (tiles + 1) / 2 * side * side * each
        };
        match dim {
            _ if dtype == DType::F64 => Self { side: 64, rows: 16, threads: 256, resident: 2 },
            0..=32 => Self { side: 32, rows: 64, threads: 128, resident: if full { 5 } else { 8 } },
            _ if cost(64, 13) < cost(128, 10) => {
                Self { side: 64, rows: 32 * narrow, threads: 128, resident: if full { 4 } else { 5 } }
            }
            _ if full => Self { side: 128, rows: 16, threads: 512, resident: 1 },
            _ => Self { side: 128, rows: 16 * narrow, threads: 128, resident: 2 },
        }
    }
}

/// What a job gives the blocks of a launch to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// Of all rows.
    pub turns: usize,
    /// For each part of the rows.
    pub blocks: usize,
}

impl Work {
    /// Parts of at most `length` turns, of two at least and not too many.
    fn parts(&self, length: usize) -> usize {
        self.turns.div_ceil(length).clamp(1, (self.turns / 2).clamp(1, 4096))
    }
}

/// Into how many parts the rows of each job of a launch are divided, so that the blocks of all occupy a GPU that holds `places` of them:
/// what takes least, counted in the time that a block takes for the rows of one turn. Parts are about as long in all jobs that have more
/// than one, so that a launch with much to do is divided only where a job is longer than the rest.
pub(super) fn splits(work: &[Work], places: usize) -> Vec<usize> {
    /// What a block takes besides its turns, and what another launch takes.
    const BLOCK: usize = 4;
    const LAUNCH: usize = 10;
    let parts = |length: usize| work.iter().map(|job| job.parts(length)).collect::<Vec<_>>();
    let blocks = |length: usize| work.iter().map(|job| job.blocks * job.parts(length)).sum::<usize>();
    let cost = |parts: &[usize]| {
        let most = parts.iter().copied().max().unwrap_or(1);
        let merging = if most > 1 { LAUNCH + most / 16 } else { 0 };
        let jobs = work.iter().zip(parts);
        let each =
            jobs.map(|(job, &parts)| (job.turns.div_ceil(parts) + BLOCK, job.blocks * parts)).collect();
        duration(each, places) + merging
    };
    let longest = work.iter().map(|job| job.turns).max().unwrap_or(0).max(1);
    let (whole, places_taken) = (parts(longest), blocks(longest));
    let waves = (places_taken / places.max(1) + 1..).take(8);
    // The shortest parts whose blocks make no more than so many waves.
    let shortest = |wave: usize| {
        let (mut low, mut high) = (1, longest);
        while low < high {
            let middle = (low + high) / 2;
            if blocks(middle) <= wave * places { high = middle } else { low = middle + 1 }
        }
        parts(low)
    };
    let all = waves.map(shortest).chain([whole]);
    all.min_by_key(|parts| (cost(parts), parts.iter().sum::<usize>())).unwrap_or_default()
}

/// How long blocks take, of which `places` run at a time, the longest first: `(time of one, number)` for each kind.
fn duration(mut kinds: Vec<(usize, usize)>, places: usize) -> usize {
    kinds.sort_unstable_by(|a, b| b.cmp(a));
    // How many places are free from when on.
    let mut free = BTreeMap::from([(0, places.max(1))]);
    for (time, mut blocks) in kinds {
        while blocks > 0 {
            let Some((start, count)) = free.pop_first() else { break };
            let taken = count.min(blocks);
            if count > taken {
                free.insert(start, count - taken);
            }
            *free.entry(start + time).or_default() += taken;
            blocks -= taken;
        }
    }
    free.last_key_value().map_or(0, |(&end, _)| end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(turns: usize, blocks: usize, places: usize) -> usize {
        splits(&[Work { turns, blocks }], places)[0]
    }

    #[test]
    fn rows_are_divided_to_fill_whole_waves() {
        // On 132 multiprocessors: one small factor of many rows, many factors, one large factor.
        assert!((500..=660).contains(&one(4700, 1, 132 * 5)));
        assert_eq!(one(100, 2000, 132 * 4), 1);
        let parts = one(4096, 136, 132);
        let waves = (136 * parts).div_ceil(132);
        assert!(136 * parts * 10 > waves * 132 * 9, "{parts}");
        assert_eq!(one(0, 1, 132), 1);
        assert!(splits(&[], 132).is_empty());
    }

    #[test]
    fn jobs_beside_others_are_divided_less() {
        let job = |turns, blocks| Work { turns, blocks };
        // Alone, each of these would be divided; all together fill three waves.
        let small = [job(64, 33); 48];
        assert!(splits(&small[..1], 132 * 4)[0] > 1);
        assert_eq!(splits(&small, 132 * 4), [1; 48]);
        // One that the others would wait for.
        let mut uneven = vec![job(8, 100); 40];
        uneven.push(job(5000, 1));
        let parts = splits(&uneven, 132 * 4);
        assert_eq!(parts[..40], [1; 40]);
        assert!(parts[40] > 50, "{}", parts[40]);
    }

    #[test]
    fn durations_are_those_of_a_schedule() {
        assert_eq!(duration(vec![(5, 6)], 3), 10);
        assert_eq!(duration(vec![(5, 7)], 3), 15);
        // 7 | 4 3 | 3 3 2
        assert_eq!(duration(vec![(3, 3), (7, 1), (2, 1), (4, 1)], 3), 8);
        assert_eq!(duration(vec![], 3), 0);
    }
}
