//! The example `finetune`, as a user starts it.

use crate::folder::Folder;
use candle_core::{Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;

const SMALL: &str = "--model mlp:784-16-10 --epochs 1 --batch 100 --threads 1";
const BASE: &str = "--base-epochs 1";

/// A line that starts from no checkpoint, with a short training of the base.
fn with_base(line: &str) -> String {
    if line.contains("--checkpoint") { line.into() } else { format!("{BASE} {line}") }
}

fn run(folder: &Folder, line: &str) -> String {
    let output = folder.command_of("finetune", &format!("{SMALL} {}", with_base(line))).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}\n{out}\n{err}");
    out.into_owned()
}

fn read(folder: &Folder, file: &str) -> Checkpoint {
    Checkpoint::read(folder.0.join(file), &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_base_is_trained_read_and_tuned() {
    let folder = Folder::new("finetune");
    let text = run(&folder, "");
    for part in [
        "classes 5 to 9: 3000 training, 500 test",
        "base: 3000 training examples",
        "\nKLD-WRM",
        "\nSO-KLD-WRM",
        "\nAdamW",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(folder.read("finetune.svg").starts_with(b"<svg"));
    let base = read(&folder, "base.safetensors");
    for name in ["kldwrm", "so", "adamw"] {
        let tuned = read(&folder, &format!("tuned-{name}.safetensors"));
        assert_eq!(tuned.tensors.keys().collect::<Vec<_>>(), base.tensors.keys().collect::<Vec<_>>());
        assert_ne!(values(&tuned.tensors["fc1.weight"]), values(&base.tensors["fc1.weight"]));
    }
}

#[test]
fn frozen_layers_stay_and_adapters_change_a_layer_by_their_rank() -> Result<()> {
    let folder = Folder::new("finetune-part");
    run(&folder, "--optimizer kfac --freeze fc1.*");
    let base = read(&folder, "base.safetensors");
    assert_eq!(
        values(&read(&folder, "tuned-kfac.safetensors").tensors["fc1.weight"]),
        values(&base.tensors["fc1.weight"])
    );
    let line =
        "--checkpoint base.safetensors --optimizer kldwrm --lora 1 --alpha 2 --clip 10 --kl-target 0.005";
    let text = run(&folder, line);
    // [1, 784] and [16, 1] of the adapters, [10, 16] and [10] of the new layer.
    assert!(text.contains("970 of 12730 parameters are trained, fc2.bias, fc2.weight new"), "{text}");
    let tuned = read(&folder, "tuned-kldwrm.safetensors");
    assert_eq!(values(&tuned.tensors["fc1.bias"]), values(&base.tensors["fc1.bias"]));
    let adapters = read(&folder, "adapters-kldwrm.safetensors");
    let part = |part: &str| &adapters.tensors[&format!("base_model.model.fc1.{part}.weight")];
    assert_eq!(part("lora_A").dims(), [1, 784]);
    // What was merged is what was saved: alpha / rank is 2.
    let product = (part("lora_B").matmul(part("lora_A"))? * 2.0)?;
    let apart = ((&tuned.tensors["fc1.weight"] - &base.tensors["fc1.weight"])? - product)?;
    assert!(apart.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
    assert!(part("lora_B").abs()?.max_all()?.to_scalar::<f32>()? > 1e-3);
    let change = (&tuned.tensors["fc1.weight"] - &base.tensors["fc1.weight"])?;
    let first = change.narrow(0, 0, 1)?;
    // Rank one: every row is a multiple of `A`.
    let share = |row: &Tensor| -> Result<f32> {
        let a = part("lora_A");
        let (dot, norms) = ((row * a)?.sum_all()?, (row.sqr()?.sum_all()? * a.sqr()?.sum_all()?)?.sqrt()?);
        (dot / norms)?.abs()?.to_scalar::<f32>()
    };
    assert!((share(&first)? - 1.0).abs() < 1e-3);
    Ok(())
}

/// Steps of a divergence near 0 lead nowhere.
#[test]
fn divergences_bound_the_steps() {
    let folder = Folder::new("finetune-kl");
    run(&folder, "--optimizer adamw");
    let base = values(&read(&folder, "base.safetensors").tensors["fc1.weight"]);
    for (name, option) in [("kldwrm", "--kl-target"), ("so", "--kl-clip"), ("kfac", "--kl-clip")] {
        let moved = |more: &str| -> f32 {
            run(&folder, &format!("--checkpoint base.safetensors --optimizer {name} {more}"));
            let tuned = values(&read(&folder, &format!("tuned-{name}.safetensors")).tensors["fc1.weight"]);
            base.iter().zip(tuned).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let (usual, bounded) = (moved(""), moved(&format!("{option} 1e-12")));
        assert!(usual > 1e-2 && bounded < 0.01 * usual, "{name}: {usual} {bounded}");
    }
}

#[test]
fn steps_are_measured_and_stay_what_they_are() {
    let folder = Folder::new("finetune-measured");
    run(&folder, "--optimizer adamw");
    let tuned = |more: &str| {
        let text = run(&folder, &format!("--checkpoint base.safetensors --optimizer kldwrm {more}"));
        (text, values(&read(&folder, "tuned-kldwrm.safetensors").tensors["fc1.weight"]))
    };
    let (measured, plain) = (tuned("--measure-every 12"), tuned(""));
    assert_eq!(measured.1, plain.1);
    for part in ["step 12\ndivergence, nats", "step 24\n", "the whole step", "the rest"] {
        assert!(measured.0.contains(part) && !plain.0.contains(part), "{part}: {}", measured.0);
    }
}

/// Every optimizer learns, and what is said of it changes what it learns.
#[test]
fn options_of_the_baselines_count() {
    let folder = Folder::new("finetune-baselines");
    run(&folder, "--optimizer adamw");
    for (name, options) in [
        ("sgd", &["--momentum 0.5"][..]),
        ("adamw", &["--momentum 0.5", "--beta2 0.9"]),
        ("muon", &["--momentum 0.5", "--ends-lr 0.0001"]),
        ("soap", &["--momentum 0.5", "--beta2 0.9", "--period 1", "--ends-lr 0.0001"]),
        ("shampoo", &["--beta2 0.9", "--period 1", "--ends-lr 0.0001"]),
        ("kl-shampoo", &["--beta2 0.9", "--period 1", "--ends-lr 0.0001"]),
        ("kfac", &["--damping 1"]),
    ] {
        let tuned = |more: &str| {
            let line = format!("--checkpoint base.safetensors --optimizer {name} {more}");
            let text = run(&folder, &line);
            let row = text.lines().find(|line| line.trim_start().starts_with("30 ")).unwrap().to_string();
            let accuracy: f64 = row.split_whitespace().nth(3).unwrap().parse().unwrap();
            // Chance is 20 %.
            assert!(accuracy > 40.0 || !more.is_empty(), "{line}: {row}");
            let file = read(&folder, &format!("tuned-{name}.safetensors"));
            ["fc1.weight", "fc2.weight"].map(|layer| values(&file.tensors[layer]))
        };
        let usual = tuned("");
        for option in options {
            let other = tuned(option);
            assert_ne!(usual[1], other[1], "{name} {option}");
            assert_ne!(usual[0], other[0], "{name} {option}");
        }
    }
}

#[test]
fn the_last_of_many_layers_is_new() {
    let folder = Folder::new("finetune-deep");
    let deep = "--model mlp:784-12-8-8-8-10 --base-epochs 1 --epochs 1 --optimizer adamw --lora 2";
    let output = folder.command_of("finetune", deep).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("trained, fc5.bias, fc5.weight new"), "{text}");
    let adapters = read(&folder, "adapters-adamw.safetensors");
    assert_eq!(adapters.tensors.len(), 8);
}

#[test]
fn a_training_goes_on_where_it_was_saved() {
    let folder = Folder::new("finetune-resume");
    // 30 steps: the state is that of step 28.
    for name in ["so", "adamw", "muon", "soap", "shampoo", "kl-shampoo"] {
        run(&folder, &format!("--optimizer {name} --save-every 28"));
        let tuned = format!("tuned-{name}.safetensors");
        let whole = folder.read(&tuned);
        std::fs::remove_file(folder.0.join(&tuned)).unwrap();
        let text = run(
            &folder,
            &format!("--checkpoint base.safetensors --optimizer {name} --save-every 28 --resume"),
        );
        assert!(text.contains("goes on from 28 steps"), "{text}");
        assert!(folder.read(&tuned) == whole, "{name}");
    }
}

/// 785 inputs of the first layer in 13 blocks of 61, in one, and of low rank.
#[test]
fn factors_are_as_they_are_asked_for() {
    let folder = Folder::new("finetune-factors");
    for (factors, shown) in [("blocks:64", "785/61"), ("whole", "16 x 785 "), ("rank:8:64", "785 rank 8")] {
        let text = run(&folder, &format!("--optimizer kldwrm --factors {factors}"));
        assert!(text.contains(shown), "{text}");
    }
}

#[test]
fn half_precision_is_trained() {
    let folder = Folder::new("finetune-half");
    for dtype in ["f16", "bf16"] {
        let text = run(&folder, &format!("--optimizer kldwrm --dtype {dtype}"));
        let row = text.lines().find(|line| line.trim_start().starts_with("30 ")).unwrap().to_string();
        let accuracy: f64 = row.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert!(accuracy > 60.0, "{dtype}: {row}");
    }
}

#[test]
fn wrong_lines_are_sentences() {
    let folder = Folder::new("finetune-wrong");
    std::fs::write(folder.0.join("short.safetensors"), [1, 2, 3]).unwrap();
    for (line, code, part) in [
        ("--freeze nope", 1, "error: --freeze nope: matches no parameter; those are fc1.bias, fc1.weight"),
        ("--data sentences.tsv", 1, "--data is for --model bert and decoder"),
        ("--model decoder:50-2", 2, "multiple of 32"),
        ("--model decoder --data none.txt", 1, "none.txt: "),
        (
            "--optimizer adamw --measure-every 2",
            1,
            "--measure-every is for kldwrm, so and kfac, and --optimizer is adamw",
        ),
        (
            "--optimizer adamw --factors whole",
            1,
            "--factors is for kldwrm, so and kfac, and --optimizer is adamw",
        ),
        ("--factors blocks:0", 2, "expected whole, blocks:ROWS or rank:RANK:ROWS, got \"blocks:0\""),
        ("--clip 1 --measure-every 2", 1, "--measure-every does not go with --clip or --dtype f16"),
        ("--model mlp:784-10 --lora 4", 1, "--lora: the model has no linear layer beside the new one"),
        ("--freeze *", 1, "error: --freeze leaves no parameter to train"),
        ("--checkpoint none.safetensors", 1, "none.safetensors: cannot be read"),
        ("--checkpoint short.safetensors", 1, "not a whole safetensors file (3 bytes)"),
        ("--dtype f16 --clip 1", 1, "--clip does not go with --dtype f16"),
        ("--lora 17", 1, "rank 17 is too large for layer fc1 [16, 784]"),
        ("--lora 0", 2, "expected a whole number of at least 1"),
        ("--kl-target 0", 2, "--kl-target"),
        ("--kl-clip nan", 2, "--kl-clip"),
        ("--optimizer so --kl-target 0.1", 1, "--kl-target is for kldwrm, and --optimizer is so"),
        ("--optimizer so --orthogonal rational:3", 1, "--orthogonal is for kldwrm, and --optimizer is so"),
        ("--orthogonal-side 0", 2, "expected a whole number of at least 1"),
        ("--optimizer adamw --kl-clip 0.1", 1, "--kl-clip is for so and kfac, and --optimizer is adamw"),
        ("--optimizer muon --damping 1", 1, "--damping is for so and kfac, and --optimizer is muon"),
        (
            "--optimizer kfac --momentum 0.5",
            1,
            "--momentum is for muon, soap, shampoo, kl-shampoo, sgd and adamw, and --optimizer is kfac",
        ),
        (
            "--optimizer sgd --beta2 0.5",
            1,
            "--beta2 is for soap, shampoo, kl-shampoo and adamw, and --optimizer is sgd",
        ),
        (
            "--optimizer muon --period 5",
            1,
            "--period is for soap, shampoo and kl-shampoo, and --optimizer is muon",
        ),
        (
            "--ends-lr 0.1",
            1,
            "--ends-lr is for muon, soap, shampoo and kl-shampoo, and --optimizer is compare",
        ),
        (
            "--optimizer q",
            2,
            "[possible values: kldwrm, so, kfac, adamw, muon, soap, shampoo, kl-shampoo, sgd, compare]",
        ),
        ("--checkpoint base.safetensors --base-epochs 2", 2, "cannot be used with"),
        ("--resume", 2, "--save-every"),
        ("--model vgg", 2, "expected cnn, lenet300"),
    ] {
        let small = if line.starts_with("--model") { "" } else { SMALL };
        let output = folder.command_of("finetune", &format!("{small} {}", with_base(line))).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
        assert!(code == 2 || error.trim_end().lines().count() == 1, "{error}");
    }
}
