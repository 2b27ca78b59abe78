//! The evidence against per-example Jacobians, finite differences, and what is proven of its bounds.

use crate::common::nets::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::evidence::{
    Curvature, Estimator, Examples, Hyper, Outputs, ParamsTuneDuring, Parts, Problem, Split, Structure,
    TuneDuring,
};
use kronwake::nn::{self, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};
use proptest::prelude::*;

#[test]
fn kernel_and_matrix_agree_with_jacobians() -> Result<()> {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        for likelihood in LIKELIHOODS {
            let net = Net::new(kind, seed as u64, 5, 3)?;
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let count = problem.parameters().len();
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?.with_temperature(0.7)?;
            hyper.set_precisions(&precisions(count))?;
            let (_, expected) = brute(&net, likelihood, 1.0 / 0.7, &precisions(count))?;
            for curvature in [Curvature::Kernel(Outputs::Joint), Curvature::Full] {
                let fit = Estimator::new(curvature, Parts::Whole).fit(&problem, &examples, 0)?;
                let found = fit.evidence(&hyper)?.log_det;
                assert!(
                    (found / expected - 1.0).abs() < 1e-10,
                    "{kind:?} {likelihood:?} {curvature:?}: {found} {expected}"
                );
            }
        }
    }
    Ok(())
}

/// Every estimator that has a gradient, by every structure of priors.
#[test]
fn gradients_agree_with_differences() -> Result<()> {
    let estimators = [
        Estimator::new(Curvature::Kernel(Outputs::Joint), Parts::Whole),
        Estimator::new(Curvature::Kernel(Outputs::Joint), Parts::Consecutive(3)),
        Estimator::new(Curvature::Kernel(Outputs::Independent(Split::Root)), Parts::Whole),
        Estimator::new(Curvature::Kernel(Outputs::OneEach(Split::Root)), Parts::Random(4)),
        Estimator::new(Curvature::Full, Parts::Whole),
        Estimator::new(Curvature::BlockPerTensor, Parts::Whole),
        Estimator::new(Curvature::BlockPerLayer, Parts::Consecutive(2)),
        Estimator::new(Curvature::Kron, Parts::Whole),
        Estimator::new(Curvature::Rotated, Parts::Consecutive(4)),
        Estimator::new(Curvature::Diagonal, Parts::Whole),
        Estimator::extrapolated(8),
    ];
    let structures = [Structure::Scalar, Structure::PerLayer, Structure::PerTensor, Structure::Diagonal];
    for (index, estimator) in estimators.iter().enumerate() {
        for (at, structure) in structures.into_iter().enumerate() {
            if structure == Structure::Diagonal
                && matches!(estimator.curvature, Curvature::Kron | Curvature::Rotated)
            {
                continue;
            }
            let likelihood = LIKELIHOODS[(index + at) % 3];
            let net = Net::new(KINDS[(index + 2 * at) % 6], index as u64, 9, 2)?;
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let mut hyper = Hyper::new(&problem, structure, 0.8)?.tune_temperature(0.6)?;
            if likelihood == Likelihood::Gaussian {
                hyper = hyper.tune_noise(0.4)?;
            }
            let vars = hyper.vars();
            for (seed, var) in vars.iter().enumerate() {
                let moved = (var.as_tensor() + (random(seed as u64, var.dims())? * 0.3)?)?;
                var.set(&moved)?;
            }
            let fit = estimator.fit(&problem, &examples, 1)?;
            let evidence = fit.evidence(&hyper)?;
            assert_eq!(evidence.value.to_scalar::<f64>()?, evidence.log_evidence);
            let at_once = estimator.evaluate(&problem, &examples, &hyper, 1)?;
            assert_eq!(at_once.log_evidence, evidence.log_evidence);
            assert_eq!(at_once.grad_log_precision, evidence.grad_log_precision);
            let grads = evidence.value.backward()?;
            for var in &vars {
                let found = grads.get(var).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
                for (i, found) in found.into_iter().enumerate() {
                    let difference = central(var, i, || Ok(fit.evidence(&hyper)?.log_evidence))?;
                    let near = (found - difference).abs() < 1e-6 * difference.abs().max(1.0);
                    assert!(
                        near,
                        "{estimator:?} {structure:?} {likelihood:?} {i}: {found}, expected {difference}"
                    );
                }
            }
            if let (Structure::PerTensor, [var, ..]) = (structure, vars.as_slice()) {
                let by_var = grads.get(var).expect("a gradient").to_vec1::<f64>()?;
                assert_eq!(by_var, evidence.grad_log_precision);
            }
        }
    }
    Ok(())
}

/// The central difference of `f` by one element of a Var.
fn central(var: &Var, at: usize, f: impl Fn() -> Result<f64>) -> Result<f64> {
    let h = 1e-5;
    let (before, mut sum) = (var.copy()?, 0.0);
    for sign in [1.0, -1.0] {
        let mut values = before.flatten_all()?.to_vec1::<f64>()?;
        values[at] += sign * h;
        var.set(&Tensor::from_vec(values, before.dims(), &CPU)?)?;
        sum += sign * f()?;
    }
    var.set(&before)?;
    Ok(sum / (2.0 * h))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is proven holds on any net.
    #[test]
    fn bounds_are_ordered(kind in 0..6usize, seed in 0..1000u64, likelihood in 0..3usize, log in -4f64..4.) {
        let ordered = || -> Result<()> {
            let (likelihood, net) = (LIKELIHOODS[likelihood], Net::new(KINDS[kind], seed, 8, 3)?);
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let hyper = Hyper::new(&problem, Structure::PerTensor, log.exp())?;
            let value = |curvature, parts| -> Result<f64> {
                Ok(Estimator::new(curvature, parts).fit(&problem, &examples, 0)?.evidence(&hyper)?.log_evidence)
            };
            let joint = Curvature::Kernel(Outputs::Joint);
            let exact = value(joint, Parts::Whole)?;
            let (halves, quarters) = (value(joint, Parts::Consecutive(4))?, value(joint, Parts::Consecutive(2))?);
            let slack = 1e-9 * exact.abs().max(1.0);
            let layers = value(Curvature::BlockPerLayer, Parts::Whole)?;
            let tensors = value(Curvature::BlockPerTensor, Parts::Whole)?;
            let diagonal = value(Curvature::Diagonal, Parts::Whole)?;
            let split = value(Curvature::Kernel(Outputs::Independent(Split::Root)), Parts::Whole)?;
            let (some_tensors, some_diagonal) = (
                value(Curvature::BlockPerTensor, Parts::Consecutive(4))?,
                value(Curvature::Diagonal, Parts::Consecutive(4))?,
            );
            for (what, tighter, looser) in [
                ("halves", exact, halves),
                ("quarters", halves, quarters),
                ("layers", exact, layers),
                ("tensors", layers, tensors),
                ("diagonal", tensors, diagonal),
                ("outputs", exact, split),
                ("tensors of parts", tensors, some_tensors),
                ("tensors below the kernel of parts", halves, some_tensors),
                ("diagonal of parts", diagonal, some_diagonal),
                ("diagonal below the tensors of parts", some_tensors, some_diagonal),
            ] {
                assert!(looser <= tighter + slack, "{what}: {looser} above {tighter}");
            }
            Ok(())
        };
        ordered().expect("no error");
    }
}

/// The mean over all draws of examples is the sum over the parts, and over all batches of a size Han's bound.
#[test]
fn expectations_by_enumeration() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Mlp, 5, 6, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::Scalar, 0.5)?;
    let joint = Curvature::Kernel(Outputs::Joint);
    let whole = Estimator::new(joint, Parts::Whole);
    let mut last = f64::INFINITY;
    for size in 1..=6usize {
        let (mut sum, mut count) = (0.0, 0.0);
        for set in 0..64usize {
            let members: Vec<usize> = (0..6).filter(|i| set >> i & 1 == 1).collect();
            if members.len() == size {
                sum += whole.fit(&problem, &examples.select(&members)?, 0)?.evidence(&hyper)?.log_det;
                count += 1.0;
            }
        }
        let scaled = sum / count * 6.0 / size as f64;
        assert!(scaled <= last + 1e-12, "{size}: {scaled} above {last}");
        last = scaled;
    }
    // Draws: by seeds, every part of a fixed partition comes as often.
    let parts = Estimator::new(joint, Parts::Consecutive(2));
    let all = parts.fit(&problem, &examples, 0)?.evidence(&hyper)?.log_det;
    let drawn = Estimator { draws: Some(1), ..parts };
    let mut seen = vec![];
    for seed in 0..40 {
        let one = drawn.fit(&problem, &examples, seed)?.evidence(&hyper)?.log_det;
        if !seen.iter().any(|other: &f64| (other - one).abs() < 1e-12) {
            seen.push(one);
        }
    }
    assert_eq!(seen.len(), 3);
    assert!((seen.iter().sum::<f64>() / 3.0 / all - 1.0).abs() < 1e-12);
    Ok(())
}

/// The loss has the prior in it, and rounds come when they are due.
#[test]
fn tuning_during_training() -> Result<()> {
    let net = Net::new(Kind::Mlp, 4, 8, 3)?;
    let likelihood = Likelihood::Categorical;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?.with_temperature(0.7)?;
    let deltas = precisions(3);
    hyper.set_precisions(&deltas)?;
    let params = ParamsTuneDuring { burn_in: 3, every: 2, ..ParamsTuneDuring::by_batches(4, 1) };
    let mut tuning = TuneDuring::new(hyper, params, 20)?;
    let data = Tensor::new(2.5, &Device::Cpu)?;
    let loss = tuning.loss(&data)?;
    let grads = loss.backward()?;
    let mut expected = 2.5;
    for (p, delta) in problem.parameters().iter().zip(&deltas) {
        expected += 0.7 / 40.0 * delta * p.tensor.sqr()?.sum_all()?.to_scalar::<f64>()?;
        let found = grads.get(&p.tensor).expect("a gradient");
        let error = (found - (&p.tensor * (0.7 / 20.0 * delta))?)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(error < 1e-15, "{error}");
    }
    assert!((loss.to_scalar::<f64>()? - expected).abs() < 1e-12);
    for (found, delta) in tuning.weight_decays()?.iter().zip(&deltas) {
        assert!((found - 0.7 / 20.0 * delta).abs() < 1e-12);
    }
    let mut due = vec![];
    for step in 1..=8 {
        let before = tuning.hyper().tensor_precisions()?;
        let round = tuning.after_step(&problem, &examples)?.is_some();
        assert_eq!(before != tuning.hyper().tensor_precisions()?, round);
        due.extend(round.then_some(step));
    }
    assert_eq!(due, [3, 5, 7]);
    Ok(())
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Mlp, 1, 6, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
    let joint = Curvature::Kernel(Outputs::Joint);
    let whole = Estimator::new(joint, Parts::Whole);
    let labels = |labels: &[u32]| Examples::new(net.x.clone(), Tensor::new(labels, &CPU)?);
    let targets = Examples::new(net.x.clone(), random(0, &[6, 3])?)?;
    let nan = Examples::new((net.x.clone() * f64::NAN)?, examples.y().clone())?;
    let other = Net::new(Kind::Shared, 1, 6, 3)?;
    let foreign = Hyper::new(&other.problem(likelihood)?, Structure::PerTensor, 1.0)?;
    let fit = whole.fit(&problem, &examples, 0)?;
    let stray = VarMap::new();
    let vb = VarBuilder::from_varmap(&stray, DType::F64, &CPU);
    let (tape, _) = (Tape::new(), vb.get(3, "gain")?);
    let layer = tape.build(|| nn::linear(3, 3, vb.pp("fc")))?;
    for (part, error) in [
        (
            "expected examples and as many labels",
            Examples::new(net.x.clone(), Tensor::new(&[0u32], &CPU)?).err(),
        ),
        (
            "label 3 is out of range for 3 classes",
            whole.fit(&problem, &labels(&[0, 1, 2, 3, 0, 0])?, 0).err(),
        ),
        ("expected 6 class numbers", whole.fit(&problem, &targets, 0).err()),
        ("not finite", whole.fit(&problem, &nan, 0).err()),
        ("a batch of 7, expected 1 to the 6", Estimator::batch(7).fit(&problem, &examples, 0).err()),
        ("a batch of 0, expected 1 to the 6", Estimator::batch(0).fit(&problem, &examples, 0).err()),
        (
            "0 draws, expected 1 to the 1",
            Estimator { draws: Some(0), ..whole }.fit(&problem, &examples, 0).err(),
        ),
        ("would take", Estimator { memory: 100, ..whole }.fit(&problem, &examples, 0).err()),
        ("expected 8 or more", Estimator::extrapolated(6).fit(&problem, &examples, 0).err()),
        ("a prior precision of 0", Hyper::new(&problem, Structure::Scalar, 0.0).err()),
        ("a prior precision of -1", hyper.set_precisions(&[1.0, -1.0, 1.0]).err()),
        (
            "2 prior precisions, expected 1 or 3: first.weight, first.bias, last.weight",
            hyper.set_precisions(&[1.0, 1.0]).err(),
        ),
        ("a temperature of NaN", hyper.clone().with_temperature(f64::NAN).err()),
        ("only a Gaussian likelihood has noise", hyper.clone().with_noise(1.0).err()),
        ("of another model", fit.evidence(&foreign).err()),
        ("gain is no weight or bias", Problem::new(&tape, &stray, &layer, likelihood).err()),
        ("no layers on the tape", Problem::new(&Tape::new(), &net.vars, &*net.model, likelihood).err()),
    ] {
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(hyper.tensor_precisions()?, [1.0; 3]);
    // A kernel that f64 cannot tell from a singular one.
    hyper.set_precisions(&[1e-200])?;
    let message = fit.evidence(&hyper).expect_err("ill-conditioned").to_string();
    assert!(message.contains("condition number") || message.contains("not finite"), "{message}");
    Ok(())
}
