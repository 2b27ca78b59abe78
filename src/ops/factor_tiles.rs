//! How the second moments of a GPU are divided among its blocks.

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
            _ if full => Self { side: 128, rows: 16, threads: 256, resident: 1 },
            _ => Self { side: 128, rows: 16 * narrow, threads: 128, resident: 2 },
        }
    }
}

/// Into how many parts the rows are divided, so that `blocks` blocks a part occupy a GPU that holds `places` of them: what takes
/// least, counted in the time that a block takes for the rows of one turn, of `turns`.
pub(super) fn splits(turns: usize, blocks: usize, places: usize) -> usize {
    /// What a block takes besides its turns, and what another launch takes.
    const BLOCK: usize = 4;
    const LAUNCH: usize = 10;
    let most = (turns / 2).clamp(1, 4096);
    let cost = |splits: usize| {
        let merging = if splits > 1 { LAUNCH + splits / 16 } else { 0 };
        (blocks * splits).div_ceil(places) * (turns.div_ceil(splits) + BLOCK) + merging
    };
    let waves = (1..=8).map(|wave| (wave * places / blocks).clamp(1, most));
    waves.chain([1]).min_by_key(|&splits| (cost(splits), splits)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_divided_to_fill_whole_waves() {
        // On 132 multiprocessors: one small factor of many rows, many factors, one large factor.
        assert!((500..=660).contains(&splits(4700, 1, 132 * 5)));
        assert_eq!(splits(100, 2000, 132 * 4), 1);
        let parts = splits(4096, 136, 132);
        let waves = (136 * parts).div_ceil(132);
        assert!(136 * parts * 10 > waves * 132 * 9, "{parts}");
        assert_eq!(splits(0, 1, 132), 1);
    }
}
