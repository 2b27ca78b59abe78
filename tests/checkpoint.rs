//! Checkpoints in several files, and files that are damaged.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use kronwake::checkpoint::Checkpoint;
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::LazyLock;

const CPU: Device = Device::Cpu;

/// A folder of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kronwake-checkpoint-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tensors(names: &[&str]) -> Result<Checkpoint> {
    let mut file = Checkpoint::default();
    for (index, name) in names.iter().enumerate() {
        let dtype = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::U8, DType::I64][index % 6];
        let values = Tensor::arange(0f32, 6., &CPU)?.reshape((2, 3))?.to_dtype(dtype)?;
        file.tensors.insert(name.to_string(), values);
    }
    file.metadata.insert(format!("of {}", names[0]), "said".into());
    Ok(file)
}

#[test]
fn several_files_are_one_checkpoint() -> Result<()> {
    let folder = Folder::new("shards");
    let at = |name: &str| folder.0.join(name);
    tensors(&["a", "b"])?.write(at("model-1.safetensors"))?;
    tensors(&["c"])?.write(at("model-2.safetensors"))?;
    let index = |map: &str| format!(r#"{{"metadata": {{"total_size": 1}}, "weight_map": {map}}}"#);
    let good =
        index(r#"{"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}"#);
    folder.write("model.safetensors.index.json", good.as_bytes());
    for path in [folder.0.as_path(), &at("model.safetensors.index.json")] {
        let found = Checkpoint::read(path, &CPU)?;
        assert_eq!(found.tensors.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(found.tensors["b"].to_vec2::<f64>()?, [[0., 1., 2.], [3., 4., 5.]]);
        assert_eq!(found.metadata.len(), 2);
        // SAFETY: nobody else knows the files.
        let mapped = unsafe { Checkpoint::read_mapped(path, &CPU)? };
        assert_eq!(mapped.metadata, found.metadata);
        for (name, tensor) in &found.tensors {
            assert_eq!(mapped.tensors[name].to_string(), tensor.to_string());
        }
    }
    for (text, part) in [
        (
            index(r#"{"a": "model-1.safetensors", "c": "model-2.safetensors"}"#),
            "b in model-1.safetensors is not in the index",
        ),
        (
            index(r#"{"a": "model-2.safetensors", "c": "model-2.safetensors"}"#),
            "a is not in model-2.safetensors",
        ),
        (index(r#"{"a": "../secret.safetensors"}"#), "expected a file of the same folder"),
        (index(r#"{"a": "/etc/secret.safetensors"}"#), "expected a file of the same folder"),
        (index(r#"{"a": 3}"#), "expected a file of the same folder"),
        (index(r#"{"a": "model-3.safetensors"}"#), "model-3.safetensors: cannot be read"),
        (index("3"), "it has no weight_map"),
        ("{".into(), "not an index of safetensors files"),
    ] {
        let path = folder.write("bad.index.json", text.as_bytes());
        // SAFETY: nobody else knows the files.
        for found in [Checkpoint::read(&path, &CPU), unsafe { Checkpoint::read_mapped(&path, &CPU) }] {
            let message = found.expect_err("refused").to_string();
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    // Without an index a folder's one file is read.
    std::fs::remove_file(at("model.safetensors.index.json"))?;
    assert!(Checkpoint::read(&folder.0, &CPU).is_err());
    tensors(&["d"])?.write(at("model.safetensors"))?;
    assert!(Checkpoint::read(&folder.0, &CPU)?.tensors.contains_key("d"));
    Ok(())
}

#[test]
fn a_part_of_a_model_is_read_and_the_rest_reported() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    for name in ["a", "b", "head"] {
        vb.get_with_hints((2, 3), name, candle_nn::Init::Const(7.0))?;
    }
    let file = tensors(&["a", "b", "old"])?;
    let message = file.load_into(&vars).expect_err("refused").to_string();
    assert!(message.contains("missing head [2, 3]; unexpected old"), "{message}");
    let differences = file.load_partly(&vars)?;
    assert_eq!(
        (differences.missing, differences.unexpected),
        (vec!["head".to_string()], vec!["old".to_string()])
    );
    for (name, expected) in [("b", [[0., 1., 2.], [3., 4., 5.]]), ("head", [[7.; 3]; 2])] {
        assert_eq!(vb.get((2, 3), name)?.to_vec2::<f32>()?, expected);
    }
    vb.get_with_hints((3, 2), "old", candle_nn::Init::Const(7.0))?;
    let message = file.load_partly(&vars).expect_err("refused").to_string();
    assert!(message.contains("old has shape [2, 3], expected [3, 2]"), "{message}");
    Ok(())
}

/// Types of the format, and one that is none.
const TYPES: [&str; 16] = [
    "F64", "F32", "F16", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4",
    "U16", "I8", "C64", "nothing",
];

/// A file of six types.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = Folder::new("good");
    let path = folder.0.join("good");
    tensors(&["a", "b", "c", "d", "e", "f"]).and_then(|file| file.write(&path)).expect("written");
    std::fs::read(&path).expect("read")
});

/// Reading ends, with tensors or an error, and takes no more memory than the file's size warrants: what is read is no larger.
fn reads(bytes: &[u8]) {
    if let Ok(file) = Checkpoint::parse("damaged", bytes, &CPU) {
        // U16 is read as u32, and nothing else grows.
        let size: usize = file.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
        assert!(size <= 2 * bytes.len(), "{size} bytes of {}", bytes.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var("KRONWAKE_FUZZ").is_ok() { 200_000 } else { 500 }))]

    #[test]
    fn damaged_files_are_errors(flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8u32), 0..4), cut in any::<prop::sample::Index>(), truncate in any::<bool>()) {
        let mut bytes = GOOD.clone();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        reads(&bytes);
    }

    /// Headers that lie: of their length, of offsets, of shapes, of types.
    #[test]
    fn lying_headers_are_errors(length in any::<u64>(), start in any::<u64>(), end in any::<u64>(), dims in prop::collection::vec(any::<u64>(), 0..4), dtype in 0..16usize, right in any::<bool>()) {
        let dtype = TYPES[dtype];
        let header = format!(
            r#"{{"a":{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{end}]}},"b":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}"#
        );
        let length = if right { header.len() as u64 } else { length };
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 64]);
        reads(&bytes);
    }

    /// Whole headers of every type, whose data may be too short or too long for the shape.
    #[test]
    fn any_type_is_read_or_refused(size in 0..64usize, count in 0..20usize, dtype in 0..16usize) {
        let dtype = TYPES[dtype];
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,{size}]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![7; size]);
        reads(&bytes);
    }

    /// Overlapping and empty tensors.
    #[test]
    fn overlaps_are_errors(a in 0..40u64, b in 0..40u64, c in 0..40u64, d in 0..40u64) {
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[{a},{b}]}},"b":{{"dtype":"U8","shape":[{}],"data_offsets":[{c},{d}]}}}}"#,
            b.saturating_sub(a), d.saturating_sub(c)
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; b.max(d) as usize]);
        let overlap = a.max(c) < b.min(d);
        let found = Checkpoint::parse("overlapping", &bytes, &CPU);
        prop_assert!(!(overlap && found.is_ok()));
    }
}
