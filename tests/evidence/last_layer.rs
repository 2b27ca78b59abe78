//! The last layer in closed form: against the rows of backward passes, against laplace-torch, and the bridge from its covariances.

use crate::common::nets::*;
use candle_core::{DType, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, Parts, Posterior, Problem, Structure,
};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};

#[track_caller]
fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let flat = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    for (found, expected) in flat(found)?.into_iter().zip(flat(expected)?) {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{what}: {found}, expected {expected}"
        );
    }
    Ok(())
}

fn scalar(value: f64) -> Result<Tensor> {
    Tensor::new(value, &CPU)
}

const STRUCTURES: [(Curvature, HessianStructure); 4] = [
    (Curvature::Full, HessianStructure::Full),
    (Curvature::Kron, HessianStructure::Kron),
    (Curvature::Rotated, HessianStructure::Rotated),
    (Curvature::Diagonal, HessianStructure::Diagonal),
];

/// Evidence and posterior in closed form are those of the rows. Outputs that are multiplied by 3 and by a third are no longer a last layer's, and
/// the same to rounding.
#[test]
fn the_closed_form_is_that_of_the_rows() -> Result<()> {
    for (seed, kind) in
        [Kind::Mlp, Kind::Conv, Kind::Shared, Kind::Sequence, Kind::Tokens].into_iter().enumerate()
    {
        let net = Net::new(kind, seed as u64, 6, 3)?;
        let thrice = |x: &Tensor| (net.model.forward(x)? * 3.0)? * (1.0 / 3.0);
        for likelihood in LIKELIHOODS {
            for weighted in [false, true] {
                let part = |model| Problem::of_part(&net.tape, &net.vars, model, likelihood, &["last.*"]);
                let (mut closed, mut rows) = (part(&*net.model)?, part(&thrice)?);
                let mut examples = net.examples(likelihood)?;
                if weighted {
                    examples = examples.weighted(&Tensor::new(&[1.0, 0.5, 2.0, 0.0, 1.5, 0.25], &CPU)?)?;
                    if likelihood == Likelihood::Gaussian {
                        let noise = [0.7, 1.1, 1.9];
                        closed = closed.with_output_noise(&noise)?;
                        rows = rows.with_output_noise(&noise)?;
                    }
                }
                let count = closed.parameters().len();
                for (curvature, structure) in STRUCTURES {
                    let what = format!("{kind:?} {likelihood:?} {curvature:?} weighted {weighted}");
                    let found = |problem: &Problem<'_>| -> Result<_> {
                        let hyper = Hyper::new(problem, Structure::PerTensor, 1.0)?.with_temperature(0.7)?;
                        hyper.set_precisions(&precisions(count))?;
                        let evidence = Estimator::new(curvature, Parts::Whole)
                            .fit(problem, &examples, 0)?
                            .evidence(&hyper)?;
                        let posterior = Posterior::fit(problem, &examples, structure, &hyper, 1 << 30)?;
                        Ok((evidence, posterior.predict(problem, &net.x)?))
                    };
                    let ((closed, predicted), (rows, expected)) = (found(&closed)?, found(&rows)?);
                    for (closed, rows) in [
                        (closed.log_det, rows.log_det),
                        (closed.log_likelihood, rows.log_likelihood),
                        (closed.grad_log_temperature, rows.grad_log_temperature),
                    ] {
                        close(&what, &scalar(closed)?, &scalar(rows)?, 1e-10)?;
                    }
                    for (closed, rows) in closed.effective.iter().zip(&rows.effective) {
                        close(&what, &scalar(*closed)?, &scalar(*rows)?, 1e-10)?;
                    }
                    close(&what, &predicted.covariance, &expected.covariance, 1e-10)?;
                }
            }
        }
    }
    Ok(())
}

/// Several passes of 256 examples add up, in f32 too.
#[test]
fn passes_add_up() -> Result<()> {
    let of = |dtype: DType, third: bool, curvature| -> Result<f64> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
        let model = tape.build(|| nn::linear(4, 3, vb.pp("fc")))?;
        for (index, (_, var)) in nn::init::named(&vars)?.into_iter().enumerate() {
            var.set(&random(index as u64, var.dims())?.to_dtype(dtype)?)?;
        }
        let thrice = |x: &Tensor| (model.forward(x)? * 3.0)? * (1.0 / 3.0);
        let model: &dyn Module = if third { &thrice } else { &model };
        let y = Tensor::from_iter((0..600).map(|i| i % 3u32), &CPU)?;
        let examples = Examples::new(random(5, &[600, 4])?.to_dtype(dtype)?, y)?;
        let problem = Problem::new(&tape, &vars, model, Likelihood::Categorical)?;
        let hyper = Hyper::new(&problem, Structure::Scalar, 0.3)?;
        Ok(Estimator::new(curvature, Parts::Whole).fit(&problem, &examples, 0)?.evidence(&hyper)?.log_det)
    };
    for (curvature, _) in STRUCTURES {
        let expected = of(DType::F64, true, curvature)?;
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-6)] {
            let found = of(dtype, false, curvature)?;
            assert!(
                (found / expected - 1.0).abs() < tolerance,
                "{curvature:?} {dtype:?}: {found} {expected}"
            );
        }
    }
    Ok(())
}

/// Determinants, covariances and probabilities of laplace-torch (tests/golden/laplace/make.py).
#[test]
fn laplace_torch_has_the_same_numbers() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/laplace");
    let golden = Checkpoint::read(format!("{folder}/laplace.safetensors"), &CPU)?;
    let values: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{folder}/laplace.json"))?).expect("json");
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let get = |name: &str| golden.tensors[name].clone();
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| {
        let (first, last) = (nn::linear(3, 6, vb.pp("fc1"))?, nn::linear(6, 5, vb.pp("fc2"))?);
        Ok(nn::seq().add(first).add_fn(|x| x.tanh()).add(last))
    })?;
    golden.load_partly(&vars)?;
    let precisions: Vec<f64> =
        values["prior_precision"].as_array().expect("a list").iter().map(number).collect();
    for (name, likelihood, (curvature, structure), scalar_prior) in [
        ("classification.last.full", Likelihood::Categorical, STRUCTURES[0], false),
        ("classification.last.kron", Likelihood::Categorical, STRUCTURES[1], true),
        ("classification.last.diag", Likelihood::Categorical, STRUCTURES[3], false),
        ("regression.last.full", Likelihood::Gaussian, STRUCTURES[0], false),
        ("regression.last.kron", Likelihood::Gaussian, STRUCTURES[1], true),
        ("regression.last.diag", Likelihood::Gaussian, STRUCTURES[3], false),
        ("classification.subnetwork.full", Likelihood::Categorical, STRUCTURES[0], true),
    ] {
        let expected = &values[name];
        let problem = Problem::of_part(&tape, &vars, &model, likelihood, &["fc2.*"])?;
        let mut hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?
            .with_temperature(number(&values["temperature"]))?;
        if likelihood == Likelihood::Gaussian {
            hyper = hyper.with_noise(number(&values["noise"]))?;
        }
        hyper.set_precisions(if scalar_prior { &precisions[..1] } else { &precisions })?;
        let categorical = likelihood == Likelihood::Categorical;
        let y = get(if categorical { "y" } else { "targets" });
        let examples = Examples::new(get("x"), y)?;
        let evidence =
            Estimator::new(curvature, Parts::Whole).fit(&problem, &examples, 0)?.evidence(&hyper)?;
        close(name, &scalar(evidence.log_det)?, &scalar(number(&expected["log_det_ratio"]))?, 1e-9)?;
        let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
        let found = posterior.predict(&problem, &get("inputs"))?;
        close(name, &found.mean, &get(&format!("{name}.mean")), 1e-9)?;
        close(name, &found.covariance, &get(&format!("{name}.covariance")), 1e-9)?;
        if categorical {
            let likelihood = number(&expected["log_likelihood"]);
            close(name, &scalar(evidence.log_likelihood)?, &scalar(likelihood)?, 1e-9)?;
            let marginals = posterior.marginals(&problem, &get("inputs"))?;
            for (found, link) in [
                (found.probit()?, "probit"),
                (marginals.probit()?, "probit"),
                (found.bridge()?, "bridge"),
                (marginals.bridge()?, "bridge"),
            ] {
                close(&format!("{name} {link}"), &found, &get(&format!("{name}.{link}")), 1e-9)?;
            }
        }
    }
    Ok(())
}

/// With two classes and variances `v` of both outputs, conditioned on a sum of zero: `mean = (d, -d) / 2` of the difference `d`, variances `v/2`,
/// `alpha_1 = exp(d/2) (exp(d/2) + exp(-d/2)) / 4 / (v/2)`, so that the prediction is the logistic function of `d`.
#[test]
fn the_bridge_of_two_classes() -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| nn::linear_no_bias(1, 2, vb.pp("fc")))?;
    vars.data().lock().expect("a lock")["fc.weight"].set(&Tensor::new(&[[0.9], [0.2]], &CPU)?)?;
    let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    let x = Tensor::new(&[[1.0], [-2.0], [0.0]], &CPU)?;
    let examples = Examples::new(x.clone(), Tensor::new(&[0u32, 1, 0], &CPU)?)?;
    let hyper = Hyper::new(&problem, Structure::Scalar, 2.0)?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Diagonal, &hyper, 1 << 30)?;
    let found = posterior.predict(&problem, &x.narrow(0, 0, 2)?)?;
    let (alpha, p) = (found.dirichlet()?.to_vec2::<f64>()?, found.bridge()?.to_vec2::<f64>()?);
    let v = found.covariance.to_vec3::<f64>()?;
    for (n, x) in [1.0, -2.0f64].into_iter().enumerate() {
        let d: f64 = 0.7 * x;
        let (same, left) = ((v[n][0][0] - v[n][1][1]).abs(), v[n][0][0] / 2.0);
        assert!(same < 1e-15);
        let expected = (d / 2.0).exp() * ((d / 2.0).exp() + (-d / 2.0).exp()) / 4.0 / left;
        assert!((alpha[n][0] / expected - 1.0).abs() < 1e-12, "{} {expected}", alpha[n][0]);
        assert!((p[n][0] - 1.0 / (1.0 + (-d).exp())).abs() < 1e-12);
    }
    // Without features there is no variance.
    let none = posterior.predict(&problem, &x.narrow(0, 2, 1)?)?.bridge().map(drop);
    let message = none.expect_err("no variance").to_string();
    assert!(message.contains("output 0 for input 0 has no variance against the others"), "{message}");
    let gaussian = Problem::new(&tape, &vars, &model, Likelihood::Gaussian)?;
    let targets = Examples::new(x.clone(), random(1, &[3, 2])?)?;
    let posterior = Posterior::fit(&gaussian, &targets, HessianStructure::Full, &hyper, 1 << 30)?;
    let message = posterior.predict(&gaussian, &x)?.bridge().expect_err("no classes").to_string();
    assert!(message.contains("for a categorical likelihood"), "{message}");
    Ok(())
}
