//! The plot of a density, SVG.

use candle_core::{Error, Result};
use kronwake::penalty::Verdict;
use plotters::prelude::*;
use std::path::Path;

/// Draws the prior's density on all of its grid.
pub fn density(path: &Path, verdict: &Verdict) -> Result<()> {
    let points: Vec<_> = verdict.x.iter().zip(&verdict.log_density).map(|(x, log)| (*x, log.exp())).collect();
    let top = points.iter().map(|(_, density)| *density).fold(0.0, f64::max);
    let edge = verdict.x.last().copied().unwrap_or(1.0);
    let root = SVGBackend::new(path, (820, 420)).into_drawing_area();
    root.fill(&WHITE).map_err(Error::wrap)?;
    let text = ("sans-serif", 15);
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(-edge..edge, 0.0..1.05 * top)
        .map_err(Error::wrap)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc("weight")
        .y_desc("density of the prior")
        .label_style(text)
        .axis_desc_style(text)
        .draw()
        .map_err(Error::wrap)?;
    let blue = RGBColor(0, 114, 178);
    chart.draw_series(LineSeries::new(points, blue.stroke_width(2))).map_err(Error::wrap)?;
    root.present().map_err(Error::wrap)
}
