//! What several test files share.
#![allow(dead_code)] // each test file uses its own part

use candle_core::{DType, Device, Result, Tensor};
pub use kronwake::checkpoint::Checkpoint;
use std::path::Path;

/// A file of `tests/golden`.
pub fn golden(name: &str) -> Result<Checkpoint> {
    Checkpoint::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name), &Device::Cpu)
}

/// The largest absolute difference, relative to the largest expected element.
pub fn relative(found: &Tensor, expected: &Tensor) -> Result<f64> {
    assert_eq!(found.dims(), expected.dims());
    let largest = |t: &Tensor| t.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    let scale = largest(expected)?.max(1e-300);
    let difference = (found.to_dtype(DType::F64)? - expected.to_dtype(DType::F64)?)?;
    Ok(largest(&difference)? / scale)
}

/// Asserts that `found` is `expected` to `tolerance` of its largest element.
#[track_caller]
pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    let difference = relative(found, expected).unwrap_or(f64::NAN);
    assert!(difference <= tolerance, "{what}: differs by {difference:e}, tolerance {tolerance:e}");
}
