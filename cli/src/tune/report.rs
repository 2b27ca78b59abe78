//! Tables, and the JSON file.

use super::args::{Args, Estimators};
use crate::program;
use candle_core::Result;
use kronwake::evidence::{Evidence, Hyper, Parameter};
use kronwake::penalty::Family;
use serde_json::{Value, json};
use std::path::Path;

/// The hyperparameters of a moment with the evidence there.
pub struct At {
    pub evidence: Evidence,
    precisions: Vec<f64>,
    temperature: f64,
    noise: f64,
}

impl At {
    pub fn new(evidence: Evidence, hyper: &Hyper) -> Result<Self> {
        Ok(Self {
            precisions: hyper.tensor_precisions()?,
            temperature: hyper.temperature()?,
            noise: hyper.noise()?,
            evidence,
        })
    }

    fn line(&self, what: &str, examples: usize) {
        let e = &self.evidence;
        println!(
            "{what:<8}{:>16.3}{:>14.3}{:>14.3}{:>16.3}{:>12.4}{:>12.1}{:>13.4}{:>9.4}",
            e.log_likelihood,
            e.log_prior,
            0.5 * e.log_det,
            e.log_evidence,
            e.log_evidence / examples as f64,
            e.effective.iter().sum::<f64>(),
            self.temperature,
            self.noise
        );
    }
}

/// Before and after, and what follows for each tensor.
pub fn print(before: Option<&At>, after: &At, parameters: &[Parameter], examples: usize) -> Result<()> {
    println!(
        "{:<8}{:>16}{:>14}{:>14}{:>16}{:>12}{:>12}{:>13}{:>9}",
        "",
        "log likelihood",
        "log prior",
        "complexity",
        "log evidence",
        "per example",
        "effective",
        "temperature",
        "noise"
    );
    if let Some(before) = before {
        before.line("before", examples);
    }
    after.line(if before.is_some() { "after" } else { "" }, examples);
    println!();
    println!(
        "{:<14}{:>9}{:>12}{:>12}{:>11}{:>14}{:>13}{:>13}{:>13}",
        "tensor",
        "numbers",
        if before.is_some() { "prior before" } else { "" },
        if before.is_some() { "and after" } else { "precision" },
        "effective",
        "weight decay",
        "L2 factor",
        "L1 factor",
        "group factor"
    );
    for (index, p) in parameters.iter().enumerate() {
        let precision = after.precisions[index];
        // In a loss that is the mean over the examples, at the tuned temperature.
        let per_example = after.temperature / examples as f64;
        let group = p.tensor.elem_count() / p.tensor.dims()[0].max(1);
        let of = |family: Family| -> Result<f64> { Ok(family.factor(1.0 / precision)? * per_example) };
        println!(
            "{:<14}{:>9}{:>12}{:>12.4}{:>11.1}{:>14.3e}{:>13.3e}{:>13.3e}{:>13.3e}",
            p.name,
            p.tensor.elem_count(),
            before.map_or(String::new(), |b| format!("{:.4}", b.precisions[index])),
            precision,
            after.evidence.effective[index],
            per_example * precision,
            0.5 * per_example * precision,
            of(Family::L1)?,
            of(Family::GroupLasso { size: group, size_weighted: false })?,
        );
    }
    println!();
    println!(
        "Weight decay is that of a loss which is the mean over the {examples} examples, decay * w in its gradient; the factors are of \
         penalties with the same prior variance, groups of weights into one output."
    );
    Ok(())
}

/// The numbers of a moment, tensors in the order of `order`.
fn numbers(at: &At, order: &[usize], examples: usize) -> Value {
    let pick = |values: &[f64]| order.iter().map(|&i| values[i]).collect::<Vec<f64>>();
    let e = &at.evidence;
    json!({
        "log_likelihood": e.log_likelihood,
        "log_prior": e.log_prior,
        "log_det": e.log_det,
        "log_evidence": e.log_evidence,
        "prior_precision": pick(&at.precisions),
        "grad_log_precision": pick(&e.grad_log_precision),
        "effective_parameters": pick(&e.effective),
        "weight_decay": pick(&at.precisions).iter().map(|p| at.temperature * p / examples as f64).collect::<Vec<f64>>(),
        "temperature": at.temperature,
        "grad_log_temperature": e.grad_log_temperature,
        "noise": at.noise,
        "grad_log_noise": e.grad_log_noise,
        "condition": e.condition,
    })
}

pub fn write(
    path: &Path,
    args: &Args,
    estimators: &Estimators,
    [before, after]: [&At; 2],
    parameters: &[Parameter],
    order: &[usize],
    held_out: Option<Value>,
) -> Result<()> {
    let examples = estimators.examples;
    let mut object = numbers(after, order, examples);
    let names: Vec<&str> = order.iter().map(|&i| parameters[i].name.as_str()).collect();
    object["tensors"] = json!(names);
    object["bound"] = json!(args.bound().name());
    object["batch"] = json!(estimators.batch);
    object["grouped"] = json!(args.grouped);
    object["examples"] = json!(examples);
    object["steps"] = json!(args.steps);
    if let Some(held_out) = held_out {
        object["held_out"] = held_out;
    }
    object["before"] = numbers(before, order, examples);
    let text = format!("{object:#}\n");
    program::write("--json", path, &text)
}
