//! Four panels of trainings: their loss and accuracy, each over steps or epochs and over seconds.

use crate::chart::{self, Legend, Line, Panel};
use candle_core::Result;
use std::path::Path;

/// Draws the lines of `lines(by_time, accuracy)` to `path`; `x` is what they are over where not by time, `loss` which loss it is.
pub fn curves(path: &Path, x: &str, loss: &str, lines: impl Fn(bool, bool) -> Vec<Line>) -> Result<()> {
    chart::file(path, (1000, 760), |root| {
        for (i, area) in root.margin(10, 10, 10, 10).split_evenly((2, 2)).iter().enumerate() {
            let (by_time, accuracy) = (i % 2 == 1, i / 2 == 1);
            let x = if by_time { "seconds of training" } else { x };
            let (y, legend) = match accuracy {
                true => ("test accuracy, %", Legend::LowerRight),
                false => (loss, Legend::UpperRight),
            };
            chart::draw(area, Panel::new(x, y, legend), &lines(by_time, accuracy))?;
        }
        Ok(())
    })
}
