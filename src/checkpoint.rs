//! Checkpoints: safetensors files, read with checks and written whole or not at all.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarMap;
use safetensors::SafeTensors;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The tensors of a safetensors file with its metadata.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The header's `__metadata__`.
    pub metadata: HashMap<String, String>,
}

impl Checkpoint {
    /// Reads a file onto `device`.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated or is not in the safetensors format; the message names the file.
    pub fn read(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => bail!("{}: cannot be read: {error}", path.display()),
        };
        let broken = |error| {
            candle_core::Error::Msg(format!(
                "{}: not a whole safetensors file ({} bytes): {error}",
                path.display(),
                bytes.len()
            ))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let views = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in views.tensors() {
            tensors.insert(name, candle_core::safetensors::Load::load(&view, device)?);
        }
        Ok(Self { tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// Writes a file: first beside `path`, then renamed over it, so that `path` is never half written.
    ///
    /// # Errors
    /// When the folder or the file cannot be written; the message names the file.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |error: String| {
            candle_core::Error::Msg(format!("{}: cannot be written: {error}", path.display()))
        };
        let mut name = path.file_name().ok_or_else(|| failed("not a file name".into()))?.to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(name);
        let metadata = (!self.metadata.is_empty()).then(|| self.metadata.clone());
        let written = safetensors::serialize_to_file(&self.tensors, metadata, &part)
            .map_err(|error| failed(error.to_string()))
            .and_then(|()| std::fs::rename(&part, path).map_err(|error| failed(error.to_string())));
        if written.is_err() {
            // The message about the failure matters more than one about the leftover.
            let _ = std::fs::remove_file(&part);
        }
        written
    }

    /// Sets every Var of `varmap` to the tensor of its name, converted to the Var's dtype.
    ///
    /// # Errors
    /// When names are missing, left over, or of another shape: one message lists them all, and no Var has changed.
    pub fn load_into(&self, varmap: &VarMap) -> Result<()> {
        let data = match varmap.data().lock() {
            Ok(data) => data,
            Err(_) => bail!("checkpoint: the VarMap's lock is poisoned"),
        };
        let mut wrong = vec![];
        for (name, var) in data.iter() {
            match self.tensors.get(name) {
                None => wrong.push(format!("missing {name} {:?}", var.dims())),
                Some(t) if t.dims() != var.dims() => {
                    wrong.push(format!("{name} has shape {:?}, expected {:?}", t.dims(), var.dims()))
                }
                Some(t) if !t.dtype().is_float() => {
                    wrong.push(format!("{name} is {:?}, expected floating point", t.dtype()))
                }
                Some(_) => {}
            }
        }
        wrong.extend(
            self.tensors.keys().filter(|n| !data.contains_key(*n)).map(|n| format!("unexpected {n}")),
        );
        if !wrong.is_empty() {
            wrong.sort();
            bail!("checkpoint does not fit the model: {}", wrong.join("; "))
        }
        for (name, var) in data.iter() {
            if let Some(tensor) = self.tensors.get(name) {
                var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)?;
            }
        }
        Ok(())
    }
}
