//! The posterior and its predictions against Jacobians and quadrature.

use crate::common::nets::*;
use candle_core::{DType, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, HessianStructure, Hyper, ParamsTune, Parts, Posterior, Structure,
};
use kronwake::tape::Likelihood;

/// Covariances of outputs from the inverse of the matrix that each structure stands for.
#[test]
fn predictions_agree_with_jacobians() -> Result<()> {
    for (seed, kind) in
        [Kind::Mlp, Kind::Conv, Kind::Shared, Kind::Sequence, Kind::Tokens].into_iter().enumerate()
    {
        let likelihood = Likelihood::Categorical;
        let net = Net::new(kind, seed as u64, 5, 3)?;
        let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
        let count = problem.parameters().len();
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?.with_temperature(0.7)?;
        hyper.set_precisions(&precisions(count))?;
        let (m, _) = brute(&net, likelihood, 1.0 / 0.7, &precisions(count))?;
        let j = net.jacobian(&problem)?;
        let size = m.dim(0)?;
        let eye = Tensor::eye(size, DType::F64, &CPU)?;
        for structure in [HessianStructure::Full, HessianStructure::Diagonal] {
            let m = if structure == HessianStructure::Full { m.clone() } else { (&m * &eye)? };
            let sigma = kronwake::linalg::cholesky::inverse_spd(&m.unsqueeze(0)?, "m")?.squeeze(0)?;
            let expected = j.matmul(&sigma)?.matmul(&j.t()?)?.to_vec2::<f64>()?;
            let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
            let found = posterior.predict(&problem, &net.x)?;
            for (n, block) in found.covariance.to_vec3::<f64>()?.iter().enumerate() {
                for (c, row) in block.iter().enumerate() {
                    for (d, found) in row.iter().enumerate() {
                        let expected = expected[n * 3 + c][n * 3 + d];
                        assert!(
                            (found - expected).abs() < 1e-10,
                            "{kind:?} {structure:?}: {found} {expected}"
                        );
                    }
                }
            }
            let mean = found.mean.to_vec2::<f64>()?;
            assert_eq!(mean, net.model.forward(&net.x)?.to_vec2::<f64>()?);
        }
    }
    Ok(())
}

/// With one example the Kronecker factors of a layer are exact for a Gaussian likelihood's single output.
#[test]
fn predictions_with_kronecker_factors() -> Result<()> {
    let likelihood = Likelihood::Gaussian;
    let net = Net::new(Kind::Mlp, 11, 1, 1)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::PerTensor, 1.5)?.with_noise(0.5)?;
    let (m, _) = brute(&net, likelihood, 4.0, &[1.5; 3])?;
    // What is between tensors is left out.
    let mut blocks = vec![];
    for (index, p) in problem.parameters().iter().enumerate() {
        blocks.extend(std::iter::repeat_n(index as f64, p.tensor.elem_count()));
    }
    let blocks = Tensor::new(blocks, &CPU)?;
    let same = blocks.unsqueeze(0)?.broadcast_eq(&blocks.unsqueeze(1)?)?.to_dtype(DType::F64)?;
    let sigma = kronwake::linalg::cholesky::inverse_spd(&(m * same)?.unsqueeze(0)?, "m")?.squeeze(0)?;
    let other = random(3, &[2, 3])?;
    let other = Net { x: other, ..net };
    let problem = other.problem(likelihood)?;
    let j = other.jacobian(&problem)?;
    let expected = j.matmul(&sigma)?.matmul(&j.t()?)?.to_vec2::<f64>()?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?;
    let found = posterior.predict(&problem, &other.x)?;
    let variance = found.variance()?.to_vec2::<f64>()?;
    for n in 0..2 {
        let expected = expected[n][n] + 0.25;
        assert!((variance[n][0] - expected).abs() < 1e-10, "{} {expected}", variance[n][0]);
    }
    Ok(())
}

/// Sampled predictions approach the integral, here one of two classes by quadrature; probit is near it.
#[test]
fn predictions_of_classes() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Mlp, 2, 6, 2)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::Scalar, 0.7)?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
    let found = posterior.predict(&problem, &net.x)?;
    let (sampled, probit) = (found.sampled(20_000, 1)?.to_vec2::<f64>()?, found.probit()?.to_vec2::<f64>()?);
    let (mean, covariance) = (found.mean.to_vec2::<f64>()?, found.covariance.to_vec3::<f64>()?);
    for n in 0..6 {
        // The difference of the outputs is Gaussian.
        let (center, c) = (mean[n][0] - mean[n][1], &covariance[n]);
        let deviation = (c[0][0] + c[1][1] - 2.0 * c[0][1]).sqrt();
        let (mut exact, mut weight) = (0.0, 0.0);
        for i in -400..=400 {
            let z = i as f64 / 50.0;
            let w = (-z * z / 2.0).exp();
            exact += w / (1.0 + (-(center + deviation * z)).exp());
            weight += w;
        }
        exact /= weight;
        // Five standard errors.
        assert!((sampled[n][0] - exact).abs() < 5.0 * 0.5 / 20_000f64.sqrt(), "{} {exact}", sampled[n][0]);
        assert!((sampled[n][0] + sampled[n][1] - 1.0).abs() < 1e-12);
        assert!((probit[n][0] - 0.5) * (exact - 0.5) >= 0.0);
    }
    Ok(())
}

/// What a fit of the evidence has read is that of the posterior, bit for bit, at hyperparameters that were tuned by it.
#[test]
fn a_posterior_of_a_fit() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Shared, 5, 7, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    for (curvature, structure) in [
        (Curvature::Kron, HessianStructure::Kron),
        (Curvature::Rotated, HessianStructure::Rotated),
        (Curvature::Diagonal, HessianStructure::Diagonal),
    ] {
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
        let fit = Estimator::new(curvature, Parts::Whole).fit(&problem, &examples, 0)?;
        fit.tune(&hyper, &ParamsTune { steps: 5, ..Default::default() }, |_, _| ())?;
        let predict = |posterior: Posterior| posterior.predict(&problem, &net.x)?.covariance.to_vec3::<f64>();
        let expected = predict(Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?)?;
        assert_eq!(predict(fit.posterior(&hyper, 1 << 30)?)?, expected, "{curvature:?}");
    }
    for (curvature, parts, draws) in [
        (Curvature::Full, Parts::Whole, None),
        (Curvature::Kron, Parts::Consecutive(3), None),
        // Of three of seven examples.
        (Curvature::Kron, Parts::Random(3), Some(1)),
    ] {
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
        let estimator = Estimator { draws, ..Estimator::new(curvature, parts) };
        let fit = estimator.fit(&problem, &examples, 0)?;
        let message = fit.posterior(&hyper, 1 << 30).map(drop).expect_err("refused").to_string();
        assert!(
            message.contains("expected Curvature::Kron, Rotated or Diagonal with Parts::Whole"),
            "{message}"
        );
    }
    Ok(())
}
