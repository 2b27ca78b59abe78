//! The plot of multipliers and excesses over the steps, SVG.

use super::train::At;
use crate::chart::{self, Area, Legend, Line, Panel};
use candle_core::Result;
use std::path::Path;

/// Hidden units in the plot.
const SHOWN: usize = 6;

/// Draws the hidden units whose multipliers were largest on the average.
pub fn multipliers(path: &Path, trace: &[At]) -> Result<()> {
    let total = |unit: usize| trace.iter().map(|at| at.report.alpha[unit]).sum::<f64>();
    let mut units: Vec<usize> = (0..trace.first().map_or(0, |at| at.report.alpha.len())).collect();
    units.sort_by(|&a, &b| total(b).total_cmp(&total(a)));
    units.truncate(SHOWN);
    let steps = 0.0..trace.last().map_or(1.0, |at| at.step as f64);
    let panel = |area: &Area, y: &str, legend, value: &dyn Fn(&At, usize) -> f64| {
        let line = |&unit: &usize| {
            let points = trace.iter().map(|at| (at.step as f64, value(at, unit))).collect();
            (format!("unit {unit}"), points)
        };
        let lines: Vec<Line> = units.iter().map(line).collect();
        chart::draw(
            area,
            Panel { x: Some(steps.clone()), marked: false, ..Panel::new("step", y, legend) },
            &lines,
        )
    };
    chart::file(path, (820, 720), |root| {
        let (top, bottom) = root.split_vertically(360);
        let (alpha, excess) = ("multiplier of a hidden unit", "norm of its weights less the bound");
        panel(&top, alpha, Legend::UpperRight, &|at, unit| at.report.alpha[unit])?;
        panel(&bottom, excess, Legend::LowerRight, &|at, unit| at.report.excess[unit])
    })
}
