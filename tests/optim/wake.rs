//! The recursions of SO and Q against the wake objective that they stand for, minimized literally.

use crate::common::wakes::*;
use crate::common::*;
use candle_core::Result;
use faer::Mat;
use kronwake::curvature::{Beyond, Damping, FactorLimit};
use kronwake::optim::{
    Bias, Carry, Every, Model, NaturalGradient, Optimizer, Params, Q, QSolve, So, TwoRate, Wake,
};
use kronwake::tape::Likelihood;

/// What one step leaves in the two wakes: `theta_i`, the gradient and curvature of the model made there, and the matrix
/// of the distance to there.
struct Past {
    theta: Mat<f64>,
    g: Mat<f64>,
    b: Mat<f64>,
    f: Mat<f64>,
}

/// `argmin_s sum_i u_i (<g_i, d_i> + 1/2 |d_i|^2_{B_i}) + 1/lr sum_i w_i 1/2 |d_i|^2_{F_i}` with `d_i = theta_k + s - theta_i`, from its
/// normal equations; `u` decays with `model_decay`, `w` with `DECAY`.
fn literal(wake: &[Past], model_decay: f64, lr: f64) -> Mat<f64> {
    let k = wake.len() - 1;
    let theta = &wake[k].theta;
    let mut matrix = Mat::zeros(theta.nrows(), theta.nrows());
    let mut right = Mat::zeros(theta.nrows(), 1);
    for (i, past) in wake.iter().enumerate() {
        let weight = |rho: f64| if i == 0 { 1.0 } else { 1.0 - rho } * rho.powi((k - i) as i32);
        let (u, w) = (weight(model_decay), weight(DECAY) / lr);
        let curved = &past.b * u + &past.f * w;
        right -= &past.g * u + &curved * (theta - &past.theta);
        matrix += curved;
    }
    solve(&matrix, &right)
}

/// What the distances of the wake are measured with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Metric {
    /// The Fisher of every iterate, damped.
    Own,
    /// The matrices whose averages are what the rule solves with, its own curvature apart. They differ from the former since a
    /// product of averages is no average of products, nor pi damping linear.
    Implied,
}

/// With `clip`, a step whose direction is the literal minimizer's and whose length the clip decides.
fn check_literal(
    wake: impl Into<Wake> + Clone,
    damping: Damping,
    metric: Metric,
    rates: &[f64],
    clip: Option<(f64, Carry)>,
) -> Result<f64> {
    let net = net(1)?;
    let wake = wake.into();
    let model = wake.model();
    let (kl_clip, carry) = clip.map_or((None, Carry::Gradient), |(limit, carry)| (Some(limit), carry));
    let options = Params { kl_clip, carry, ..params(&net, wake, damping) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options.clone())?;
    let mut worst = 0f64;
    let blocks = ["a", "b"];
    let elements = blocks.map(|b| net.elements(b, 0, 1));
    let mut bars: [Option<Factors>; 2] = [None, None];
    let mut means: [Option<Mat<f64>>; 2] = [None, None];
    let mut models: [Option<(Factors, Mat<f64>)>; 2] = [None, None];
    let mut wakes: [Vec<Past>; 2] = [vec![], vec![]];
    let (model_decay, scale) = (options.wake.model_decay(), options.wake.rate_scale());
    // With the inputs fixed and squared loss either A or G of a layer stays, and averages of products are products of
    // averages: the metric may be the iterates' own.
    let x = random(2, &[7, 3])?;
    for (k, &lr) in rates.iter().enumerate() {
        opt.set_learning_rate(lr);
        let z = (net.forward)(&x)?;
        let loss = mean_loss(Likelihood::Gaussian, &z, &random(10 + k as u64, &[7, 2])?)?;
        let grads = loss.backward()?;
        let now = current(&net, &z, Likelihood::Gaussian, Bias::Folded)?;
        let before: Vec<_> = elements.iter().map(|e| values_at(e)).collect();
        opt.observe(&z, Likelihood::Gaussian)?;
        opt.backward_step(&loss)?;
        for (i, elements) in elements.iter().enumerate() {
            let g = column(elements, |var| grads.get(var).unwrap().clone());
            let bar = average(bars[i].as_ref(), &now[i], DECAY);
            // The averaged models' factors, their curvature, and what this step's model must have had for it.
            let factors = average(models[i].as_ref().map(|m| &m.0), &now[i], model_decay);
            let curvature = if model == Model::Linear {
                g.clone() * g.transpose() * 0.0
            } else {
                kron(&factors.0, &factors.1)
            };
            let b = match &models[i] {
                None => curvature.clone(),
                Some((_, last)) => (&curvature - last * model_decay) * (1.0 / (1.0 - model_decay)),
            };
            let rate = lr * scale;
            let mean = solved(model, &bar, &factors, rate, (damping, FactorLimit::NONE)) - &curvature * rate;
            let f = match (metric, &means[i]) {
                (Metric::Own, _) => damped(&now[i], damping),
                (Metric::Implied, None) => mean.clone(),
                (Metric::Implied, Some(last)) => (&mean - last * DECAY) * (1.0 / (1.0 - DECAY)),
            };
            wakes[i].push(Past { theta: before[i].clone(), g, b, f });
            models[i] = Some((factors, curvature));
            let expected = literal(&wakes[i], model_decay, rate);
            let what = format!("{model:?}, {damping:?}, {metric:?}, block {}, step {k}", blocks[i]);
            let taken = values_at(elements) - &before[i];
            if clip.is_none() {
                assert_same(&taken, &expected, 1e-10, &what);
            }
            let (unit, wanted) = (&taken * (1.0 / taken.norm_l2()), &expected * (1.0 / expected.norm_l2()));
            worst = worst.max((unit - wanted).norm_l2());
            (bars[i], means[i]) = (Some(bar), Some(mean));
        }
    }
    Ok(worst)
}

#[test]
fn literal_minimization() -> Result<()> {
    let (eigenvalue, pi) = (Damping::Eigenvalue(DAMPING), Damping::Pi(DAMPING));
    let q = |solve| Q { wake_decay: None, solve };
    for rates in [[0.3; 8], [0.3, 0.2, 0.25, 0.1, 0.4, 0.4, 0.05, 0.3]] {
        check_literal(So::default(), eigenvalue, Metric::Own, &rates, None)?;
        check_literal(So::default(), pi, Metric::Implied, &rates, None)?;
        check_literal(q(QSolve::Exact), pi, Metric::Implied, &rates, None)?;
        check_literal(q(QSolve::Factor), pi, Metric::Implied, &rates, None)?;
        check_literal(q(QSolve::Factor), eigenvalue, Metric::Implied, &rates, None)?;
        for (model_decay, steady) in [(0.7, false), (DECAY, false), (0.0, true), (0.8, true)] {
            let two = |model| TwoRate { model_decay, wake_decay: DECAY, model, steady };
            check_literal(two(Model::Linear), eigenvalue, Metric::Own, &rates, None)?;
            check_literal(two(Model::Linear), pi, Metric::Implied, &rates, None)?;
            check_literal(two(Model::Quadratic(QSolve::Exact)), pi, Metric::Implied, &rates, None)?;
            check_literal(two(Model::Quadratic(QSolve::Factor)), eigenvalue, Metric::Implied, &rates, None)?;
        }
    }
    Ok(())
}

/// The published carry keeps what is left of the gradient at the minimizer; a step that a clip has shortened ends elsewhere.
#[test]
fn a_clipped_step_needs_the_literal_carry() -> Result<()> {
    let (rates, metric) = ([0.3; 8], Metric::Implied);
    let pi = Damping::Pi(DAMPING);
    let q = || Q { wake_decay: None, solve: QSolve::Exact };
    for (carry, least, most) in [(Carry::Gradient, 0.05, 2.0), (Carry::Literal, 0.0, 1e-10)] {
        let clip = Some((1e-3, carry));
        let two = |model| TwoRate { model_decay: 0.7, wake_decay: DECAY, model, steady: true };
        let off = [
            check_literal(So::default(), pi, metric, &rates, clip)?,
            check_literal(q(), pi, metric, &rates, clip)?,
            check_literal(two(Model::Linear), pi, metric, &rates, clip)?,
            check_literal(two(Model::Quadratic(QSolve::Exact)), pi, metric, &rates, clip)?,
        ];
        assert!(off.iter().all(|off| (least..most).contains(off)), "{carry:?}: directions off by {off:?}");
    }
    Ok(())
}

/// The documented recursion, dense, where the theory has no objective to offer: rates of the wake and of the averages apart,
/// and periods of more than one step. With a limit, the dense factors without what couples one run to another.
fn check_recursion(
    wake: impl Into<Wake> + Clone,
    damping: Damping,
    every: Every,
    (bias, limit): (Bias, FactorLimit),
) -> Result<()> {
    let wake = wake.into();
    let (net, likelihood) = (net(3)?, Likelihood::Categorical);
    let (model, rho) = (wake.model(), wake.wake_decay(DECAY).unwrap());
    let options = Params { every, bias, factor_limit: limit, ..params(&net, wake, damping) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    let blocks: Vec<String> = opt.block_names().iter().map(|b| b.to_string()).collect();
    let elements: Vec<_> = blocks.iter().map(|b| net.elements(b, 0, 1)).collect();
    let mut bars = vec![None; blocks.len()];
    let mut carries = vec![None; blocks.len()];
    let mut matrices = vec![Mat::zeros(0, 0); blocks.len()];
    let mut last_lr = 1.0;
    for block in opt.summary().blocks {
        let [_, out, columns] = block.dims;
        assert_eq!(block.runs, [run_of(out, limit), run_of(columns, limit)]);
        assert_eq!(block.ranks, [rank_of(out, limit), rank_of(columns, limit)]);
    }
    for k in 0..8 {
        let lr = 0.3 / (1.0 + k as f64);
        opt.set_learning_rate(lr);
        let x = random(20 + k as u64, &[7, 3])?;
        let z = (net.forward)(&x)?;
        let loss = mean_loss(likelihood, &z, &labels(30 + k as u64, 7, 2)?)?;
        let grads = loss.backward()?;
        let now = current(&net, &z, likelihood, bias)?;
        let before: Vec<_> = elements.iter().map(|e| values_at(e)).collect();
        opt.observe(&z, likelihood)?;
        opt.backward_step(&loss)?;
        for (i, elements) in elements.iter().enumerate() {
            let fresh = k % every.factors == 0;
            let bar =
                if fresh { average(bars[i].as_ref(), &now[i], DECAY) } else { bars[i].clone().unwrap() };
            let now = if fresh { &now[i] } else { &bar };
            let phase = k % every.inverses;
            if phase == 0 || (phase == 1 && model != Model::Linear) {
                matrices[i] = solved(model, &bar, now, lr, (damping, limit));
            }
            let g = column(elements, |var| grads.get(var).unwrap().clone());
            let wake_gradient = match &carries[i] {
                Some(carry) => &g - carry * (rho * last_lr / lr),
                None => g.clone(),
            };
            let step = solve(&matrices[i], &wake_gradient) * -lr;
            let what = format!("{model:?}, {damping:?}, {every:?}, {limit:?}, block {}, step {k}", blocks[i]);
            assert_same(&(values_at(elements) - &before[i]), &step, 1e-10, &what);
            let (a, f) = both_kept(now, limit);
            carries[i] = Some(if model == Model::Linear { g } else { g + kron(&a, &f) * step });
            bars[i] = Some(bar);
        }
        last_lr = lr;
    }
    Ok(())
}

#[test]
fn documented_recursion() -> Result<()> {
    let (eigenvalue, pi) = (Damping::Eigenvalue(DAMPING), Damping::Pi(DAMPING));
    for (factors, inverses) in [(1, 1), (2, 3), (3, 3), (2, 4)] {
        let every = Every { factors, inverses };
        for bias in [Bias::Folded, Bias::Split] {
            for (wake_decay, limit) in [
                (Some(0.7), FactorLimit::NONE),
                (None, FactorLimit::NONE),
                // The last runs are filled up, or not.
                (None, FactorLimit { rows: 3, beyond: Beyond::BlockDiagonal }),
                (None, FactorLimit { rows: 2, beyond: Beyond::BlockDiagonal }),
                (None, FactorLimit { rows: 4, beyond: Beyond::Diagonal }),
                (None, FactorLimit::DIAGONAL),
                (None, FactorLimit { rows: 3, beyond: Beyond::LowRank { rank: 2 } }),
                (None, FactorLimit { rows: 2, beyond: Beyond::LowRank { rank: 1 } }),
            ] {
                let how = (bias, limit);
                check_recursion(So { wake_decay }, eigenvalue, every, how)?;
                check_recursion(So { wake_decay }, pi, every, how)?;
                check_recursion(Q { wake_decay, solve: QSolve::Factor }, eigenvalue, every, how)?;
                check_recursion(Q { wake_decay, solve: QSolve::Exact }, pi, every, how)?;
            }
        }
    }
    Ok(())
}
