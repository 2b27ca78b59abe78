//! Parts of a model, the rotated bound, predictions of a last layer, and what is saved and resumed.

use crate::common::nets::*;
use candle_core::{DType, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, Evidence, Examples, HessianStructure, Hyper, Outputs, ParamsTune, ParamsTuneDuring,
    Parts, Posterior, Problem, Structure, TuneDuring, tune,
};
use kronwake::linalg::cholesky::inverse_spd;
use kronwake::linalg::eigh::eigh;
use kronwake::nn::{self, BatchNorm, Lora, Module, ModuleT, ParamsLora, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};
use proptest::prelude::*;

fn evidence(
    problem: &Problem<'_>,
    examples: &Examples,
    curvature: Curvature,
    hyper: &Hyper,
) -> Result<Evidence> {
    Estimator::new(curvature, Parts::Whole).fit(problem, examples, 3)?.evidence(hyper)
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{what}: {found}, expected {expected}"
    );
}

/// `G` of the problem's parameters from Jacobians, and `s G + P0`.
fn matrices(
    net: &Net,
    problem: &Problem<'_>,
    s: f64,
    precisions: &[f64],
) -> Result<(Tensor, Tensor, Tensor)> {
    let j = net.jacobian(problem)?;
    let g = j.t()?.matmul(&net.hessian(problem.likelihood())?.matmul(&j)?)?;
    let sizes = problem.parameters().iter().map(|p| p.tensor.elem_count());
    let each: Vec<f64> = precisions.iter().zip(sizes).flat_map(|(p, n)| std::iter::repeat_n(*p, n)).collect();
    let p0 = Tensor::eye(each.len(), DType::F64, &CPU)?.broadcast_mul(&Tensor::new(each, &CPU)?)?;
    let m = ((&g * s)? + p0)?;
    Ok((j, g, m))
}

/// Determinant, gradients and predictions are those of the chosen Vars; the others are constants.
#[test]
fn a_part_of_a_model() -> Result<()> {
    let parts: [(Kind, &[&str], &[&str]); 6] = [
        (Kind::Mlp, &["last.*"], &["last.weight"]),
        (Kind::Conv, &["second*", "last*"], &["second.weight", "last.weight", "last.bias"]),
        (Kind::Tokens, &["!*norm*", "!rms*", "!table*"], &["last.weight", "last.bias"]),
        (Kind::Tokens, &["!last*"], &["table.weight", "norm.weight", "norm.bias", "rms.weight"]),
        (Kind::Shared, &["*.bias"], &["first.bias", "last.bias"]),
        (Kind::Terms, &["first.w?ight"], &["first.weight"]),
    ];
    for (seed, (kind, patterns, names)) in parts.into_iter().enumerate() {
        for likelihood in LIKELIHOODS {
            let net = Net::new(kind, seed as u64, 5, 3)?;
            let problem = Problem::of_part(&net.tape, &net.vars, &*net.model, likelihood, patterns)?;
            let found: Vec<_> = problem.parameters().iter().map(|p| p.name.as_str()).collect();
            assert_eq!(found, names);
            let examples = net.examples(likelihood)?;
            let precisions = precisions(names.len());
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
            hyper.set_precisions(&precisions)?;
            let (j, _, m) = matrices(&net, &problem, 1.0, &precisions)?;
            let logs: f64 = problem
                .parameters()
                .iter()
                .zip(&precisions)
                .map(|(p, d)| p.tensor.elem_count() as f64 * d.ln())
                .sum();
            let expected = log_det(&m)? - logs;
            for curvature in [Curvature::Kernel(Outputs::Joint), Curvature::Full] {
                let found = evidence(&problem, &examples, curvature, &hyper)?;
                close(&format!("{kind:?} {curvature:?}"), found.log_det, expected, 1e-10);
                // The prior is of the part alone.
                let prior: f64 = problem
                    .parameters()
                    .iter()
                    .zip(&precisions)
                    .map(|(p, d)| Ok(-0.5 * d * p.tensor.sqr()?.sum_all()?.to_scalar::<f64>()?))
                    .sum::<Result<f64>>()?;
                close("prior", found.log_prior, prior, 1e-12);
            }
            for curvature in
                [Curvature::BlockPerTensor, Curvature::Rotated, Curvature::Diagonal, Curvature::BlockPerLayer]
            {
                assert!(evidence(&problem, &examples, curvature, &hyper)?.log_det >= expected - 1e-9);
            }
            evidence(&problem, &examples, Curvature::Kron, &hyper)?;
            if kind == Kind::Terms {
                continue;
            }
            let posterior = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
            let sigma = inverse_spd(&m.unsqueeze(0)?, "m")?.squeeze(0)?;
            let expected = j.matmul(&sigma)?.matmul(&j.t()?)?.to_vec2::<f64>()?;
            for (n, block) in
                posterior.predict(&problem, &net.x)?.covariance.to_vec3::<f64>()?.iter().enumerate()
            {
                close("covariance", block[0][1], expected[3 * n][3 * n + 1], 1e-9);
            }
            let before = evidence(&problem, &examples, Curvature::Full, &hyper)?.log_evidence;
            let whole = Estimator::new(Curvature::Full, Parts::Whole);
            let steps = ParamsTune { steps: 20, ..Default::default() };
            assert!(tune(&problem, &examples, &whole, &hyper, &steps, |_, _| ())?.log_evidence > before);
        }
    }
    let net = Net::new(Kind::Mlp, 1, 5, 3)?;
    let of = |patterns: &[&str]| {
        Problem::of_part(&net.tape, &net.vars, &*net.model, Likelihood::Categorical, patterns).err()
    };
    for (part, error) in [
        (
            r#"no Var matches "fc9.*"; there are first.bias, first.weight, last.weight"#,
            of(&["last.*", "fc9.*"]),
        ),
        ("no Var is in the part", of(&["last.*", "!last.*"])),
    ] {
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part}: {message}");
    }
    Ok(())
}

/// A BatchNorm in evaluation mode is a constant; adapters alone have a posterior.
#[test]
fn norms_and_adapters() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| {
        let (first, last) = (nn::linear(3, 4, vb.pp("first"))?, nn::linear(4, 3, vb.pp("last"))?);
        let norm: BatchNorm = nn::batch_norm(4, 1e-5, vb.pp("norm"))?;
        Ok(Box::new(move |x: &Tensor| {
            last.forward(&norm.forward_t(&first.forward(x)?.unsqueeze(2)?, false)?.squeeze(2)?.tanh()?)
        }) as Box<dyn Module>)
    })?;
    for (seed, (name, var)) in vars.data().lock().expect("a lock").iter().enumerate() {
        let positive = if name.contains("var") { 1.5 } else { 0.0 };
        var.set(&(random(seed as u64, var.dims())? + positive)?)?;
    }
    let net = Net { vars, tape, model, x: random(3, &[6, 3])?, classes: 3, positions: 1 };
    let error = net.problem(likelihood).expect_err("statistics").to_string();
    assert!(error.contains("norm.running_mean") && error.contains("Problem::of_part"), "{error}");
    let problem = Problem::of_part(&net.tape, &net.vars, &*net.model, likelihood, &["!norm*"])?;
    let hyper = Hyper::new(&problem, Structure::Scalar, 0.7)?;
    let (_, _, m) = matrices(&net, &problem, 1.0, &[0.7; 4])?;
    let expected = log_det(&m)? - m.dim(0)? as f64 * 0.7f64.ln();
    let examples = net.examples(likelihood)?;
    close("BatchNorm", evidence(&problem, &examples, Curvature::Full, &hyper)?.log_det, expected, 1e-10);

    let (base, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&base, DType::F64, &CPU);
    let lora = Lora::new(ParamsLora { rank: 2, ..Default::default() })?;
    let model = lora.build(|| {
        tape.build(|| {
            let (first, last) = (nn::linear(3, 4, vb.pp("first"))?, nn::linear(4, 3, vb.pp("last"))?);
            Ok(Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?)) as Box<dyn Module>)
        })
    })?;
    for (seed, var) in lora.varmap().all_vars().iter().enumerate() {
        var.set(&random(40 + seed as u64, var.dims())?)?;
    }
    let net =
        Net { vars: lora.varmap().clone(), tape, model, x: random(3, &[6, 3])?, classes: 3, positions: 1 };
    let problem = Problem::of_part(&net.tape, &net.vars, &*net.model, likelihood, &["*"])?;
    assert_eq!(problem.parameters().len(), 4);
    let hyper = Hyper::new(&problem, Structure::Scalar, 0.7)?;
    let (j, _, m) = matrices(&net, &problem, 1.0, &[0.7; 4])?;
    let expected = log_det(&m)? - m.dim(0)? as f64 * 0.7f64.ln();
    let examples = net.examples(likelihood)?;
    close("adapters", evidence(&problem, &examples, Curvature::Full, &hyper)?.log_det, expected, 1e-10);
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
    let sigma = inverse_spd(&m.unsqueeze(0)?, "m")?.squeeze(0)?;
    let expected = j.matmul(&sigma)?.matmul(&j.t()?)?.to_vec2::<f64>()?;
    let found = posterior.predict(&problem, &net.x)?.covariance.to_vec3::<f64>()?;
    close("adapters", found[2][1][2], expected[7][8], 1e-9);
    Ok(())
}

/// The rotated diagonal from the dense matrix: its basis from the marginals of each weight's block, its values as quadratic forms.
#[test]
fn rotated_diagonals_agree_with_the_dense_matrix() -> Result<()> {
    for (seed, kind) in [Kind::Mlp, Kind::Shared, Kind::Sequence, Kind::Terms].into_iter().enumerate() {
        for likelihood in LIKELIHOODS {
            let net = Net::new(kind, seed as u64, 5, 3)?;
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let precisions = precisions(problem.parameters().len());
            let (_, g, _) = matrices(&net, &problem, 1.0, &precisions)?;
            let (mut start, mut expected) = (0, 0.0);
            for (p, delta) in problem.parameters().iter().zip(&precisions) {
                let size = p.tensor.elem_count();
                let block = g.narrow(0, start, size)?.narrow(1, start, size)?.contiguous()?;
                start += size;
                let vectors = |m: Tensor| -> Result<Vec<Vec<f64>>> {
                    eigh(&m.unsqueeze(0)?, "m")?.vectors.squeeze(0)?.t()?.to_vec2::<f64>()
                };
                let (out, columns) = if p.tensor.rank() == 2 { p.tensor.dims2()? } else { (size, 1) };
                let four = block.reshape((out, columns, out, columns))?.to_vec1_of_four()?;
                let at = |i: usize, j: usize, k: usize, l: usize| {
                    four[((i * columns + j) * out + k) * columns + l]
                };
                let of_grads = Tensor::from_iter(
                    (0..out * out).map(|n| (0..columns).map(|j| at(n / out, j, n % out, j)).sum::<f64>()),
                    &CPU,
                )?;
                let of_inputs = Tensor::from_iter(
                    (0..columns * columns)
                        .map(|n| (0..out).map(|i| at(i, n / columns, i, n % columns)).sum::<f64>()),
                    &CPU,
                )?;
                let (u, v) = (
                    vectors(of_grads.reshape((out, out))?)?,
                    vectors(of_inputs.reshape((columns, columns))?)?,
                );
                for u in &u {
                    for v in &v {
                        let direction: Vec<f64> =
                            u.iter().flat_map(|a| v.iter().map(move |b| a * b)).collect();
                        let direction = Tensor::new(direction, &CPU)?.unsqueeze(1)?;
                        let s = direction
                            .t()?
                            .matmul(&block.matmul(&direction)?)?
                            .sum_all()?
                            .to_scalar::<f64>()?;
                        expected += (s / delta).ln_1p();
                    }
                }
            }
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
            hyper.set_precisions(&precisions)?;
            let found = evidence(&problem, &examples, Curvature::Rotated, &hyper)?.log_det;
            close(&format!("{kind:?} {likelihood:?}"), found, expected, 1e-9);
        }
    }
    Ok(())
}

trait Four {
    fn to_vec1_of_four(&self) -> Result<Vec<f64>>;
}

impl Four for Tensor {
    fn to_vec1_of_four(&self) -> Result<Vec<f64>> {
        self.flatten_all()?.to_vec1::<f64>()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// It bounds the exact determinant on any net, in parts too, and its derivatives are those of the bound.
    #[test]
    fn the_rotated_diagonal_bounds(kind in 0..6usize, seed in 0..1000u64, likelihood in 0..3usize, log in -6f64..4.) {
        let bounded = || -> Result<()> {
            let (likelihood, net) = (LIKELIHOODS[likelihood], Net::new(KINDS[kind], seed, 6, 3)?);
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let hyper = Hyper::new(&problem, Structure::PerTensor, log.exp())?.tune_temperature(0.8)?;
            let exact = evidence(&problem, &examples, Curvature::Full, &hyper)?.log_det;
            let blocks = evidence(&problem, &examples, Curvature::BlockPerTensor, &hyper)?.log_det;
            let fit = Estimator::new(Curvature::Rotated, Parts::Whole).fit(&problem, &examples, 0)?;
            let found = fit.evidence(&hyper)?;
            assert!(found.log_det >= blocks - 1e-8 && blocks >= exact - 1e-8, "{} {blocks} {exact}", found.log_det);
            let parts = Estimator::new(Curvature::Rotated, Parts::Consecutive(2)).fit(&problem, &examples, 0)?;
            assert!(parts.evidence(&hyper)?.log_det >= exact - 1e-8);
            let grads = found.value.backward()?;
            for var in hyper.vars() {
                let slopes = grads.get(&var).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
                let before = var.copy()?;
                for (i, slope) in slopes.into_iter().enumerate() {
                    let mut sum = 0.0;
                    for sign in [1.0, -1.0] {
                        let mut values = before.flatten_all()?.to_vec1::<f64>()?;
                        values[i] += sign * 1e-5;
                        var.set(&Tensor::from_vec(values, before.dims(), &CPU)?)?;
                        sum += sign * fit.evidence(&hyper)?.log_evidence;
                    }
                    var.set(&before)?;
                    let difference = sum / 2e-5;
                    assert!((slope - difference).abs() < 1e-5 * difference.abs().max(1.0), "{slope} {difference}");
                }
            }
            Ok(())
        };
        bounded().expect("no error");
    }
}

/// A last layer's predictions through its structure are those through rows, and joint draws are of one draw of the parameters.
#[test]
fn predictions_of_a_last_layer() -> Result<()> {
    let structures = [
        HessianStructure::Kron,
        HessianStructure::Rotated,
        HessianStructure::Diagonal,
        HessianStructure::Full,
    ];
    for likelihood in LIKELIHOODS {
        for kind in [Kind::Conv, Kind::Mlp] {
            let net = Net::new(kind, 4, 6, 3)?;
            let part = Problem::of_part(&net.tape, &net.vars, &*net.model, likelihood, &["last.*"])?;
            let whole = net.problem(likelihood)?;
            let examples = net.examples(likelihood)?;
            for problem in [&part, &whole] {
                let hyper = Hyper::new(problem, Structure::PerTensor, 0.6)?;
                for structure in structures {
                    let posterior = Posterior::fit(problem, &examples, structure, &hyper, 1 << 30)?;
                    for n in [1, 6] {
                        let x = net.x.narrow(0, 0, n)?;
                        let (rows, found) =
                            (posterior.predict(problem, &x)?, posterior.marginals(problem, &x)?);
                        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
                        let pairs = [
                            (flat(&rows.variance()?)?, flat(&found.predictive_variance()?)?, 1e-12),
                            (flat(&rows.probit()?)?, flat(&found.probit()?)?, 1e-12),
                            // Other random numbers: standard errors are up to 0.013, and of a Gaussian mean those of its outputs.
                            (flat(&rows.sampled(1500, 1)?)?, flat(&found.sampled(1500, 1)?)?, 0.1),
                        ];
                        for (expected, found, tolerance) in pairs {
                            for (expected, found) in expected.into_iter().zip(found) {
                                close(&format!("{structure:?} {n}"), found, expected, tolerance);
                            }
                        }
                        let joint = posterior.joint_samples(problem, &x, 1000, 2);
                        if problem.parameters().len() > 2 || structure == HessianStructure::Full {
                            let error = joint.expect_err("not a last layer").to_string();
                            assert!(error.contains("of the last linear layer alone"), "{error}");
                            continue;
                        }
                        let joint = joint?;
                        assert_eq!(joint.dims(), [1000, n, 3]);
                        let centred = joint.broadcast_sub(&rows.mean)?;
                        let variance = centred.sqr()?.mean(0)?;
                        for (found, expected) in
                            flat(&variance)?.into_iter().zip(flat(&kronwake_diagonal(&rows.covariance)?)?)
                        {
                            // Six standard errors of a variance.
                            assert!(
                                (found / expected - 1.0).abs() < 6.0 * (2.0f64 / 1000.0).sqrt(),
                                "{found} {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
    // One linear layer without bias: draws are linear in the inputs.
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| nn::linear_no_bias(3, 4, vb.pp("fc")))?;
    let (a, b) = (random(1, &[1, 3])?, random(2, &[1, 3])?);
    let x = Tensor::cat(&[&a, &b, &(&a + &b)?], 0)?;
    let problem = Problem::new(&tape, &vars, &model, Likelihood::Gaussian)?;
    let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
    let examples = Examples::new(x.clone(), random(3, &[3, 4])?)?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?;
    for draw in posterior.joint_samples(&problem, &x, 5, 0)?.to_vec3::<f64>()? {
        for ((first, second), both) in draw[0].iter().zip(&draw[1]).zip(&draw[2]) {
            close("linear", first + second, *both, 1e-12);
        }
    }
    Ok(())
}

fn kronwake_diagonal(covariance: &Tensor) -> Result<Tensor> {
    let (_, c, _) = covariance.dims3()?;
    let eye = Tensor::eye(c, DType::F64, &CPU)?;
    covariance.broadcast_mul(&eye.unsqueeze(0)?)?.sum(2)
}

/// A thousand classes of a last layer.
#[test]
fn a_thousand_classes() -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let model = tape.build(|| nn::linear(128, 1000, vb.pp("head")))?;
    let x = random(1, &[2, 128])?.to_dtype(DType::F32)?;
    let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    let examples = Examples::new(x.clone(), Tensor::new(&[3u32, 700], &CPU)?)?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, 2.0)?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 33)?;
    let inputs = random(2, &[64, 128])?.to_dtype(DType::F32)?;
    let start = std::time::Instant::now();
    let found = posterior.marginals(&problem, &inputs)?;
    let probit = found.probit()?;
    let took = start.elapsed().as_secs_f64() / 64.0;
    println!("probit of 1,000 classes: {:.3} ms an input", 1e3 * took);
    let one = std::time::Instant::now();
    posterior.marginals(&problem, &inputs.narrow(0, 0, 1)?)?.probit()?;
    println!("of one input: {:.3} ms", 1e3 * one.elapsed().as_secs_f64());
    let start = std::time::Instant::now();
    found.sampled(64, 0)?;
    println!("64 draws: {:.3} ms an input", 1e3 * start.elapsed().as_secs_f64() / 64.0);
    assert_eq!(probit.dims(), [64, 1000]);
    close("probabilities", probit.sum_all()?.to_scalar::<f64>()?, 64.0, 1e-9);
    assert!(took < 0.5);
    Ok(())
}

fn file(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("kronwake-{name}-{}", std::process::id()))
}

/// A posterior that was saved predicts the same bits; what does not fit is said at once.
#[test]
fn posteriors_are_saved() -> Result<()> {
    let path = file("posterior");
    let likelihood = Likelihood::Categorical;
    for kind in [Kind::Mlp, Kind::Conv, Kind::Shared, Kind::Tokens] {
        let net = Net::new(kind, 3, 5, 3)?;
        let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
        for (structure, prior) in [
            (HessianStructure::Full, Structure::Diagonal),
            (HessianStructure::Full, Structure::PerTensor),
            (HessianStructure::Kron, Structure::PerLayer),
            (HessianStructure::Rotated, Structure::PerTensor),
            (HessianStructure::Diagonal, Structure::Diagonal),
        ] {
            let hyper = Hyper::new(&problem, prior, 0.3)?.with_temperature(0.8)?;
            let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
            posterior.save(&problem, &path)?;
            let loaded = Posterior::load(&problem, &path)?;
            let bits = |posterior: &Posterior| -> Result<Vec<u64>> {
                let predicted = posterior.predict(&problem, &net.x)?;
                let (a, b) = (predicted.covariance.flatten_all()?, predicted.sampled(7, 1)?.flatten_all()?);
                Ok(Tensor::cat(&[a, b], 0)?.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect())
            };
            assert_eq!(bits(&posterior)?, bits(&loaded)?, "{kind:?} {structure:?}");
            let again = file("posterior-again");
            loaded.save(&problem, &again)?;
            assert_eq!(std::fs::read(&path)?, std::fs::read(&again)?);
            std::fs::remove_file(&again)?;
        }
    }
    let net = Net::new(Kind::Mlp, 3, 5, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::PerTensor, 0.3)?;
    Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?.save(&problem, &path)?;
    let other = Net::new(Kind::Mlp, 3, 5, 4)?;
    let error =
        Posterior::load(&other.problem(Likelihood::Bernoulli)?, &path).expect_err("another").to_string();
    for part in [
        "likelihood is Categorical, expected Bernoulli",
        "last.weight/grads is F64 [1, 3, 3], expected F64 [1, 4, 4]",
        "last.weight/values is F64 [12], expected F64 [16]",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let part = Problem::of_part(&net.tape, &net.vars, &*net.model, likelihood, &["last.*"])?;
    let error = Posterior::load(&part, &path).expect_err("a part").to_string();
    for part in [
        "of is first.weight, first.bias, last.weight, expected last.weight",
        "first.weight/values has no place here",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let posterior = Posterior::load(&problem, &path)?;
    let error = posterior.predict(&part, &net.x).expect_err("a part").to_string();
    assert!(error.contains("expected the problem that it was fitted to"), "{error}");
    TuneDuring::new(hyper, ParamsTuneDuring::by_batches(3, 1), 5)?.save(&path)?;
    let error = Posterior::load(&problem, &path).expect_err("a tuning").to_string();
    assert!(error.contains("not a file of kronwake posterior"), "{error}");
    std::fs::remove_file(&path)?;
    Ok(())
}

/// Rounds after a resume are the uninterrupted ones.
#[test]
fn tuning_is_resumed() -> Result<()> {
    let path = file("tuning");
    let likelihood = Likelihood::Gaussian;
    let net = Net::new(Kind::Mlp, 2, 12, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let params = ParamsTuneDuring { burn_in: 2, every: 3, steps: 4, ..ParamsTuneDuring::by_batches(5, 1) };
    for structure in [Structure::Scalar, Structure::PerLayer, Structure::PerTensor, Structure::Diagonal] {
        let new = || -> Result<TuneDuring> {
            let hyper = Hyper::new(&problem, structure, 0.5)?.tune_temperature(0.9)?.tune_noise(0.7)?;
            TuneDuring::new(hyper, params, 12)
        };
        let run = |tuning: &mut TuneDuring, steps: usize| -> Result<Vec<u64>> {
            for _ in 0..steps {
                tuning.after_step(&problem, &examples)?;
            }
            let mut bits = vec![];
            for var in tuning.hyper().vars() {
                bits.extend(var.flatten_all()?.to_vec1::<f64>()?.into_iter().map(f64::to_bits));
            }
            Ok(bits)
        };
        let (mut whole, mut first, mut second) = (new()?, new()?, new()?);
        let expected = run(&mut whole, 17)?;
        let middle = run(&mut first, 6)?;
        first.save(&path)?;
        second.resume(&path)?;
        assert_eq!(run(&mut second, 0)?, middle);
        assert_eq!(run(&mut second, 11)?, expected);
        // An error in a round leaves everything as it was.
        let broken = Examples::new((examples.x() * f64::NAN)?, examples.y().clone())?;
        let before = run(&mut first, 0)?;
        let mut failed = 0;
        for _ in 0..3 {
            failed += usize::from(first.after_step(&problem, &broken).is_err());
        }
        assert_eq!((failed, run(&mut first, 0)?), (1, before));
    }
    let hyper = Hyper::new(&problem, Structure::Scalar, 0.5)?.with_noise(0.3)?;
    let mut other = TuneDuring::new(hyper, ParamsTuneDuring { seed: 3, ..params }, 13)?;
    let error = other.resume(&path).expect_err("another").to_string();
    for part in [
        "structure is Diagonal, expected Scalar",
        "temperature is tuned, expected 1",
        "noise is tuned, expected 0.3",
        "examples is 12, expected 13",
        "seed is 0, expected 3",
        "missing log_precision [1]",
        "log_precision.first.weight has no place here",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    std::fs::remove_file(&path)?;
    Ok(())
}
