//! What a training reports: the rows on the screen, the log file, the comparison.

use super::train::Run;
use crate::jsonl::Lines;
use crate::values::Choice;
use candle_core::Result;
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;

/// An epoch's results.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub optimizer: &'static str,
    /// From 1.
    pub epoch: usize,
    /// Steps since the start of training.
    pub step: usize,
    /// Learning rate of the epoch's last step.
    pub lr: f64,
    pub train_loss: f64,
    pub train_accuracy: f64,
    pub test_loss: f64,
    pub test_accuracy: f64,
    /// Of training, without the evaluation.
    pub seconds: f64,
}

/// The columns of a printed [`Row`].
pub const HEADER: &str = "epoch   train loss  accuracy    test loss  accuracy    seconds";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { epoch, train_loss, test_loss, seconds, .. } = self;
        let (train, test) = (100.0 * self.train_accuracy, 100.0 * self.test_accuracy);
        write!(
            f,
            "{epoch:5}   {train_loss:10.4}  {train:6.2} %   {test_loss:10.4}  {test:6.2} %   {seconds:8.2}"
        )
    }
}

/// The trainings side by side.
pub fn comparison(runs: &[Run]) -> String {
    let mut table =
        String::from("optimizer    train loss    test loss    test accuracy: last, best    seconds\n");
    for run in runs {
        let Some(last) = run.rows.last() else { continue };
        let best = run.rows.iter().map(|row| row.test_accuracy).fold(0.0, f64::max);
        let seconds: f64 = run.rows.iter().map(|row| row.seconds).sum();
        table.push_str(&format!(
            "{:9}    {:10.4}    {:9.4}    {:17.2} %, {:6.2} % {seconds:10.2}\n",
            last.optimizer,
            last.train_loss,
            last.test_loss,
            100.0 * last.test_accuracy,
            100.0 * best,
        ));
    }
    table
}

/// The file of `--log`, if one is wanted.
pub struct Log(Option<Lines>);

impl Log {
    pub fn create(path: Option<&Path>) -> Result<Self> {
        path.map(|path| Lines::create("--log", path)).transpose().map(Self)
    }

    /// Writes an epoch.
    pub fn write(&mut self, row: &Row) -> Result<()> {
        self.line(json!({
            "optimizer": row.optimizer, "epoch": row.epoch, "step": row.step, "lr": row.lr,
            "train_loss": row.train_loss, "train_accuracy": row.train_accuracy,
            "test_loss": row.test_loss, "test_accuracy": row.test_accuracy, "seconds": row.seconds,
        }))
    }

    /// Writes a step.
    pub fn write_step(&mut self, choice: Choice, step: usize, loss: f64) -> Result<()> {
        self.line(json!({ "optimizer": choice.name(), "step": step, "loss": loss }))
    }

    fn line(&mut self, value: Value) -> Result<()> {
        self.0.as_mut().map_or(Ok(()), |lines| lines.write(&value))
    }
}
