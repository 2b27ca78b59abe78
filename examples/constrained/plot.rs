//! The plot of multipliers and excesses over the steps, SVG.

use super::colors::COLORS;
use super::train::At;
use candle_core::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Hidden units in the plot.
const SHOWN: usize = 6;

/// Draws the hidden units whose multipliers were largest on the average.
pub fn multipliers(path: &Path, trace: &[At]) -> Result<()> {
    let total = |unit: usize| trace.iter().map(|at| at.report.alpha[unit]).sum::<f64>();
    let mut units: Vec<usize> = (0..trace.first().map_or(0, |at| at.report.alpha.len())).collect();
    units.sort_by(|&a, &b| total(b).total_cmp(&total(a)));
    units.truncate(SHOWN);
    let root = SVGBackend::new(path, (820, 720)).into_drawing_area();
    root.fill(&WHITE).map_err(Error::wrap)?;
    let (top, bottom) = root.split_vertically(360);
    panel(
        &top,
        trace,
        &units,
        "multiplier of a hidden unit",
        SeriesLabelPosition::UpperRight,
        |at, unit| at.report.alpha[unit],
    )?;
    panel(
        &bottom,
        trace,
        &units,
        "norm of its weights less the bound",
        SeriesLabelPosition::LowerRight,
        |at, unit| at.report.excess[unit],
    )?;
    root.present().map_err(Error::wrap)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    trace: &[At],
    units: &[usize],
    y: &str,
    legend: SeriesLabelPosition,
    value: impl Fn(&At, usize) -> f64,
) -> Result<()> {
    let values = || trace.iter().flat_map(|at| units.iter().map(|&unit| value(at, unit)));
    let (low, high) = values().fold((0.0f64, 1e-6f64), |(l, h), v| (l.min(v), h.max(v)));
    let margin = 0.05 * (high - low);
    let steps = 0.0..trace.last().map_or(1.0, |at| at.step as f64);
    let text = ("sans-serif", 15);
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(steps, low - margin..high + margin)
        .map_err(Error::wrap)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_label_formatter(&|step| step.to_string())
        .y_label_formatter(&|v| ((v * 1e4).round() / 1e4 + 0.0).to_string())
        .x_desc("step")
        .y_desc(y)
        .label_style(text)
        .axis_desc_style(text)
        .draw()
        .map_err(Error::wrap)?;
    for (&unit, color) in units.iter().zip(COLORS) {
        chart
            .draw_series(LineSeries::new(
                trace.iter().map(|at| (at.step as f64, value(at, unit))),
                color.stroke_width(2),
            ))
            .map_err(Error::wrap)?
            // The backend estimates widths, without a font: the blanks leave room.
            .label(format!("unit {unit}  "))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(text)
        .draw()
        .map_err(Error::wrap)
}
