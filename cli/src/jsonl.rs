//! Files with a JSON object a line.

use candle_core::{Result, bail};
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// A file that grows; `name` is what errors call it.
pub struct Lines {
    pub name: String,
    pub file: File,
}

impl Lines {
    /// Begins a file anew.
    pub fn create(flag: &str, path: &Path) -> Result<Self> {
        Self::of(format!("{flag} {}", path.display()), File::create(path))
    }

    /// Opens a file, or makes it, to write at its end.
    pub fn append(path: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(path);
        Self::of(path.display().to_string(), file)
    }

    fn of(name: String, file: std::io::Result<File>) -> Result<Self> {
        match file {
            Ok(file) => Ok(Self { name, file }),
            Err(e) => bail!("{name}: cannot be written ({e})"),
        }
    }

    pub fn write(&mut self, value: &Value) -> Result<()> {
        match self.file.write_all(format!("{value}\n").as_bytes()) {
            Ok(()) => Ok(()),
            Err(e) => bail!("{}: cannot be written ({e})", self.name),
        }
    }
}

/// What is in a file, if there is such a file. What is not UTF-8 is no JSON either, and will be refused as that.
pub fn text(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => bail!("{}: cannot be read ({e})", path.display()),
    }
}
