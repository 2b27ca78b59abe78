//! The study's results, a line of JSON each.

use crate::jsonl::{self, Lines};
use candle_core::{Result, bail};
use serde_json::Value;
use std::path::Path;

/// All results in `path`; none if there is no such file.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = jsonl::text(path)?.unwrap_or_default();
    let line = |(i, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(value) => Ok(value),
        Err(e) => bail!("{}, line {}: {e}", path.display(), i + 1),
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

/// Adds one.
pub fn append(path: &Path, value: &Value) -> Result<()> {
    Lines::append(path)?.write(value)
}
