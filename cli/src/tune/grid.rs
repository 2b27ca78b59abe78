//! The evidence over a grid of prior precisions, for several batch sizes, as a table of lines in an SVG file.

use crate::chart::{self, Legend, Line, Panel};
use candle_core::Result;
use kronwake::evidence::{Curvature, Estimator, Examples, Hyper, Outputs, Parts, Problem, Structure};
use std::path::Path;

/// Examples of the grid: enough to tell the batches apart, few enough for the largest.
const EXAMPLES: usize = 400;
const BATCHES: [usize; 4] = [10, 25, 50, 100];
/// Decimal logarithms of the precisions, in halves.
const LOGS: std::ops::RangeInclusive<i32> = -4..=8;

/// Decimal logarithms of precisions with the log evidence per example.
fn lines(problem: &Problem<'_>, examples: &Examples) -> Result<Vec<Line>> {
    let joint = Curvature::Kernel(Outputs::Joint);
    let mut kinds: Vec<(String, Estimator)> = BATCHES
        .into_iter()
        .filter(|&b| b < examples.len())
        .map(|b| (format!("batches of {b}"), Estimator::new(joint, Parts::Consecutive(b))))
        .collect();
    if examples.len() >= 100 {
        let curvature = Curvature::Extrapolated;
        kinds.push(("batches of 100, continued".into(), Estimator::new(curvature, Parts::Consecutive(100))));
    }
    kinds.push(("Kronecker factors".into(), Estimator::new(Curvature::Kron, Parts::Whole)));
    let mut lines = Vec::new();
    for (name, estimator) in kinds {
        let fit = estimator.fit(problem, examples, 0)?;
        let mut points = Vec::new();
        for log in LOGS {
            let log = f64::from(log) / 2.0;
            let hyper = Hyper::new(problem, Structure::Scalar, 10f64.powf(log))?;
            // Where a kernel is too badly conditioned for f32 there is nothing to draw.
            if let Ok(found) = fit.evidence(&hyper) {
                points.push((log, found.log_evidence / examples.len() as f64));
            }
        }
        lines.push((name, points));
    }
    Ok(lines)
}

/// Draws the grid for the first examples, one precision for all weights.
pub fn draw(problem: &Problem<'_>, examples: &Examples, path: &Path) -> Result<usize> {
    let count = examples.len().min(EXAMPLES);
    let lines = lines(problem, &examples.select(&(0..count).collect::<Vec<_>>())?)?;
    let values = || lines.iter().flat_map(|(_, points)| points.iter().map(|p| p.1));
    let best = values().fold(f64::NEG_INFINITY, f64::max);
    // Far below the best the lines say nothing.
    let least = values().fold(f64::INFINITY, f64::min).max(best - 4.0);
    let margin = 0.05 * (best - least).max(1e-3);
    let (from, to) = (f64::from(*LOGS.start()) / 2.0, f64::from(*LOGS.end()) / 2.0);
    let y = format!("log evidence per example, first {count}");
    let panel = Panel {
        x: Some(from..to),
        y: Some(least - margin..best + margin),
        ..Panel::new("log10 of the prior precision of all weights", &y, Legend::LowerMiddle)
    };
    chart::file(path, (800, 560), |root| chart::draw(root, panel, &lines))?;
    Ok(count)
}
