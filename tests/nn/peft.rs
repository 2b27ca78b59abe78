//! Adapters of Hugging Face's peft in this crate, and of this crate in peft. The values are in `golden/peft`, made by `golden/make_peft.py`.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{self, Lora, Module, ParamsLora, VarBuilder, VarMap};
use kronwake::optim::{NaturalGradient, Params};
use kronwake::tape::Tape;
use serde_json::{Value, json};
use std::path::PathBuf;

struct Model {
    emb: nn::Embedding,
    fc1: nn::Linear,
    block: nn::Linear,
    fc2: nn::Linear,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            emb: nn::embedding(7, 6, vb.pp("emb"))?,
            fc1: nn::linear(6, 5, vb.pp("fc1"))?,
            block: nn::linear(5, 5, vb.pp("block").pp("fc1"))?,
            fc2: nn::linear_no_bias(5, 3, vb.pp("fc2"))?,
        })
    }

    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let hidden = self.fc1.forward(&self.emb.forward(tokens)?)?.tanh()?;
        self.fc2.forward(&self.block.forward(&hidden)?.tanh()?)
    }
}

fn folder(name: &str) -> PathBuf {
    root().join("tests/golden/peft").join(name)
}

fn outputs(name: &str) -> Result<Tensor> {
    Ok(golden("peft/outputs.safetensors")?.tensors[name].clone())
}

/// The base with adapters that are not yet those of a file.
fn built(params: ParamsLora) -> Result<(VarMap, Lora, Model)> {
    let base = VarMap::new();
    let lora = Lora::new(params)?;
    let model = lora.build(|| Model::new(VarBuilder::from_varmap(&base, DType::F32, &Device::Cpu)))?;
    golden("peft/base.safetensors")?.load_into(&base)?;
    Ok((base, lora, model))
}

fn loaded(path: &PathBuf) -> Result<(VarMap, Lora, Model)> {
    let (base, lora, model) = built(ParamsLora::read(path)?)?;
    lora.load(path)?;
    Ok((base, lora, model))
}

fn tokens() -> Result<Tensor> {
    outputs("tokens")
}

const NAMES: [&str; 3] = ["patterns", "rslora", "expression"];

#[test]
fn files_of_peft_have_its_outputs() -> Result<()> {
    for name in NAMES {
        let expected = outputs(name)?;
        assert!(relative(&outputs("base")?, &expected)? > 0.1, "{name}: the adapters do something");
        // The folder, and the file in it.
        for path in [folder(name), folder(name).join("adapter_model.safetensors")] {
            let (base, lora, model) = loaded(&path)?;
            assert_close(&model.forward(&tokens()?)?, &expected, 2e-6, name);
            let merged = lora.merged(&golden("peft/base.safetensors")?)?;
            lora.merge(&base)?;
            assert_close(&model.forward(&tokens()?)?, &expected, 2e-6, name);
            let plain = VarMap::new();
            let model = Model::new(VarBuilder::from_varmap(&plain, DType::F32, &Device::Cpu))?;
            merged.load_into(&plain)?;
            assert_close(&model.forward(&tokens()?)?, &expected, 2e-6, name);
        }
    }
    let params = ParamsLora::read(folder("patterns"))?;
    assert_eq!((params.rank, params.alpha, params.rslora), (2, 3.0, false));
    assert_eq!(
        (&params.layers, &params.embeddings),
        (&vec!["fc1".into(), "fc2".into()], &vec!["emb".into()])
    );
    assert_eq!((&params.ranks, &params.alphas), (&vec![("fc2".into(), 3)], &vec![("fc1".into(), 5.0)]));
    Ok(())
}

/// What `Lora::save` writes, which `make_peft.py ours` has loaded by peft.
#[test]
fn files_of_this_crate_have_their_outputs_in_peft() -> Result<()> {
    let found = golden("peft/ours/outputs.safetensors")?;
    for name in NAMES {
        let (_, lora, model) = loaded(&folder(name))?;
        assert_close(&found.tensors[name], &model.forward(&tokens()?)?, 2e-6, name);
        let made = scratch(name);
        std::fs::create_dir(&made)?;
        lora.save(&made)?;
        let read = |path: PathBuf| -> Result<(Value, Checkpoint)> {
            let text = std::fs::read_to_string(path.join("adapter_config.json"))?;
            let config = serde_json::from_str(&text).map_err(candle_core::Error::wrap)?;
            Ok((config, Checkpoint::read(path.join("adapter_model.safetensors"), &Device::Cpu)?))
        };
        let ((config, file), (expected, theirs)) = (read(made.clone())?, read(folder("ours").join(name))?);
        assert_eq!(config, expected, "{name}");
        assert!(file.tensors.keys().eq(theirs.tensors.keys()));
        // Also those that peft has written: the same names and values.
        let (_, peft) = read(folder(name))?;
        for (key, tensor) in &file.tensors {
            assert_eq!(flat(tensor), flat(&theirs.tensors[key]), "{name} {key}");
            assert_eq!(flat(tensor), flat(&peft.tensors[key]), "{name} {key}");
        }
        let (_, _, again) = loaded(&made)?;
        assert_eq!(flat(&again.forward(&tokens()?)?), flat(&model.forward(&tokens()?)?));
        // A file of another name has it all in its metadata.
        let alone = scratch("alone");
        lora.save(&alone)?;
        let (_, _, again) = loaded(&alone)?;
        assert_eq!(flat(&again.forward(&tokens()?)?), flat(&model.forward(&tokens()?)?));
        assert!(!alone.with_file_name("adapter_config.json").exists());
    }
    Ok(())
}

/// Run with `KRONWAKE_GOLDEN=1` to write what `make_peft.py ours` then loads.
#[test]
#[ignore = "writes tests/golden/peft/ours"]
fn writes_ours() -> Result<()> {
    if std::env::var_os("KRONWAKE_GOLDEN").is_some() {
        for name in NAMES {
            let (_, lora, _) = loaded(&folder(name))?;
            std::fs::create_dir_all(folder("ours").join(name))?;
            lora.save(folder("ours").join(name))?;
        }
    }
    Ok(())
}

#[test]
fn no_file_is_read_at_the_wrong_strength() -> Result<()> {
    let load = |params: ParamsLora, path: &PathBuf| built(params)?.1.load(path);
    let params = ParamsLora::read(folder("rslora"))?;
    let with = |alpha, rslora| ParamsLora { alpha, rslora, ..params.clone() };
    assert_says(
        load(with(16.0, true), &folder("rslora")),
        &[
            "lora_alpha is 4 with use_rslora",
            "expected 16 with use_rslora",
            "4 times as strong",
            "ParamsLora::read",
        ],
    );
    assert_says(load(with(4.0, false), &folder("rslora")), &["expected 4, for layer block.fc1"]);
    // Half the rank at half the alpha would be as strong, but is another adapter.
    let other = ParamsLora { rank: 1, alpha: 2.0, rslora: false, ..params.clone() };
    assert_says(load(other, &folder("rslora")), &["lora_alpha is 4 with use_rslora"]);
    // A strength by other numbers is the same strength.
    load(with(4.0 / 2f64.sqrt() * 2f64.sqrt(), true), &folder("rslora"))?;
    load(with(4.0 * 2f64.sqrt(), false), &folder("rslora"))?;

    // Away from its configuration a file of peft has no strength.
    let alone = scratch("alone.safetensors");
    std::fs::copy(folder("rslora").join("adapter_model.safetensors"), &alone)?;
    for result in [load(params.clone(), &alone), ParamsLora::read(&alone).map(drop)] {
        assert_says(result, &["nothing says how strong these adapters are", "adapter_config.json"]);
    }
    // In a folder the configuration beside the file counts, whatever its own metadata say.
    let changed = scratch("edited");
    std::fs::create_dir(&changed)?;
    loaded(&folder("rslora"))?.1.save(&changed)?;
    let config = changed.join("adapter_config.json");
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, text.replace("\"lora_alpha\": 4", "\"lora_alpha\": 5"))?;
    assert_eq!(ParamsLora::read(&changed)?.alpha, 5.0);
    assert_says(load(params.clone(), &changed), &["lora_alpha is 5 with use_rslora", "expected 4"]);
    // What is not supported is named.
    let folder_of = |change: &dyn Fn(&mut Value)| -> Result<PathBuf> {
        let copy = scratch("changed");
        std::fs::create_dir(&copy)?;
        std::fs::copy(
            folder("rslora").join("adapter_model.safetensors"),
            copy.join("adapter_model.safetensors"),
        )?;
        let text = std::fs::read_to_string(folder("rslora").join("adapter_config.json"))?;
        let mut config: Value = serde_json::from_str(&text).map_err(candle_core::Error::wrap)?;
        change(&mut config);
        std::fs::write(copy.join("adapter_config.json"), config.to_string())?;
        Ok(copy)
    };
    for (key, value) in
        [("use_dora", json!(true)), ("bias", json!("all")), ("modules_to_save", json!(["fc2"]))]
    {
        let changed = folder_of(&|config| config[key] = value.clone())?;
        for result in [load(params.clone(), &changed), ParamsLora::read(&changed).map(drop)] {
            assert_says(result, &[key, "not supported"]);
        }
    }
    let changed = folder_of(&|config| config["target_modules"] = json!(["fc1"]))?;
    assert_says(ParamsLora::read(&changed), &["adapters of layer fc2", "target_modules"]);
    let changed = folder_of(&|config| config["exclude_modules"] = json!(["block.fc1"]))?;
    assert_says(ParamsLora::read(&changed), &["adapters of layer block.fc1"]);
    let changed = folder_of(&|config| config["r"] = json!(3))?;
    assert_says(ParamsLora::read(&changed), &["have rank 2, expected 3"]);
    std::fs::remove_file(changed.join("adapter_config.json"))?;
    std::fs::create_dir(changed.join("adapter_config.json"))?;
    assert_says(ParamsLora::read(&changed), &["adapter_config.json", "cannot be read"]);
    let base = root().join("tests/golden/peft/base.safetensors");
    assert_says(ParamsLora::read(base), &["no adapters"]);
    Ok(())
}

/// Adapters of an embedding: the base's table is a constant, they are tapped, and have the gradients of differences.
#[test]
fn embeddings() -> Result<()> {
    let (base, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&base, DType::F64, &Device::Cpu);
    let params = ParamsLora {
        rank: 2,
        alpha: 3.0,
        layers: vec!["fc*".into(), "*.fc1".into()],
        exclude: vec!["fc2".into()],
        embeddings: vec!["emb".into()],
        ..Default::default()
    };
    let lora = Lora::new(params.clone())?;
    let model = lora.build(|| tape.build(|| Model::new(vb.clone())))?;
    assert_eq!(lora.layers(), ["block.fc1", "emb", "fc1"]);
    let plain = Model::new(vb)?;
    assert_eq!(flat(&model.forward(&tokens()?)?), flat(&plain.forward(&tokens()?)?));
    let opt = NaturalGradient::from_varmap(lora.varmap(), Params::k_fac(&tape))?;
    let blocks = opt.block_names();
    for name in ["emb.lora_embedding_A", "emb.lora_embedding_B"] {
        assert!(blocks.contains(&name), "{blocks:?}");
    }
    for (i, var) in lora.varmap().data().lock().unwrap().values().enumerate() {
        var.set(&random(20 + i as u64, var.dims())?)?;
    }
    let loss = || model.forward(&tokens()?)?.sqr()?.sum_all();
    let grads = loss()?.backward()?;
    let frozen = ["emb.weight", "fc1.weight", "block.fc1.weight"];
    for (name, var) in base.data().lock().unwrap().iter().filter(|(name, _)| frozen.contains(&name.as_str()))
    {
        assert!(grads.get(var).is_none(), "{name}");
    }
    for (name, var) in lora.varmap().data().lock().unwrap().iter() {
        let (found, values) = (flat(grads.get(var).unwrap()), flat(var));
        for i in 0..values.len() {
            let at = |h: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] += h;
                var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu)?)?;
                loss()?.to_scalar()
            };
            let difference = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            at(0.0)?;
            assert!((found[i] - difference).abs() < 1e-7 * (1.0 + difference.abs()), "{name} {i}");
        }
    }
    // A single number, and many.
    let one = Tensor::new(3u32, &Device::Cpu)?;
    let three = model.emb.forward(&Tensor::new(&[3u32], &Device::Cpu)?)?;
    assert_eq!(flat(&model.emb.forward(&one)?), flat(&three));
    let tuned = model.forward(&tokens()?)?;
    lora.merge(&base)?;
    assert_close(&plain.forward(&tokens()?)?, &tuned, 1e-13, "merged");

    let message = |params: ParamsLora| built(params).map(drop);
    let all = || ParamsLora::default();
    assert_says(
        message(ParamsLora { rank: 2, embeddings: vec!["table".into()], ..all() }),
        &["\"table\" matches no embedding", "emb"],
    );
    assert_says(
        message(ParamsLora { rank: 2, ranks: vec![("head".into(), 1)], ..all() }),
        &["\"head\"", "matches no layer"],
    );
    assert_says(
        message(ParamsLora { ranks: vec![("fc1".into(), 0)], ..all() }),
        &["rank of 1 or more", "rank 0"],
    );
    Ok(())
}

/// The base's linear weights as GPT-2 has them.
#[test]
fn weights_of_inputs_times_outputs() -> Result<()> {
    let path = folder("expression");
    let (_, lora, _) = loaded(&path)?;
    let params = ParamsLora { fan_in_fan_out: true, ..ParamsLora::read(&path)? };
    let (_, turned, _) = built(params)?;
    turned.load(&path)?;
    let base = golden("peft/base.safetensors")?;
    let mut transposed = base.clone();
    let weight = transposed.tensors.get_mut("block.fc1.weight").unwrap();
    *weight = weight.t()?.contiguous()?;
    let (plain, other) = (lora.merged(&base)?, turned.merged(&transposed)?);
    assert_eq!(flat(&plain.tensors["block.fc1.weight"].t()?), flat(&other.tensors["block.fc1.weight"]));
    let made = scratch("turned");
    std::fs::create_dir(&made)?;
    turned.save(&made)?;
    assert!(ParamsLora::read(&made)?.fan_in_fan_out);
    Ok(())
}
