//! The report of a study as markdown.

use super::methods::METHODS;
use super::plan::Stage;
use super::store::{Done, Record};
use crate::stats::{cell, deviation, header, mean, median, row, standard_error};
use serde_json::Value;

/// The methods of which there are runs, in the order of [`METHODS`].
pub fn methods(done: &Done) -> Vec<&'static str> {
    let has = |name: &&str| done.keys().any(|(method, ..)| method == name);
    METHODS.iter().map(|method| method.name).filter(has).collect()
}

/// A method's runs in some stages.
pub fn runs<'a>(done: &'a Done, method: &str, stages: &[Stage]) -> Vec<&'a Record> {
    done.values().filter(|run| run.method == method && stages.contains(&run.stage)).collect()
}

/// `a ± b`
fn pair(value: f64, spread: f64) -> String {
    format!("{} ± {}", cell(value, 2), cell(spread, 2))
}

/// All tables; `thresholds` in %.
pub fn markdown(protocol: &Value, done: &Done, thresholds: &[f64]) -> String {
    let field =
        |name: &str| protocol[name].as_str().map_or_else(|| protocol[name].to_string(), str::to_string);
    let mut text = format!(
        "# Optimizers under equal budgets: {}, {}\n\nBatch {}, dropout {}, factors every {} and inverses every {} steps, \
         {} runs side by side on one thread each, seed {}. A method is tuned by {} random settings and {} near the best, \
         {} epochs each, then the best {} for {} epochs; accuracies are those of the held-out training images unless they \
         are called test accuracies. Seconds are of training alone.\n",
        field("dataset"),
        field("model"),
        field("batch"),
        field("dropout"),
        field("factor_every"),
        field("inverse_every"),
        field("workers"),
        field("seed"),
        field("random"),
        field("local"),
        field("short_epochs"),
        field("long"),
        field("epochs"),
    );
    let methods = methods(done);
    settings(&mut text, done, &methods);
    results(&mut text, done, &methods);
    speed(&mut text, done, &methods, thresholds);
    let first = thresholds.first().copied().unwrap_or(97.5);
    robustness(&mut text, done, &methods, first);
    text
}

fn settings(text: &mut String, done: &Done, methods: &[&str]) {
    text.push_str("\n## Tuned settings\n\n");
    header(text, &["method", "setting"]);
    for method in methods {
        if let Some(run) = runs(done, method, &[Stage::Final]).first() {
            row(text, &[method.to_string(), run.setting.to_string()]);
        }
    }
}

/// `method`'s numbers less K-FAC's, over the seeds that both have, in % points.
fn differences(done: &Done, method: &str, of: fn(&Record) -> f64) -> Vec<f64> {
    let baseline = runs(done, "kfac", &[Stage::Final]);
    let apart = |run: &&Record| {
        let other = baseline.iter().find(|other| other.seed == run.seed)?;
        Some(100.0 * (of(run) - of(other)))
    };
    runs(done, method, &[Stage::Final]).iter().filter_map(apart).collect()
}

fn results(text: &mut String, done: &Done, methods: &[&str]) {
    text.push_str(
        "\n## The tuned settings over fresh seeds\n\nIn %: mean ± standard deviation over the seeds, and the differences \
         from K-FAC seed by seed, mean ± standard error.\n\n",
    );
    let less = ["held out, less K-FAC's", "test, less K-FAC's", "diverged", "seconds an epoch"];
    header(text, &[&["method", "seeds", "held out", "test"][..], &less].concat());
    for method in methods {
        let all = runs(done, method, &[Stage::Final]);
        if all.is_empty() {
            continue;
        }
        let accuracy = |of: fn(&Record) -> f64| {
            let values: Vec<f64> = all.iter().map(|run| 100.0 * of(run)).collect();
            pair(mean(&values), deviation(&values))
        };
        let less = |of| match differences(done, method, of) {
            _ if *method == "kfac" => String::new(),
            values => pair(mean(&values), standard_error(&values)),
        };
        let epoch = |run: &&Record| Some(run.seconds.last()? / run.seconds.len() as f64);
        let seconds: Vec<f64> = all.iter().filter_map(epoch).collect();
        let diverged = all.iter().filter(|run| run.diverged).count().to_string();
        row(
            text,
            &[
                method.to_string(),
                all.len().to_string(),
                accuracy(Record::held_out),
                accuracy(Record::tested),
                less(Record::held_out),
                less(Record::tested),
                diverged,
                cell(median(&seconds), 2),
            ],
        );
    }
}

fn speed(text: &mut String, done: &Done, methods: &[&str], thresholds: &[f64]) {
    text.push_str(
        "\n## Epochs and seconds to a held-out accuracy\n\nMedians over the seeds, one that never gets there counted as \
         endless; in brackets the seeds that get there.\n\n",
    );
    let titles = thresholds.iter().flat_map(|t| [format!("epochs to {t} %"), format!("seconds to {t} %")]);
    header(text, &["method".to_string()].into_iter().chain(titles).collect::<Vec<_>>());
    for method in methods {
        let all = runs(done, method, &[Stage::Final]);
        if all.is_empty() {
            continue;
        }
        let mut line = vec![method.to_string()];
        for threshold in thresholds {
            let reached: Vec<_> = all.iter().map(|run| run.reached(threshold / 100.0)).collect();
            let middle = |of: fn((usize, f64)) -> f64| {
                median(&reached.iter().map(|r| r.map_or(f64::INFINITY, of)).collect::<Vec<_>>())
            };
            let count = reached.iter().flatten().count();
            line.push(format!("{} ({count} of {})", cell(middle(|r| r.0 as f64), 1), all.len()));
            line.push(cell(middle(|r| r.1), 2));
        }
        row(text, &line);
    }
}

fn robustness(text: &mut String, done: &Done, methods: &[&str], threshold: f64) {
    text.push_str(
        "\n## Random settings\n\nOver all seeds of the stages random and robust; in brackets the runs.\n\n",
    );
    let share = format!("reach {threshold} %");
    header(text, &["method", "runs", &share, "diverged", "median accuracy, %"]);
    for method in methods {
        let all = runs(done, method, &[Stage::Random, Stage::Robust]);
        let count = |of: &dyn Fn(&Record) -> bool| {
            let count = all.iter().filter(|run| of(run)).count();
            format!("{} % ({count})", cell(100.0 * count as f64 / all.len() as f64, 0))
        };
        let last: Vec<f64> = all.iter().map(|run| 100.0 * run.held_out()).collect();
        row(
            text,
            &[
                method.to_string(),
                all.len().to_string(),
                count(&|run| run.reached(threshold / 100.0).is_some()),
                count(&|run| run.diverged),
                cell(median(&last), 2),
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::store;
    use super::*;

    fn line(method: &str, stage: &str, index: usize, held: [f64; 2], test: &[f64], diverged: bool) -> String {
        serde_json::json!({
            "method": method, "stage": stage, "index": index, "seed": 100 + index, "setting": { "lr": 0.1, "fisher": "sampled" },
            "epochs": 2, "held": held, "test": test, "loss": [1.0, 0.5], "seconds": [1.5, 3.0], "diverged": diverged,
        })
        .to_string()
    }

    #[test]
    fn the_numbers_of_a_small_log() {
        let lines = [
            "{\"protocol\":{\"dataset\":\"mnist\",\"model\":\"cnn\",\"epochs\":2}}".to_string(),
            line("kfac", "final", 0, [0.976, 0.981], &[0.97, 0.980], false),
            line("kfac", "final", 1, [0.970, 0.979], &[0.97, 0.982], false),
            line("so", "final", 0, [0.970, 0.982], &[0.97, 0.983], false),
            line("so", "final", 1, [0.974, 0.982], &[0.97, 0.983], false),
            line("so", "final", 2, [0.974, 0.982], &[0.97, 0.983], true),
            line("so", "random", 0, [0.976, 0.970], &[], false),
            line("so", "robust", 0, [0.9, 0.92], &[], false),
            line("so", "robust", 1, [0.9, 0.92], &[], true),
            String::new(),
        ];
        let path = std::env::temp_dir().join(format!("kronwake-report-{}.jsonl", std::process::id()));
        std::fs::write(&path, lines.join("\n")).unwrap();
        let (protocol, done) = store::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let text = markdown(&protocol, &done, &[97.5, 98.0, 99.0]);
        for expected in [
            "# Optimizers under equal budgets: mnist, cnn\n",
            "| kfac | fisher sampled, lr 0.1 |\n",
            "| kfac | 2 | 98.00 ± 0.14 | 98.10 ± 0.14 |  |  | 0 | 1.50 |\n",
            // The third seed has no K-FAC run beside it: the differences are .1 and .3, then .3 and .1.
            "| so | 3 | 68.80 ± 50.92 | 68.87 ± 50.98 | 0.20 ± 0.10 | 0.20 ± 0.10 | 1 | 1.50 |\n",
            "| kfac | 1.5 (2 of 2) | 2.25 | - (1 of 2) | - | - (0 of 2) | - |\n",
            "| so | 2.0 (2 of 3) | 3.00 | 2.0 (2 of 3) | 3.00 | - (0 of 3) | - |\n",
            "| so | 3 | 33 % (1) | 33 % (1) | 92.00 |\n",
            "| kfac | 0 | - % (0) | - % (0) | - |\n",
        ] {
            assert!(text.contains(expected), "{expected}is not in\n{text}");
        }
    }
}
