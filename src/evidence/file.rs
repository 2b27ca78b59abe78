//! Files of what the evidence has found: safetensors, with numbers as lines `name = value` in one entry of the metadata.

use crate::checkpoint::Checkpoint;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const FORMAT: u32 = 1;

/// A file that is being put together.
pub(super) struct Writing {
    file: Checkpoint,
    lines: String,
    key: &'static str,
}

impl Writing {
    /// `key` is the metadata entry, which says what the file is of.
    pub fn new(key: &'static str) -> Self {
        let mut writing = Self { file: Checkpoint::default(), lines: String::new(), key };
        writing.line("format", FORMAT);
        writing
    }

    pub fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        self.lines.push_str(&format!("{name} = {value}\n"));
    }

    pub fn tensor(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        let tensor = tensor.detach().to_device(&Device::Cpu)?.contiguous()?;
        self.file.tensors.insert(name, tensor);
        Ok(())
    }

    pub fn write(mut self, path: &Path) -> Result<()> {
        let count = self.file.tensors.len();
        self.line("tensors", count);
        self.file.metadata.insert(self.key.into(), self.lines);
        self.file.write(path)
    }
}

/// A file that is being read: notes all that does not fit, to be said at once.
pub(super) struct Reading {
    path: PathBuf,
    file: Checkpoint,
    lines: Vec<(String, String)>,
    used: BTreeSet<String>,
    wrong: Vec<String>,
}

impl Reading {
    /// # Errors
    /// When the file cannot be read, is not of `key`, or of another format.
    pub fn open(path: &Path, key: &'static str) -> Result<Self> {
        let file = Checkpoint::read(path, &Device::Cpu)?;
        let Some(text) = file.metadata.get(key) else {
            bail!("{}: not a file of {key}: its metadata have no entry {key:?}", path.display())
        };
        let lines: Vec<(String, String)> = text
            .lines()
            .filter_map(|line| line.split_once(" = "))
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect();
        let mut reading =
            Self { path: path.to_path_buf(), file, lines, used: BTreeSet::new(), wrong: Vec::new() };
        match reading.number::<u32>("format") {
            Some(FORMAT) => Ok(reading),
            Some(other) => bail!("{}: {key} of format {other}, expected {FORMAT}", path.display()),
            None => bail!("{}: {key} of no format, expected {FORMAT}", path.display()),
        }
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        let found = self.lines.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone());
        if found.is_none() {
            self.wrong.push(format!("{name} is missing"));
        }
        found
    }

    pub fn number<T: FromStr>(&mut self, name: &str) -> Option<T> {
        let text = self.text(name)?;
        let found = text.parse().ok();
        if found.is_none() {
            self.wrong.push(format!("{name} is {text:?}, expected a number"));
        }
        found
    }

    /// Notes a line that has another value here.
    pub fn expect(&mut self, name: &str, expected: impl std::fmt::Display) {
        let expected = expected.to_string();
        if let Some(found) = self.text(name)
            && found != expected
        {
            self.wrong.push(format!("{name} is {found}, expected {expected}"));
        }
    }

    /// Notes a line that is there and should not be.
    pub fn expect_none(&mut self, name: &str) {
        if let Some((_, found)) = self.lines.iter().find(|(other, _)| other == name) {
            self.wrong.push(format!("{name} is {found}, expected none"));
        }
    }

    /// How many dimensions a tensor has.
    pub fn rank(&self, name: &str) -> Option<usize> {
        self.file.tensors.get(name).map(Tensor::rank)
    }

    /// A tensor of finite f64 of this shape.
    pub fn tensor(&mut self, name: &str, dims: &[usize]) -> Option<Tensor> {
        let Some(tensor) = self.file.tensors.get(name).cloned() else {
            self.wrong.push(format!("missing {name} {dims:?}"));
            return None;
        };
        self.used.insert(name.to_string());
        if tensor.dims() != dims || tensor.dtype() != DType::F64 {
            let (found, dtype) = (tensor.dims(), tensor.dtype());
            self.wrong.push(format!("{name} is {dtype:?} {found:?}, expected F64 {dims:?}"));
            return None;
        }
        let finite = tensor.flatten_all().and_then(|t| t.to_vec1::<f64>());
        if !finite.is_ok_and(|values| values.iter().all(|v| v.is_finite())) {
            self.wrong.push(format!("{name} has NaN or infinite elements"));
            return None;
        }
        Some(tensor)
    }

    pub fn note(&mut self, wrong: String) {
        self.wrong.push(wrong);
    }

    /// # Errors
    /// Lists all that was noted, and tensors that nobody asked for.
    pub fn finish(mut self) -> Result<()> {
        let count = self.file.tensors.len();
        self.expect("tensors", count);
        let left = self.file.tensors.keys().filter(|name| !self.used.contains(*name));
        let left: Vec<String> = left.map(|name| format!("{name} has no place here")).collect();
        self.wrong.extend(left);
        if self.wrong.is_empty() {
            return Ok(());
        }
        bail!("{} does not fit: {}", self.path.display(), self.wrong.join("; "))
    }
}
