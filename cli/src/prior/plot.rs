//! The plot of a density, SVG.

use crate::chart::{self, Legend, Panel};
use candle_core::Result;
use kronwake::penalty::Admissibility;
use std::path::Path;

/// Draws the prior's density on all of its grid.
pub fn density(path: &Path, admissibility: &Admissibility) -> Result<()> {
    let points: Vec<_> =
        admissibility.x.iter().zip(&admissibility.log_density).map(|(x, log)| (*x, log.exp())).collect();
    let top = points.iter().map(|(_, density)| *density).fold(0.0, f64::max);
    let edge = admissibility.x.last().copied().unwrap_or(1.0);
    let panel = Panel {
        x: Some(-edge..edge),
        y: Some(0.0..1.05 * top),
        legend: None,
        marked: false,
        ..Panel::new("weight", "density of the prior", Legend::UpperRight)
    };
    chart::file(path, (820, 420), |root| chart::draw(root, panel, &[("prior".into(), points)]))
}
