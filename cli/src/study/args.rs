//! The command line.

use super::methods::{METHODS, Method, method};
use super::plan::Stage;
use crate::data::Name;
use crate::model::Spec;
use crate::values::{count, fraction};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Which optimizer wins, under equal budgets.
///
/// Every method is tuned by as many runs on the same part of the training set, chosen on a held-out part, and compared
/// over fresh seeds. The split is fixed: a seeded shuffle of the training images, of which the last sixth (10,000 of
/// MNIST's 60,000) is held out. The test set is read by the last stage alone, for one setting a method.
///
/// Each finished run is a line of --out. A study that was stopped goes on where it was, with the same results: all that
/// is random depends on --seed, the stage, the knob and the number of the run.
///
/// Seconds are those of training alone, without evaluation, on one thread, while --workers - 1 other runs go on beside
/// it: they can be compared within a study, which is why --workers cannot change when it goes on.
#[derive(Parser, Clone, Debug)]
#[command(name = "study", allow_negative_numbers = true)]
pub struct Args {
    /// Folder with the four IDX files of --dataset, gzip or raw; needed for all but the report
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Name::Mnist)]
    pub dataset: Name,
    /// cnn | lenet300 | lenet5 | mlp:784-32-10[:relu|tanh]
    #[arg(long, default_value = "cnn")]
    pub model: Spec,
    /// Methods, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_parser = method, hide_default_value = true, default_values = names())]
    pub methods: Vec<&'static Method>,
    /// Stages, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Stage::value_variants().to_vec())]
    pub stages: Vec<Stage>,

    /// Random settings of a method
    #[arg(long, value_name = "R", default_value_t = 35, value_parser = count)]
    pub random: usize,
    /// Settings near the best one so far, one after the other
    #[arg(long, value_name = "L", default_value_t = 15)]
    pub local: usize,
    /// How many of the best settings are trained for --epochs; the best of these is the tuned one
    #[arg(long, value_name = "T", default_value_t = 4, value_parser = count)]
    pub long: usize,
    /// Fresh seeds of the tuned setting, the same for all methods; can grow when a study goes on
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = count)]
    pub seeds: usize,
    /// Epochs of the stages random, local and robust
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count)]
    pub short_epochs: usize,
    /// Epochs of the stages long and final
    #[arg(long, value_name = "E", default_value_t = 10, value_parser = count)]
    pub epochs: usize,
    /// Examples a step; an epoch's last batch may be smaller
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = count)]
    pub batch: usize,
    /// Steps from one refresh of the factors to the next
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = count)]
    pub factor_every: usize,
    /// Steps from one refresh of the inverses to the next
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = count)]
    pub inverse_every: usize,
    /// Probability that a unit before the last layer is dropped in training
    #[arg(long, value_name = "P", default_value_t = 0.5, value_parser = fraction)]
    pub dropout: f64,
    /// Of everything that is random, but for the split
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Runs side by side, each on one thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count)]
    pub workers: usize,

    /// The log: one JSON object a line
    #[arg(long, value_name = "FILE", default_value = "study.jsonl")]
    pub out: PathBuf,
    /// Write the report (markdown) here too
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Folder of the report's plots, seconds.svg and random.svg
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Held-out accuracies to reach, in %; the first also counts random settings
    #[arg(long, value_delimiter = ',', default_values_t = [97.5, 98.0, 98.5])]
    pub thresholds: Vec<f64>,
}

fn names() -> Vec<&'static str> {
    METHODS.iter().map(|method| method.name).collect()
}

impl Args {
    /// All that the runs' results depend on, but for the methods: the first line of the log.
    pub fn protocol(&self) -> Value {
        let dataset = self.dataset.to_possible_value().map(|value| value.get_name().to_string());
        json!({
            "dataset": dataset,
            "model": format!("{:?}", self.model).to_lowercase(),
            "random": self.random,
            "local": self.local,
            "long": self.long,
            "short_epochs": self.short_epochs,
            "epochs": self.epochs,
            "batch": self.batch,
            "factor_every": self.factor_every,
            "inverse_every": self.inverse_every,
            "dropout": self.dropout,
            "seed": self.seed,
            "workers": self.workers,
        })
    }

    /// Whether there is anything to train.
    pub fn trains(&self) -> bool {
        self.stages.iter().any(|&stage| stage != Stage::Report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn lists_are_read_and_the_report_needs_no_data() {
        Args::command().debug_assert();
        let read = |line: &str| Args::try_parse_from(["study"].into_iter().chain(line.split_whitespace()));
        let args = read("--data-dir d --methods kfac,qe --thresholds 90,95.5").unwrap();
        assert_eq!(args.methods.iter().map(|m| m.name).collect::<Vec<_>>(), ["kfac", "qe"]);
        assert_eq!((args.thresholds.as_slice(), args.stages.len()), (&[90.0, 95.5][..], 6));
        assert!(args.trains());
        assert!(!read("--stages report").unwrap().trains());
        for wrong in ["--dropout", "--data-dir d --methods lbfgs", "--data-dir d --seeds 0", "--dropout 1"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
