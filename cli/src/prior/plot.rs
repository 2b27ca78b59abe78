//! The plot of a density, SVG.

use crate::chart::{self, Legend, Panel};
use candle_core::Result;
use kronwake::penalty::Verdict;
use std::path::Path;

/// Draws the prior's density on all of its grid.
pub fn density(path: &Path, verdict: &Verdict) -> Result<()> {
    let points: Vec<_> = verdict.x.iter().zip(&verdict.log_density).map(|(x, log)| (*x, log.exp())).collect();
    let top = points.iter().map(|(_, density)| *density).fold(0.0, f64::max);
    let edge = verdict.x.last().copied().unwrap_or(1.0);
    let panel = Panel {
        x: Some(-edge..edge),
        y: Some(0.0..1.05 * top),
        legend: None,
        marked: false,
        ..Panel::new("weight", "density of the prior", Legend::UpperRight)
    };
    chart::file(path, (820, 420), |root| chart::draw(root, panel, &[("prior".into(), points)]))
}
