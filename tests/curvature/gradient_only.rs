//! Gradient-only factors, for models that are built with plain candle_nn.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use faer::Mat;
use kronwake::curvature::{Beyond, Damping, FactorLimit};
use kronwake::optim::{
    Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, QSolve, So, TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};

const DAMPING: f64 = 0.02;
const DECAY: f64 = 0.6;

fn gradients(pattern: &str) -> Groups {
    Groups(vec![Group { rule: Some(UpdateRule::GradientFactors), ..Group::named(pattern) }])
}

/// Options for a model without a tape.
fn options(groups: Groups, damping: Damping) -> Params {
    Params {
        lr: 1.0,
        damping,
        fisher: Fisher::Empirical,
        stat_decay: DECAY,
        every: Every { factors: 1, inverses: 1 },
        kl_clip: None,
        groups,
        ..Params::k_fac(&Tape::new())
    }
}

/// A Var `fc.weight` and an optimizer that gets its gradients from a linear loss.
struct Linear {
    var: Var,
    opt: NaturalGradient,
}

impl Linear {
    fn new(dims: &[usize], options: Params) -> Result<Self> {
        let varmap = candle_nn::VarMap::new();
        let var = Var::from_tensor(&random(1, dims)?)?;
        varmap.data().lock().unwrap().insert("fc.weight".into(), var.clone());
        Ok(Self { var, opt: NaturalGradient::from_varmap(&varmap, options)? })
    }

    /// The change of the Var in a step on a gradient, of a mean over `terms`.
    fn step(&mut self, gradient: &Tensor, terms: usize) -> Result<Tensor> {
        let before = self.var.as_detached_tensor().copy()?;
        self.opt.observe(&Tensor::zeros((terms, 3), DType::F64, &Device::Cpu)?, Likelihood::Categorical)?;
        self.opt.backward_step(&(self.var.as_tensor() * gradient)?.sum_all()?)?;
        self.var.as_detached_tensor() - before
    }
}

fn trace(m: &Mat<f64>) -> f64 {
    m.diagonal().column_vector().sum()
}

/// `(N avg(M^T M) (x) avg(M M^T) / tr + damping)^-1 M`, dense, step after step.
#[test]
fn closed_form() -> Result<()> {
    let terms = 5;
    for dims in [&[3, 4][..], &[3, 2, 1, 2]] {
        for limit in [
            FactorLimit::NONE,
            FactorLimit { rows: 2, beyond: Beyond::BlockDiagonal },
            FactorLimit { rows: 3, beyond: Beyond::Diagonal },
            FactorLimit { rows: 2, beyond: Beyond::LowRank { rank: 1 } },
            FactorLimit { rows: 3, beyond: Beyond::LowRank { rank: 2 } },
        ] {
            for damping in [Damping::Eigenvalue(DAMPING), Damping::Pi(DAMPING)] {
                let mut net =
                    Linear::new(dims, Params { factor_limit: limit, ..options(gradients("*"), damping) })?;
                let (mut l, mut r) = (Mat::zeros(3, 3), Mat::zeros(4, 4));
                for k in 0..4 {
                    let gradient = random(10 + k, dims)?;
                    let m = matrix(&gradient.reshape((3, 4))?);
                    let (old, new) = if k == 0 { (0.0, 1.0) } else { (DECAY, 1.0 - DECAY) };
                    l = l * old + &m * m.transpose() * (new * terms as f64);
                    r = r * old + m.transpose() * &m * (new * terms as f64);
                    let (g, a) = (kept(&l, limit), kept(&r, limit) * (1.0 / trace(&l)));
                    let damped = match damping {
                        Damping::Pi(la) => {
                            let pi = (trace(&a) / 4.0 / (trace(&g) / 3.0)).sqrt();
                            kron(&(a + eye(4) * (pi * la.sqrt())), &(g + eye(3) * (la.sqrt() / pi)))
                        }
                        _ => kron(&a, &g) + eye(12) * DAMPING,
                    };
                    let step = solve(&damped, &Mat::from_fn(12, 1, |i, _| m[(i % 3, i / 3)]));
                    let expected = Mat::from_fn(3, 4, |i, j| -step[(j * 3 + i, 0)]);
                    let found = matrix(&net.step(&gradient, terms)?.reshape((3, 4))?);
                    assert_same(&found, &expected, 1e-10, &format!("{dims:?} {limit:?} {damping:?} {k}"));
                }
            }
        }
    }
    Ok(())
}

/// Rotated gradients make rotated steps; gradients of `c` times the loss, with the damping of `c^2`, steps of `1 / c`.
#[test]
fn invariances() -> Result<()> {
    let rotation = |n: usize, seed: u64| -> Result<Tensor> {
        let m = matrix(&random(seed, &[n, n])?);
        Ok(tensor(&(&m + m.transpose()).self_adjoint_eigen(faer::Side::Lower).unwrap().U().to_owned()))
    };
    let (left, right, scale) = (rotation(3, 1)?, rotation(4, 2)?, 3.0);
    let new = |damping| Linear::new(&[3, 4], options(gradients("*"), Damping::Eigenvalue(damping)));
    let (mut plain, mut rotated, mut scaled) = (new(DAMPING)?, new(DAMPING)?, new(DAMPING * scale * scale)?);
    for k in 0..3 {
        let m = random(20 + k, &[3, 4])?;
        let step = plain.step(&m, 6)?;
        let turn = |m: &Tensor| left.matmul(m)?.matmul(&right.t()?);
        assert_close(&rotated.step(&turn(&m)?, 6)?, &turn(&step)?, 1e-10, "rotated");
        assert_close(&(scaled.step(&(m * scale)?, 6)? * scale)?, &step, 1e-10, "scaled");
    }
    Ok(())
}

/// A convolutional net of plain candle_nn: it trains, is saved and resumed to the last bit, and micro-batches are one batch.
fn plain_net(vb: candle_nn::VarBuilder) -> Result<Forward> {
    use candle_nn::Module;
    let conv = candle_nn::conv2d(1, 4, 2, Default::default(), vb.pp("conv"))?;
    let last = candle_nn::linear(16, 3, vb.pp("last"))?;
    Ok(Box::new(move |x| last.forward(&conv.forward(x)?.tanh()?.flatten_from(1)?)))
}

fn check_training(
    what: &str,
    wake: impl Into<Wake> + Clone,
    change: impl Fn(Params) -> Params,
) -> Result<()> {
    let new = |seed| -> Result<(Net, NaturalGradient)> {
        let net = Net::of(DType::F32, seed, plain_net)?;
        let every = Every { factors: 2, inverses: 3 };
        let options =
            Params { every, groups: gradients("*.weight"), ..Params::of(wake.clone(), &Tape::new()) };
        let opt = NaturalGradient::from_varmap(&net.varmap, change(options))?;
        Ok((net, opt))
    };
    let step = |(net, opt): &mut (Net, NaturalGradient), k: u64| -> Result<f64> {
        let (x, _) = small_batch(k % 4, 32, DType::F32)?;
        let y = x.flatten_from(1)?.narrow(1, 0, 3)?.argmax(1)?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        let loss = candle_nn::loss::cross_entropy(&z, &y)?;
        opt.backward_step(&loss)?;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    };
    let mut whole = new(1)?;
    let names: Vec<_> =
        whole.1.summary().blocks.iter().map(|b| (b.name.clone(), b.dims, b.gradient_only)).collect();
    assert_eq!(names, [("conv".to_string(), [1, 4, 4], true), ("last".to_string(), [1, 3, 16], true)]);
    let losses = (0..20).map(|k| step(&mut whole, k)).collect::<Result<Vec<_>>>()?;
    let path = scratch("half");
    whole.1.save(&path)?;
    let mut resumed = new(2)?;
    resumed.1.resume(&path)?;
    std::fs::remove_file(&path)?;
    let losses: Vec<_> = losses.into_iter().chain((20..40).map(|k| step(&mut whole, k).unwrap())).collect();
    for k in 20..40 {
        step(&mut resumed, k)?;
    }
    assert_same_state(&saved(&resumed.1)?, &saved(&whole.1)?, &[], what);
    let epoch = |from: usize| losses[from..from + 4].iter().sum::<f64>();
    assert!(epoch(36) < 0.9 * epoch(0), "{what}: {losses:?}");
    Ok(())
}

#[test]
fn training_and_resuming() -> Result<()> {
    check_training("kfac", Wake::KFac, |p| p)?;
    check_training("so", So::default(), |p| p)?;
    check_training("q, exact", Q { solve: QSolve::Exact, ..Q::default() }, |p| Params {
        damping: Damping::Pi(0.01),
        ..p
    })?;
    check_training("kld-wrm", TwoRate::default(), |p| p)?;
    let quadratic = TwoRate { model_decay: 0.7, ..TwoRate::q(0.3, QSolve::Factor) };
    check_training("kld-wrm, quadratic", quadratic, |p| p)
}

/// Many draws come to the two marginals of the Fisher matrix of a linear classifier, `D_n = e_n x_n^T` with `E e e^T` the Hessian.
#[test]
fn drawn_labels_give_the_fisher_matrix() -> Result<()> {
    use candle_nn::Module;
    let net = Net::of(DType::F64, 1, |vb| {
        let layer = candle_nn::linear_no_bias(4, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    let fisher = Fisher::Sampled { draws: 4000, seed: 1 };
    let options = Params { fisher, ..options(gradients("*"), Damping::Eigenvalue(DAMPING)) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    let x = random(5, &[6, 4])?;
    let z = (net.forward)(&x)?;
    let (mut l, mut r) = (Mat::zeros(3, 3), Mat::zeros(4, 4));
    for n in 0..6 {
        let h = hessian(Likelihood::Categorical, &flat(&z.get(n)?));
        let row = matrix(&x.narrow(0, n, 1)?);
        l += &h * (row.norm_l2().powi(2) / 6.0);
        r += row.transpose() * &row * (trace(&h) / 6.0);
    }
    opt.observe(&z, Likelihood::Categorical)?;
    opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &labels(6, 6, 3)?)?)?;
    let (a, g) = opt.factors("fc").unwrap();
    assert_same(&of_group(&a, 0), &r, 0.05, "inputs");
    assert_same(&(of_group(&g, 0) * trace(&l)), &l, 0.05, "outputs");
    Ok(())
}

#[test]
fn micro_batches_are_one_batch() -> Result<()> {
    micro_batches(Fisher::Empirical)?;
    micro_batches(Fisher::Sampled { draws: 3, seed: 2 })
}

fn micro_batches(fisher: Fisher) -> Result<()> {
    let new = || -> Result<(Net, NaturalGradient)> {
        let net = Net::of(DType::F64, 1, plain_net)?;
        let options = options(gradients("*.weight"), Damping::Eigenvalue(DAMPING));
        let opt = NaturalGradient::from_varmap(&net.varmap, Params { fisher, ..options })?;
        Ok((net, opt))
    };
    let (x, y) = small_batch(1, 10, DType::F64)?;
    let loss = |net: &Net, opt: &mut NaturalGradient, from: usize, count: usize| -> Result<Tensor> {
        let z = (net.forward)(&x.narrow(0, from, count)?)?;
        opt.observe(&z, Likelihood::Categorical)?;
        mean_loss(Likelihood::Categorical, &z, &y.narrow(0, from, count)?)
    };
    let ((whole, mut opt), (parts, mut by_parts)) = (new()?, new()?);
    let all = loss(&whole, &mut opt, 0, 10)?;
    opt.backward_step(&all)?;
    for (from, count) in [(0, 7), (7, 3)] {
        let part = loss(&parts, &mut by_parts, from, count)?;
        by_parts.accumulate(&part, count)?;
    }
    by_parts.step_accumulated()?;
    for (found, expected) in parts.values()?.iter().zip(whole.values()?) {
        assert_close(found, &expected, 1e-10, "micro-batches");
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let build = |groups, ekfac| {
        let net = Net::of(DType::F64, 1, plain_net)?;
        NaturalGradient::from_varmap(
            &net.varmap,
            Params { ekfac, ..options(groups, Damping::Eigenvalue(DAMPING)) },
        )
    };
    assert_says(build(gradients("*"), false), &["two or more dimensions", "conv.bias is [4]"]);
    assert_says(build(gradients("*.weight"), true), &["ekfac needs records", "conv.weight"]);
    let tapped = Groups(vec![Group { rule: Some(UpdateRule::Kronecker), ..Group::named("conv.weight") }]);
    assert_says(build(tapped, false), &["conv.weight belongs to no tapped layer", "GradientFactors"]);
    assert_says(
        Linear::new(&[3, 0], options(gradients("*"), Damping::Pi(0.1))).map(|_| ()),
        &["fc.weight is [3, 0]"],
    );
    let mut net = Linear::new(&[3, 4], options(gradients("*"), Damping::Pi(0.1)))?;
    let loss = net.var.as_tensor().sum_all()?;
    assert_says(net.opt.backward_step(&loss), &["step 0 needs the curvature", "observe"]);
    let before = flat(net.var.as_tensor());
    assert_says(net.step(&(random(1, &[3, 4])? * 1e200)?, 2), &["factor A of block fc has NaN or infinite"]);
    assert_eq!(before, flat(net.var.as_tensor()));
    Ok(())
}
