//! The curves of the trainings as an SVG file: loss and test accuracy over epochs and over seconds.

use super::train::Run;
use candle_core::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Colors that stay apart for the color-blind (Okabe and Ito).
const COLORS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];

/// A training's line: its name and its points.
type Line = (&'static str, Vec<(f64, f64)>);

/// Writes four panels to `path`: training loss and test accuracy, each over epochs and over seconds of training.
pub fn curves(runs: &[Run], path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (1000, 760)).into_drawing_area();
    root.fill(&WHITE).map_err(Error::wrap)?;
    let panels = root.margin(10, 10, 10, 10).split_evenly((2, 2));
    for (i, panel) in panels.iter().enumerate() {
        let (by_time, accuracy) = (i % 2 == 1, i / 2 == 1);
        let lines: Vec<Line> = runs.iter().map(|run| line(run, by_time, accuracy)).collect();
        let x = if by_time { "seconds of training" } else { "epoch" };
        let y = if accuracy { "test accuracy, %" } else { "training loss" };
        draw(panel, &lines, x, y)?;
    }
    root.present().map_err(Error::wrap)
}

fn line(run: &Run, by_time: bool, accuracy: bool) -> Line {
    let mut seconds = 0.0;
    let point = |row: &super::report::Row| {
        seconds += row.seconds;
        let x = if by_time { seconds } else { row.epoch as f64 };
        (x, if accuracy { 100.0 * row.test_accuracy } else { row.train_loss })
    };
    (run.choice.title(), run.rows.iter().map(point).collect())
}

/// The smallest range that holds `values`, a little wider on both sides; never empty.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (0.05 * (high - low)).max(1e-3 * high.abs()).max(1e-6);
    low - margin..high + margin
}

/// A number on an axis.
fn short(value: &f64) -> String {
    ((value * 1e3).round() / 1e3).to_string()
}

fn draw(panel: &Area, lines: &[Line], x: &str, y: &str) -> Result<()> {
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let text = ("sans-serif", 15);
    let mut chart = ChartBuilder::on(panel)
        .margin(8)
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
    for ((name, points), color) in lines.iter().zip(COLORS.iter().cycle()) {
        let style = color.stroke_width(2);
        let series = LineSeries::new(points.iter().copied(), style.filled()).point_size(3);
        chart
            .draw_series(series)
            .map_err(Error::wrap)?
            // The backend estimates widths, without a font: the blanks leave room.
            .label(format!("{name}  "))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    let corner =
        if y.contains('%') { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight };
    chart
        .configure_series_labels()
        .position(corner)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(text)
        .draw()
        .map_err(Error::wrap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_its_values_and_is_never_empty() {
        for values in [vec![], vec![0.0], vec![5.0, 5.0], vec![1.0, 3.0, 2.0]] {
            let range = range(values.iter().copied());
            assert!(
                range.start < range.end && values.iter().all(|v| range.contains(v)),
                "{values:?} {range:?}"
            );
        }
    }
}
