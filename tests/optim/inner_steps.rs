//! QE's inner steps against the wake objective with exact divergences, differentiated literally.

use crate::common::wakes::*;
use crate::common::*;
use candle_core::{Result, Tensor};
use faer::Mat;
use kronwake::curvature::{Damping, FactorLimit};
use kronwake::optim::{Bias, Inner, Model, NaturalGradient, Params, QSolve, Qe};
use kronwake::tape::Likelihood;

/// The mean over terms of `(KL(p || q) + KL(q || p)) / 2`, from the definitions of the divergences.
pub fn symmetric_kl(likelihood: Likelihood, z: &Tensor, old: &Tensor) -> f64 {
    let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
    let both = |p: &[f64], q: &[f64]| 0.5 * (kl(p, q) + kl(q, p));
    let classes = z.dim(1).unwrap();
    let (z, old) = (flat(z), flat(old));
    let term = |(z, old): (&[f64], &[f64])| match likelihood {
        Likelihood::Categorical => both(&softmax(z), &softmax(old)),
        Likelihood::Bernoulli => {
            let two = |z: f64| [sigmoid(z), 1.0 - sigmoid(z)];
            z.iter().zip(old).map(|(&z, &old)| both(&two(z), &two(old))).sum()
        }
        // Of unit-variance normals both divergences are half the squared distance of the means.
        Likelihood::Gaussian => z.iter().zip(old).map(|(z, old)| 0.5 * (z - old).powi(2)).sum(),
    };
    let terms = z.len() / classes;
    z.chunks(classes).zip(old.chunks(classes)).map(term).sum::<f64>() / terms as f64
}

/// The matrix with `blocks` on its diagonal.
fn block_diagonal(blocks: impl Iterator<Item = Mat<f64>>) -> Mat<f64> {
    blocks.fold(Mat::zeros(0, 0), |all, block| {
        let n = all.nrows();
        Mat::from_fn(n + block.nrows(), n + block.nrows(), |i, j| match (i < n, j < n) {
            (true, true) => all[(i, j)],
            (false, false) => block[(i - n, j - n)],
            _ => 0.0,
        })
    })
}

/// Inner steps against finite differences of the literal objective; they are dropped where they raise it.
fn check_inner(likelihood: Likelihood, inner: Inner, steps: usize) -> Result<()> {
    let (rho, lr) = (0.4, 0.2);
    let with = |inner_lr: f64| {
        let inner = Inner { lr: inner_lr, ..inner.clone() };
        Qe { wake_decay: Some(rho), solve: QSolve::Factor, inner }
    };
    // Two runs that part at the last step but one, where the second makes no inner steps.
    let (net, twin) = (net(5)?, net(5)?);
    let optimizer = |net: &Net| -> Result<NaturalGradient> {
        let options = params(net, with(inner.lr), Damping::Eigenvalue(DAMPING));
        NaturalGradient::from_varmap(&net.varmap, Params { lr, ..options })
    };
    let (mut opt, mut opt_twin) = (optimizer(&net)?, optimizer(&twin)?);
    let blocks = ["a", "b"].map(|b| net.elements(b, 0, 1));
    let all: Vec<_> = blocks.concat();
    let mut models = vec![];
    for k in 0..=steps {
        models.push(net.values()?);
        let x = random(40 + k as u64, &[6, 3])?;
        let y = targets(50 + k as u64, likelihood, &(net.forward)(&x)?)?;
        let go = |net: &Net, opt: &mut NaturalGradient| -> Result<()> {
            let z = (net.forward)(&x)?;
            opt.observe(&z, likelihood)?;
            opt.step_with(&mean_loss(likelihood, &z, &y)?, likelihood, &mut || (net.forward)(&x))
        };
        if k < steps {
            go(&net, &mut opt)?;
            go(&twin, &mut opt_twin)?;
            continue;
        }
        let z = (net.forward)(&x)?;
        let grads = mean_loss(likelihood, &z, &y)?.backward()?;
        let g = column(&all, |var| grads.get(var).unwrap().clone());
        let now = current(&net, &z, likelihood, Bias::Folded)?;
        let b = block_diagonal(now.iter().map(|(a, g)| kron(a, g)));
        let start = values_at(&all);
        go(&net, &mut opt)?;
        opt_twin.set_params(Params { wake: with(0.0).into(), ..opt_twin.params().clone() })?;
        go(&twin, &mut opt_twin)?;
        let (found, quadratic) = (net.values()?, twin.values()?);
        let model = Model::Quadratic(QSolve::Factor);
        let matrix = block_diagonal(["a", "b"].iter().zip(&now).map(|(block, now)| {
            let (a, g) = opt.factors(block).unwrap();
            solved(
                model,
                &(of_group(&a, 0), of_group(&g, 0)),
                now,
                lr,
                (Damping::Eigenvalue(DAMPING), FactorLimit::NONE),
            )
        }));

        let wake = &models[models.len() - inner.models..];
        let mut outputs = vec![];
        for model in wake {
            net.set(model)?;
            outputs.push((net.forward)(&x)?);
        }
        let objective = || -> Result<Tensor> {
            let s = values_at(&all) - &start;
            let z = (net.forward)(&x)?;
            let mut value = (g.transpose() * &s)[(0, 0)] + 0.5 * (s.transpose() * &b * &s)[(0, 0)];
            for (j, old) in outputs.iter().rev().enumerate() {
                let kappa = if j + 1 == outputs.len() { 1.0 } else { 1.0 - rho };
                value += inner.scale / lr * kappa * rho.powi(j as i32) * symmetric_kl(likelihood, &z, old);
            }
            Tensor::new(&[value], z.device())
        };
        net.set(&quadratic)?;
        let before = flat(&objective()?)[0];
        let mut buffer = Mat::<f64>::zeros(all.len(), 1);
        for _ in 0..inner.steps {
            let gradient = jacobian(&all, 2e-3, &objective)?.transpose().to_owned();
            let direction = if inner.preconditioned { solve(&matrix, &gradient) } else { gradient };
            buffer = buffer * inner.momentum + direction;
            for (i, (var, index)) in all.iter().enumerate() {
                let mut values = flat(var.as_tensor());
                values[*index] -= inner.lr * lr * buffer[(i, 0)];
                var.set(&Tensor::from_vec(values, var.dims(), var.device())?)?;
            }
        }
        let (expected, lower) = (values_at(&all), flat(&objective()?)[0] <= before);
        net.set(&quadratic)?;
        let quadratic = values_at(&all);
        net.set(&found)?;
        let what = format!("{likelihood:?}, {inner:?}");
        assert_eq!(lower, inner.lr < 1.0, "{what}");
        let expected = if lower { expected - &quadratic } else { Mat::zeros(all.len(), 1) };
        assert_same(&(values_at(&all) - &quadratic), &expected, 1e-8, &what);
    }
    Ok(())
}

#[test]
fn exact_divergence() -> Result<()> {
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian] {
        let inner = |steps, lr, momentum, models| Inner { steps, lr, momentum, models, ..Inner::default() };
        for inner in [
            inner(1, 0.3, 0.0, 2),
            Inner { scale: 0.3, ..inner(1, 0.3, 0.0, 3) },
            inner(3, 0.3, 0.5, 2),
            inner(2, 0.3, 0.9, 4),
            Inner { preconditioned: true, ..inner(2, 0.3, 0.5, 3) },
            inner(1, 1000.0, 0.0, 2),
        ] {
            check_inner(likelihood, inner, 5)?;
        }
    }
    Ok(())
}
