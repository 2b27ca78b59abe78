//! Products of the blocks of models with their eigenvectors: all in one launch, and each by itself.

use super::Options;
use super::ops::{bytes, named, pick, random};
use super::report::{Report, Work};
use super::timing::time;
use candle_core::{DType, Result};
use kronwake::ops::{dense, grouped};

/// Blocks `[rows, columns]`.
type Blocks = &'static [[usize; 2]];

const MODELS: [(&str, Blocks); 5] = [
    ("LeNet-300-100", &[[300, 785], [100, 301], [10, 101]]),
    ("LeNet-5", &[[6, 26], [16, 151], [120, 401], [84, 121], [10, 85]]),
    ("6 of 64 to 224", &[[64, 65], [96, 65], [128, 97], [160, 129], [192, 161], [224, 193]]),
    ("one of 512", &[[512, 513]]),
    ("three to 1024", &[[512, 513], [768, 513], [1024, 769]]),
];

pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let models = pick(options, &MODELS, &MODELS[..2], &[("one", &[[16, 33]])]);
    for dtype in [DType::F32, DType::F64] {
        for &(model, blocks) in &models {
            let (mut by_rows, mut by_columns) = (vec![], vec![]);
            for &[rows, columns] in blocks {
                let of = |dims: [usize; 3]| random(&options.device, dtype, &dims);
                let x = of([1, rows, columns])?;
                by_rows.push((of([1, rows, rows])?.t()?, x.clone()));
                by_columns.push((x, of([1, columns, columns])?));
            }
            for (which, pairs) in [("rows", by_rows), ("columns", by_columns)] {
                let mut work = Work::default();
                for (a, b) in &pairs {
                    let out = a.dims()[1] * b.dims()[2];
                    work.bytes += bytes(a) + bytes(b) + (out * dtype.size_in_bytes()) as f64;
                    work.flops += 2.0 * (out * a.dims()[2]) as f64;
                }
                let times =
                    time(&options.device, options.quick, &mut || grouped::products(&pairs).map(drop))?;
                let each = time(&options.device, options.quick, &mut || {
                    pairs.iter().try_for_each(|(a, b)| dense::product(a, b).map(drop))
                })?;
                let shape = format!("{model}, {which}");
                let baseline = Some(("a product each", each));
                report.kernel("grouped products", &shape, named(dtype), work, times, baseline);
            }
        }
    }
    Ok(())
}
