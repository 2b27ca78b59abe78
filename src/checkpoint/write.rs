//! Files that are replaced at once or not at all.

use super::Checkpoint;
use super::foreign::MAX_HEADER;
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use safetensors::tensor::{self, TensorInfo};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Links that are followed one after the other, as Linux has it.
const LINKS: usize = 40;

impl Checkpoint {
    /// Writes a file: first beside `path`, then renamed over it, so that `path` is never half written. A file that is replaced gives its mode to
    /// the new one; a new one has that of other new files (by the umask). Where `path` is a symbolic link, what it points to is replaced.
    ///
    /// Equal checkpoints are equal files. [`Checkpoint::skipped`] tensors are not in it.
    ///
    /// # Errors
    /// When the folder or the file cannot be written, `path` is something else than a file, or a tensor is of a type that candle only stores (F4, F6, F8E8M0);
    /// the message names the file.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (header, tensors) = match header(self) {
            Ok(made) => made,
            Err(error) => bail!("{}: cannot be written: {error}", path.display()),
        };
        replace(path, |file| {
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            for tensor in tensors {
                // On the host and in one piece: the conversion to bytes cannot fail.
                let tensor = tensor.to_device(&Device::Cpu)?.flatten_all()?;
                file.write_all(&tensor::View::data(&tensor))?;
            }
            Ok(())
        })
    }
}

/// The header, and the tensors in its order: those of large types first, so that all are aligned, as the safetensors crate does it. Unlike there
/// the metadata are sorted.
fn header(checkpoint: &Checkpoint) -> Result<(String, Vec<&Tensor>)> {
    const METADATA: &str = "__metadata__";
    let mut tensors: Vec<(&String, &Tensor)> = checkpoint.tensors.iter().collect();
    for (name, tensor) in &tensors {
        if matches!(tensor.dtype(), DType::F4 | DType::F6E2M3 | DType::F6E3M2 | DType::F8E8M0) {
            bail!("{name} is {:?}, whose elements candle does not give", tensor.dtype())
        }
        if *name == METADATA {
            bail!("no tensor can have the name {METADATA}")
        }
    }
    let dtype = |tensor: &Tensor| safetensors::Dtype::from(tensor.dtype());
    tensors.sort_by(|(a, x), (b, y)| dtype(y).cmp(&dtype(x)).then(a.cmp(b)));
    let json = |value: serde_json::Result<String>| value.map_err(Error::wrap);
    let mut entries = vec![];
    if !checkpoint.metadata.is_empty() {
        let sorted: BTreeMap<_, _> = checkpoint.metadata.iter().collect();
        entries.push(format!("\"{METADATA}\":{}", json(serde_json::to_string(&sorted))?));
    }
    let mut start = 0;
    for (name, tensor) in &tensors {
        let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let info =
            TensorInfo { dtype: dtype(tensor), shape: tensor.dims().to_vec(), data_offsets: (start, end) };
        let (name, info) = (json(serde_json::to_string(name))?, json(serde_json::to_string(&info))?);
        entries.push(format!("{name}:{info}"));
        start = end;
    }
    let mut text = format!("{{{}}}", entries.join(","));
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    if text.len() as u64 > MAX_HEADER {
        bail!("a header of {} bytes, the format allows {MAX_HEADER}", text.len())
    }
    Ok((text, tensors.into_iter().map(|(_, tensor)| tensor).collect()))
}

/// Writes a file beside `path` by `write` and renames it over `path`: all files of the crate are written so.
///
/// The mode is the old file's, else that of new files; links are followed.
///
/// # Errors
/// When something cannot be written, or `path` is no file; the message names it, and what stood there stays.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let failed = |error: Error| Error::Msg(format!("{}: cannot be written: {error}", path.display()));
    let (target, old) = target(path).map_err(failed)?;
    let (part, file) = beside(&target, old.as_ref()).map_err(failed)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let written = write(&mut file).and_then(|()| {
        file.flush()?;
        if let Some(mode) = old {
            std::fs::set_permissions(&part, mode)?;
        }
        Ok(std::fs::rename(&part, &target)?)
    });
    written.map_err(|error| {
        // The message about the failure matters more than one about the leftover.
        let _ = std::fs::remove_file(&part);
        failed(error)
    })
}

/// The file that `path` leads to, by links too, and its mode if it is there.
fn target(path: &Path) -> Result<(PathBuf, Option<Permissions>)> {
    let mut at = path.to_path_buf();
    for _ in 0..=LINKS {
        if let Ok(next) = std::fs::read_link(&at) {
            at = at.parent().unwrap_or(Path::new("")).join(next);
            continue;
        }
        return match std::fs::metadata(&at) {
            Ok(found) if found.is_file() => Ok((at, Some(found.permissions()))),
            Ok(found) if found.is_dir() => bail!("it is a folder, expected a file's name"),
            Ok(_) => bail!("it is a device or pipe, expected a file"),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok((at, None)),
            Err(error) => Err(error.into()),
        };
    }
    bail!("more than {LINKS} symbolic links one after the other")
}

/// A new file beside `target`, with at most the old one's rights.
fn beside(target: &Path, old: Option<&Permissions>) -> Result<(PathBuf, File)> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let Some(name) = target.file_name() else { bail!("not a file name") };
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if let Some(old) = old {
        use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
        options.mode(old.mode() & 0o777);
    }
    loop {
        let mut name = name.to_os_string();
        name.push(format!(".{}-{}.part", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let part = target.with_file_name(name);
        match options.open(&part) {
            // Left by another process of this number.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            opened => return Ok((part, opened?)),
        }
    }
}
