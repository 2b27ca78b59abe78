//! What the tuned posterior predicts for held-out examples, beside the net itself.

use super::args::{Args, Bound, PosteriorKind};
use candle_core::{Result, Tensor};
use kronwake::evidence::{Examples, Fit, HessianStructure, Hyper, Posterior, Problem, Scores, Structure};
use kronwake::ops::softmax::softmax_last_dim;
use kronwake::tape::Likelihood;
use serde_json::{Value, json};
use std::time::Instant;

/// Held-out examples that are predicted for.
const EXAMPLES: usize = 1000;
/// Of a pass, so that sequences of like lengths are together.
const PASS: usize = 32;
/// Draws of the outputs.
const DRAWS: usize = 100;

/// The posterior that predicts, with its name.
fn structure(args: &Args, hyper: &Hyper) -> (HessianStructure, &'static str) {
    let of_bound = match args.bound() {
        Bound::Diag => PosteriorKind::Diag,
        _ if hyper.structure() == Structure::Diagonal => PosteriorKind::Diag,
        Bound::Rotated => PosteriorKind::Rotated,
        _ => PosteriorKind::Kron,
    };
    match args.posterior.unwrap_or(of_bound) {
        PosteriorKind::Full => (HessianStructure::Full, "the full matrix"),
        PosteriorKind::Rotated => (HessianStructure::Rotated, "a rotated diagonal"),
        PosteriorKind::Kron => (HessianStructure::Kron, "Kronecker factors"),
        PosteriorKind::Diag => (HessianStructure::Diagonal, "a diagonal"),
    }
}

/// Prints negative log-likelihood, calibration error and accuracy before and after, and returns them; nothing for likelihoods without classes.
/// Training examples come with a fit of the evidence to all of them, where there is one.
pub fn held_out(
    args: &Args,
    problem: &Problem<'_>,
    (train, fit): (&Examples, Option<&Fit>),
    test: &Examples,
    hyper: &Hyper,
) -> Result<Option<Value>> {
    if problem.likelihood() != Likelihood::Categorical {
        return Ok(None);
    }
    let clock = Instant::now();
    let (structure, name) = structure(args, hyper);
    let memory = (args.memory * 1e9) as usize;
    let posterior = match (fit, args.bound(), structure) {
        (Some(fit), Bound::Rotated, HessianStructure::Rotated)
        | (Some(fit), Bound::Kfac, HessianStructure::Kron)
        | (Some(fit), Bound::Diag, HessianStructure::Diagonal) => fit.posterior(hyper, memory)?,
        _ => Posterior::fit(problem, train, structure, hyper, memory)?,
    };
    let test = test.select(&(0..test.len().min(EXAMPLES)).collect::<Vec<_>>())?;
    let mut parts: [Vec<Tensor>; 4] = Default::default();
    for (pass, start) in (0..test.len()).step_by(PASS).enumerate() {
        let some = test.select(&(start..test.len().min(start + PASS)).collect::<Vec<_>>())?;
        let predictive = posterior.predict(problem, some.x())?;
        let found = [
            softmax_last_dim(&predictive.mean)?,
            predictive.probit()?,
            predictive.bridge()?,
            predictive.sampled(DRAWS, pass as u64)?,
        ];
        parts.iter_mut().zip(found).for_each(|(parts, found)| parts.push(found));
    }
    println!(
        "\n{:<58}{:>8}{:>20}{:>9}",
        format!("{} held-out examples, {:.1} s", test.len(), clock.elapsed().as_secs_f64()),
        "NLL",
        "calibration error",
        "%"
    );
    let chosen = args.predictive.name();
    let mut found = json!({ "examples": test.len(), "after": chosen });
    let mut lines = Vec::new();
    for ((key, what), parts) in [
        ("net", "before: the net".to_string()),
        ("probit", format!("its posterior with {name}, probit")),
        ("bridge", format!("its posterior with {name}, Laplace bridge")),
        ("sampled", format!("its posterior with {name}, sampled")),
    ]
    .into_iter()
    .zip(&parts)
    {
        let Scores { nll, calibration_error, accuracy } = Scores::of(&Tensor::cat(parts, 0)?, test.y())?;
        let what = if key == chosen { format!("after: {what}") } else { what };
        lines.push((key, format!("{what:<58}{nll:>8.4}{calibration_error:>20.4}{:>9.2}", 100.0 * accuracy)));
        found[key] = json!({ "nll": nll, "calibration_error": calibration_error, "accuracy": accuracy });
    }
    // Before, after, and what else there is.
    lines.sort_by_key(|(key, _)| if *key == "net" { 0 } else { 1 + u8::from(*key != chosen) });
    lines.iter().for_each(|(_, line)| println!("{line}"));
    println!();
    Ok(Some(found))
}
