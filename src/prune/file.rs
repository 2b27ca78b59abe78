//! Sparse weights in safetensors files.

use crate::checkpoint::Checkpoint;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::path::Path;

/// In the metadata before the name of a sparse tensor; its value is the shape, `300,784`.
const SHAPE: &str = "sparse.shape:";
/// After the name of a tensor's places, u32 numbers of its elements by rows, increasing.
const INDICES: &str = ".sparse_indices";
/// After the name of the values at these places, in the tensor's dtype.
const VALUES: &str = ".sparse_values";

/// Writes a safetensors file in which a tensor `name` with many zeros is two: `name.sparse_indices`, the flat indices (u32, increasing, by
/// rows) of its elements that are not zero, and `name.sparse_values`, these elements. Its shape is in the metadata, under
/// `sparse.shape:name`. Tensors that would not be smaller so, and those not of floating point, are written as they are. The file is written
/// whole or not at all, as by [`Checkpoint::write`].
///
/// # Errors
/// If a name is taken twice by this, a tensor has more than `2^32` elements, or the file cannot be written.
pub fn write_sparse(checkpoint: &Checkpoint, path: impl AsRef<Path>) -> Result<()> {
    let mut out = Checkpoint { metadata: checkpoint.metadata.clone(), ..Default::default() };
    let reserved = |name: &str| name.ends_with(INDICES) || name.ends_with(VALUES);
    if let Some(name) = checkpoint.tensors.keys().find(|name| reserved(name)) {
        bail!("sparse file: the name {name} is one of those that sparse tensors get")
    }
    if let Some(key) = checkpoint.metadata.keys().find(|key| key.starts_with(SHAPE)) {
        bail!("sparse file: the metadata have {key} already")
    }
    for (name, tensor) in &checkpoint.tensors {
        let flat = pickable(&tensor.detach().to_device(&Device::Cpu)?.flatten_all()?)?;
        let indices = if tensor.dtype().is_float() { nonzeros(&flat, name)? } else { vec![] };
        let bytes = tensor.dtype().size_in_bytes();
        if !tensor.dtype().is_float() || indices.len() * (bytes + 4) >= tensor.elem_count() * bytes {
            out.tensors.insert(name.clone(), tensor.clone());
            continue;
        }
        let count = indices.len();
        let indices = Tensor::from_vec(indices, count, &Device::Cpu)?;
        // candle's gather of nothing is an error.
        let values = if count > 0 { flat.index_select(&indices, 0)? } else { flat.narrow(0, 0, 0)? };
        let dims: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
        out.metadata.insert(format!("{SHAPE}{name}"), dims.join(","));
        out.tensors.insert(format!("{name}{INDICES}"), indices);
        out.tensors.insert(format!("{name}{VALUES}"), values.to_dtype(tensor.dtype())?);
    }
    out.write(path)
}

/// Reads a file of [`write_sparse`]; its tensors are dense again. Any other safetensors file is read as it is.
///
/// # Errors
/// If the file cannot be read, or an index is too large or does not increase, the numbers of indices and values differ, or one of these
/// tensors or a shape is missing; the message names the file and the tensor.
pub fn read_sparse(path: impl AsRef<Path>, device: &Device) -> Result<Checkpoint> {
    let path = path.as_ref();
    let mut file = Checkpoint::read(path, &Device::Cpu)?;
    let broken = |name: &str, what: String| -> candle_core::Error {
        candle_core::Error::Msg(format!("{}: sparse tensor {name}: {what}", path.display()))
    };
    let skipped = std::mem::take(&mut file.skipped);
    let mut out = Checkpoint { skipped, ..Default::default() };
    for (key, text) in std::mem::take(&mut file.metadata) {
        let Some(name) = key.strip_prefix(SHAPE) else {
            out.metadata.insert(key, text);
            continue;
        };
        let mut take = |part: &str| {
            let tensor = file.tensors.remove(&format!("{name}{part}"));
            tensor.ok_or_else(|| broken(name, format!("{name}{part} is missing")))
        };
        let (indices, values) = (take(INDICES)?, take(VALUES)?);
        let dims = text
            .split(',')
            .filter(|d| !d.is_empty())
            .map(str::parse)
            .collect::<std::result::Result<Vec<usize>, _>>();
        let dims = dims.map_err(|_| broken(name, format!("{text:?} is not a shape")))?;
        let count = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n as u64 <= 1 << 32);
        let count = count.ok_or_else(|| broken(name, format!("shape {text} has too many elements")))?;
        if file.tensors.contains_key(name) {
            return Err(broken(name, "there is a dense tensor of this name too".into()));
        }
        let dense = scattered(&indices, &values, count).map_err(|e| broken(name, e.to_string()))?;
        out.tensors.insert(name.to_string(), dense.reshape(dims)?.to_device(device)?);
    }
    for (name, tensor) in file.tensors {
        if let Some(name) = name.strip_suffix(INDICES).or(name.strip_suffix(VALUES)) {
            return Err(broken(name, format!("its shape is missing, {SHAPE}{name} in the metadata")));
        }
        out.tensors.insert(name, tensor.to_device(device)?);
    }
    Ok(out)
}

/// A tensor in a type whose elements candle can pick and place: fp8 as f32, in which all its values are exact.
fn pickable(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F8E4M3 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

/// The places of a flat tensor's elements that are not zero (NaN is not).
fn nonzeros(flat: &Tensor, name: &str) -> Result<Vec<u32>> {
    if flat.elem_count() as u64 > 1 << 32 {
        bail!(
            "sparse file: {name} has {} elements, more than indices of 32 bits tell apart",
            flat.elem_count()
        )
    }
    let is_not = flat.ne(&flat.zeros_like()?)?.to_vec1::<u8>()?;
    Ok((0u32..=u32::MAX).zip(&is_not).filter(|(_, is)| **is != 0).map(|(i, _)| i).collect())
}

fn scattered(indices: &Tensor, values: &Tensor, count: usize) -> Result<Tensor> {
    if indices.dtype() != DType::U32 || indices.rank() != 1 || values.dims() != indices.dims() {
        bail!(
            "expected U32 indices and as many values, got {:?} {:?} and {:?}",
            indices.dtype(),
            indices.dims(),
            values.dims()
        )
    }
    let places = indices.to_vec1::<u32>()?;
    if let Some(at) = places.windows(2).position(|pair| pair[0] >= pair[1]) {
        bail!("index {} after {} at {}, expected increasing ones", places[at + 1], places[at], at + 1)
    }
    if let Some(last) = places.last().filter(|last| **last as usize >= count) {
        bail!("index {last}, expected it below {count}")
    }
    let (dtype, values) = (values.dtype(), pickable(values)?);
    let dense = Tensor::zeros(count, values.dtype(), &Device::Cpu)?;
    let dense = if places.is_empty() { dense } else { dense.index_add(indices, &values, 0)? };
    dense.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn scratch() -> std::path::PathBuf {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        std::env::temp_dir().join(format!("kronwake-sparse-{}-{count}", std::process::id()))
    }

    fn tensors() -> Result<Checkpoint> {
        let mut values = vec![0f64; 60];
        (0..60).step_by(7).for_each(|i| values[i] = i as f64 - 20.5);
        let w = Tensor::from_vec(values, (3, 4, 5), &Device::Cpu)?;
        let mut all = Checkpoint::default();
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
            all.tensors.insert(format!("{dtype:?}"), w.to_dtype(dtype)?);
        }
        all.tensors.insert("dense".into(), Tensor::randn(0f32, 1., (2, 3), &Device::Cpu)?);
        all.tensors.insert("zero".into(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?);
        all.tensors.insert("whole".into(), Tensor::new(&[0u32, 0, 1], &Device::Cpu)?);
        all.metadata.insert("epoch".into(), "3".into());
        Ok(all)
    }

    #[test]
    fn back_and_forth() -> Result<()> {
        let (path, all) = (scratch(), tensors()?);
        write_sparse(&all, &path)?;
        let stored = Checkpoint::read(&path, &Device::Cpu)?;
        let found = read_sparse(&path, &Device::Cpu)?;
        std::fs::remove_file(&path)?;
        assert_eq!(stored.metadata["sparse.shape:F32"], "3,4,5");
        assert_eq!(
            stored.tensors["F32.sparse_indices"].to_vec1::<u32>()?,
            [0, 7, 14, 21, 28, 35, 42, 49, 56]
        );
        assert!(stored.tensors.contains_key("dense") && stored.tensors.contains_key("whole"));
        assert_eq!(stored.tensors["zero.sparse_values"].dims(), [0]);
        assert_eq!(found.metadata, all.metadata);
        assert_eq!(found.tensors.keys().collect::<Vec<_>>(), all.tensors.keys().collect::<Vec<_>>());
        for (name, expected) in &all.tensors {
            let found = &found.tensors[name];
            assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()), "{name}");
            let wide = |t: &Tensor| {
                crate::checkpoint::cast(t, DType::F64, &Device::Cpu)?.flatten_all()?.to_vec1::<f64>()
            };
            assert_eq!(wide(found)?, wide(expected)?, "{name}");
        }
        Ok(())
    }

    #[test]
    fn broken_files_are_refused() -> Result<()> {
        let u32s = |v: &[u32]| Tensor::new(v, &Device::Cpu);
        type Change = Box<dyn Fn(&mut Checkpoint)>;
        let set = |name: &'static str, value: Tensor| -> Change {
            Box::new(move |c| {
                c.tensors.insert(name.into(), value.clone());
            })
        };
        let meta = |value: &'static str| -> Change {
            Box::new(move |c| {
                c.metadata.insert("sparse.shape:w".into(), value.into());
            })
        };
        let cases: Vec<(Change, &str)> = vec![
            (set("w.sparse_indices", u32s(&[1, 20])?), "sparse tensor w: index 20, expected it below 20"),
            (set("w.sparse_indices", u32s(&[3, 3])?), "index 3 after 3 at 1, expected increasing"),
            (set("w.sparse_indices", u32s(&[4, 2])?), "index 2 after 4 at 1"),
            (set("w.sparse_indices", u32s(&[4])?), "U32 [1] and [2]"),
            (set("w.sparse_indices", Tensor::new(&[1i64, 2], &Device::Cpu)?), "got I64"),
            (set("w", u32s(&[1])?), "a dense tensor of this name too"),
            (meta("4,x"), "\"4,x\" is not a shape"),
            (meta("4,4000000000,4000000000"), "too many elements"),
            (Box::new(|c| c.metadata.clear()), "sparse tensor w: its shape is missing"),
            (
                Box::new(|c| {
                    c.tensors.remove("w.sparse_values");
                }),
                "w.sparse_values is missing",
            ),
        ];
        let mut w = vec![0f32; 20];
        (w[3], w[9]) = (1.5, -2.);
        for (change, part) in cases {
            let (path, mut file) = (scratch(), Checkpoint::default());
            file.tensors.insert("w".into(), Tensor::from_vec(w.clone(), (4, 5), &Device::Cpu)?);
            write_sparse(&file, &path)?;
            let mut stored = Checkpoint::read(&path, &Device::Cpu)?;
            change(&mut stored);
            stored.write(&path)?;
            let message = read_sparse(&path, &Device::Cpu).err().map(|e| e.to_string()).unwrap_or_default();
            std::fs::remove_file(&path)?;
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        let taken =
            Checkpoint { tensors: [("w.sparse_values".into(), u32s(&[1])?)].into(), ..Default::default() };
        assert!(write_sparse(&taken, scratch()).is_err());
        Ok(())
    }
}
