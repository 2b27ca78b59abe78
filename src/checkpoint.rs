//! Checkpoints: safetensors files, read with checks and written whole or not at all.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarMap;
use safetensors::SafeTensors;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::path::Path;

/// The tensors of a safetensors file with its metadata.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The header's `__metadata__`.
    pub metadata: HashMap<String, String>,
}

/// What a checkpoint and a model do not share, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Vars that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that no Var takes.
    pub unexpected: Vec<String>,
}

impl Checkpoint {
    /// Reads a file onto `device`; of a file that ends in `.index.json` all the files that it names; of a folder its
    /// `model.safetensors.index.json`, or else its `model.safetensors`.
    ///
    /// The metadata of several files are joined; of a key that comes more than once the last file's counts.
    ///
    /// # Errors
    /// When a file cannot be read, is truncated or is not in the safetensors format; when the index is no such index, names files outside of
    /// its folder, or tensors that are missing, left over or in two files. The message names the file.
    pub fn read(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::read_by(path.as_ref(), device, |file| std::fs::read(file))
    }

    fn read_by<B: Deref<Target = [u8]>>(
        path: &Path,
        device: &Device,
        open: impl Copy + Fn(&Path) -> std::io::Result<B>,
    ) -> Result<Self> {
        let bytes = |path: &Path| match open(path) {
            Ok(bytes) => Ok(bytes),
            Err(error) => bail!("{}: cannot be read: {error}", path.display()),
        };
        let (index, single) = (path.join("model.safetensors.index.json"), path.join("model.safetensors"));
        let path = match path.is_dir() {
            true if index.exists() => &index,
            true => &single,
            false => path,
        };
        if !path.to_string_lossy().ends_with(".index.json") {
            return Self::parse(&path.display().to_string(), &bytes(path)?, device);
        }
        Self::indexed(path, &bytes(path)?, |file| {
            Self::parse(&file.display().to_string(), &bytes(file)?, device)
        })
    }

    /// [`Checkpoint::read`] by way of the files' pages in memory: each is read as its tensors are made, without a copy of the whole file beside
    /// them.
    ///
    /// # Safety
    /// While this runs, nobody may change the files: what is read then is not defined, and a file that becomes shorter ends the process.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub unsafe fn read_mapped(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        // SAFETY: the caller's promise.
        Self::read_by(path.as_ref(), device, |file| unsafe {
            memmap2::Mmap::map(&std::fs::File::open(file)?)
        })
    }

    /// The tensors of a safetensors file's bytes; `name` is what errors call it.
    ///
    /// # Errors
    /// When they are truncated or not in the safetensors format.
    pub fn parse(name: &str, bytes: &[u8], device: &Device) -> Result<Self> {
        let broken = |error| {
            let size = bytes.len();
            candle_core::Error::Msg(format!("{name}: not a whole safetensors file ({size} bytes): {error}"))
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let views = SafeTensors::deserialize(bytes).map_err(broken)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in views.tensors() {
            tensors.insert(name, candle_core::safetensors::Load::load(&view, device)?);
        }
        Ok(Self { tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// All files that an index names, as Hugging Face's libraries write it: `{"weight_map": {tensor: file}}`.
    fn indexed(path: &Path, index: &[u8], read: impl Fn(&Path) -> Result<Self>) -> Result<Self> {
        let shown = path.display();
        let index: serde_json::Value = match serde_json::from_slice(index) {
            Ok(index) => index,
            Err(error) => bail!("{shown}: not an index of safetensors files: {error}"),
        };
        let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
            bail!("{shown}: not an index of safetensors files: it has no weight_map")
        };
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            match file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file)) {
                Some(file) => files.entry(file).or_default().push(tensor),
                None => bail!(
                    "{shown}: tensor {tensor} is said to be in {file}, expected a file of the same folder"
                ),
            }
        }
        let (mut all, mut wrong) = (Self::default(), vec![]);
        for (file, tensors) in files {
            let part = read(&path.with_file_name(file))?;
            wrong.extend(
                tensors
                    .iter()
                    .filter(|t| !part.tensors.contains_key(**t))
                    .map(|t| format!("{t} is not in {file}")),
            );
            for (name, tensor) in part.tensors {
                if !tensors.contains(&name.as_str()) {
                    wrong.push(format!("{name} in {file} is not in the index there"));
                }
                all.tensors.insert(name, tensor);
            }
            all.metadata.extend(part.metadata);
        }
        if !wrong.is_empty() {
            bail!("{shown} does not fit its files: {}", wrong.join("; "))
        }
        Ok(all)
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
        self.load(varmap, false).map(drop)
    }

    /// [`Checkpoint::load_into`] for a model that the file is not quite of, as PyTorch's `strict=False`: Vars that the file lacks stay as they are, and
    /// tensors that no Var takes are left. Both are returned.
    ///
    /// # Errors
    /// When a name that both have differs in shape, or is not of a floating point type: one message lists all, and no Var has changed.
    pub fn load_partly(&self, varmap: &VarMap) -> Result<Differences> {
        self.load(varmap, true)
    }

    fn load(&self, varmap: &VarMap, partly: bool) -> Result<Differences> {
        let data = match varmap.data().lock() {
            Ok(data) => data,
            Err(_) => bail!("checkpoint: the VarMap's lock is poisoned"),
        };
        let mut wrong = vec![];
        let mut differences = Differences::default();
        for (name, var) in data.iter() {
            match self.tensors.get(name) {
                None => differences.missing.push(name.clone()),
                Some(t) if t.dims() != var.dims() => {
                    wrong.push(format!("{name} has shape {:?}, expected {:?}", t.dims(), var.dims()))
                }
                Some(t) if !t.dtype().is_float() => {
                    wrong.push(format!("{name} is {:?}, expected floating point", t.dtype()))
                }
                Some(_) => {}
            }
        }
        differences.missing.sort();
        differences.unexpected = self.tensors.keys().filter(|n| !data.contains_key(*n)).cloned().collect();
        if !partly {
            let shape = |name: &String| data.get(name).map(|var| var.dims().to_vec()).unwrap_or_default();
            wrong.extend(differences.missing.iter().map(|name| format!("missing {name} {:?}", shape(name))));
            wrong.extend(differences.unexpected.iter().map(|name| format!("unexpected {name}")));
        }
        if !wrong.is_empty() {
            wrong.sort();
            bail!("checkpoint does not fit the model: {}", wrong.join("; "))
        }
        for (name, var) in data.iter() {
            if let Some(tensor) = self.tensors.get(name) {
                var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)?;
            }
        }
        Ok(differences)
    }
}
