//! The evidence where inputs are unusual: weights that layers share, masks, ignored labels, small precisions, models that mix examples.

use crate::common::nets::*;
use candle_core::{DType, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, Outputs, Parts, Posterior, Problem, Split,
    Structure,
};
use kronwake::nn::{self, Linear, Module, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};

const CURVATURES: [Curvature; 7] = [
    Curvature::Kernel(Outputs::Joint),
    Curvature::Full,
    Curvature::BlockPerTensor,
    Curvature::BlockPerLayer,
    Curvature::Kron,
    Curvature::Rotated,
    Curvature::Diagonal,
];

fn evidence(
    problem: &Problem<'_>,
    examples: &Examples,
    curvature: Curvature,
    parts: Parts,
    hyper: &Hyper,
) -> Result<kronwake::evidence::Evidence> {
    Estimator::new(curvature, parts).fit(problem, examples, 3)?.evidence(hyper)
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{what}: {found}, expected {expected}"
    );
}

/// `log det(s G + P0) - log det P0` of blocks of parameters: of those with the same number in `blocks`.
fn brute_blocks(g: &Tensor, s: f64, precisions: &[f64], blocks: &[usize]) -> Result<f64> {
    let g = g.to_vec2::<f64>()?;
    let mut sum = 0.0;
    let mut numbers = blocks.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    for block in numbers {
        let members: Vec<usize> = (0..blocks.len()).filter(|&i| blocks[i] == block).collect();
        let of = |&i: &usize| {
            let row = members.iter().map(|&j| s * g[i][j] + if i == j { precisions[i] } else { 0.0 });
            Tensor::from_iter(row, &CPU)
        };
        let rows = members.iter().map(of).collect::<Result<Vec<_>>>()?;
        sum += log_det(&Tensor::stack(&rows, 0)?)? - members.iter().map(|&i| precisions[i].ln()).sum::<f64>();
    }
    Ok(sum)
}

/// What each curvature that is exact on its blocks must give, from a matrix `G` of all parameters.
fn expected(
    problem: &Problem<'_>,
    g: &Tensor,
    s: f64,
    precisions: &[f64],
    curvature: Curvature,
) -> Result<f64> {
    let (mut each, mut blocks) = (vec![], vec![]);
    for (tensor, (p, precision)) in problem.parameters().iter().zip(precisions).enumerate() {
        let first = problem.parameters().iter().position(|other| other.layer == p.layer).expect("itself");
        for _ in 0..p.tensor.elem_count() {
            blocks.push(match curvature {
                Curvature::BlockPerTensor => tensor,
                Curvature::BlockPerLayer => first,
                Curvature::Diagonal => each.len(),
                _ => 0,
            });
            each.push(*precision);
        }
    }
    brute_blocks(g, s, &each, &blocks)
}

const EXACT: [Curvature; 5] = [
    Curvature::Kernel(Outputs::Joint),
    Curvature::Full,
    Curvature::BlockPerTensor,
    Curvature::BlockPerLayer,
    Curvature::Diagonal,
];

/// One weight in several layers, each with a bias of its own, the same, or none, in every order.
#[test]
fn weights_shared_with_other_biases() -> Result<()> {
    let orders: [&[Option<usize>]; 7] = [
        &[Some(0), None],
        &[None, Some(0)],
        &[Some(0), Some(1)],
        &[Some(0), Some(0)],
        &[Some(0), None, Some(1)],
        &[None, Some(0), Some(1)],
        &[Some(0), Some(1), Some(0)],
    ];
    for (seed, order) in orders.into_iter().enumerate() {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        let model = tape.build(|| {
            let weight = vb.get((3, 3), "shared.weight")?;
            let layer = |bias: &Option<usize>| -> Result<Linear> {
                let bias = bias.map(|i| vb.get(3, &format!("bias{i}"))).transpose()?;
                Ok(Linear::new(weight.clone(), bias))
            };
            let layers = order.iter().map(layer).collect::<Result<Vec<_>>>()?;
            let last = nn::linear(3, 2, vb.pp("last"))?;
            Ok(Box::new(move |x: &Tensor| {
                let mut x = x.clone();
                for layer in &layers {
                    x = layer.forward(&x)?.tanh()?;
                }
                last.forward(&x)
            }) as Box<dyn Module>)
        })?;
        let mut names: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (index, (_, var)) in names.iter().enumerate() {
            var.set(&random(70 * seed as u64 + index as u64, var.dims())?)?;
        }
        let net = Net { vars, tape, model, x: random(9, &[6, 3])?, classes: 2, positions: 1 };
        for likelihood in LIKELIHOODS {
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let precisions = precisions(problem.parameters().len());
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
            hyper.set_precisions(&precisions)?;
            let j = net.jacobian(&problem)?;
            let g = j.t()?.matmul(&net.hessian(likelihood)?.matmul(&j)?)?;
            for curvature in EXACT {
                let expected = expected(&problem, &g, 1.0, &precisions, curvature)?;
                let found = evidence(&problem, &examples, curvature, Parts::Whole, &hyper)?;
                close(&format!("{order:?} {likelihood:?} {curvature:?}"), found.log_det, expected, 1e-9);
            }
            let bound = evidence(&problem, &examples, Curvature::Rotated, Parts::Whole, &hyper)?.log_det;
            let tensors = expected(&problem, &g, 1.0, &precisions, Curvature::BlockPerTensor)?;
            assert!(bound >= tensors - 1e-9, "{order:?}: {bound} {tensors}");
            // Every bias has a posterior variance of its own.
            let full = Posterior::fit(&problem, &examples, HessianStructure::Full, &hyper, 1 << 30)?;
            let identity = Tensor::eye(g.dim(0)?, DType::F64, &CPU)?;
            let each: Vec<f64> = problem
                .parameters()
                .iter()
                .zip(&precisions)
                .flat_map(|(p, d)| std::iter::repeat_n(*d, p.tensor.elem_count()))
                .collect();
            let m = (g + identity.broadcast_mul(&Tensor::new(each, &CPU)?)?)?;
            let sigma = kronwake::linalg::cholesky::inverse_spd(&m.unsqueeze(0)?, "m")?.squeeze(0)?;
            let expected = j.matmul(&sigma)?.matmul(&j.t()?)?.to_vec2::<f64>()?;
            let found = full.predict(&problem, &net.x)?.covariance.to_vec3::<f64>()?;
            for (n, block) in found.iter().enumerate() {
                close("variance", block[0][0], expected[2 * n][2 * n], 1e-9);
            }
            for structure in [HessianStructure::Kron, HessianStructure::Rotated, HessianStructure::Diagonal] {
                let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
                assert!(
                    posterior.predict(&problem, &net.x)?.variance()?.min_all()?.to_scalar::<f64>()? > 0.0
                );
            }
        }
    }
    Ok(())
}

#[test]
fn tensors_shared_in_other_ways_are_refused() -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| {
        let table = nn::embedding(3, 3, vb.pp("table"))?;
        let head = Linear::new(table.embeddings().clone(), None);
        Ok(move |x: &Tensor| head.forward(&table.forward(x)?.mean(1)?))
    })?;
    let error = Problem::new(&tape, &vars, &model, Likelihood::Categorical).expect_err("shared").to_string();
    assert!(error.contains("table.weight is shared by the layers"), "{error}");
    Ok(())
}

/// Sequences with padding: a token's last feature is 1 where it counts, and the model's mean is over those.
fn padded(seed: u64, x: &Tensor, classes: usize, terms: bool, detached: bool) -> Result<Net> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| {
        let (first, last) = (nn::linear(3, 4, vb.pp("first"))?, nn::linear(4, classes, vb.pp("last"))?);
        Ok(Box::new(move |x: &Tensor| {
            let (x, live) = (x.narrow(2, 0, 3)?, x.narrow(2, 3, 1)?);
            // What the mask leaves out is a constant.
            let constant = |h: Tensor| {
                if !detached {
                    return Ok(h);
                }
                h.broadcast_mul(&live)? + h.detach().broadcast_mul(&(1.0 - &live)?)?
            };
            let h = constant(first.forward(&x)?.tanh()?)?;
            if terms {
                return constant(last.forward(&h)?);
            }
            // All positions count in the mean: leaving some out is the mask's doing alone.
            last.forward(&h.mean(1)?)
        }) as Box<dyn Module>)
    })?;
    let mut names: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (_, var)) in names.iter().enumerate() {
        var.set(&random(100 * seed + index as u64, var.dims())?)?;
    }
    let positions = if terms { x.dim(1)? } else { 1 };
    Ok(Net { vars, tape, model, x: x.clone(), classes, positions })
}

fn live() -> Result<Tensor> {
    Tensor::new(
        &[[1f64, 1., 1., 0.], [1., 0., 0., 0.], [1., 1., 0., 1.], [1., 1., 1., 1.], [0., 1., 1., 0.]],
        &CPU,
    )
}

/// Positions that a mask leaves out are constants, of the tape's mask or of the examples' own.
#[test]
fn masks_are_honoured() -> Result<()> {
    let live = live()?;
    let x = Tensor::cat(&[random(3, &[5, 4, 3])?, live.unsqueeze(2)?], 2)?;
    for terms in [false, true] {
        let (net, reference) = (padded(4, &x, 3, terms, false)?, padded(4, &x, 3, terms, true)?);
        for likelihood in LIKELIHOODS {
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let precisions = precisions(4);
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
            hyper.set_precisions(&precisions)?;
            let j = reference.jacobian(&reference.problem(likelihood)?)?;
            let mut hessian = net.hessian(likelihood)?;
            if terms {
                let each = live.flatten_all()?.unsqueeze(1)?.repeat((1, 3))?.flatten_all()?;
                hessian = hessian.broadcast_mul(&each.unsqueeze(1)?)?;
            }
            let g = j.t()?.matmul(&hessian.matmul(&j)?)?;
            let (without, masked) = (examples.clone(), examples.clone().masked(&live)?);
            for curvature in EXACT {
                let expected = expected(&problem, &g, 1.0, &precisions, curvature)?;
                let what = format!("{terms} {likelihood:?} {curvature:?}");
                let found = evidence(&problem, &masked, curvature, Parts::Whole, &hyper)?;
                close(&what, found.log_det, expected, 1e-9);
                net.tape.mask(Some(&live))?;
                let by_tape = evidence(&problem, &without, curvature, Parts::Whole, &hyper)?;
                assert_eq!(by_tape.log_evidence, found.log_evidence);
                // In parts the mask is divided as the examples are.
                let [by_tape, own] = [&without, &masked].map(|examples| {
                    evidence(&problem, examples, curvature, Parts::Random(2), &hyper).map(|e| e.log_evidence)
                });
                let by_tape = by_tape?;
                net.tape.mask(None)?;
                assert_eq!(by_tape, own?, "{what}");
                let all = evidence(&problem, &without, curvature, Parts::Whole, &hyper)?;
                assert!((all.log_det - expected).abs() > 1e-3, "{what}");
            }
        }
    }
    Ok(())
}

/// Padding at the end of all sequences is as if it were not there, for every curvature and posterior.
#[test]
fn masked_sequences_are_the_shorter_ones() -> Result<()> {
    let short = Tensor::cat(&[random(3, &[5, 3, 3])?, Tensor::ones((5, 3, 1), DType::F64, &CPU)?], 2)?;
    let padding = Tensor::cat(&[random(4, &[5, 2, 3])?, Tensor::zeros((5, 2, 1), DType::F64, &CPU)?], 2)?;
    let long = Tensor::cat(&[&short, &padding], 1)?;
    let mask = long.narrow(2, 3, 1)?.squeeze(2)?;
    let (whole, padded) = (padded(5, &short, 3, true, false)?, padded(5, &long, 3, true, false)?);
    let likelihood = Likelihood::Categorical;
    let labels = Tensor::from_iter((0..15).map(|i| i * i % 3u32), &CPU)?.reshape((5, 3))?;
    let rest = Tensor::full(7u32, (5, 2), &CPU)?;
    let examples = Examples::new(short, labels.clone())?;
    let longer = Examples::new(long, Tensor::cat(&[labels, rest], 1)?)?.masked(&mask)?;
    for curvature in CURVATURES {
        let (problem, other) = (whole.problem(likelihood)?, padded.problem(likelihood)?);
        let (a, b) = (
            Hyper::new(&problem, Structure::PerTensor, 0.4)?,
            Hyper::new(&other, Structure::PerTensor, 0.4)?,
        );
        let expected = evidence(&problem, &examples, curvature, Parts::Whole, &a)?;
        let found = evidence(&other, &longer, curvature, Parts::Whole, &b)?;
        close(&format!("{curvature:?}"), found.log_det, expected.log_det, 1e-10);
        close(&format!("{curvature:?}"), found.log_likelihood, expected.log_likelihood, 1e-10);
    }
    Ok(())
}

/// Terms of weight 0, by their label or given, and weights that are others.
#[test]
fn weights_of_terms() -> Result<()> {
    for kind in [Kind::Mlp, Kind::Terms, Kind::Conv] {
        for likelihood in LIKELIHOODS {
            let net = Net::new(kind, 3, 5, 3)?;
            let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
            let terms = 5 * net.positions;
            let weights: Vec<f64> = (0..terms).map(|i| [1.0, 0.0, 0.5, 2.0][i % 4]).collect();
            let shape: &[usize] = if net.positions > 1 { &[5, net.positions] } else { &[5] };
            let weighted =
                examples.clone().weighted(&Tensor::new(weights.as_slice(), &CPU)?.reshape(shape)?)?;
            let precisions = precisions(problem.parameters().len());
            let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?.with_temperature(0.7)?;
            hyper.set_precisions(&precisions)?;
            let j = net.jacobian(&problem)?;
            let each: Vec<f64> = weights.iter().flat_map(|w| [*w; 3]).collect();
            let hessian = net.hessian(likelihood)?.broadcast_mul(&Tensor::new(each, &CPU)?.unsqueeze(1)?)?;
            let g = j.t()?.matmul(&hessian.matmul(&j)?)?;
            for curvature in EXACT {
                let expected = expected(&problem, &g, 1.0 / 0.7, &precisions, curvature)?;
                let found = evidence(&problem, &weighted, curvature, Parts::Whole, &hyper)?;
                close(&format!("{kind:?} {likelihood:?} {curvature:?}"), found.log_det, expected, 1e-9);
            }
            // Independent outputs bound, and the log-likelihood is the weighted sum.
            let independent = Curvature::Kernel(Outputs::Independent(Split::Root));
            let bound = evidence(&problem, &weighted, independent, Parts::Whole, &hyper)?;
            let exact = expected(&problem, &g, 1.0 / 0.7, &precisions, Curvature::Full)?;
            assert!(bound.log_det >= exact - 1e-9);
            let z = net.model.forward(&net.x)?.reshape((terms, 3))?.to_vec2::<f64>()?;
            let y = examples.y().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            let mut sum = 0.0;
            for (n, (z, w)) in z.iter().zip(&weights).enumerate() {
                sum += w * match likelihood {
                    Likelihood::Categorical => z[y[n] as usize] - z.iter().map(|z| z.exp()).sum::<f64>().ln(),
                    Likelihood::Bernoulli => {
                        (0..3).map(|c| y[3 * n + c] * z[c] - (1.0 + z[c].exp()).ln()).sum::<f64>()
                    }
                    Likelihood::Gaussian => {
                        let of = |c: usize| -(y[3 * n + c] - z[c]).powi(2) / 2.0;
                        (0..3).map(of).sum::<f64>() - 1.5 * (2.0 * std::f64::consts::PI).ln()
                    }
                };
            }
            close("log-likelihood", bound.log_likelihood, sum / 0.7, 1e-12);
        }
    }
    Ok(())
}

/// A label that is ignored is a weight of 0, and an example of weight 0 one that is not there; weight 2 is an example twice.
#[test]
fn ignored_labels_and_repeated_examples() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Conv, 6, 6, 3)?;
    let problem = net.problem(likelihood)?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, 0.6)?;
    let labels = Tensor::new(&[0i64, 1, -100, 2, 1, 0], &CPU)?;
    let ignoring = Examples::new(net.x.clone(), labels.clone())?.ignoring(-100);
    let weights = Tensor::new(&[1f64, 1., 0., 1., 1., 1.], &CPU)?;
    let weighted = Examples::new(net.x.clone(), labels.clone())?.weighted(&weights)?;
    let all = Examples::new(net.x.clone(), Tensor::new(&[0i64, 1, 0, 2, 1, 0], &CPU)?)?;
    let fewer = all.select(&[0, 1, 3, 4, 5])?;
    let twice = all.select(&[0, 1, 1, 2, 3, 4, 5])?;
    let heavy = all.clone().weighted(&Tensor::new(&[1f64, 2., 1., 1., 1., 1.], &CPU)?)?;
    for curvature in CURVATURES {
        let of = |examples: &Examples| evidence(&problem, examples, curvature, Parts::Whole, &hyper);
        for (found, expected) in [(&ignoring, &fewer), (&weighted, &fewer), (&heavy, &twice)] {
            let (found, expected) = (of(found)?, of(expected)?);
            close(&format!("{curvature:?}"), found.log_evidence, expected.log_evidence, 1e-10);
            close(&format!("{curvature:?}"), found.log_det, expected.log_det, 1e-10);
        }
    }
    for structure in [
        HessianStructure::Full,
        HessianStructure::Kron,
        HessianStructure::Rotated,
        HessianStructure::Diagonal,
    ] {
        let of = |examples: &Examples| {
            let posterior = Posterior::fit(&problem, examples, structure, &hyper, 1 << 30)?;
            posterior.predict(&problem, &net.x)?.variance()?.flatten_all()?.to_vec1::<f64>()
        };
        for (found, expected) in of(&ignoring)?.into_iter().zip(of(&fewer)?) {
            close(&format!("{structure:?}"), found, expected, 1e-10);
        }
    }
    Ok(())
}

/// Labels are looked at before anything else: at once, and before the model is run.
#[test]
fn labels_out_of_range() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Mlp, 1, 6, 3)?;
    let problem = net.problem(likelihood)?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
    let start = std::time::Instant::now();
    let wrong = |y: Tensor| Examples::new(net.x.clone(), y);
    for (message, examples) in [
        ("label -100", wrong(Tensor::new(&[0i64, 1, -100, 2, 1, 0], &CPU)?)?),
        ("label 4294967196", wrong(Tensor::new(&[0u32, 1, 4294967196, 2, 1, 0], &CPU)?)?),
        ("label 3", wrong(Tensor::new(&[0u8, 1, 2, 2, 1, 3], &CPU)?)?),
        ("label -1", wrong(Tensor::new(&[-1i64, 1, -100, 2, 1, 0], &CPU)?)?.ignoring(-100)),
    ] {
        for parts in [Parts::Whole, Parts::ByLabel(2), Parts::Random(2), Parts::Consecutive(4)] {
            for curvature in CURVATURES {
                let error = Estimator::new(curvature, parts).fit(&problem, &examples, 0).expect_err("labels");
                assert!(error.to_string().contains(message), "{message}: {error}");
                let draws = Estimator { draws: Some(1), ..Estimator::new(curvature, parts) };
                assert!(draws.evaluate(&problem, &examples, &hyper, 0).is_err());
            }
        }
        let error =
            Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30).expect_err("labels");
        assert!(error.to_string().contains(message), "{message}: {error}");
    }
    assert!(start.elapsed().as_secs() < 20);
    // Ignored ones are a group.
    let ignoring = wrong(Tensor::new(&[0i64, 1, -100, 2, 1, 0], &CPU)?)?.ignoring(-100);
    let grouped =
        evidence(&problem, &ignoring, Curvature::Kernel(Outputs::Joint), Parts::ByLabel(6), &hyper)?;
    let mut sum = 0.0;
    for group in [&[0, 5][..], &[1, 4], &[3]] {
        let part = ignoring.select(group)?;
        sum += evidence(&problem, &part, Curvature::Full, Parts::Whole, &hyper)?.log_det;
    }
    close("by label", grouped.log_det, sum, 1e-10);
    Ok(())
}

#[test]
fn models_that_mix_examples_are_refused() -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let (first, last) =
        tape.build(|| Ok((nn::linear(3, 4, vb.pp("first"))?, nn::linear(4, 3, vb.pp("last"))?)))?;
    let alone = |x: &Tensor| last.forward(&first.forward(x)?.tanh()?);
    let normed = |x: &Tensor| {
        let h = first.forward(x)?;
        let h = h.broadcast_sub(&h.mean_keepdim(0)?)?;
        let deviation = (h.sqr()?.mean_keepdim(0)? + 1e-5)?.sqrt()?;
        last.forward(&h.broadcast_div(&deviation)?.tanh()?)
    };
    let before = |x: &Tensor| {
        let h = first.forward(x)?.tanh()?;
        let shifted = Tensor::cat(&[h.narrow(0, 0, 1)?, h.narrow(0, 0, h.dim(0)? - 1)?], 0)?;
        last.forward(&(h + shifted)?)
    };
    let dropped = |x: &Tensor| last.forward(&nn::ops::dropout(&first.forward(x)?, 0.5)?);
    let likelihood = Likelihood::Categorical;
    for n in [2, 3, 9, 300] {
        let x = random(8, &[n, 3])?.to_dtype(DType::F32)?;
        let y = Tensor::from_iter((0..n as u32).map(|i| i % 3), &CPU)?;
        let examples = Examples::new(x.clone(), y)?;
        let of = |model: &dyn Module| -> Result<f64> {
            let problem = Problem::new(&tape, &vars, model, likelihood)?;
            let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
            Posterior::fit(&problem, &examples, HessianStructure::Diagonal, &hyper, 1 << 30)?;
            Ok(evidence(&problem, &examples, Curvature::Diagonal, Parts::Whole, &hyper)?.log_evidence)
        };
        of(&alone)?;
        for model in [&normed as &dyn Module, &before, &dropped] {
            let error = of(model).expect_err("mixes").to_string();
            assert!(error.contains("the model mixes examples"), "{n}: {error}");
        }
        // Predictions too.
        let problem = Problem::new(&tape, &vars, &alone, likelihood)?;
        let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
        let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?;
        posterior.predict(&problem, &x)?;
        let mixing = Problem::new(&tape, &vars, &normed, likelihood)?;
        assert!(posterior.predict(&mixing, &x).is_err());
    }
    Ok(())
}

/// A net of 40 inputs of which some are always zero, in both types with the same numbers.
fn dead_inputs(dtype: DType) -> Result<(VarMap, Tape, Box<dyn Module>, Tensor)> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
    let model = tape.build(|| {
        let (first, last) = (nn::linear(40, 12, vb.pp("first"))?, nn::linear(12, 4, vb.pp("last"))?);
        Ok(Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?)) as Box<dyn Module>)
    })?;
    let mut names: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (_, var)) in names.iter().enumerate() {
        var.set(&(random(index as u64, var.dims())?.to_dtype(DType::F32)?.to_dtype(dtype)? * 0.5)?)?;
    }
    let live = Tensor::from_iter((0..40).map(|i| f64::from(u8::from(i >= 15))), &CPU)?;
    let x = random(77, &[300, 40])?.broadcast_mul(&live)?.to_dtype(DType::F32)?.to_dtype(dtype)?;
    Ok((vars, tape, model, x))
}

/// At small precisions eigenvalues that are rounding are not charged for, and what f32 cannot tell is refused.
#[test]
fn small_precisions_in_f32() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let labels = Tensor::from_iter((0..300).map(|i| (i * i / 7) % 4u32), &CPU)?;
    for precision in [1e-2, 1e-6, 1e-8] {
        let of = |dtype| -> Result<Vec<(String, f64, f64)>> {
            let (vars, tape, model, x) = dead_inputs(dtype)?;
            let problem = Problem::new(&tape, &vars, &*model, likelihood)?;
            let examples = Examples::new(x.clone(), labels.clone())?;
            let hyper = Hyper::new(&problem, Structure::Scalar, precision)?;
            let mut found = vec![];
            for curvature in [Curvature::Kron, Curvature::Rotated, Curvature::Diagonal, Curvature::Full] {
                let evidence = evidence(&problem, &examples, curvature, Parts::Whole, &hyper)?;
                found.push((format!("{curvature:?} log det"), evidence.log_det, 1e-5));
                found.push((format!("{curvature:?} condition"), evidence.condition, 1e-3));
                found.push((format!("{curvature:?} effective"), evidence.effective.iter().sum(), 1e-4));
            }
            for structure in [
                HessianStructure::Kron,
                HessianStructure::Rotated,
                HessianStructure::Diagonal,
                HessianStructure::Full,
            ] {
                let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
                let predicted = posterior.predict(&problem, &x.narrow(0, 0, 3)?)?;
                for c in predicted.covariance.to_vec3::<f64>()? {
                    found.push((format!("{structure:?} variance"), c[0][0], 1e-3));
                    // Of a difference, which softmax sees, beside a common part that is far larger.
                    found.push((
                        format!("{structure:?} difference"),
                        c[0][0] + c[1][1] - 2.0 * c[0][1],
                        1e-3,
                    ));
                }
                for p in predicted.sampled(50, 1)?.flatten_all()?.to_vec1::<f64>()? {
                    assert!((0.0..=1.0).contains(&p));
                }
            }
            Ok(found)
        };
        for ((what, found, tolerance), (_, expected, _)) in of(DType::F32)?.into_iter().zip(of(DType::F64)?) {
            println!("{precision} {what}: {found} {expected}");
            close(&format!("{precision} {what}"), found, expected, tolerance);
        }
    }
    let (vars, tape, model, x) = dead_inputs(DType::F32)?;
    let problem = Problem::new(&tape, &vars, &*model, likelihood)?;
    let examples = Examples::new(x, labels)?;
    let hyper = Hyper::new(&problem, Structure::Scalar, 1e-15)?;
    for curvature in CURVATURES {
        let error =
            evidence(&problem, &examples, curvature, Parts::Whole, &hyper).expect_err("noise").to_string();
        assert!(
            error.contains("condition number") && error.contains("or a model in f64 would do"),
            "{error}"
        );
    }
    for structure in [
        HessianStructure::Kron,
        HessianStructure::Rotated,
        HessianStructure::Diagonal,
        HessianStructure::Full,
    ] {
        let error =
            Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30).expect_err("noise").to_string();
        assert!(
            error.contains("condition number") && error.contains("or a model in f64 would do"),
            "{error}"
        );
    }
    Ok(())
}

/// Outputs that always move together have a singular covariance; draws from it are right.
#[test]
fn draws_of_outputs_that_move_together() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
        let hidden = tape.build(|| nn::linear_no_bias(2, 1, vb.pp("hidden")))?;
        let directions = Tensor::new(&[[0.3f64, 1.1, -0.7, 2.0]], &CPU)?.to_dtype(dtype)?;
        let model = |x: &Tensor| hidden.forward(x)?.broadcast_mul(&directions);
        vars.all_vars()[0].set(&Tensor::new(&[[0.4f64, -0.2]], &CPU)?.to_dtype(dtype)?)?;
        let x = random(5, &[7, 2])?.to_dtype(dtype)?;
        let likelihood = Likelihood::Categorical;
        let problem = Problem::new(&tape, &vars, &model, likelihood)?;
        let examples = Examples::new(x.clone(), Tensor::new(&[0u32, 1, 2, 3, 0, 1, 2], &CPU)?)?;
        let hyper = Hyper::new(&problem, Structure::Scalar, 1e-3)?;
        for structure in [
            HessianStructure::Kron,
            HessianStructure::Rotated,
            HessianStructure::Diagonal,
            HessianStructure::Full,
        ] {
            let posterior = Posterior::fit(&problem, &examples, structure, &hyper, 1 << 30)?;
            let predicted = posterior.predict(&problem, &x)?;
            let sampled = predicted.sampled(20_000, 3)?.to_vec2::<f64>()?;
            let direction = directions.to_dtype(DType::F64)?.to_vec2::<f64>()?.remove(0);
            let (means, covariances) =
                (predicted.mean.to_vec2::<f64>()?, predicted.covariance.to_vec3::<f64>()?);
            for ((sampled, mean), covariance) in sampled.iter().zip(means).zip(covariances) {
                // All outputs follow one number, the covariance is d d^T v: the integral over that number.
                let deviation = covariance[3][3].sqrt() / 2.0;
                let mut expected = [0.0; 4];
                let mut weight = 0.0;
                for i in -400..=400 {
                    let z = i as f64 / 50.0;
                    let w = (-z * z / 2.0).exp();
                    let e: Vec<f64> =
                        mean.iter().zip(&direction).map(|(m, d)| (m + d * deviation * z).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    expected.iter_mut().zip(e).for_each(|(x, e)| *x += w * e / sum);
                    weight += w;
                }
                for (sampled, expected) in sampled.iter().zip(expected) {
                    let expected = expected / weight;
                    assert!(
                        (sampled - expected).abs() < 5.0 * 0.5 / 20_000f64.sqrt(),
                        "{structure:?} {sampled} {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// What would not fit is refused with its bytes, of matrices and of rows.
#[test]
fn memory_is_refused_before_it_is_taken() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Conv, 3, 40, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    // Inputs and two columns' gradients of three layers; of conv 3 x 3 positions and 2 x 9 inputs, of second 2 x 2 and 16, of last 8.
    let rows = 8 * 40 * (9 * (18 + 2 * 4) + 4 * (16 + 2 * 2) + 8 + 2 * 3);
    for curvature in [Curvature::BlockPerTensor, Curvature::BlockPerLayer, Curvature::Kernel(Outputs::Joint)]
    {
        let whole = Estimator::new(curvature, Parts::Whole);
        let matrix = 4 * 8 * 80 * 80;
        // The blocks' own matrices are small.
        let bytes = if curvature == Curvature::Kernel(Outputs::Joint) { matrix } else { rows };
        let error = Estimator { memory: bytes - 1, ..whole }
            .fit(&problem, &examples, 0)
            .expect_err("too much")
            .to_string();
        assert!(error.contains(&format!("{bytes} bytes")), "{curvature:?}: {error}");
        // A fit keeps all its parts.
        let parts = Estimator { memory: rows - 1, ..Estimator::new(curvature, Parts::Consecutive(10)) };
        let error = parts.fit(&problem, &examples, 0).expect_err("too much").to_string();
        assert!(error.contains(&format!("{} bytes", rows / 4)), "{curvature:?}: {error}");
        let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
        parts.evaluate(&problem, &examples, &hyper, 0)?;
    }
    // Sums are of passes that fit, down to one example.
    let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
    for curvature in [Curvature::Kron, Curvature::Rotated, Curvature::Diagonal] {
        let whole = Estimator::new(curvature, Parts::Whole);
        let expected = whole.fit(&problem, &examples, 0)?.evidence(&hyper)?;
        let found = Estimator { memory: rows / 6, ..whole }.fit(&problem, &examples, 0)?.evidence(&hyper)?;
        close(&format!("{curvature:?}"), found.log_det, expected.log_det, 1e-12);
        close(&format!("{curvature:?}"), found.log_likelihood, expected.log_likelihood, 1e-12);
        let error =
            Estimator { memory: rows / 40 - 1, ..whole }.fit(&problem, &examples, 0).expect_err("one");
        assert!(error.to_string().contains(&format!("{} bytes", rows / 40)), "{error}");
    }
    let predicted = |memory| -> Result<Vec<f64>> {
        let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, memory)?;
        posterior.predict(&problem, &net.x)?.variance()?.flatten_all()?.to_vec1::<f64>()
    };
    for (found, expected) in predicted(rows / 6)?.into_iter().zip(predicted(1 << 30)?) {
        close("variance", found, expected, 1e-12);
    }
    let net = Net::new(Kind::Terms, 3, 4, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
    let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?;
    let error = posterior.predict(&problem, &net.x).expect_err("positions").to_string();
    assert!(error.contains("predictions are of outputs [n, classes], got [4, 2, 3]"), "{error}");
    Ok(())
}

/// Bad weights, masks and labels are refused in words.
#[test]
fn bad_terms_are_refused() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    let net = Net::new(Kind::Terms, 3, 4, 3)?;
    let (problem, examples) = (net.problem(likelihood)?, net.examples(likelihood)?);
    let weights = |values: Vec<f64>| examples.clone().weighted(&Tensor::new(values, &CPU)?);
    let whole = Estimator::new(Curvature::Full, Parts::Whole);
    let gaussian = net.problem(Likelihood::Gaussian)?;
    net.tape.mask(Some(&Tensor::ones((3, 2), DType::U8, &CPU)?))?;
    let of_three = whole.fit(&problem, &examples, 0).err();
    net.tape.mask(None)?;
    for (part, error) in [
        ("weights of shape [3] for 4 examples", weights(vec![1.0; 3]).err()),
        ("the weight of term 1 is -1", weights(vec![1.0, -1.0, 1.0, 1.0]).err()),
        ("the weight of term 2 is NaN", weights(vec![1.0, 1.0, f64::NAN, 1.0]).err()),
        ("all 4 weights are zero", weights(vec![0.0; 4]).err()),
        (
            "weights of shape [4, 3] for outputs [4, 2, 3]",
            whole
                .fit(&problem, &examples.clone().weighted(&Tensor::ones((4, 3), DType::F32, &CPU)?)?, 0)
                .err(),
        ),
        (
            "a mask [3, 2] for 4 examples",
            examples.clone().masked(&Tensor::ones((3, 2), DType::U8, &CPU)?).err(),
        ),
        ("the tape's mask is of 3 examples of 2 positions, expected 4 examples", of_three),
        (
            "only class numbers can be",
            whole.fit(&gaussian, &net.examples(Likelihood::Gaussian)?.ignoring(0), 0).err(),
        ),
        (
            "no term counts",
            whole
                .fit(
                    &problem,
                    &Examples::new(net.x.clone(), Tensor::full(-1i64, (4, 2), &CPU)?)?.ignoring(-1),
                    0,
                )
                .err(),
        ),
        (
            "no layer saw a batch of 4 examples of 5 positions",
            whole.fit(&problem, &examples.clone().masked(&Tensor::ones((4, 5), DType::U8, &CPU)?)?, 0).err(),
        ),
    ] {
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part}: {message}");
    }
    Ok(())
}
