use super::*;
use candle_core::{DType, Var};
use candle_nn::VarMap;
use std::sync::mpsc;
use std::time::Duration;

const CPU: Device = Device::Cpu;

/// A file's bytes: name, type, shape and data of each tensor, and the metadata in JSON.
fn raw(tensors: &[(&str, &str, &[usize], &[u8])], metadata: &str) -> Vec<u8> {
    let (mut entries, mut data) = (vec![format!("\"__metadata__\":{metadata}")], vec![]);
    for (name, dtype, dims, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let end = data.len();
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn model(vars: &[(&str, Tensor)]) -> Result<VarMap> {
    let map = VarMap::new();
    let made = vars.iter().map(|(name, t)| Ok((name.to_string(), Var::from_tensor(t)?)));
    let made = made.collect::<Result<Vec<_>>>()?;
    map.data().lock().expect("not poisoned").extend(made);
    Ok(map)
}

fn values(map: &VarMap, name: &str) -> Result<Vec<f64>> {
    cast(map.data().lock().expect("not poisoned")[name].as_tensor(), DType::F64, &CPU)?
        .flatten_all()?
        .to_vec1()
}

fn zeros(dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::zeros(dims, dtype, &CPU)
}

/// A number of a sign, `exponent` bits with a bias and `mantissa` bits, by the definition.
fn float8(bits: u8, mantissa: u32, bias: i32) -> f64 {
    let sign = if bits & 0x80 == 0 { 1. } else { -1. };
    let fraction = f64::from(bits & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    let exponent = i32::from((bits & 0x7f) >> mantissa);
    sign * if exponent == 0 {
        fraction * 2f64.powi(1 - bias)
    } else {
        (1. + fraction) * 2f64.powi(exponent - bias)
    }
}

#[test]
fn types_that_candle_lacks() -> Result<()> {
    let all: Vec<u8> = (0..=255).collect();
    let bytes = raw(
        &[
            ("bool", "BOOL", &[2, 2], &[0, 1, 1, 0]),
            ("i8", "I8", &[3], &[0xff, 0x80, 0x7f]),
            ("u16", "U16", &[1], &[0xff, 0xff]),
            ("u64", "U64", &[2], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
            ("large", "U64", &[1], &[0xff; 8]),
            ("e5m2", "F8_E5M2", &[256], &all),
            ("e4m3", "F8_E4M3", &[256], &all),
            ("c64", "C64", &[2], &[0; 16]),
            ("f4", "F4", &[4], &[0; 2]),
            ("f6", "F6_E2M3", &[4], &[0; 3]),
            ("scale", "F8_E8M0", &[1], &[7]),
            ("fnuz", "F8_E4M3FNUZ", &[1], &[7]),
        ],
        "{}",
    );
    let file = Checkpoint::parse("x", &bytes, &CPU)?;
    let read = |name: &str| cast(&file.tensors[name], DType::F64, &CPU)?.flatten_all()?.to_vec1::<f64>();
    assert_eq!((read("bool")?, file.tensors["bool"].dims()), (vec![0., 1., 1., 0.], &[2, 2][..]));
    assert_eq!((read("i8")?, read("u16")?), (vec![-1., -128., 127.], vec![65535.]));
    assert_eq!(file.tensors["u64"].to_vec1::<i64>()?, [5, 1 << 40]);
    for (bits, value) in all.iter().zip(read("e5m2")?) {
        match bits & 0x7f {
            0x7c => assert_eq!(value, f64::INFINITY * float8(bits & 0x80 | 0x3c, 2, 15)),
            0x7d.. => assert!(value.is_nan(), "{bits}"),
            _ => assert_eq!(value, float8(*bits, 2, 15), "{bits}"),
        }
    }
    for (bits, value) in all.iter().zip(read("e4m3")?) {
        match bits & 0x7f {
            0x7f => assert!(value.is_nan(), "{bits}"),
            _ => assert_eq!(value, float8(*bits, 3, 7), "{bits}"),
        }
    }
    let skipped: Vec<_> = file.skipped.iter().map(|(name, why)| format!("{name} is {why}")).collect();
    let lacks = |name: &str, dtype: &str| format!("{name} is {dtype}, which candle has no type for");
    assert_eq!(
        skipped,
        [
            lacks("c64", "C64"),
            lacks("f4", "F4"),
            lacks("f6", "F6_E2M3"),
            lacks("fnuz", "F8_E4M3FNUZ"),
            "large is U64 with values of 2^63 and more, which no type of candle holds".into(),
            lacks("scale", "F8_E8M0"),
        ]
    );
    // A Var that asks for one of these says so, and nothing else is lost by it.
    let vars = model(&[("c64", zeros(&[2], DType::F32)?)])?;
    let message = file.load_partly(&vars).expect_err("refused").to_string();
    assert!(message.contains("c64 is C64, which candle has no type for"), "{message}");
    Ok(())
}

/// candle's own conversion of some of these does not return.
#[test]
fn fp8_goes_into_any_float_in_time() -> Result<()> {
    let all: Vec<u8> = (0..=255).collect();
    let file = Checkpoint::parse("x", &raw(&[("w", "F8_E4M3", &[256], &all)], "{}"), &CPU)?;
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let (file, (done, wait)) = (file.clone(), mpsc::channel());
        std::thread::spawn(move || {
            let found = zeros(&[256], dtype).and_then(|zeros| {
                let vars = model(&[("w", zeros)])?;
                file.load_into(&vars)?;
                values(&vars, "w")
            });
            done.send(found)
        });
        let found = wait.recv_timeout(Duration::from_secs(20)).expect("in time")?;
        for (bits, value) in all.iter().zip(found) {
            // All are exact in all of these.
            let right = if bits & 0x7f == 0x7f { f64::NAN } else { float8(*bits, 3, 7) };
            assert!(value == right || value.is_nan() && right.is_nan(), "{dtype:?} {bits}: {value}");
        }
    }
    Ok(())
}

#[test]
fn nothing_changes_when_one_does_not_fit() -> Result<()> {
    let ones = Tensor::ones((2, 2), DType::F32, &CPU)?;
    let file = |name: &str, tensor: Tensor| {
        let tensors = [("a", ones.clone()), (name, tensor), ("z", ones.clone())];
        Checkpoint { tensors: tensors.map(|(n, t)| (n.to_string(), t)).into(), ..Default::default() }
    };
    let f64s = |values: &[f64]| Tensor::new(values, &CPU);
    let large = f64s(&[70000., 1., -65520., 65519.])?;
    let bf16 = f64s(&[3.39618e38, 1e39, -3.39e38, 1.])?;
    let f32 = f64s(&[3.5e38, f64::INFINITY, f64::NAN, 1.])?;
    for (value, dtype, part) in [
        (large.clone(), DType::F16, "m is F64 with 2 of 4 elements beyond the largest number of F16"),
        (large.to_dtype(DType::F32)?, DType::F16, "m is F32 with 2 of 4"),
        (large.to_dtype(DType::BF16)?, DType::F16, "m is BF16 with 3 of 4"),
        (bf16.clone(), DType::BF16, "m is F64 with 2 of 4 elements beyond the largest number of BF16"),
        (f32, DType::F32, "m is F64 with 1 of 4 elements beyond the largest number of F32"),
        (f64s(&[1., 2.])?, DType::F32, "m has shape [2], expected [4]"),
        (Tensor::new(&[1i64, 2, 3, 4], &CPU)?, DType::F32, "m is I64, expected floating point"),
        (f64s(&[1., 2., 3., 4.])?, DType::I64, "m is F64, expected integers"),
        (Tensor::new(&[1i64, 300, -1, 4], &CPU)?, DType::U8, "m is I64 with 2 values that U8 does not hold"),
    ] {
        let vars = model(&[
            ("a", zeros(&[2, 2], DType::F32)?),
            ("m", zeros(&[4], dtype)?),
            ("z", zeros(&[2, 2], DType::F32)?),
        ])?;
        let file = file("m", value);
        for message in [file.load_into(&vars).err(), file.load_partly(&vars).map(drop).err()] {
            let message = message.map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        for (name, count) in [("a", 4), ("m", 4), ("z", 4)] {
            assert_eq!(values(&vars, name)?, vec![0.; count], "{part}");
        }
    }
    // To the last number that is rounded to the largest, and what is infinite already.
    for (dtype, values_in, largest) in [
        (DType::F16, [65519.9, f64::INFINITY], 65504.),
        (DType::BF16, [3.39e38, f64::NEG_INFINITY], 3.3895313892515355e38),
    ] {
        let vars = model(&[
            ("a", zeros(&[2, 2], DType::F32)?),
            ("m", zeros(&[2], dtype)?),
            ("z", zeros(&[2, 2], DType::F32)?),
        ])?;
        file("m", f64s(&values_in)?).load_into(&vars)?;
        assert_eq!(values(&vars, "m")?, [largest, values_in[1]]);
    }
    let vars = model(&[
        ("a", zeros(&[2, 2], DType::F32)?),
        ("m", zeros(&[3], DType::U32)?),
        ("z", zeros(&[2, 2], DType::F32)?),
    ])?;
    file("m", Tensor::new(&[1i64, 1 << 31, 3], &CPU)?).load_into(&vars)?;
    assert_eq!(values(&vars, "m")?, [1., 2147483648., 3.]);
    Ok(())
}

/// A checkpoint of the model's own memory, in another order, and in one that is a part of it.
#[test]
fn vars_can_be_loaded_from_each_other() -> Result<()> {
    let vars = model(&[("a", Tensor::new(&[1f32, 2.], &CPU)?), ("b", Tensor::new(&[3f32, 4.], &CPU)?)])?;
    let var = |name: &str| vars.data().lock().expect("not poisoned")[name].as_detached_tensor();
    let swapped = [("a".to_string(), var("b")), ("b".to_string(), var("a"))];
    Checkpoint { tensors: swapped.into(), ..Default::default() }.load_into(&vars)?;
    assert_eq!((values(&vars, "a")?, values(&vars, "b")?), (vec![3., 4.], vec![1., 2.]));
    let same = [("a".to_string(), var("a")), ("b".to_string(), var("b"))];
    Checkpoint { tensors: same.into(), ..Default::default() }.load_into(&vars)?;
    assert_eq!((values(&vars, "a")?, values(&vars, "b")?), (vec![3., 4.], vec![1., 2.]));
    Ok(())
}

#[test]
fn buffers_are_left_and_ties_resolve() -> Result<()> {
    let one = 1f32.to_le_bytes();
    let bytes = raw(
        &[
            ("wte.weight", "F32", &[1], &one),
            ("bn.num_batches_tracked", "I64", &[], &[9, 0, 0, 0, 0, 0, 0, 0]),
            ("attn.mask", "BOOL", &[1], &[1]),
            ("freqs", "C64", &[1], &[0; 8]),
        ],
        r#"{"lm_head.weight": "wte.weight", "format": "pt", "gone": "nowhere"}"#,
    );
    let file = Checkpoint::parse("x", &bytes, &CPU)?;
    assert_eq!(file.get("lm_head.weight").map(|t| t.dims()), Some(&[1][..]));
    assert!(file.get("gone").is_none() && file.get("format").is_none() && file.get("other").is_none());
    let left = ["attn.mask", "bn.num_batches_tracked", "freqs"].map(String::from).to_vec();
    // Models that tie the two themselves, by either name, or do not.
    for names in [&["wte.weight"][..], &["lm_head.weight"], &["wte.weight", "lm_head.weight"]] {
        let vars = names.iter().map(|n| Ok((*n, zeros(&[1], DType::F32)?))).collect::<Result<Vec<_>>>()?;
        let vars = model(&vars)?;
        file.load_into(&vars)?;
        for name in names {
            assert_eq!(values(&vars, name)?, [1.], "{name}");
        }
        assert_eq!(file.load_partly(&vars)?, Differences { missing: vec![], unexpected: left.clone() });
    }
    let vars = model(&[("lm_head.weight", zeros(&[2], DType::F32)?)])?;
    let message = file.load_into(&vars).expect_err("refused").to_string();
    assert!(
        message.contains("lm_head.weight (in the file wte.weight) has shape [1], expected [2]"),
        "{message}"
    );
    // Parameters that no Var takes are still an error, and so are Vars of integers that the file lacks.
    let vars =
        model(&[("bn.num_batches_tracked", zeros(&[], DType::I64)?), ("count", zeros(&[], DType::I64)?)])?;
    let message = file.load_into(&vars).expect_err("refused").to_string();
    let first = message.lines().next().unwrap_or_default();
    assert!(first.ends_with("missing count []; unexpected wte.weight"), "{message}");
    Ok(())
}

#[test]
fn other_formats_are_recognised() -> Result<()> {
    let zip = |name: &str| [b"PK\x03\x04\x00\x00\x08\x08", [0; 18].as_slice(), name.as_bytes()].concat();
    let tar = [b"sys_info".as_slice(), &[0; 249], b"ustar\x00"].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "an empty one; copy or download it again"),
        (zip("archive/data.pkl"), "a zip archive, as torch.save writes it (pytorch_model.bin"),
        (zip("arr_0.npy"), "NumPy arrays (.npz)"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "safetensors.torch.save_file"),
        (b"\x80\x05\x95\x00\x00".to_vec(), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), "git lfs pull"),
        (b"\n  <!DOCTYPE html><html>".to_vec(), "a web page in place of"),
        (b"<HTML>".to_vec(), "a web page in place of"),
        (b"GGUF\x03\x00\x00\x00{\x00\x00\x00\x00\x00\x00\x00".to_vec(), "a GGUF file"),
        (b"\x93NUMPY\x01\x00".to_vec(), "a NumPy array (.npy)"),
        (b"\x89HDF\r\n\x1a\n".to_vec(), "an HDF5 file"),
        (b"\x1f\x8b\x08".to_vec(), "compressed"),
        (tar, "a tar archive"),
        (b"{\"error\": \"Invalid credentials\"}".to_vec(), "JSON text"),
        (vec![0; 200], "zeros at its start, as an unfinished download"),
        (b"junk".to_vec(), "not a whole safetensors file (4 bytes)"),
    ];
    let folder = std::env::temp_dir().join(format!("kronwake-foreign-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("model.safetensors");
    for (bytes, part) in cases {
        std::fs::write(&path, &bytes)?;
        // SAFETY: nobody else knows the file.
        let mapped =
            if bytes.is_empty() { None } else { Some(unsafe { Checkpoint::read_mapped(&path, &CPU) }) };
        for found in [Checkpoint::read(&path, &CPU), Checkpoint::parse("model", &bytes, &CPU)]
            .into_iter()
            .chain(mapped)
        {
            let message = found.expect_err("refused").to_string();
            assert!(message.contains("model") && message.contains(part), "{part:?} is not in {message:?}");
        }
    }
    // Files whose headers' lengths look like other formats' first bytes are read.
    for length in [0x0280u64, 0x0480, 0x8b1f] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(format!("{:<1$}", "{}", length as usize).as_bytes());
        std::fs::write(&path, &bytes)?;
        assert!(Checkpoint::read(&path, &CPU)?.tensors.is_empty());
    }
    // Damaged ones are not called something else; cut ones say how much is missing.
    let whole = raw(&[("a", "U8", &[100], &[1; 100])], "{}");
    std::fs::write(&path, &whole[..whole.len() - 60])?;
    let message = Checkpoint::read(&path, &CPU).expect_err("refused").to_string();
    let part = format!("{} bytes, expected {} by its header", whole.len() - 60, whole.len());
    assert!(message.contains(&part), "{part:?} is not in {message:?}");
    for (name, part) in [
        ("nothing.txt", "a folder without model.safetensors or model.safetensors.index.json"),
        ("pytorch_model.bin", "it holds pytorch_model.bin, which is of another format"),
        ("model-00001-of-00002.safetensors", "the index is missing"),
        ("adapter_model.safetensors", "it holds an adapter of PEFT, adapter_model.safetensors"),
        ("unet.safetensors.index.json", "give its index unet.safetensors.index.json"),
    ] {
        std::fs::remove_dir_all(&folder)?;
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(name), b"")?;
        let message = Checkpoint::read(&folder, &CPU).expect_err("refused").to_string();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// The layout is the safetensors crate's.
#[test]
fn files_are_those_of_the_format_s_crate() -> Result<()> {
    let mut file = Checkpoint::default();
    let dtypes = [
        DType::U8,
        DType::F64,
        DType::F8E4M3,
        DType::BF16,
        DType::I64,
        DType::F16,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::F32,
    ];
    for (index, dtype) in dtypes.into_iter().enumerate() {
        let values = Tensor::arange(0f32, 6., &CPU)?.reshape((2, 3))?.to_dtype(dtype)?;
        // One that is a view.
        let values = if index % 2 == 0 { values } else { values.t()? };
        file.tensors.insert(format!("{index}\"\\ö"), values);
    }
    file.tensors.insert("empty".into(), zeros(&[0, 3], DType::F32)?);
    file.tensors.insert("scalar".into(), zeros(&[], DType::F32)?);
    file.metadata.insert("a\nb".into(), "c\"".into());
    let path = std::env::temp_dir().join(format!("kronwake-layout-{}", std::process::id()));
    file.write(&path)?;
    let bytes = std::fs::read(&path)?;
    std::fs::remove_file(&path)?;
    let expected = safetensors::serialize(&file.tensors, Some(file.metadata.clone())).expect("written");
    assert!(bytes == expected);
    let found = Checkpoint::parse("x", &bytes, &CPU)?;
    assert_eq!((found.metadata, found.tensors.len()), (file.metadata, file.tensors.len()));
    Ok(())
}
