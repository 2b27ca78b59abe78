//! Linear models with Gaussian noise, whose evidence is known: the prior's mean, and a noise for each output.

use crate::common::nets::*;
use candle_core::{DType, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, ParamsTuneDuring, Parts, Posterior, Problem,
    Structure, TuneDuring, TuneRule,
};
use kronwake::linalg::cholesky::inverse_spd;
use kronwake::nn::{self, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};
use std::collections::BTreeMap;

const N: usize = 12;
const PRECISION: f64 = 1.7;

/// `log N(y; X m, noise^2 I + X X^T / precision)` of one output's weights `w`, and their maximum a posteriori.
fn exact(x: &Tensor, y: &Tensor, mean: &Tensor, noise: f64, precision: f64) -> Result<(f64, Tensor)> {
    let n = x.dim(0)?;
    let covariance =
        ((x.matmul(&x.t()?)? / precision)? + (Tensor::eye(n, DType::F64, &CPU)? * (noise * noise))?)?;
    let left = (y - x.matmul(mean)?)?;
    let inverse = inverse_spd(&covariance.unsqueeze(0)?, "covariance")?.squeeze(0)?;
    let quadratic = left.t()?.matmul(&inverse.matmul(&left)?)?.sum_all()?.to_scalar::<f64>()?;
    let value = -0.5 * (quadratic + log_det(&covariance)? + n as f64 * (2.0 * std::f64::consts::PI).ln());
    let gain = (x.t()?.matmul(&inverse)? / precision)?;
    Ok((value, (mean + gain.matmul(&left)?)?))
}

struct Linear {
    vars: VarMap,
    tape: Tape,
    model: nn::Linear,
    x: Tensor,
    y: Tensor,
}

impl Linear {
    fn new() -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        let model = tape.build(|| nn::linear_no_bias(3, 2, vb.pp("fc")))?;
        let (x, noise) = (random(1, &[N, 3])?, random(2, &[N, 2])?);
        let w = Tensor::new(&[[1.0, -0.5], [0.3, 2.0], [-1.2, 0.4]], &CPU)?;
        let y = (x.matmul(&w)? + noise.broadcast_mul(&Tensor::new(&[[0.2, 1.5]], &CPU)?)?)?;
        Ok(Self { vars, tape, model, x, y })
    }

    fn problem(&self) -> Result<Problem<'_>> {
        Problem::new(&self.tape, &self.vars, &self.model, Likelihood::Gaussian)
    }

    /// Sets the weights to their maximum a posteriori; the exact log evidence.
    fn solve(&self, means: &Tensor, noise: [f64; 2]) -> Result<f64> {
        let (mut value, mut rows) = (0.0, vec![]);
        for (c, noise) in noise.into_iter().enumerate() {
            let mean = means.narrow(0, c, 1)?.t()?;
            let (of_output, w) = exact(&self.x, &self.y.narrow(1, c, 1)?, &mean, noise, PRECISION)?;
            value += of_output;
            rows.push(w.t()?);
        }
        self.vars.data().lock().expect("a lock")["fc.weight"].set(&Tensor::cat(&rows, 0)?)?;
        Ok(value)
    }
}

/// At the maximum a posteriori of a linear model the evidence is the density of the targets, which is Gaussian with the means of the prior.
#[test]
fn a_prior_with_a_mean() -> Result<()> {
    let linear = Linear::new()?;
    let means = random(9, &[2, 3])?;
    let expected = linear.solve(&means, [0.6, 0.6])?;
    let map = BTreeMap::from([("fc.weight".to_string(), means.clone()), ("other".into(), random(0, &[1])?)]);
    let problem = linear.problem()?.with_prior_mean(&map)?;
    let examples = Examples::new(linear.x.clone(), linear.y.clone())?;
    for structure in [Structure::PerTensor, Structure::Diagonal] {
        let hyper = Hyper::new(&problem, structure, PRECISION)?.with_noise(0.6)?;
        let found =
            Estimator::new(Curvature::Full, Parts::Whole).fit(&problem, &examples, 0)?.evidence(&hyper)?;
        assert!((found.log_evidence - expected).abs() < 1e-10, "{} {expected}", found.log_evidence);
        // The derivative by the precision, against the exact evidence: the weights move with it, and have no slope.
        let step = 1e-4;
        let of = |precision: f64| -> Result<f64> {
            let each = (0..2).map(|c| {
                let (y, mean) = (linear.y.narrow(1, c, 1)?, means.narrow(0, c, 1)?.t()?);
                Ok(exact(&linear.x, &y, &mean, 0.6, precision)?.0)
            });
            each.sum()
        };
        let slope = (of(PRECISION * (1.0 + step))? - of(PRECISION * (1.0 - step))?) / (2.0 * step);
        assert!((found.grad_log_precision[0] - slope).abs() < 1e-6, "{:?} {slope}", found.grad_log_precision);
        // While training the loss pulls to the means.
        let tuning = TuneDuring::new(hyper, ParamsTuneDuring::by_batches(4, 1), N)?;
        let data = Tensor::new(0.5f64, &CPU)?;
        let distance = (&problem.parameters()[0].tensor - &means)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        let loss = tuning.loss(&data)?;
        assert!((loss.to_scalar::<f64>()? - 0.5 - PRECISION * distance / (2.0 * N as f64)).abs() < 1e-12);
        let grad = loss.backward()?.get(&problem.parameters()[0].tensor).expect("a gradient").clone();
        let pull = ((&problem.parameters()[0].tensor - &means)? * (PRECISION / N as f64))?;
        assert!((grad - pull)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
    }
    Ok(())
}

#[test]
fn means_that_do_not_fit() -> Result<()> {
    let linear = Linear::new()?;
    let examples = Examples::new(linear.x.clone(), linear.y.clone())?;
    let says = |result: Result<()>, what: &str| {
        let message = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(what), "{what}: {message}");
    };
    let with = |name: &str, mean: Tensor| {
        linear.problem()?.with_prior_mean(&BTreeMap::from([(name.to_string(), mean)])).map(drop)
    };
    says(
        with("fc.weight", random(0, &[3, 2])?),
        "the prior's mean of fc.weight has shape [3, 2], expected [2, 3]",
    );
    says(with("fc.weight", (random(0, &[2, 3])? * f64::NAN)?), "the prior's mean of fc.weight is not finite");
    says(with("other", random(0, &[2, 3])?), "of none of the parameters, which are fc.weight");
    let plain = Hyper::new(&linear.problem()?, Structure::Scalar, 1.0)?;
    let means = BTreeMap::from([("fc.weight".to_string(), random(0, &[2, 3])?)]);
    let fit = Estimator::new(Curvature::Full, Parts::Whole).fit(
        &linear.problem()?.with_prior_mean(&means)?,
        &examples,
        0,
    )?;
    says(fit.evidence(&plain).map(drop), "of a prior with other means");
    Ok(())
}

/// Outputs with a noise each are as many regressions.
#[test]
fn a_noise_for_each_output() -> Result<()> {
    let linear = Linear::new()?;
    let (none, noise) = (Tensor::zeros((2, 3), DType::F64, &CPU)?, [0.3, 1.4]);
    let expected = linear.solve(&none, noise)?;
    let examples = Examples::new(linear.x.clone(), linear.y.clone())?;
    // 0.5 times 0.6 and 2.8.
    let problem = linear.problem()?.with_output_noise(&[0.6, 2.8])?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, PRECISION)?.with_noise(0.5)?;
    for curvature in [
        Curvature::Full,
        Curvature::Kernel(Default::default()),
        Curvature::BlockPerTensor,
        Curvature::Kernel(kronwake::evidence::Outputs::Independent(Default::default())),
    ] {
        let found = Estimator::new(curvature, Parts::Whole).fit(&problem, &examples, 0)?.evidence(&hyper)?;
        assert!(
            (found.log_evidence - expected).abs() < 1e-10,
            "{curvature:?} {} {expected}",
            found.log_evidence
        );
    }
    // Variances of predictions: x^T (X^T X / noise^2 + precision)^-1 x + noise^2.
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
    let new = random(4, &[2, 3])?;
    let variance = posterior.predict(&problem, &new)?.variance()?.to_vec2::<f64>()?;
    let marginal = posterior.marginals(&problem, &new)?.predictive_variance()?.to_vec2::<f64>()?;
    for (c, noise) in noise.into_iter().enumerate() {
        let precision = ((linear.x.t()?.matmul(&linear.x)? / (noise * noise))?
            + (Tensor::eye(3, DType::F64, &CPU)? * PRECISION)?)?;
        let inverse = inverse_spd(&precision.unsqueeze(0)?, "precision")?.squeeze(0)?;
        let spread = new.matmul(&inverse)?.matmul(&new.t()?)?.to_vec2::<f64>()?;
        for n in 0..2 {
            let expected = spread[n][n] + noise * noise;
            assert!((variance[n][c] - expected).abs() < 1e-12 && (marginal[n][c] - expected).abs() < 1e-12);
        }
    }
    Ok(())
}

/// Rounds of the fixed point end where the exact evidence has no slope by the noise of any output, and what is saved fits no other noise.
#[test]
fn the_noise_of_each_output_is_found() -> Result<()> {
    let linear = Linear::new()?;
    let none = Tensor::zeros((2, 3), DType::F64, &CPU)?;
    let examples = Examples::new(linear.x.clone(), linear.y.clone())?;
    let mut noise = [1.0, 1.0];
    let mut saved = None;
    for _ in 0..200 {
        linear.solve(&none, noise)?;
        let problem = linear.problem()?.with_output_noise(&noise)?;
        let hyper = Hyper::new(&problem, Structure::PerTensor, PRECISION)?;
        let posterior = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
        let found = posterior.output_noise(&problem, &examples)?;
        saved = Some((posterior, noise));
        noise = [found[0], found[1]];
    }
    assert!(noise[0] < 0.4 && noise[1] > 0.6, "{noise:?}");
    for (c, now) in noise.into_iter().enumerate() {
        let of = |factor: f64| -> Result<f64> {
            let mean = none.narrow(0, c, 1)?.t()?;
            Ok(exact(&linear.x, &linear.y.narrow(1, c, 1)?, &mean, factor * now, PRECISION)?.0)
        };
        let slope = (of(1.0 + 1e-4)? - of(1.0 - 1e-4)?) / 2e-4;
        assert!(slope.abs() < 1e-5, "output {c}: {slope}");
    }
    let Some((posterior, noise)) = saved else { panic!("no posterior") };
    let path = std::env::temp_dir().join(format!("kronwake-noise-{}", std::process::id()));
    let problem = linear.problem()?.with_output_noise(&noise)?;
    posterior.save(&problem, &path)?;
    let bits = |p: &Posterior| p.predict(&problem, &linear.x)?.variance()?.to_vec2::<f64>();
    assert_eq!(bits(&Posterior::load(&problem, &path)?)?, bits(&posterior)?);
    let size = std::fs::metadata(&path)?.len() as usize;
    Posterior::load_within(&problem, &path, size)?;
    for (found, what) in [
        (
            Posterior::load_within(&problem, &path, size - 1),
            format!("a posterior of {size} bytes, and {} are", size - 1),
        ),
        (
            Posterior::load(&linear.problem()?.with_output_noise(&[1.0, 2.0])?, &path),
            "output_noise is".into(),
        ),
    ] {
        let message = found.map(drop).expect_err("does not fit").to_string();
        assert!(message.contains(&what), "{what}: {message}");
    }
    std::fs::remove_file(&path)?;
    let message =
        posterior.predict(&linear.problem()?, &linear.x).map(drop).expect_err("no noise").to_string();
    assert!(message.contains("of outputs with noise None"), "{message}");
    for (noise, what) in [(vec![], "expected a finite number"), (vec![1.0, 0.0], "expected a finite number")]
    {
        let message = linear.problem()?.with_output_noise(&noise).map(drop).expect_err("refused").to_string();
        assert!(message.contains(what), "{message}");
    }
    let three = linear.problem()?.with_output_noise(&[1.0; 3])?;
    let hyper = Hyper::new(&three, Structure::Scalar, 1.0)?;
    let message = Posterior::fit(&three, &examples, HessianStructure::Full, &hyper, 1 << 30);
    let message = message.map(drop).expect_err("three").to_string();
    assert!(message.contains("the noise of 3 outputs, and the model has [12, 2]"), "{message}");
    Ok(())
}

/// A round of the fixed point goes to effective parameters over squares, of all tensors of a group together; half of the way on the logarithm where
/// the rate is a half, and by a factor of e^2 at most; and is resumed.
#[test]
fn rounds_of_the_fixed_point() -> Result<()> {
    let net = Net::new(Kind::Mlp, 4, 6, 3)?;
    let likelihood = Likelihood::Categorical;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let estimator = Estimator::new(Curvature::Full, Parts::Whole);
    let params =
        ParamsTuneDuring { estimator, burn_in: 1, every: 1, ..ParamsTuneDuring::by_fixed_points(6, 20) };
    for (structure, groups) in [
        (Structure::PerTensor, vec![vec![0], vec![1], vec![2]]),
        (Structure::PerLayer, vec![vec![0, 1], vec![2]]),
    ] {
        for lr in [1.0, 0.5] {
            let hyper = Hyper::new(&problem, structure, 1.5)?;
            let before = estimator.fit(&problem, &examples, 0)?.evidence(&hyper)?;
            let mut tuning = TuneDuring::new(hyper, ParamsTuneDuring { lr, ..params }, 6)?;
            tuning.after_step(&problem, &examples)?.expect("a round");
            let found = tuning.hyper().tensor_precisions()?;
            for group in &groups {
                let squares: Result<Vec<f64>> = group
                    .iter()
                    .map(|&t| problem.parameters()[t].tensor.sqr()?.sum_all()?.to_scalar::<f64>())
                    .collect();
                let effective: f64 = group.iter().map(|&t| before.effective[t]).sum();
                let way = (effective / squares?.iter().sum::<f64>() / 1.5).ln();
                for &t in group {
                    let expected = 1.5 * (lr * way).clamp(-2.0, 2.0).exp();
                    assert!(
                        (found[t] / expected - 1.0).abs() < 1e-12,
                        "{structure:?} {lr}: {} {expected}",
                        found[t]
                    );
                }
            }
        }
    }
    let new = |rule| -> Result<TuneDuring> {
        let hyper = Hyper::new(&problem, Structure::PerLayer, 1.5)?;
        TuneDuring::new(hyper, ParamsTuneDuring { rule, ..params }, 6)
    };
    let path = std::env::temp_dir().join(format!("kronwake-fixed-point-{}", std::process::id()));
    let mut first = new(TuneRule::FixedPoint)?;
    first.after_step(&problem, &examples)?;
    first.save(&path)?;
    let mut second = new(TuneRule::FixedPoint)?;
    second.resume(&path)?;
    for tuning in [&mut first, &mut second] {
        tuning.after_step(&problem, &examples)?;
    }
    assert_eq!(first.hyper().tensor_precisions()?, second.hyper().tensor_precisions()?);
    assert!(new(TuneRule::Adam)?.resume(&path).is_err());
    std::fs::remove_file(&path)?;
    for (structure, lr) in [(Structure::Diagonal, 1.0), (Structure::Scalar, 1.5)] {
        let hyper = Hyper::new(&problem, structure, 1.0)?;
        let message = TuneDuring::new(hyper, ParamsTuneDuring { lr, ..params }, 6).map(drop);
        let message = message.expect_err("refused").to_string();
        assert!(message.contains("a fixed point with a rate of"), "{message}");
    }
    Ok(())
}

/// With a hyperprior of so many effective parameters the precision is `(effective + a) / (squares + a / d)`, `d` that of all tensors together: between
/// the fixed point of each tensor and the one of all.
#[test]
fn precisions_pooled_by_a_hyperprior() -> Result<()> {
    let net = Net::new(Kind::Mlp, 4, 6, 3)?;
    let likelihood = Likelihood::Categorical;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let estimator = Estimator::new(Curvature::Full, Parts::Whole);
    let params =
        ParamsTuneDuring { estimator, burn_in: 1, every: 1, ..ParamsTuneDuring::by_fixed_points(6, 20) };
    let before =
        estimator.fit(&problem, &examples, 0)?.evidence(&Hyper::new(&problem, Structure::PerTensor, 1.5)?)?;
    let squares = |p: &kronwake::evidence::Parameter| p.tensor.sqr()?.sum_all()?.to_scalar::<f64>();
    let squares = problem.parameters().iter().map(squares).collect::<Result<Vec<_>>>()?;
    let all = before.effective.iter().sum::<f64>() / squares.iter().sum::<f64>();
    for pooled in [0.0, 2.0, 1e9] {
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.5)?;
        let mut tuning = TuneDuring::new(hyper, ParamsTuneDuring { pooled, ..params }, 6)?;
        tuning.after_step(&problem, &examples)?.expect("a round");
        let found = tuning.hyper().tensor_precisions()?;
        for (tensor, found) in found.into_iter().enumerate() {
            let (effective, squares) = (before.effective[tensor], squares[tensor]);
            let expected = (effective + pooled) / (squares + pooled / all);
            let expected = 1.5 * (expected / 1.5).ln().clamp(-2.0, 2.0).exp();
            assert!((found / expected - 1.0).abs() < 1e-12, "{pooled}: {found} {expected}");
            if pooled > 1e6 {
                let one = 1.5 * (all / 1.5).ln().clamp(-2.0, 2.0).exp();
                assert!((found / one - 1.0).abs() < 1e-6, "{found} {one}");
            }
        }
    }
    for (pooled, rule) in
        [(-1.0, TuneRule::FixedPoint), (f64::NAN, TuneRule::FixedPoint), (1.0, TuneRule::Adam)]
    {
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
        let message = TuneDuring::new(hyper, ParamsTuneDuring { pooled, rule, ..params }, 6).map(drop);
        assert!(message.expect_err("refused").to_string().contains("precisions pooled by"));
    }
    Ok(())
}
