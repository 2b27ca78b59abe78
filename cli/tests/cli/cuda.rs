//! The example from end to end on a GPU: it trains as on the CPU, and a training may change devices.

use crate::folder::Folder;
use candle_core::Device;

/// The losses of a run's steps, in order.
fn losses(folder: &Folder, log: &str) -> Vec<f64> {
    folder.log(log).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

/// The largest difference of two runs' losses.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The optimizer's options, with which devices differ by rounding alone: by its default KLD-WRM makes directions by other functions on a GPU.
fn chosen(optimizer: &str) -> String {
    let way = if optimizer == "kldwrm" { " --orthogonal polynomials:4" } else { "" };
    format!("--optimizer {optimizer}{way}")
}

const OPTIMIZERS: [&str; 7] = ["sgd", "adamw", "kfac", "so", "q", "qe", "kldwrm"];

/// The first GPU. Without one the tests say so and pass, unless `KRONWAKE_REQUIRE_CUDA` is 1.
fn gpu() -> Option<&'static str> {
    match Device::new_cuda(0) {
        Ok(_) => Some("cuda"),
        Err(error) => {
            let required = std::env::var("KRONWAKE_REQUIRE_CUDA").is_ok_and(|value| value == "1");
            assert!(!required, "KRONWAKE_REQUIRE_CUDA=1, but there is no CUDA device: {error}");
            eprintln!("skipped: no CUDA device");
            None
        }
    }
}

#[test]
fn every_optimizer_trains_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let folder = Folder::new("cuda-train");
    for optimizer in OPTIMIZERS {
        for (model, dtype, tolerance) in
            [("cnn", "f64", 1e-5), ("lenet300", "f32", 0.02), ("lenet5", "f32", 0.02)]
        {
            let line = format!(
                "{} --model {model} --dtype {dtype} --dropout 0.2 --steps 8 --batch 64",
                chosen(optimizer)
            );
            folder.train(&format!("{line} --device cpu --log cpu.jsonl"));
            folder.train(&format!("{line} --device {gpu} --log gpu.jsonl"));
            let difference = apart(&losses(&folder, "cpu.jsonl"), &losses(&folder, "gpu.jsonl"));
            println!("{optimizer} {model} {dtype}: the losses differ by {difference:.1e}");
            assert!(
                difference < tolerance,
                "{optimizer} {model} {dtype}: the losses differ by {difference:e}"
            );
        }
    }
}

#[test]
fn half_types_learn() {
    let Some(gpu) = gpu() else { return };
    let folder = Folder::new("cuda-half");
    for (optimizer, dtype) in OPTIMIZERS.into_iter().flat_map(|o| ["f32", "bf16", "f16"].map(|d| (o, d))) {
        folder.train(&format!(
            "--optimizer {optimizer} --model cnn --dtype {dtype} --epochs 1 --device {gpu} --log log.jsonl"
        ));
        let last = folder.log("log.jsonl").pop().unwrap();
        let accuracy = last["test_accuracy"].as_f64().unwrap();
        println!("{optimizer} {dtype}: test accuracy {accuracy}");
        assert!(accuracy > 0.5, "{optimizer} {dtype}: test accuracy {accuracy}");
    }
}

#[test]
fn a_training_changes_devices() {
    let Some(gpu) = gpu() else { return };
    let folder = Folder::new("cuda-resume");
    // As it comes a training goes on by the other device's function. The bound is an estimate.
    let by_default = ("--optimizer kldwrm".to_string(), 0.05);
    let alike = ["adamw", "kfac", "q", "kldwrm"].map(|optimizer| (chosen(optimizer), 1e-5));
    for (optimizer, tolerance) in alike.into_iter().chain([by_default]) {
        let line = format!("{optimizer} --batch 100 --epochs 1 --dtype f64");
        folder.train(&format!("{line} --steps 12 --device cpu --log whole.jsonl"));
        let whole = losses(&folder, "whole.jsonl");
        for (first, second) in [("cpu", gpu), (gpu, "cpu")] {
            folder.train(&format!("{line} --steps 6 --device {first} --save state --log first.jsonl"));
            folder.train(&format!("{line} --steps 12 --device {second} --resume state --log second.jsonl"));
            let mut parts = losses(&folder, "first.jsonl");
            parts.extend(losses(&folder, "second.jsonl"));
            let difference = apart(&whole, &parts);
            assert!(
                difference < tolerance,
                "{optimizer}, {first} then {second}: the losses differ by {difference:e}"
            );
        }
    }
}
