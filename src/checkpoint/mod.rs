//! Checkpoints: safetensors files, read with checks and written whole or not at all.

mod folder;
mod foreign;
mod load;
mod values;
mod write;

use candle_core::{Device, Result, Tensor, bail};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Deref;
use std::path::Path;

pub use load::Differences;
pub(crate) use values::cast;

/// The tensors of a safetensors file with its metadata.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The header's `__metadata__`.
    pub metadata: HashMap<String, String>,
    /// Tensors of the file that candle has no type for, as complex ones, by name: what they are. [`Checkpoint::write`] does not write them.
    pub skipped: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads a file onto `device`; of a file that ends in `.index.json` all the files that it names; of a folder its
    /// `model.safetensors.index.json`, or else its `model.safetensors`.
    ///
    /// The metadata of several files are joined; of a key that comes more than once the last file's counts.
    ///
    /// Types that candle lacks become the next larger one that it has: BOOL becomes u8 of 0 and 1, I8 i16, U16 u32, U64 i64 (where the values
    /// allow it) and F8_E5M2 f16, all exactly. What fits none, as C64 and F4, is in [`Checkpoint::skipped`].
    ///
    /// # Errors
    /// When a file cannot be read, is truncated or is not in the safetensors format; when the index is no such index, names files outside of
    /// its folder, or tensors that are missing, left over or in two files. The message names the file. Of PyTorch's, Keras' and GGUF files, of
    /// pointers of Git LFS and of web pages it says what they are and what to do.
    pub fn read(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::read_by(path.as_ref(), device, None, |file| std::fs::read(file))
    }

    /// [`Checkpoint::read`] of those tensors alone whose names `wanted` says yes to; the others are not even looked at, and files of an index
    /// that hold no other ones are not opened. A tensor that a single file has under
    /// another name alone ([`Checkpoint::get`]) is asked for by either.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; and when a wanted tensor is of a type that candle has nothing for: the message names it.
    pub fn read_where(
        path: impl AsRef<Path>,
        device: &Device,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        Self::read_by(path.as_ref(), device, Some(&wanted), |file| std::fs::read(file))
    }

    fn read_by<B: Deref<Target = [u8]>>(
        path: &Path,
        device: &Device,
        wanted: Wanted,
        open: impl Copy + Fn(&Path) -> std::io::Result<B>,
    ) -> Result<Self> {
        let bytes = |path: &Path| match foreign::refuse(path).and_then(|()| open(path)) {
            Ok(bytes) => Ok(bytes),
            Err(error) => bail!("{}: cannot be read: {error}", path.display()),
        };
        let path = &folder::file_of(path)?;
        let parsed = |path: &Path| Self::parsed(&path.display().to_string(), &bytes(path)?, device, wanted);
        if !path.to_string_lossy().ends_with(".index.json") {
            return parsed(path);
        }
        Self::indexed(path, &bytes(path)?, wanted, parsed)
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
        Self::read_by(path.as_ref(), device, None, |file| unsafe {
            memmap2::Mmap::map(&std::fs::File::open(file)?)
        })
    }

    /// The tensors of a safetensors file's bytes; `name` is what errors call it.
    ///
    /// # Errors
    /// When they are truncated or not in the safetensors format.
    pub fn parse(name: &str, bytes: &[u8], device: &Device) -> Result<Self> {
        Self::parsed(name, bytes, device, None)
    }

    fn parsed(file: &str, bytes: &[u8], device: &Device, wanted: Wanted) -> Result<Self> {
        let read = SafeTensors::read_metadata(bytes).and_then(|(_, header)| {
            Ok((header.metadata().clone().unwrap_or_default(), SafeTensors::deserialize(bytes)?))
        });
        let (metadata, views) = match read {
            Ok(read) => read,
            Err(error) => bail!("{file}: {}", foreign::broken(bytes, &error)),
        };
        let mut found = Self { metadata, ..Default::default() };
        let kept: BTreeSet<&str> = match wanted {
            // Tensors that are asked for under a name that was tied to theirs.
            Some(wanted) => {
                let tied = found.metadata.iter().filter(|(name, _)| wanted(name));
                tied.map(|(_, kept)| kept.as_str()).collect()
            }
            None => BTreeSet::new(),
        };
        for (name, view) in views.tensors() {
            if wanted.is_some_and(|wanted| !wanted(&name) && !kept.contains(name.as_str())) {
                continue;
            }
            match values::tensor(&view, device) {
                Ok(Ok(tensor)) => {
                    found.tensors.insert(name, tensor);
                }
                Ok(Err(why)) if wanted.is_some() => bail!("{file}: {name} is {why}"),
                Ok(Err(why)) => {
                    found.skipped.insert(name, why);
                }
                Err(error) => bail!("{file}: {name}: {error}"),
            }
        }
        Ok(found)
    }

    /// The tensor of a name; or of one that the metadata say is another's. safetensors for PyTorch writes tensors that share their memory once,
    /// and of the others, in the metadata, the name under which: `"lm_head.weight": "model.embed_tokens.weight"`.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(self.stored(name))
    }

    /// The name under which a tensor is stored: its own, if it has none.
    fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        let here = |name: &str| self.tensors.contains_key(name) || self.skipped.contains_key(name);
        match self.metadata.get(name) {
            Some(kept) if !here(name) && here(kept) => kept,
            _ => name,
        }
    }

    /// All files that an index names, as Hugging Face's libraries write it: `{"weight_map": {tensor: file}}`.
    fn indexed(
        path: &Path,
        index: &[u8],
        wanted: Wanted,
        read: impl Fn(&Path) -> Result<Self>,
    ) -> Result<Self> {
        let shown = path.display();
        let index: serde_json::Value = match serde_json::from_slice(index) {
            Ok(index) => index,
            Err(error) => bail!("{shown}: not an index of safetensors files: {error}"),
        };
        let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
            bail!("{shown}: not an index of safetensors files: it has no weight_map")
        };
        let mut files: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            match file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file)) {
                Some(file) => files.entry(file).or_default().insert(tensor),
                None => bail!(
                    "{shown}: tensor {tensor} is said to be in {file}, expected a file of the same folder"
                ),
            };
        }
        let asked = |name: &str| wanted.is_none_or(|wanted| wanted(name));
        let (mut all, mut wrong) = (Self::default(), vec![]);
        for (file, tensors) in files {
            if !tensors.iter().any(|name| asked(name)) {
                continue;
            }
            let part = read(&path.with_file_name(file))?;
            let held: BTreeSet<&str> =
                part.tensors.keys().chain(part.skipped.keys()).map(String::as_str).collect();
            let missing = tensors.difference(&held).filter(|name| asked(name));
            wrong.extend(missing.map(|name| format!("{name} is not in {file}")));
            let extra = held.difference(&tensors);
            wrong.extend(extra.map(|name| format!("{name} in {file} is not in the index there")));
            all.tensors.extend(part.tensors);
            all.skipped.extend(part.skipped);
            all.metadata.extend(part.metadata);
        }
        if !wrong.is_empty() {
            bail!("{shown} does not fit its files: {}", wrong.join("; "))
        }
        Ok(all)
    }
}

/// Which tensors are asked for; all without one.
type Wanted<'a> = Option<&'a dyn Fn(&str) -> bool>;

#[cfg(test)]
mod tests;
