//! The plots of a study, SVG.

use super::colors::COLORS;
use super::plan::Stage;
use super::report::{methods, runs};
use super::stats::mean;
use super::store::{Done, Record};
use candle_core::{Error, Result};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

/// A method's line: its name and its points.
type Line = (&'static str, Vec<(f64, f64)>);

/// The mean held-out accuracy of the tuned settings over the seconds of training.
pub fn seconds(done: &Done, path: &Path) -> Result<()> {
    let lines = methods(done).into_iter().map(|method| {
        let mut all = runs(done, method, &[Stage::Final]);
        all.retain(|run| !run.diverged);
        let epochs = all.iter().map(|run| run.held.len()).min().unwrap_or(0);
        let average = |of: &dyn Fn(&Record) -> f64| mean(&all.iter().map(|run| of(run)).collect::<Vec<_>>());
        let point =
            |epoch: usize| (average(&|run| run.seconds[epoch]), average(&|run| 100.0 * run.held[epoch]));
        (method, (0..epochs).map(point).collect())
    });
    let y = "held-out accuracy, %, mean of the seeds";
    draw(path, lines.collect(), "seconds of training", y, SeriesLabelPosition::LowerRight)
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
        (method, sorted.iter().enumerate().map(|(rank, &accuracy)| (share(rank), accuracy)).collect())
    });
    let y = format!("held-out accuracy, % ({FLOOR} or less at {FLOOR})");
    draw(path, lines.collect(), "random settings, %, best first", &y, SeriesLabelPosition::LowerLeft)
}

/// The smallest range that holds `values`, a little wider on both sides; never empty.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (0.05 * (high - low)).max(1e-6);
    low - margin..high + margin
}

fn draw(path: &Path, lines: Vec<Line>, x: &str, y: &str, legend: SeriesLabelPosition) -> Result<()> {
    let root = SVGBackend::new(path, (820, 560)).into_drawing_area();
    root.fill(&WHITE).map_err(Error::wrap)?;
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let text = ("sans-serif", 15);
    let short = |value: &f64| ((value * 1e3).round() / 1e3).to_string();
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(range(points().map(|p| p.0)), range(points().map(|p| p.1)))
        .map_err(Error::wrap)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .x_desc(x)
        .y_desc(y)
        .label_style(text)
        .axis_desc_style(text)
        .draw()
        .map_err(Error::wrap)?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let style = COLORS[i % COLORS.len()].stroke_width(2);
        let points = points.iter().copied();
        // The colors' second round is dashed.
        let (dash, gap) = if i < COLORS.len() { (22, 0) } else { (5, 3) };
        let series = if gap == 0 {
            chart.draw_series(LineSeries::new(points, style.filled()).point_size(2))
        } else {
            chart.draw_series(DashedLineSeries::new(points, dash, gap, style))
        };
        series
            .map_err(Error::wrap)?
            // The backend estimates widths, without a font: the blanks leave room.
            .label(format!("{name}  "))
            .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 22, y)], dash, gap, style));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(text)
        .draw()
        .map_err(Error::wrap)?;
    root.present().map_err(Error::wrap)
}
