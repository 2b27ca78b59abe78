//! Figures as they come, for the eye and as JSON.

use super::timing::Times;
use candle_core::{Result, bail};
use serde_json::{Value, json};
use std::collections::HashMap;

/// What a call moves and computes at the least: every operand read once, every result written once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    pub bytes: f64,
    pub flops: f64,
}

pub struct Report {
    machine: Value,
    file: Option<String>,
    /// Bytes a second of a copy on the device, read and written.
    copy: Option<f64>,
    /// Operations a second of a large matrix product, by the name of its arithmetic.
    products: HashMap<String, f64>,
    kernels: Vec<Value>,
    steps: Vec<Value>,
    failures: Vec<Value>,
}

impl Report {
    pub fn new(machine: Value, file: Option<String>) -> Self {
        println!("{machine}");
        let (kernels, steps, failures) = (vec![], vec![], vec![]);
        Self { machine, file, copy: None, products: HashMap::new(), kernels, steps, failures }
    }

    pub fn ceiling_copy(&mut self, rate: f64) {
        println!("copy: {:.1} GB/s", rate / 1e9);
        self.copy = Some(rate);
    }

    pub fn ceiling_product(&mut self, arithmetic: &str, rate: f64) {
        println!("product, {arithmetic}: {:.2} Tflop/s", rate / 1e12);
        self.products.insert(arithmetic.to_string(), rate);
    }

    /// A kernel's figures. `arithmetic` is a dtype, or tf32. `baseline` is the time of a composition that computes the same.
    pub fn kernel(
        &mut self,
        name: &str,
        shape: &str,
        arithmetic: &str,
        work: Work,
        times: Times,
        baseline: Option<(&str, Times)>,
    ) {
        let (moved, computed) = (work.bytes / times.median, work.flops / times.median);
        let of_copy = self.copy.map(|copy| moved / copy);
        let product = self.products.get(arithmetic);
        let of_product = product.filter(|_| work.flops > 0.0).map(|product| computed / product);
        let percent = |share: Option<f64>| share.map_or("-".to_string(), |s| format!("{:.0} %", 100.0 * s));
        let ratio = baseline.map(|(_, other)| other.median / times.median);
        println!(
            "{name:<28} {shape:<28} {arithmetic:<5} {:>11.2} us  {:>8.1} GB/s {:>6}  {:>8.3} Tflop/s {:>6}{}",
            times.median * 1e6,
            moved / 1e9,
            percent(of_copy),
            computed / 1e12,
            percent(of_product),
            baseline
                .map_or(String::new(), |(name, _)| format!("  {:.2} x {name}", ratio.unwrap_or(f64::NAN)))
        );
        self.kernels.push(json!({
            "name": name, "shape": shape, "arithmetic": arithmetic,
            "seconds": times.median, "least_seconds": times.least,
            "bytes": work.bytes, "flops": work.flops,
            "bytes_per_second": moved, "flops_per_second": computed,
            "share_of_copy": of_copy, "share_of_product": of_product,
            "baseline": baseline.map(|(name, times)| json!({ "name": name, "seconds": times.median })),
            "speed_over_baseline": ratio,
        }));
    }

    /// An optimizer's step on a model: a mean over whole periods, the refresh at their start, and a step without one.
    pub fn step(&mut self, figures: Value) {
        let number = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:<12} {:<5} {:<32} {:>10.3} ms a step, {:.2} of AdamW; {:.3} ms without refresh, {:.3} ms with",
            figures["model"].as_str().unwrap_or_default(),
            figures["dtype"].as_str().unwrap_or_default(),
            figures["optimizer"].as_str().unwrap_or_default(),
            number("seconds") * 1e3,
            number("ratio_to_adamw"),
            number("plain_seconds") * 1e3,
            number("refresh_seconds") * 1e3,
        );
        self.steps.push(figures);
    }

    pub fn failed(&mut self, name: &str, error: &candle_core::Error) {
        let message = error.to_string();
        let message = message.lines().next().unwrap_or_default();
        println!("{name}: FAILED: {message}");
        self.failures.push(json!({ "name": name, "error": message }));
    }

    /// Whether nothing failed.
    pub fn complete(&self) -> bool {
        self.failures.is_empty()
    }

    /// Writes the JSON file; what was measured so far, whenever it is called.
    pub fn write(&self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let all = json!({
            "machine": self.machine,
            "ceilings": { "copy_bytes_per_second": self.copy, "product_flops_per_second": self.products },
            "kernels": self.kernels,
            "steps": self.steps,
            "failures": self.failures,
        });
        // Whole at any time: a measurement may be stopped from outside.
        let unfinished = format!("{file}.part");
        let written = std::fs::write(&unfinished, format!("{all:#}\n"));
        match written.and_then(|()| std::fs::rename(&unfinished, file)) {
            Ok(()) => Ok(()),
            Err(error) => bail!("--json {file}: cannot be written: {error}"),
        }
    }
}
