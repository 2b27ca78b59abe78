//! Files that are something else than safetensors, or not whole: what they are and what to do.

use safetensors::SafeTensorError;
use std::io::{Error, Read};
use std::path::Path;

/// As many first bytes as tell what a file is.
const HEAD: u64 = 1024;
/// The largest header of the format, in bytes.
pub(super) const MAX_HEADER: u64 = 100_000_000;
const TORCH: &str =
    "load it in PyTorch (torch.load with weights_only=True) and write it with safetensors.torch.save_file";

/// An error about a file whose first bytes are another format's, before all of it is read.
pub(super) fn refuse(path: &Path) -> std::io::Result<()> {
    // What a pipe gives is gone once it is read.
    if !std::fs::metadata(path)?.is_file() {
        return Ok(());
    }
    let mut head = vec![];
    std::fs::File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    let index = path.to_string_lossy().ends_with(".index.json");
    match recognised(&head) {
        // An index is JSON.
        Some(what) if !(index && what == JSON) => Err(Error::other(what)),
        _ => Ok(()),
    }
}

/// What is wrong with bytes that are no whole safetensors file.
pub(super) fn broken(bytes: &[u8], error: &SafeTensorError) -> String {
    let size = bytes.len();
    if let Some(what) = recognised(bytes) {
        return what;
    }
    match expected_size(bytes).filter(|expected| *expected != size as u64) {
        Some(expected) => {
            let again = if expected > size as u64 { "; copy or download it again" } else { "" };
            format!("not a whole safetensors file: {size} bytes, expected {expected} by its header{again}")
        }
        None => format!("not a whole safetensors file ({size} bytes): {error}"),
    }
}

/// The size that a header gives its file.
fn expected_size(bytes: &[u8]) -> Option<u64> {
    let length = header_length(bytes)?;
    let header = bytes.get(8..8usize.checked_add(length.try_into().ok()?)?)?;
    let header: serde_json::Value = serde_json::from_slice(header).ok()?;
    let tensors = header.as_object()?.iter().filter(|(name, _)| *name != "__metadata__");
    let ends = tensors.filter_map(|(_, info)| info.get("data_offsets")?.get(1)?.as_u64());
    ends.max().unwrap_or(0).checked_add(8 + length)
}

fn header_length(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?))
}

const JSON: &str =
    "JSON text, not a safetensors file; of an index of several files the name ends in .index.json";

/// What begins with these bytes and what to do about it; nothing for safetensors files, damaged ones too.
fn recognised(bytes: &[u8]) -> Option<String> {
    // The first bytes of other formats give headers longer than any.
    if header_length(bytes).is_some_and(|length| length <= MAX_HEADER) && bytes.get(8) == Some(&b'{') {
        return None;
    }
    let head = &bytes[..bytes.len().min(HEAD as usize)];
    let holds = |part: &[u8]| head.windows(part.len()).any(|window| window == part);
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let tag = |tag: &str| text.len() >= tag.len() && text[..tag.len()].eq_ignore_ascii_case(tag.as_bytes());
    let what = match head {
        [] => "not a whole safetensors file but an empty one; copy or download it again".into(),
        [b'P', b'K', 3, 4, ..] if holds(b".npy") => {
            "NumPy arrays (.npz), not a safetensors file; write them with safetensors.numpy.save_file".into()
        }
        [b'P', b'K', 3, 4, ..] => format!(
            "a zip archive, as torch.save writes it (pytorch_model.bin, .pt), not a safetensors file; {TORCH}"
        ),
        [0x80, 1..=5, ..] => {
            format!("a Python pickle, as old versions of torch.save wrote it, not a safetensors file; {TORCH}")
        }
        [b'G', b'G', b'U', b'F', ..] => {
            "a GGUF file, not a safetensors file; read it with candle's quantized::gguf_file, or take the model's safetensors"
                .into()
        }
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => {
            "a NumPy array (.npy), not a safetensors file; write it with safetensors.numpy.save_file".into()
        }
        [0x89, b'H', b'D', b'F', ..] => {
            "an HDF5 file, as Keras writes it, not a safetensors file; load it in Keras and write its weights with safetensors".into()
        }
        [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            "compressed (gzip or zstd), not a safetensors file; unpack it first".into()
        }
        _ if text.starts_with(b"version https://git-lfs") => {
            "a pointer of Git LFS in place of the safetensors file; fetch the file itself with git lfs pull".into()
        }
        _ if tag("<!doctype") || tag("<html") || tag("<?xml") => {
            "a web page in place of a safetensors file; download the file itself (on Hugging Face from /resolve/, not /blob/, and logged in if it asks for that)"
                .into()
        }
        _ if text.first() == Some(&b'{') => JSON.into(),
        _ if head.get(257..262) == Some(b"ustar") => {
            format!("a tar archive, as the first versions of torch.save wrote it, not a safetensors file; {TORCH}")
        }
        _ if head.len() >= 64 && head.iter().all(|&byte| byte == 0) => {
            "zeros at its start, as an unfinished download; copy or download it again".into()
        }
        _ => return None,
    };
    Some(what)
}
