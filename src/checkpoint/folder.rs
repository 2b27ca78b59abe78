//! Which file of a folder is the model's.

use candle_core::{Result, bail};
use std::path::{Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// `path`, or the file to read of the folder that it is.
pub(super) fn file_of(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    match [INDEX, SINGLE].map(|name| path.join(name)).into_iter().find(|file| file.exists()) {
        Some(file) => Ok(file),
        None => bail!("{}: a folder without {SINGLE} or {INDEX}{}", path.display(), others(path)),
    }
}

/// What a folder without a model holds in its place, and what to do.
fn others(path: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(path) else { return String::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let has = |name: &str| names.iter().any(|n| n == name);
    let ending = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    if has("adapter_model.safetensors") {
        return "; it holds an adapter of PEFT, adapter_model.safetensors, to be loaded by nn::Lora::load into adapters of the base model, which is read first".into();
    }
    if let Some(index) = ending(&[".safetensors.index.json"]) {
        return format!("; give its index {index} in place of the folder");
    }
    let whole: Vec<&str> =
        names.iter().filter(|name| name.ends_with(".safetensors")).map(String::as_str).collect();
    if whole.iter().any(|name| name.contains("-of-")) {
        return format!("; of {} the index is missing, download it too", whole.join(", "));
    }
    if !whole.is_empty() {
        return format!("; give the file in place of the folder: {}", whole.join(", "));
    }
    if let Some(other) =
        ending(&[".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"])
    {
        return format!(
            "; it holds {other}, which is of another format: take the model's safetensors, or convert it in Python (save_pretrained with safe_serialization=True)"
        );
    }
    String::new()
}
