//! Checkpoints in several files, and files that are damaged.

use candle_core::{DType, Device, Result, Tensor, Var};
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

/// What a file is asked for is read, and nothing else is looked at.
#[test]
fn a_file_is_read_in_part() -> Result<()> {
    let folder = Folder::new("part");
    let header = r#"{"__metadata__":{"head":"b"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"c":{"dtype":"C64","shape":[1],"data_offsets":[3,11]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[7; 11]].concat();
    let path = folder.write("one.safetensors", &bytes);
    let found = |names: &[&str]| -> Result<Vec<String>> {
        let file = Checkpoint::read_where(&path, &CPU, |name| names.contains(&name))?;
        assert!(file.skipped.is_empty());
        Ok(file.tensors.into_keys().collect())
    };
    assert_eq!(found(&["a"])?, ["a"]);
    assert_eq!(found(&["a", "head", "none"])?, ["a", "b"]);
    let message = found(&["a", "c"]).expect_err("refused").to_string();
    assert!(message.contains("one.safetensors: c is C64, which candle has no type for"), "{message}");
    assert_eq!(Checkpoint::read(&path, &CPU)?.skipped.into_keys().collect::<Vec<_>>(), ["c"]);
    // Of several files only those that hold what is asked for.
    let index = br#"{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors", "d": "lost.safetensors"}}"#;
    let index = folder.write("model.safetensors.index.json", index);
    let file = Checkpoint::read_where(&folder.0, &CPU, |name| name == "b")?;
    assert_eq!(file.tensors.into_keys().collect::<Vec<_>>(), ["b"]);
    let message = Checkpoint::read(index, &CPU).expect_err("refused").to_string();
    assert!(message.contains("lost.safetensors: cannot be read"), "{message}");
    Ok(())
}

/// A file as it lies, its mode, and nothing beside it.
#[cfg(unix)]
#[test]
fn modes_and_links_stay() -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = Folder::new("modes");
    let at = |name: &str| folder.0.join(name);
    let mode =
        |name: &str| Ok::<u32, std::io::Error>(std::fs::metadata(at(name))?.permissions().mode() & 0o7777);
    // By the umask, as any new file.
    folder.write("any", b"");
    tensors(&["a"])?.write(at("new"))?;
    assert_eq!(mode("new")?, mode("any")?);
    for old in [0o600, 0o640, 0o664, 0o444, 0o777, 0o400, 0o2755] {
        std::fs::set_permissions(at("new"), std::fs::Permissions::from_mode(old))?;
        tensors(&["b"])?.write(at("new"))?;
        assert_eq!(mode("new")?, old);
    }
    // Links to a file, to a link, and to what is not there yet, relative and absolute.
    std::fs::create_dir(at("deep"))?;
    symlink("../new", at("deep/link"))?;
    symlink(at("deep/link"), at("far"))?;
    symlink("deep/later", at("early"))?;
    for (link, real) in [("deep/link", "new"), ("far", "new"), ("early", "deep/later")] {
        tensors(&[link])?.write(at(link))?;
        assert!(std::fs::symlink_metadata(at(link))?.is_symlink(), "{link}");
        assert!(!std::fs::symlink_metadata(at(real))?.is_symlink(), "{real}");
        assert!(Checkpoint::read(at(real), &CPU)?.tensors.contains_key(link));
    }
    assert_eq!((mode("new")?, mode("deep/later")?), (0o2755, mode("any")?));
    symlink("loop", at("loop"))?;
    symlink("no/where", at("lost"))?;
    for (path, part) in [
        (at("loop"), "more than 40 symbolic links"),
        (at("lost"), "No such file"),
        (at("deep"), "it is a folder"),
        (at("none/file"), "No such file"),
        (PathBuf::from("/dev/null"), "it is a device or pipe"),
        (at(".."), "it is a folder"),
    ] {
        let message = tensors(&["a"])?.write(&path).expect_err("refused").to_string();
        assert!(message.contains(part) && message.contains(&path.display().to_string()), "{part}: {message}");
    }
    // What fails leaves the old file and nothing else.
    let mut bad = tensors(&["a"])?;
    bad.tensors.insert("__metadata__".into(), Tensor::new(1f32, &CPU)?);
    let before = std::fs::read(at("new"))?;
    assert!(bad.write(at("new")).is_err());
    assert_eq!(std::fs::read(at("new"))?, before);
    let mut names: Vec<_> =
        std::fs::read_dir(&folder.0)?.map(|e| e.map(|e| e.file_name())).collect::<std::io::Result<_>>()?;
    names.sort();
    assert_eq!(names, ["any", "deep", "early", "far", "loop", "lost", "new"]);
    Ok(())
}

/// Types of the format, and one that is none.
const TYPES: [&str; 22] = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "U8",
    "I64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F6_E2M3",
    "F4",
    "U16",
    "I8",
    "C64",
    "U64",
    "U32",
    "I32",
    "I16",
    "F6_E3M2",
    "F8_E4M3FNUZ",
    "nothing",
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
        // U16 is read as u32, I8 as i16 and F8_E5M2 as f16; nothing else grows.
        let size: usize = file.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
        assert!(size <= 2 * bytes.len(), "{size} bytes of {}", bytes.len());
        loads(&file);
    }
}

/// What was read goes into a model of half precision wholly or not at all, and what goes in was finite if it had been.
fn loads(file: &Checkpoint) {
    let vars = VarMap::new();
    for (name, tensor) in &file.tensors {
        let dtype = if tensor.dtype().is_int() { DType::I16 } else { DType::F16 };
        let zeros = Tensor::zeros(tensor.dims(), dtype, &CPU).and_then(|zeros| Var::from_tensor(&zeros));
        vars.data().lock().expect("a lock").insert(name.clone(), zeros.expect("made"));
    }
    let loaded = file.load_into(&vars);
    for (name, var) in vars.data().lock().expect("a lock").iter() {
        let wide = |t: &Tensor| t.to_dtype(DType::F32)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let values = wide(var).expect("values");
        match loaded {
            Ok(()) => {
                for (a, b) in values.into_iter().zip(wide(&file.tensors[name]).expect("values")) {
                    // f64 below the smallest f32 is 0 in both.
                    assert!(
                        a.is_finite() == b.is_finite() && (a - b).abs() <= 1e-3 * b.abs() + 1e-7
                            || !b.is_finite(),
                        "{name}: {a} {b}"
                    );
                }
            }
            Err(_) => assert!(values.iter().all(|&value| value == 0.), "{name}"),
        }
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
    fn lying_headers_are_errors(length in any::<u64>(), start in any::<u64>(), end in any::<u64>(), dims in prop::collection::vec(any::<u64>(), 0..4), dtype in 0..TYPES.len(), right in any::<bool>()) {
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
    fn any_type_is_read_or_refused(fits in any::<bool>(), size in 0..64usize, count in 0..20usize, dtype in 0..TYPES.len(), data in prop::collection::vec(any::<u8>(), 160)) {
        // Of whole elements, or of any size.
        let size = if fits { count * [8, 4, 2, 1][size % 4] } else { size };
        let dtype = TYPES[dtype];
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,{size}]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&data[..size]);
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

    /// First bytes of other formats with anything behind them are errors that name the file.
    #[test]
    fn other_formats_are_errors(kind in 0..8usize, rest in prop::collection::vec(any::<u8>(), 0..64)) {
        let heads: [&[u8]; 8] = [b"PK\x03\x04", b"\x80\x02", b"GGUF", b"version https://git-lfs", b"<html", b"\x93NUMPY", b"\x1f\x8b", b"{"];
        let bytes = [heads[kind], &rest].concat();
        if let Err(error) = Checkpoint::parse("some file", &bytes, &CPU) {
            prop_assert!(error.to_string().starts_with("some file: "));
        } else {
            let plain = bytes[8] == b'{';
            prop_assert!(plain);
        }
    }
}

#[cfg(unix)]
proptest! {
    // A disk takes its time.
    #![proptest_config(ProptestConfig::with_cases(if std::env::var("KRONWAKE_FUZZ").is_ok() { 5_000 } else { 30 }))]

    /// Any mode and any chain of links: the file behind the last one is replaced, with its mode, and the links stay.
    #[test]
    fn files_are_replaced_where_they_are(mode in proptest::option::of(0..0o1000u32), links in prop::collection::vec((0..3usize, any::<bool>()), 0..6)) {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = Folder::new("chain");
        for name in ["0", "1", "2"] {
            std::fs::create_dir_all(folder.0.join(name))?;
        }
        let place = |index: usize| match index.checked_sub(1) {
            Some(link) => PathBuf::from(links[link].0.to_string()).join(format!("link{index}")),
            None => PathBuf::from("0/file"),
        };
        let at = |index: usize| folder.0.join(place(index));
        let permissions = |path: &std::path::Path| Ok::<u32, std::io::Error>(std::fs::metadata(path)?.permissions().mode() & 0o777);
        let new = folder.write("other", b"");
        let expected = mode.unwrap_or(permissions(&new)?);
        if let Some(mode) = mode {
            std::fs::write(at(0), b"old")?;
            std::fs::set_permissions(at(0), std::fs::Permissions::from_mode(mode))?;
        }
        for index in 1..=links.len() {
            let before = if links[index - 1].1 { at(index - 1) } else { PathBuf::from("..").join(place(index - 1)) };
            symlink(before, at(index))?;
        }
        let file = tensors(&["a", "b", "c"]).expect("made");
        file.write(at(links.len())).expect("written");
        prop_assert_eq!(permissions(&at(0))?, expected);
        prop_assert!(!std::fs::symlink_metadata(at(0))?.is_symlink());
        for index in 1..=links.len() {
            prop_assert!(std::fs::symlink_metadata(at(index))?.is_symlink());
        }
        std::fs::set_permissions(at(0), std::fs::Permissions::from_mode(0o600))?;
        prop_assert_eq!(Checkpoint::read(at(links.len()), &CPU).expect("read").tensors.len(), 3);
        let count: usize = ["0", "1", "2"].iter().map(|n| std::fs::read_dir(folder.0.join(n)).expect("a folder").count()).sum();
        prop_assert_eq!(count, 1 + links.len());
    }
}
