//! What the tuned posterior predicts for test images, beside the net itself.

use candle_core::{D, DType, Result, Tensor};
use kronwake::evidence::{Examples, HessianStructure, Hyper, Posterior, Problem, Structure};
use kronwake::ops::softmax::softmax_last_dim;

/// Test images that are predicted for.
const IMAGES: usize = 1000;
/// Draws of the outputs.
const DRAWS: usize = 100;

/// Negative log-likelihood and accuracy of probabilities `[n, classes]`.
fn score(probabilities: &Tensor, labels: &Tensor) -> Result<(f64, f64)> {
    let labels = labels.to_dtype(DType::U32)?;
    let of_label = probabilities.gather(&labels.unsqueeze(1)?, 1)?;
    let nll = of_label.clamp(1e-300, 1.0)?.log()?.mean_all()?.to_scalar::<f64>()?;
    let right = probabilities.argmax(D::Minus1)?.eq(&labels)?.to_dtype(DType::F64)?.mean_all()?;
    Ok((-nll, 100.0 * right.to_scalar::<f64>()?))
}

pub fn print(problem: &Problem<'_>, train: &Examples, test: &Examples, hyper: &Hyper) -> Result<()> {
    if hyper.structure() == Structure::Diagonal {
        return Ok(());
    }
    let posterior = Posterior::fit(problem, train, HessianStructure::Kron, hyper, usize::MAX)?;
    let test = test.select(&(0..test.len().min(IMAGES)).collect::<Vec<_>>())?;
    let predictive = posterior.predict(problem, test.x())?;
    println!("\n{:<44}{:>10}{:>10}", format!("first {} test images", test.len()), "NLL", "%");
    for (name, probabilities) in [
        ("the net", softmax_last_dim(&predictive.mean)?),
        ("its posterior with Kronecker factors, probit", predictive.probit()?),
        ("the same, sampled", predictive.sampled(DRAWS, 0)?),
    ] {
        let (nll, accuracy) = score(&probabilities, test.y())?;
        println!("{name:<44}{nll:>10.4}{accuracy:>10.2}");
    }
    println!();
    Ok(())
}
