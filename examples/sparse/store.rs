//! The study's results, a line of JSON each.

use candle_core::{Result, bail};
use serde_json::Value;
use std::path::Path;

/// All results in `path`; none if there is no such file.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => bail!("{}: cannot be read ({e})", path.display()),
    };
    let line = |(i, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(value) => Ok(value),
        Err(e) => bail!("{}, line {}: {e}", path.display(), i + 1),
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

/// Adds one.
pub fn append(path: &Path, value: &Value) -> Result<()> {
    use std::io::Write;
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    match file.and_then(|mut file| writeln!(file, "{value}")) {
        Ok(()) => Ok(()),
        Err(e) => bail!("{}: cannot be written ({e})", path.display()),
    }
}
