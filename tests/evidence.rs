//! The evidence against per-example Jacobians, finite differences, and what is proven of its bounds.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, Outputs, Parts, Posterior, Problem, Split,
    Structure,
};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::pool::relu;
use kronwake::tape::{Likelihood, Tape};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const CPU: Device = Device::Cpu;

fn random(seed: u64, dims: &[usize]) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &CPU)
}

/// A net with every kind of layer that is counted.
struct Net {
    vars: VarMap,
    tape: Tape,
    model: Box<dyn Module>,
    x: Tensor,
    classes: usize,
    positions: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Mlp,
    /// Grouped, strided and padded convolutions.
    Conv,
    /// One layer used twice.
    Shared,
    /// Layers on `[n, t, features]`, a mean over `t`.
    Sequence,
    /// Outputs `[n, t, classes]`.
    Terms,
    /// An embedding and both norms.
    Tokens,
}

const KINDS: [Kind; 6] = [Kind::Mlp, Kind::Conv, Kind::Shared, Kind::Sequence, Kind::Terms, Kind::Tokens];

impl Net {
    fn new(kind: Kind, seed: u64, n: usize, classes: usize) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        let (dims, positions) = match kind {
            Kind::Mlp | Kind::Shared => (vec![n, 3], 1),
            Kind::Conv => (vec![n, 2, 6, 5], 1),
            Kind::Sequence => (vec![n, 4, 3], 1),
            Kind::Terms => (vec![n, 2, 3], 2),
            Kind::Tokens => (vec![n, 4], 1),
        };
        let model = tape.build(|| {
            let first = |to| nn::linear(3, to, vb.pp("first"));
            Ok(match kind {
                Kind::Mlp => {
                    let (first, last) = (first(4)?, nn::linear_no_bias(4, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?)) as Box<dyn Module>
                }
                Kind::Conv => {
                    let grouped = nn::Conv2dConfig { groups: 2, padding: 1, stride: 2, ..Default::default() };
                    let conv = nn::conv2d(2, 4, 3, grouped, vb.pp("conv"))?;
                    let (second, last) = (
                        nn::conv2d_no_bias(4, 2, 2, Default::default(), vb.pp("second"))?,
                        nn::linear(8, classes, vb.pp("last"))?,
                    );
                    Box::new(move |x: &Tensor| {
                        let x = second.forward(&conv.forward(x)?.tanh()?)?;
                        last.forward(&relu(&x)?.flatten_from(1)?)
                    })
                }
                Kind::Shared => {
                    let (shared, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| {
                        let once = shared.forward(x)?.tanh()?;
                        last.forward(&shared.forward(&once)?.tanh()?)
                    })
                }
                Kind::Sequence => {
                    let (first, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?.mean(1)?))
                }
                Kind::Tokens => {
                    let table = nn::embedding(5, 3, vb.pp("table"))?;
                    let (norm, rms) =
                        (nn::layer_norm(3, 1e-5, vb.pp("norm"))?, nn::rms_norm(3, 1e-5, vb.pp("rms"))?);
                    let last = nn::linear(3, classes, vb.pp("last"))?;
                    Box::new(move |x: &Tensor| {
                        let x = norm.forward(&table.forward(x)?)?;
                        last.forward(&rms.forward(&(&x + x.tanh()?)?)?.mean(1)?)
                    })
                }
                Kind::Terms => {
                    let (first, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| {
                        let x = first.forward(x)?.tanh()?;
                        // Positions see each other.
                        last.forward(&x.broadcast_add(&x.mean_keepdim(1)?)?)
                    })
                }
            })
        })?;
        let mut names: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (index, (_, var)) in names.iter().enumerate() {
            var.set(&random(100 * seed + index as u64, var.dims())?)?;
        }
        let x = match kind {
            // Tokens come twice in an example, and one never.
            Kind::Tokens => {
                Tensor::from_iter((0..4 * n as u32).map(|i| (i * i / 3 + i) % 4), &CPU)?.reshape(dims)?
            }
            _ => random(100 * seed + 50, &dims)?,
        };
        Ok(Self { vars, tape, model, x, classes, positions })
    }

    fn problem(&self, likelihood: Likelihood) -> Result<Problem<'_>> {
        Problem::new(&self.tape, &self.vars, &*self.model, likelihood)
    }

    fn examples(&self, likelihood: Likelihood) -> Result<Examples> {
        let n = self.x.dim(0)?;
        let y = match likelihood {
            Likelihood::Categorical => {
                let labels = (0..n * self.positions).map(|i| (i * i % self.classes) as u32);
                let dims: &[usize] = if self.positions > 1 { &[n, self.positions] } else { &[n] };
                Tensor::from_iter(labels, &CPU)?.reshape(dims)?
            }
            other => {
                let dims: &[usize] =
                    if self.positions > 1 { &[n, self.positions, self.classes] } else { &[n, self.classes] };
                let y = random(7, dims)?;
                if other == Likelihood::Bernoulli { y.gt(0.)?.to_dtype(DType::F64)? } else { y }
            }
        };
        Examples::new(self.x.clone(), y)
    }

    /// `J` `[outputs of all examples, parameters]`, by a backward pass for every output of every example.
    fn jacobian(&self, problem: &Problem<'_>) -> Result<Tensor> {
        let outputs = self.model.forward(&self.x)?.flatten_all()?;
        let mut rows = Vec::new();
        for i in 0..outputs.elem_count() {
            let grads = outputs.get(i)?.backward()?;
            let parts = problem.parameters().iter().map(|p| match grads.get(&p.tensor) {
                Some(grad) => grad.flatten_all(),
                None => Tensor::zeros(p.tensor.elem_count(), DType::F64, &CPU),
            });
            rows.push(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?);
        }
        Tensor::stack(&rows, 0)
    }

    /// The Hessian by the outputs of all examples, block by block.
    fn hessian(&self, likelihood: Likelihood) -> Result<Tensor> {
        let outputs = self.model.forward(&self.x)?.reshape(((), self.classes))?;
        let (terms, c) = outputs.dims2()?;
        let p = match likelihood {
            Likelihood::Categorical => candle_nn::ops::softmax(&outputs, D::Minus1)?,
            Likelihood::Bernoulli => candle_nn::ops::sigmoid(&outputs)?,
            Likelihood::Gaussian => outputs.ones_like()?,
        };
        let p = p.to_vec2::<f64>()?;
        let mut h = vec![0.0; terms * c * terms * c];
        for (n, p) in p.iter().enumerate() {
            for i in 0..c {
                for j in 0..c {
                    let own = if i == j { 1.0 } else { 0.0 };
                    h[(n * c + i) * terms * c + n * c + j] = match likelihood {
                        Likelihood::Categorical => own * p[i] - p[i] * p[j],
                        Likelihood::Bernoulli => own * p[i] * (1.0 - p[i]),
                        Likelihood::Gaussian => own,
                    };
                }
            }
        }
        Tensor::from_vec(h, (terms * c, terms * c), &CPU)
    }
}

/// `log det m` by Gaussian elimination.
fn log_det(m: &Tensor) -> Result<f64> {
    let mut m = m.to_vec2::<f64>()?;
    let mut sum = 0.0;
    for k in 0..m.len() {
        sum += m[k][k].ln();
        for i in k + 1..m.len() {
            let factor = m[i][k] / m[k][k];
            let row = m[k].clone();
            for (x, r) in m[i].iter_mut().zip(&row).skip(k) {
                *x -= factor * r;
            }
        }
    }
    Ok(sum)
}

/// `s G + P0` and `log det` of it over `P0`, from Jacobians.
fn brute(net: &Net, likelihood: Likelihood, s: f64, precisions: &[f64]) -> Result<(Tensor, f64)> {
    let problem = net.problem(likelihood)?;
    let j = net.jacobian(&problem)?;
    let g = j.t()?.matmul(&net.hessian(likelihood)?.matmul(&j)?)?;
    let sizes = problem.parameters().iter().map(|p| p.tensor.elem_count());
    let diagonal: Vec<f64> =
        precisions.iter().zip(sizes).flat_map(|(p, n)| std::iter::repeat_n(*p, n)).collect();
    let p0 = Tensor::new(diagonal.as_slice(), &CPU)?;
    let m = ((g * s)? + Tensor::eye(diagonal.len(), DType::F64, &CPU)?.broadcast_mul(&p0)?)?;
    let value = log_det(&m)? - diagonal.iter().map(|d| d.ln()).sum::<f64>();
    Ok((m, value))
}

const LIKELIHOODS: [Likelihood; 3] = [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian];

fn precisions(count: usize) -> Vec<f64> {
    (0..count).map(|i| 0.3 + 0.4 * i as f64).collect()
}

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
        Estimator::new(Curvature::Diagonal, Parts::Whole),
        Estimator::extrapolated(8),
    ];
    let structures = [Structure::Scalar, Structure::PerLayer, Structure::PerTensor, Structure::Diagonal];
    for (index, estimator) in estimators.iter().enumerate() {
        for (at, structure) in structures.into_iter().enumerate() {
            if structure == Structure::Diagonal && estimator.curvature == Curvature::Kron {
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
