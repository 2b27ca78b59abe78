//! The study's tables.

use super::penalty::Choice;
use super::study::{MARGIN, TARGETS, WAYS, best, fewest};
use crate::stats::{cell, header, mean, spread};
use serde_json::Value;
use std::fmt::Write;

/// A penalty's factor and its records of the final stage.
fn finals(records: &[Value], choice: Choice) -> (f64, Vec<&Value>) {
    let factor = best(records, choice).factor;
    let is = |r: &&Value| r["stage"] == "final" && r["penalty"] == choice.name() && r["factor"] == factor;
    (factor, records.iter().filter(is).collect())
}

fn numbers(points: &[&Value], key: &str) -> Vec<f64> {
    points.iter().filter_map(|p| p[key].as_f64()).collect()
}

/// All tables, as markdown.
pub fn markdown(records: &[Value]) -> String {
    let mut text = String::new();
    for target in TARGETS {
        chosen(records, target, &mut text);
    }
    once(records, &mut text);
    tuned(records, &mut text);
    tried(records, &mut text);
    text
}

fn chosen(records: &[Value], target: f64, text: &mut String) {
    let aim = 100.0 * (target - MARGIN);
    let _ = writeln!(text, "## Fewest nonzeros at {:.1} % (held out at least {aim:.1} %)\n", 100.0 * target);
    let _ = writeln!(
        text,
        "Of 266,610. Means ± standard deviations over the seeds that get there; of how many.\n"
    );
    header(text, &["penalty", "factor", "pruned by", "nonzeros", "test, %", "pixels", "units", "seeds"]);
    for choice in Choice::ALL {
        let (factor, runs) = finals(records, choice);
        for way in &WAYS {
            let points: Vec<&Value> = runs
                .iter()
                .map(|r| &r["chosen"][way.name][target.to_string()])
                .filter(|p| p.is_object())
                .collect();
            let head = format!("| {} | {factor} | {} |", choice.name(), way.name);
            if points.is_empty() {
                let _ = writeln!(text, "{head} - | - | - | - | 0 of {} |", runs.len());
                continue;
            }
            let count = spread(&numbers(&points, "nonzeros"), 0);
            let test: Vec<f64> = numbers(&points, "test").iter().map(|t| 100.0 * t).collect();
            let test = spread(&test, 2);
            let width =
                |at: usize| mean(&points.iter().filter_map(|p| p["widths"][at].as_f64()).collect::<Vec<_>>());
            let _ = writeln!(
                text,
                "{head} {count} | {test} | {:.0} | {:.0} + {:.0} | {} of {} |",
                width(0),
                width(1),
                width(2),
                points.len(),
                runs.len()
            );
        }
    }
    text.push('\n');
}

/// Held-out accuracies over the counts of `ways`, means over the seeds, a table for each penalty.
fn curves(records: &[Value], ways: &[&str], text: &mut String) {
    header(text, &[&["penalty", "weights kept"], ways].concat());
    for choice in Choice::ALL {
        let (_, runs) = finals(records, choice);
        let Some(counts) = runs.first().and_then(|r| r["curves"][ways[0]].as_array()) else { continue };
        for (at, point) in counts.iter().enumerate() {
            let held = |way: &&str| {
                let held: Vec<f64> =
                    runs.iter().filter_map(|r| r["curves"][*way][at]["held"].as_f64()).collect();
                cell(100.0 * mean(&held), 2)
            };
            let means: Vec<String> = ways.iter().map(held).collect();
            let _ = writeln!(text, "| {} | {} | {} |", choice.name(), point["kept"], means.join(" | "));
        }
    }
    text.push('\n');
}

fn once(records: &[Value], text: &mut String) {
    let _ = writeln!(text, "## Held-out accuracy without training after pruning, %\n");
    curves(records, &["magnitude", "kronecker", "kronecker, iterated"], text);
}

fn tuned(records: &[Value], text: &mut String) {
    let _ = writeln!(text, "## Held-out accuracy with masked training after each step, %\n");
    curves(records, &["magnitude, tuned", "kronecker, tuned"], text);
}

fn tried(records: &[Value], text: &mut String) {
    let _ = writeln!(
        text,
        "## Factors tried, one seed: nonzeros at {}\n",
        TARGETS.map(|t| format!("{:.1} %", 100.0 * t)).join(" / ")
    );
    let ways: Vec<&str> = WAYS.iter().filter(|way| way.chooses).map(|way| way.name).collect();
    header(text, &[&["penalty", "factor", "dense, held out, %"], &ways[..]].concat());
    for record in records.iter().filter(|record| record["stage"] == "tune") {
        let count = |way: &&str, target: f64| {
            fewest(&record["curves"][*way], target).map_or("-".to_string(), |p| p["nonzeros"].to_string())
        };
        let cells: Vec<String> = ways.iter().map(|way| TARGETS.map(|t| count(way, t)).join(" / ")).collect();
        let dense = 100.0 * record["dense"].as_f64().unwrap_or_default();
        let name = record["penalty"].as_str().unwrap_or_default();
        let _ = writeln!(text, "| {name} | {} | {dense:.2} | {} |", record["factor"], cells.join(" | "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn choices_and_means() {
        let curve = |counts: [u32; 3]| {
            json!([
                { "kept": 9, "nonzeros": counts[0], "widths": [700, 90, 80, 10], "held": 0.981 },
                { "kept": 5, "nonzeros": counts[1], "widths": [600, 60, 50, 10], "held": 0.978 },
                { "kept": 2, "nonzeros": counts[2], "widths": [300, 30, 20, 10], "held": 0.9731 },
            ])
        };
        let mut records = vec![];
        for (factor, counts) in [(6e-5, [9000, 5000, 3000]), (1e-4, [9000, 4000, 2500])] {
            records.push(
                json!({ "stage": "tune", "penalty": "l1", "factor": factor, "seed": 100, "dense": 0.98,
                "curves": { "kronecker, tuned": curve(counts) } }),
            );
        }
        assert_eq!(best(&records, Choice::L1).factor, 1e-4);
        let found = fewest(&records[0]["curves"]["kronecker, tuned"], 0.98).map(|p| p["nonzeros"].as_u64());
        assert_eq!(found, Some(Some(5000)));
        for (seed, nonzeros) in [(1, 4000), (2, 4200)] {
            let mut point = curve([0, nonzeros, 0])[1].clone();
            point["test"] = json!(0.9795 + 1e-3 * f64::from(seed));
            records
                .push(json!({ "stage": "final", "penalty": "l1", "factor": 1e-4, "seed": seed, "curves": {},
                "chosen": { "kronecker, tuned": { "0.98": point } } }));
        }
        let text = markdown(&records);
        assert!(
            text.contains(
                "| l1 | 0.0001 | kronecker, tuned | 4100 ± 141 | 98.10 ± 0.07 | 600 | 60 + 50 | 2 of 2 |"
            ),
            "{text}"
        );
        assert!(text.contains("| l1 | 0.0001 | magnitude | - | - | - | - | 0 of 2 |"), "{text}");
        assert!(text.contains("| l1 | 0.00006 | 98.00 | 5000 / 3000 |"), "{text}");
    }
}
