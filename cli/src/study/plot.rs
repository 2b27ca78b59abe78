//! The plots of a study, SVG.

use super::plan::Stage;
use super::report::{methods, runs};
use super::store::{Done, Record};
use crate::chart::{self, Legend, Line, Panel};
use crate::stats::mean;
use candle_core::Result;
use std::path::Path;

/// The mean held-out accuracy of the tuned settings over the seconds of training.
pub fn seconds(done: &Done, path: &Path) -> Result<()> {
    let lines = methods(done).into_iter().map(|method| {
        let mut all = runs(done, method, &[Stage::Final]);
        all.retain(|run| !run.diverged);
        let epochs = all.iter().map(|run| run.held.len()).min().unwrap_or(0);
        let average = |of: &dyn Fn(&Record) -> f64| mean(&all.iter().map(|run| of(run)).collect::<Vec<_>>());
        let point =
            |epoch: usize| (average(&|run| run.seconds[epoch]), average(&|run| 100.0 * run.held[epoch]));
        (method.to_string(), (0..epochs).map(point).collect())
    });
    let y = "held-out accuracy, %, mean of the seeds";
    draw(path, lines.collect(), "seconds of training", y, Legend::LowerRight)
}

/// Accuracies below this are drawn there.
const FLOOR: f64 = 90.0;

/// The accuracies of the random settings, best first.
pub fn random(done: &Done, path: &Path) -> Result<()> {
    let lines = methods(done).into_iter().map(|method| {
        let all = runs(done, method, &[Stage::Random, Stage::Robust]);
        let mut sorted: Vec<f64> = all.iter().map(|run| (100.0 * run.held_out()).max(FLOOR)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let share = |rank: usize| 100.0 * (rank as f64 + 0.5) / sorted.len() as f64;
        (
            method.to_string(),
            sorted.iter().enumerate().map(|(rank, &accuracy)| (share(rank), accuracy)).collect(),
        )
    });
    let y = format!("held-out accuracy, % ({FLOOR} or less at {FLOOR})");
    draw(path, lines.collect(), "random settings, %, best first", &y, Legend::LowerLeft)
}

fn draw(path: &Path, lines: Vec<Line>, x: &str, y: &str, legend: Legend) -> Result<()> {
    chart::file(path, (820, 560), |root| chart::draw(root, Panel::new(x, y, legend), &lines))
}
