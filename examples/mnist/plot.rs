//! The curves of the trainings as an SVG file: loss and test accuracy over epochs and over seconds.

use super::chart::{self, Legend, Line, Panel};
use super::report::Row;
use super::train::Run;
use candle_core::Result;
use std::path::Path;

/// Writes four panels to `path`: training loss and test accuracy, each over epochs and over seconds of training.
pub fn curves(runs: &[Run], path: &Path) -> Result<()> {
    chart::file(path, (1000, 760), |root| {
        for (i, panel) in root.margin(10, 10, 10, 10).split_evenly((2, 2)).iter().enumerate() {
            let (by_time, accuracy) = (i % 2 == 1, i / 2 == 1);
            let lines: Vec<Line> = runs.iter().map(|run| line(run, by_time, accuracy)).collect();
            let x = if by_time { "seconds of training" } else { "epoch" };
            let (y, legend) = match accuracy {
                true => ("test accuracy, %", Legend::LowerRight),
                false => ("training loss", Legend::UpperRight),
            };
            chart::draw(panel, Panel::new(x, y, legend), &lines)?;
        }
        Ok(())
    })
}

fn line(run: &Run, by_time: bool, accuracy: bool) -> Line {
    let mut seconds = 0.0;
    let point = |row: &Row| {
        seconds += row.seconds;
        let x = if by_time { seconds } else { row.epoch as f64 };
        (x, if accuracy { 100.0 * row.test_accuracy } else { row.train_loss })
    };
    (run.choice.title().to_string(), run.rows.iter().map(point).collect())
}
