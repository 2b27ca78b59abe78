//! The example from end to end, as a user starts it.

use crate::folder::Folder;

const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/data/fashion-mnist-6k");

#[test]
fn options_that_do_not_apply_are_errors() {
    let folder = Folder::new("options");
    for (line, sentence) in [
        (
            "--lr 0.1",
            "--lr does not apply to --optimizer compare, only to sgd, adamw, muon, soap, shampoo, kl-shampoo, kfac, so, q, qe, kldwrm",
        ),
        (
            "--optimizer adamw --damping 1",
            "--damping does not apply to --optimizer adamw, only to kfac, so, q, qe, kldwrm, compare",
        ),
        (
            "--optimizer kfac --wake-decay 0.5",
            "--wake-decay does not apply to --optimizer kfac, only to so, q, qe, kldwrm, compare",
        ),
        (
            "--penalty sparse-group:0.5 --factor auto",
            "--factor auto is a prediction for l2, l1 and group alone: give a number",
        ),
        ("--optimizer so --q-solve exact", "--q-solve does not apply to --optimizer so, only to q, qe"),
        ("--optimizer q --qe-lr 0.1", "--qe-lr does not apply to --optimizer q, only to qe"),
        (
            "--save x",
            "--save does not apply to --optimizer compare, only to sgd, adamw, muon, soap, shampoo, kl-shampoo, kfac, so, q, qe, kldwrm",
        ),
    ] {
        let error = folder.fail(line, 2);
        assert!(error.starts_with(&format!("error: {sentence}\n")), "{line}: {error}");
    }
}

#[test]
fn penalties_with_any_optimizer() {
    let folder = Folder::new("penalties");
    let line = "--batch 100 --epochs 1 --model mlp:784-16-10";
    let zeros = |out: &str| -> usize {
        let (_, rest) = out.split_once("weights that are zero: ").unwrap();
        assert!(rest.contains("of 12704"), "{out}");
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    for optimizer in
        ["sgd", "adamw", "muon", "soap", "shampoo", "kl-shampoo", "kfac", "so", "q", "qe", "kldwrm"]
    {
        let line = format!("--optimizer {optimizer} --steps 5 {line} --penalty");
        let none = zeros(&folder.train(&format!("{line} l1 --factor 0")));
        assert_eq!(none, 0, "{optimizer}");
        let some = zeros(&folder.train(&format!("{line} l1 --factor 0.1")));
        assert!(some > 0, "{optimizer}");
        assert_eq!(zeros(&folder.train(&format!("{line} spatial --factor 0.01"))), 0, "{optimizer}");
    }
    let out = folder.train(&format!("--optimizer sgd --steps 2 {line} --penalty group --factor auto:0.5"));
    // sqrt((n + 1) / (n v)) for columns of 16 and 10 weights, v = 1 / fan_in, halved, over 6,000 examples.
    let factor = |n: f64, fan_in: f64| format!("{:.4e}", ((n + 1.0) / n * fan_in).sqrt() / 12e3);
    for (name, factor) in [("fc1.weight", factor(16.0, 784.0)), ("fc2.weight", factor(10.0, 16.0))] {
        assert!(out.contains(&format!("{name}     {factor}, of a prior")), "{factor} in {out}");
    }
    let line = format!("--optimizer adamw {line} --penalty sparse-group:0.5 --factor 0.01");
    folder.train(&format!("{line} --steps 9 --out whole"));
    folder.train(&format!("{line} --steps 4 --save state --out part"));
    folder.train(&format!("{line} --steps 9 --resume state --out part"));
    assert!(folder.read("whole/model.safetensors") == folder.read("part/model.safetensors"));
}

#[test]
fn other_errors_are_one_sentence() {
    let folder = Folder::new("errors");
    std::fs::write(folder.0.join("junk"), "no safetensors").unwrap();
    let mut cases = vec![
        (
            "--data-dir nowhere",
            "nowhere: neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz is in this folder",
        ),
        ("--steps 9 --epochs 1 --batch 3000", "--steps 9 is more than the 2 steps of --epochs 1"),
        ("--init junk", "junk: not a whole safetensors file (14 bytes)"),
        ("--optimizer sgd --resume junk", "junk: not a whole safetensors file (14 bytes)"),
        ("--optimizer so --resume junk", "junk: not a whole safetensors file (14 bytes)"),
        ("--out junk/there", "--out junk/there: cannot be made"),
        ("--log no/log", "--log no/log: cannot be written"),
        ("--optimizer sgd --lr 1e30", "sgd: the loss of step"),
        ("--optimizer q --q-solve exact", "q-kld-wrm: the exact solve needs pi damping"),
    ];
    if !cfg!(feature = "cuda") {
        cases
            .push(("--device cuda:1", "--device cuda:1: this build has no CUDA; build with --features cuda"));
    }
    for (line, sentence) in cases {
        let error = folder.fail(line, 1);
        assert!(error.contains(sentence) && error.starts_with("error: "), "{line}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{line}: {error}");
    }
}

#[test]
fn without_a_download_the_full_set_asks_for_a_folder() {
    let folder = Folder::new("offline");
    // A cache that is empty, and an address where nothing answers.
    let offline = [("HF_HOME", "cache"), ("HF_ENDPOINT", "http://127.0.0.1:9")];
    let sentence = match cfg!(feature = "datasets") {
        true => "cannot be downloaded: give the folder of its four IDX files with --data-dir DIR",
        false => {
            "is not bundled: give the folder of its four IDX files with --data-dir DIR, or build with --features datasets"
        }
    };
    for (line, name) in [("--dataset mnist", "MNIST"), ("--dataset fashion-mnist", "Fashion-MNIST")] {
        let output = folder.command(line).envs(offline).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.starts_with(&format!("error: {name} {sentence}")), "{error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    }
}

#[test]
fn three_steps_in_file_order_with_every_optimizer() {
    let folder = Folder::new("steps");
    let mut first = vec![];
    for optimizer in ["sgd", "adamw", "muon", "soap", "shampoo", "kl-shampoo", "kfac", "so", "q", "qe"] {
        let line =
            format!("--optimizer {optimizer} --no-shuffle --steps 3 --batch 50 --log {optimizer}.jsonl");
        let out = folder.train(&line);
        assert!(out.contains("curves: ./curves.svg") && out.contains("model.safetensors"), "{out}");
        let log = folder.log(&format!("{optimizer}.jsonl"));
        assert_eq!(log.len(), 4, "{log:?}");
        let losses: Vec<f64> = log[..3].iter().map(|step| step["loss"].as_f64().unwrap()).collect();
        assert_eq!(log[..3].iter().map(|step| step["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
        let epoch = &log[3];
        assert_eq!((epoch["epoch"].as_u64(), epoch["step"].as_u64()), (Some(1), Some(3)));
        assert_eq!(epoch["optimizer"], optimizer);
        let mean = losses.iter().sum::<f64>() / 3.0;
        assert!((epoch["train_loss"].as_f64().unwrap() - mean).abs() < 1e-12);
        for accuracy in ["train_accuracy", "test_accuracy"] {
            assert!((0.0..=1.0).contains(&epoch[accuracy].as_f64().unwrap()), "{epoch}");
        }
        assert!(epoch["test_loss"].as_f64().unwrap() < 3.0 && epoch["seconds"].as_f64().unwrap() > 0.0);
        first.push(losses[0]);
        assert!(folder.read("curves.svg").starts_with(b"<svg"));
    }
    assert!(first.iter().all(|loss| *loss == first[0]), "the same parameters and batch: {first:?}");
    let model = candle_core::safetensors::load(folder.0.join("model.safetensors"), &candle_core::Device::Cpu)
        .unwrap();
    let mut names: Vec<_> = model.keys().map(String::as_str).collect();
    names.sort_unstable();
    let layers = ["conv1", "conv2", "fc1", "fc2"];
    let expected: Vec<_> = layers.iter().flat_map(|l| [format!("{l}.bias"), format!("{l}.weight")]).collect();
    assert_eq!(names, expected);
}

#[test]
fn a_resumed_training_is_the_uninterrupted_one() {
    let folder = Folder::new("resume");
    let first_order = ["sgd", "adamw", "muon", "soap", "shampoo", "kl-shampoo"];
    let curved = ["kfac --damping-kind adaptive", "so", "q", "qe --qe-models 3"];
    for optimizer in first_order.into_iter().chain(curved) {
        let mut line = format!("--optimizer {optimizer} --batch 100 --epochs 1 --dropout 0.3 --dtype f64");
        if !first_order.contains(&optimizer) {
            line.push_str(" --factor-every 2 --inverse-every 3");
        }
        folder.train(&format!("{line} --steps 9 --out whole"));
        folder.train(&format!("{line} --steps 4 --save state --out part"));
        folder.train(&format!("{line} --steps 9 --resume state --out part"));
        assert!(
            folder.read("whole/model.safetensors") == folder.read("part/model.safetensors"),
            "{optimizer}"
        );
        let error = folder.fail(&format!("{line} --steps 4 --resume state"), 1);
        assert!(error.contains("already has the 4 steps of --resume"), "{error}");
    }
}

#[test]
fn a_folder_and_a_start_from_a_file_give_the_same_training() {
    let folder = Folder::new("folder");
    let line = "--optimizer kfac --steps 2 --batch 100 --model mlp:784-16-10:tanh";
    folder.train(&format!("{line} --out a"));
    folder.train(&format!("{line} --out b --dataset fashion-mnist --data-dir {BUNDLED}"));
    assert!(folder.read("a/model.safetensors") == folder.read("b/model.safetensors"));
    folder.train(&format!("{line} --seed 5 --no-shuffle --out c --init a/model.safetensors"));
    folder.train(&format!("{line} --seed 5 --no-shuffle --out d --init b/model.safetensors"));
    assert!(folder.read("c/model.safetensors") == folder.read("d/model.safetensors"));
    let error = folder.fail("--init a/model.safetensors", 1);
    assert!(error.contains("conv1.weight"), "{error}");
}

#[test]
fn the_comparison_names_what_it_wrote_and_where_the_time_went() {
    let folder = Folder::new("compare");
    let out = folder.train("--epochs 1 --batch 500 --trace --model mlp:784-16-10");
    let expected = [
        "KLD-WRM",
        "SO-KLD-WRM",
        "K-FAC",
        "AdamW",
        "curves.svg",
        "parameters after kldwrm",
        "./model.safetensors",
    ];
    for word in expected.into_iter().chain(["forward", "backward", "factors", "inverse", "step"]) {
        assert!(out.contains(word), "{word} in {out}");
    }
}
