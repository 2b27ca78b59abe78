//! Lines in the panels of an SVG file.

use candle_core::{Error, Result};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

pub use plotters::prelude::SeriesLabelPosition as Legend;

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A line: its name and its points.
pub type Line = (String, Vec<(f64, f64)>);

/// Colors that stay apart for the color-blind (Okabe and Ito).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// What is around the lines.
pub struct Panel<'a> {
    /// What the axes are.
    pub labels: (&'a str, &'a str),
    /// What they show; all of the lines, if not said.
    pub x: Option<Range<f64>>,
    pub y: Option<Range<f64>>,
    /// Where the lines' names are; nowhere, if not said.
    pub legend: Option<Legend>,
    /// Whether points are marked.
    pub marked: bool,
}

impl<'a> Panel<'a> {
    /// Marked lines, shown whole.
    pub fn new(x: &'a str, y: &'a str, legend: Legend) -> Self {
        Self { labels: (x, y), x: None, y: None, legend: Some(legend), marked: true }
    }
}

/// Makes a file of `size` and has `fill` draw in it.
pub fn file(path: &Path, size: (u32, u32), fill: impl FnOnce(&Area) -> Result<()>) -> Result<()> {
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE).map_err(Error::wrap)?;
    fill(&root)?;
    root.present().map_err(Error::wrap)
}

/// Draws `lines`.
pub fn draw(area: &Area, panel: Panel, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let x = panel.x.unwrap_or_else(|| around(points().map(|p| p.0)));
    let y = panel.y.unwrap_or_else(|| around(points().map(|p| p.1)));
    let (low, high) = (y.start, y.end);
    let text = ("sans-serif", 15);
    let short = |value: &f64| ((value * 1e4).round() / 1e4 + 0.0).to_string();
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(x, y)
        .map_err(Error::wrap)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .x_desc(panel.labels.0)
        .y_desc(panel.labels.1)
        .label_style(text)
        .axis_desc_style(text)
        .draw()
        .map_err(Error::wrap)?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let style = COLORS[i % COLORS.len()].stroke_width(2);
        let points = points.iter().copied().filter(|p| (low..=high).contains(&p.1));
        // The colors' second round is dashed.
        let (dash, gap) = if i < COLORS.len() { (22, 0) } else { (5, 3) };
        let size = if panel.marked { 3 } else { 0 };
        let series = match gap {
            0 => chart.draw_series(LineSeries::new(points, style.filled()).point_size(size)),
            _ => chart.draw_series(DashedLineSeries::new(points, dash, gap, style)),
        };
        series
            .map_err(Error::wrap)?
            // The backend estimates widths, without a font: the blanks leave room.
            .label(format!("{name}  "))
            .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 22, y)], dash, gap, style));
    }
    let Some(legend) = panel.legend else { return Ok(()) };
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(text)
        .draw()
        .map_err(Error::wrap)
}

/// The smallest range that holds `values`, a little wider on both sides; never empty.
fn around(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (0.05 * (high - low)).max(1e-3 * high.abs()).max(1e-6);
    low - margin..high + margin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_its_values_and_is_never_empty() {
        for values in [vec![], vec![0.0], vec![5.0, 5.0], vec![1.0, 3.0, 2.0]] {
            let range = around(values.iter().copied());
            assert!(
                range.start < range.end && values.iter().all(|v| range.contains(v)),
                "{values:?} {range:?}"
            );
        }
    }
}
