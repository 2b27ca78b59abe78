//! The example `tune` on nets that were fine-tuned.

use crate::folder::Folder;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::evidence::{Curvature, Estimator, Examples, Hyper, Outputs, Parts, Problem, Structure};
use kronwake::nn::{
    Activation, AdamW, Lora, Module, Optimizer, ParamsAdamW, ParamsLora, VarBuilder, VarMap, init, loss,
};
use kronwake::tape::{Likelihood, Tape};
use kronwake_cli::models::bert::{Bert, Config};
use kronwake_cli::models::vit;
use serde_json::{Value, json};

fn run(folder: &Folder, program: &str, line: &str) {
    let output = folder.command_of(program, line).output().expect("a program");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}\n{out}\n{err}");
}

fn tune(folder: &Folder, line: &str) -> Value {
    run(folder, "tune", &format!("{line} --json out.json"));
    serde_json::from_slice(&folder.read("out.json")).expect("json")
}

fn read(folder: &Folder, file: &str) -> Result<Checkpoint> {
    Checkpoint::read(folder.0.join(file), &Device::Cpu)
}

fn squares(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}

#[track_caller]
fn near(found: &Value, expected: f64) {
    let found = found.as_f64().expect("a number");
    assert!((found - expected).abs() < 1e-5 * expected.abs().max(1e-3), "{found}, expected {expected}");
}

/// Scores of held-out predictions are there, and make sense.
fn check_held_out(found: &Value, examples: usize) {
    assert_eq!(found["held_out"]["examples"], json!(examples));
    for key in ["net", "probit", "bridge", "sampled"] {
        let of = |name: &str| found["held_out"][key][name].as_f64().expect("a number");
        assert!(of("nll") > 0.0 && of("nll") < 5.0, "{key} {}", of("nll"));
        assert!((0.0..=1.0).contains(&of("calibration_error")) && (0.0..=1.0).contains(&of("accuracy")));
    }
}

const NET: &str = "--model mlp:784-16-10 --threads 1";

/// The prior's mean is the base, and zero for the new last layer.
#[test]
fn a_net_that_was_fine_tuned() -> Result<()> {
    let folder = Folder::new("tuned-net");
    run(&folder, "finetune", &format!("{NET} --optimizer adamw --base-epochs 1 --epochs 1"));
    let (base, tuned) = (read(&folder, "base.safetensors")?, read(&folder, "tuned-adamw.safetensors")?);
    let line =
        format!("{NET} --checkpoint base.safetensors --tuned tuned-adamw.safetensors --steps 5 --first 500");
    let found = tune(&folder, &line);
    let of = |name: &str| (&tuned.tensors[name], &base.tensors[name]);
    let (mut moved, mut whole) = (0.0, 0.0);
    for name in ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"] {
        let (after, before) = of(name);
        whole += squares(after)?;
        moved += if name.starts_with("fc2") { squares(after)? } else { squares(&(after - before)?)? };
    }
    near(&found["before"]["log_prior"], -0.5 * moved);
    assert_eq!((&found["bound"], &found["examples"]), (&json!("rotated"), &json!(500)));
    check_held_out(&found, 500);
    near(&tune(&folder, &format!("{line} --prior-mean zero"))["before"]["log_prior"], -0.5 * whole);
    // The new last layer alone has a mean of zero.
    let last = tune(&folder, &format!("{line} --part fc2.*"));
    near(&last["before"]["log_prior"], -0.5 * (squares(of("fc2.weight").0)? + squares(of("fc2.bias").0)?));
    // The posterior is that of the bound unless another is asked for; all predictions are shown, and one is the result.
    let nll = |found: &Value, key: &str| found["held_out"][key]["nll"].as_f64().expect("a number");
    let exact = tune(&folder, &format!("{line} --part fc2.* --posterior full --predictive sampled"));
    assert_eq!(
        (&last["held_out"]["after"], &exact["held_out"]["after"]),
        (&json!("probit"), &json!("sampled"))
    );
    assert_eq!(nll(&exact, "net"), nll(&last, "net"));
    assert_ne!(nll(&exact, "probit"), nll(&last, "probit"));
    let rotated = tune(&folder, &format!("{line} --part fc2.* --posterior rotated"));
    assert_eq!(rotated["held_out"], last["held_out"]);
    Ok(())
}

/// An encoder of a few numbers, its tokenizer, and sentences whose first word is the label but for some.
fn write_encoder(folder: &Folder) -> Result<()> {
    let config = json!({
        "vocab_size": 8, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 6, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12
    });
    let words = ["[UNK]", "good", "bad", "day", "night", "one", "more"];
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(i, word)| (word.to_string(), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]" }
    });
    let encoder = folder.0.join("encoder");
    std::fs::create_dir_all(&encoder)?;
    std::fs::write(encoder.join("config.json"), config.to_string())?;
    std::fs::write(encoder.join("tokenizer.json"), tokenizer.to_string())?;
    let vars = VarMap::new();
    Bert::new(&Config::parse(&config)?, &VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    init::seeded_normal(&init::named(&vars)?, 1)?;
    Checkpoint::from_varmap(&vars)?.write(encoder.join("model.safetensors"))?;
    let line = |i: usize| {
        let label = if i.is_multiple_of(11) { 1 - i % 2 } else { i % 2 };
        let rest = ["day", "night one", "one more day"][i % 3];
        format!("{} {rest}\t{}\n", ["good", "bad"][label], i % 2)
    };
    std::fs::write(folder.0.join("sentences.tsv"), (0..60).map(line).collect::<String>())?;
    Ok(())
}

/// Fine-tuned in the same command, and read from its files: the same numbers. The prior's mean is the adapters' start.
#[test]
fn adapters_of_an_encoder() -> Result<()> {
    let folder = Folder::new("tuned-encoder");
    write_encoder(&folder)?;
    let encoder = "--model bert --checkpoint encoder --data sentences.tsv --threads 1 --seed 3 --steps 20 --tune-temperature";
    let found = tune(&folder, &format!("{encoder} --part adapters --lora 2 --epochs 3"));
    let layer = "encoder.layer.0.attention.self";
    let names: Vec<String> = ["query", "value"]
        .iter()
        .flat_map(|part| ["A", "B"].map(|matrix| format!("{layer}.{part}.lora_{matrix}.weight")))
        .collect();
    assert_eq!(found["tensors"], json!(names));
    check_held_out(&found, 12);
    assert_ne!(found["temperature"], json!(1.0));
    assert!(found["log_evidence"].as_f64() > found["before"]["log_evidence"].as_f64());
    let again = tune(&folder, &format!("{encoder} --part adapters --tuned tuned-adamw.safetensors"));
    assert_eq!(again, found);
    let (vars, adapters) = (VarMap::new(), read(&folder, "adapters-adamw.safetensors")?);
    let lora = Lora::new(ParamsLora {
        rank: 2,
        layers: vec!["*.query".into(), "*.value".into()],
        seed: 3,
        ..Default::default()
    })?;
    let config: Value = serde_json::from_slice(&folder.read("encoder/config.json")).expect("json");
    let config = Config::parse(&config)?;
    lora.build(|| Bert::new(&config, &VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)))?;
    let (mut moved, mut whole) = (0.0, 0.0);
    for (name, start) in Checkpoint::from_varmap(lora.varmap())?.tensors {
        let after = &adapters.tensors[&format!("base_model.model.{name}")];
        moved += squares(&(after - start)?)?;
        whole += squares(after)?;
    }
    near(&found["before"]["log_prior"], -0.5 * moved);
    let tuned = format!("{encoder} --tuned tuned-adamw.safetensors");
    let zero = tune(&folder, &format!("{tuned} --part adapters --prior-mean zero"));
    near(&zero["before"]["log_prior"], -0.5 * whole);
    // Without --part the new last layer belongs to it.
    let all = tune(&folder, &tuned);
    assert_eq!(all["tensors"].as_array().map(Vec::len), Some(6));
    // Another base is told by the weights that were merged.
    let mut other = read(&folder, "encoder/model.safetensors")?;
    let name = format!("{layer}.query.weight");
    let changed = (&other.tensors[&name] * 2.0)?;
    other.tensors.insert(name, changed);
    other.write(folder.0.join("encoder/model.safetensors"))?;
    let output = folder.command_of("tune", &tuned).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--checkpoint has to be the base that was fine-tuned"), "{error}");
    Ok(())
}

#[test]
fn wrong_lines_are_sentences() -> Result<()> {
    let folder = Folder::new("tuned-wrong");
    let mut net = Checkpoint::default();
    for (name, dims) in
        [("fc1.weight", &[16, 784][..]), ("fc1.bias", &[16]), ("fc2.weight", &[10, 16]), ("fc2.bias", &[10])]
    {
        net.tensors.insert(name.into(), Tensor::zeros(dims, DType::F32, &Device::Cpu)?);
    }
    net.write(folder.0.join("net.safetensors"))?;
    let net = "--model mlp:784-16-10";
    for (line, code, part) in [
        (format!("{net} --tuned net.safetensors"), 1, "--tuned needs --checkpoint"),
        (
            format!("{net} --tuned net.safetensors --checkpoint net.safetensors --part adapters"),
            1,
            "--part adapters: the model has none",
        ),
        (format!("{net} --data s.tsv"), 1, "--data is for --model bert"),
        (format!("{net} --prior-mean zero"), 1, "--prior-mean is for a net that was fine-tuned"),
        (format!("{net} --lora 4"), 1, "--lora is for a net that was fine-tuned"),
        ("--model vit --examples x.safetensors".into(), 1, "--examples does not apply"),
        ("--model bert".into(), 1, "--model bert needs --checkpoint DIR and --data FILE"),
        (format!("{net} --tuned net.safetensors --lora 4"), 2, "cannot be used with"),
        ("--model decoder".into(), 2, "or vit, bert"),
    ] {
        let output = folder.command_of("tune", &format!("{line} --json out.json")).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
        assert!(code == 2 || error.lines().count() == 1, "{line}: {error}");
    }
    Ok(())
}

/// On a small vision transformer that was trained, every kind of layer in it: exact, blocks, the rotated diagonal and the diagonal are bounds in
/// this order, and the rotated diagonal is tighter than the estimate of Kronecker factors.
#[test]
fn the_rotated_bound_of_a_vision_transformer() -> Result<()> {
    let config = vit::Config {
        hidden: 8,
        inner: 16,
        layers: 2,
        heads: 2,
        image: 8,
        patch: 4,
        channels: 1,
        activation: Activation::Gelu,
        eps: 1e-6,
        bias: true,
    };
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let model = tape.build(|| vit::Vit::new(&config, 3, &vb))?;
    init::seeded_normal(&init::named(&vars)?, 0)?;
    // A bright spot in one of three places, in noise.
    let n = 48;
    let noise = init::Stream::new(1, "pixels", 0);
    let pixel = |i: usize| {
        let (image, row, column) = (i / 64, i / 8 % 8, i % 8);
        let spot = [(1, 1), (2, 6), (6, 3)][image % 3];
        let near = row.abs_diff(spot.0) + column.abs_diff(spot.1) < 2;
        f64::from(u8::from(near)) + 1.6 * (noise.uniform(i) - 0.5)
    };
    let x = Tensor::from_iter((0..n * 64).map(pixel), &Device::Cpu)?.reshape((n, 1, 8, 8))?;
    let y = Tensor::from_iter((0..n).map(|i| i as u32 % 3), &Device::Cpu)?;
    let mut adam = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 5e-3, ..Default::default() })?;
    for _ in 0..60 {
        adam.backward_step(&loss::cross_entropy(&model.forward(&x)?, &y)?)?;
    }
    let part = ["!vit.embeddings.cls_token", "!vit.embeddings.position_embeddings"];
    let problem = Problem::of_part(&tape, &vars, &model, Likelihood::Categorical, &part)?;
    let examples = Examples::new(x, y)?;
    for precision in [0.3, 1.0, 10.0] {
        let hyper = Hyper::new(&problem, Structure::PerTensor, precision)?;
        let log_det = |curvature| -> Result<f64> {
            Ok(Estimator::new(curvature, Parts::Whole).evaluate(&problem, &examples, &hyper, 0)?.log_det)
        };
        let exact = log_det(Curvature::Kernel(Outputs::Joint))?;
        let (blocks, rotated) = (log_det(Curvature::BlockPerTensor)?, log_det(Curvature::Rotated)?);
        let (kron, diagonal) = (log_det(Curvature::Kron)?, log_det(Curvature::Diagonal)?);
        println!("precision {precision}: {exact:.1} {blocks:.1} {rotated:.1} {kron:.1} {diagonal:.1}");
        assert!(exact <= blocks && blocks <= rotated && rotated < diagonal);
        assert!(rotated < kron, "precision {precision}: {rotated} {kron}");
    }
    Ok(())
}
