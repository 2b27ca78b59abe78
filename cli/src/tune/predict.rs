//! What the tuned posterior predicts for held-out examples, beside the net itself.

use super::args::{Args, Bound};
use candle_core::Result;
use kronwake::evidence::{Examples, HessianStructure, Hyper, Posterior, Problem, Scores, Structure};
use kronwake::ops::softmax::softmax_last_dim;
use kronwake::tape::Likelihood;
use serde_json::{Value, json};

/// Held-out examples that are predicted for.
const EXAMPLES: usize = 1000;
/// Draws of the outputs.
const DRAWS: usize = 100;

/// The posterior that goes with the estimate of the evidence, with its name.
fn structure(args: &Args, hyper: &Hyper) -> (HessianStructure, &'static str) {
    match args.bound() {
        Bound::Diag => (HessianStructure::Diagonal, "a diagonal"),
        _ if hyper.structure() == Structure::Diagonal => (HessianStructure::Diagonal, "a diagonal"),
        Bound::Rotated => (HessianStructure::Rotated, "a rotated diagonal"),
        _ => (HessianStructure::Kron, "Kronecker factors"),
    }
}

/// Prints negative log-likelihood, calibration error and accuracy before and after, and returns them; nothing for likelihoods without classes.
pub fn held_out(
    args: &Args,
    problem: &Problem<'_>,
    train: &Examples,
    test: &Examples,
    hyper: &Hyper,
) -> Result<Option<Value>> {
    if problem.likelihood() != Likelihood::Categorical {
        return Ok(None);
    }
    let (structure, name) = structure(args, hyper);
    let posterior = Posterior::fit(problem, train, structure, hyper, (args.memory * 1e9) as usize)?;
    let test = test.select(&(0..test.len().min(EXAMPLES)).collect::<Vec<_>>())?;
    let predictive = posterior.predict(problem, test.x())?;
    println!(
        "\n{:<48}{:>10}{:>20}{:>10}",
        format!("{} held-out examples", test.len()),
        "NLL",
        "calibration error",
        "%"
    );
    let mut found = json!({ "examples": test.len() });
    for (key, name, probabilities) in [
        ("net", "the net".into(), softmax_last_dim(&predictive.mean)?),
        ("probit", format!("its posterior with {name}, probit"), predictive.probit()?),
        ("bridge", "the same by the Laplace bridge".into(), predictive.bridge()?),
        ("sampled", "the same, sampled".into(), predictive.sampled(DRAWS, 0)?),
    ] {
        let Scores { nll, calibration_error, accuracy } = Scores::of(&probabilities, test.y())?;
        println!("{name:<48}{nll:>10.4}{calibration_error:>20.4}{:>10.2}", 100.0 * accuracy);
        found[key] = json!({ "nll": nll, "calibration_error": calibration_error, "accuracy": accuracy });
    }
    println!();
    Ok(Some(found))
}
