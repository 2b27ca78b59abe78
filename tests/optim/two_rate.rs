//! What surrounds the wake: the corners of the two-rate family, steps of fixed KL, damping from the factors, averaged parameters.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Damping, DampingKind, Relative};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    AdaptiveKl, Average, Carry, Decay, Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, QSolve,
    So, StepRule, TwoRate, Wake,
};
use kronwake::tape::{Fisher, Likelihood};

fn params(net: &Net, wake: impl Into<Wake> + Clone) -> Params {
    Params {
        lr: 0.1,
        step_rule: StepRule::LearningRate,
        damping: Damping::Eigenvalue(0.01),
        stat_decay: 0.5,
        every: Every { factors: 2, inverses: 3 },
        fisher: Fisher::Exact,
        kl_clip: None,
        early_refresh: false,
        average: None,
        orthogonal: None,
        ..Params::of(wake, &net.tape)
    }
}

/// The values after each of `steps` steps on the batches of [`small`].
fn trajectory(wake: impl Into<Wake> + Clone, rates: &[f64]) -> Result<Vec<Vec<Tensor>>> {
    let net = Net::of(DType::F64, 1, small)?;
    // Adam's rate follows the optimizer's, so its Var would tell two equivalent rates apart.
    let groups = Groups(vec![Group { frozen: true, ..Group::named("gain") }]);
    let mut opt = NaturalGradient::from_varmap(&net.varmap, Params { groups, ..params(&net, wake) })?;
    let mut values = vec![];
    for (k, &lr) in rates.iter().enumerate() {
        opt.set_learning_rate(lr);
        let (x, y) = small_batch(k as u64, 9, DType::F64)?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)?;
        values.push(net.values()?);
    }
    Ok(values)
}

fn assert_same_trajectory(found: &[Vec<Tensor>], expected: &[Vec<Tensor>], what: &str) {
    for (k, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (found, expected) in found.iter().zip(expected) {
            assert_close(found, expected, 1e-11, &format!("{what}, step {k}"));
        }
    }
}

#[test]
fn corners_are_the_known_methods() -> Result<()> {
    let (constant, falling) = ([0.1; 8], [0.2, 0.1, 0.15, 0.05, 0.2, 0.2, 0.1, 0.05]);
    for rates in [constant, falling] {
        let k_fac = trajectory(Wake::KFac, &rates)?;
        assert_same_trajectory(&trajectory(TwoRate::k_fac(), &rates)?, &k_fac, "K-FAC");
        let so = trajectory(So { wake_decay: Some(0.3) }, &rates)?;
        assert_same_trajectory(&trajectory(TwoRate::so(0.3), &rates)?, &so, "SO");
        let q = Q { wake_decay: Some(0.3), solve: QSolve::Factor };
        let q = trajectory(q, &rates)?;
        assert_same_trajectory(&trajectory(TwoRate::q(0.3, QSolve::Factor), &rates)?, &q, "Q");
    }
    // The two wakes cancel at a constant rate.
    let equal = TwoRate { model_decay: 0.6, wake_decay: 0.6, steady: false, ..TwoRate::default() };
    // All but the first step are those of a gradient weighted by 1 - rho.
    let from_second = |rate: f64| {
        let mut rates = [rate; 8];
        rates[0] = 0.1;
        rates
    };
    assert_same_trajectory(
        &trajectory(equal, &constant)?,
        &trajectory(Wake::KFac, &from_second(0.04))?,
        "equal rates",
    );
    Ok(())
}

/// Momentum filters on a linear layer whose Fisher matrix and inverse stay, from the gradients that they saw.
#[test]
fn momentum_corners_filter_the_gradients() -> Result<()> {
    let mu: f64 = 0.7;
    for nesterov in [false, true] {
        let wake = if nesterov { TwoRate::nesterov(mu) } else { TwoRate::k_fac_momentum(mu) };
        let net = linear(1)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, wake))?;
        let elements = net.elements("fc", 0, 1);
        let (x, mut mean) = (random(2, &[9, 4])?, None);
        for k in 0..8 {
            let z = (net.forward)(&x)?;
            let loss = mean_loss(Likelihood::Gaussian, &z, &random(10 + k, &[9, 3])?)?;
            let grads = loss.backward()?;
            let g = column(&elements, |var| grads.get(var).unwrap().clone());
            opt.observe(&z, Likelihood::Gaussian)?;
            let before = values_at(&elements);
            opt.backward_step(&loss)?;
            let last = mean.clone();
            let next = match &last {
                None => g.clone(),
                Some(last) => &g * (1.0 - mu) + last * mu,
            };
            let filtered = match &last {
                Some(last) if nesterov => &g * (1.0 - mu * mu) + last * (mu * mu),
                // The first average is the first gradient, whole: there is nothing to look back at.
                None if nesterov => &g * (1.0 + mu),
                _ => next.clone(),
            };
            let (a, f) = opt.factors("fc").unwrap();
            let matrix = kron(&of_group(&a, 0), &of_group(&f, 0)) + eye(elements.len()) * 0.01;
            let expected = solve(&matrix, &filtered) * -0.1;
            assert_same(&(values_at(&elements) - before), &expected, 1e-10, &format!("{nesterov}, step {k}"));
            mean = Some(next);
        }
    }
    Ok(())
}

/// A linear layer, whose Fisher matrix for the Gaussian likelihood is `A (x) I` exactly.
fn linear(seed: u64) -> Result<Net> {
    Net::of(DType::F64, seed, |vb: VarBuilder| {
        let fc = nn::linear(4, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x| fc.forward(x)))
    })
}

/// One step on a linear regression; the mean KL divergence between the models before and after.
fn step(net: &Net, opt: &mut NaturalGradient, x: &Tensor, y: &Tensor) -> Result<f64> {
    let z = (net.forward)(x)?;
    opt.observe(&z, Likelihood::Gaussian)?;
    opt.backward_step(&mean_loss(Likelihood::Gaussian, &z, y)?)?;
    // Between normals of unit variance: half the squared distance of their means.
    let moved = ((net.forward)(x)?.detach() - z.detach())?;
    Ok(flat(&moved.sqr()?.sum_all()?)[0] / (2 * x.dim(0)?) as f64)
}

fn check_target(wake: impl Into<Wake> + Clone) -> Result<()> {
    let (net, target) = (linear(3)?, 0.003);
    let tiny = Damping::Eigenvalue(1e-9);
    let options = Params { damping: tiny, ..params(&net, wake).fixed_kl(target) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    let x = random(4, &[9, 4])?;
    for (k, part) in [1.0, 0.5, 1.0, 0.1, 0.7].into_iter().enumerate() {
        opt.set_learning_rate(part);
        let kl = step(&net, &mut opt, &x, &(random(20 + k as u64, &[9, 3])? * 3.0)?)?;
        let share = kl / (target * part * part);
        assert!((share - 1.0).abs() < 1e-6, "{}, step {k}: {share} of the target", opt.params().wake.name());
    }
    Ok(())
}

#[test]
fn the_divergence_is_the_target() -> Result<()> {
    check_target(Wake::KFac)?;
    check_target(So { wake_decay: Some(0.3) })?;
    check_target(Q { wake_decay: Some(0.3), solve: QSolve::Factor })?;
    check_target(TwoRate::default())?;
    check_target(TwoRate::nesterov(0.9))
}

/// The length follows the slopes before and after each step, as documented, for steps of any kind.
#[test]
fn the_length_follows_the_slopes() -> Result<()> {
    let rule = AdaptiveKl { initial: 0.02, slope: 0.6, noise: 500.0, pace: 0.5, longest: f64::INFINITY };
    for wake in [TwoRate::default(), TwoRate::q(0.3, QSolve::Factor)] {
        let net = Net::of(DType::F64, 1, small)?;
        let groups = Groups(vec![Group { frozen: true, ..Group::named("gain") }]);
        let options = Params { groups, ..params(&net, wake).adaptive_kl(rule) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        // Nine loss terms.
        let first = rule.initial * (9.0 / AdaptiveKl::TERMS).sqrt();
        let share = 9.0 / (9.0 + rule.noise);
        let (mut after, mut before, mut target) = (0.0, 0.0, first);
        let mut last: Option<(Vec<f64>, f64)> = None;
        for k in 0..9 {
            let part = [1.0, 0.5, 0.8][k % 3];
            opt.set_learning_rate(part);
            let (x, y) = small_batch(k as u64, 9, DType::F64)?;
            let z = (net.forward)(&x)?;
            let loss = mean_loss(Likelihood::Categorical, &z, &y)?;
            let grads = loss.backward()?;
            let all = |of: &dyn Fn(&str) -> Tensor| -> Vec<f64> {
                net.names().iter().filter(|n| *n != "gain").flat_map(|n| flat(&of(n))).collect()
            };
            let g = all(&|name| grads.get(&net.var(name)).unwrap().clone());
            let value = || all(&|name| net.var(name).as_detached_tensor());
            let start = value();
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&loss)?;
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            if let Some((step, slope)) = &last {
                after = 0.95 * after + 0.05 * dot(step, &g);
                before = 0.95 * before + 0.05 * slope;
                let quotient: f64 = after / before;
                target *= (2.0 * rule.pace * (rule.slope * share * part - quotient.clamp(-1.0, 1.0))).exp();
            }
            let found = opt.kl_target().unwrap();
            assert!((found / target - 1.0).abs() < 1e-9, "step {k}: target {found}, expected {target}");
            let step: Vec<f64> = value().iter().zip(&start).map(|(after, before)| after - before).collect();
            last = Some((step.clone(), dot(&step, &g).abs()));
        }
    }
    Ok(())
}

/// On a quadratic loss the quotient of slopes is the rate less the rate that lowers the loss most: exactly 1 without noise,
/// so a length that follows it ends at the full step and stays.
#[test]
fn without_noise_the_full_step_is_found() -> Result<()> {
    let net = linear(8)?;
    let rule = AdaptiveKl { initial: 1e-6, slope: 0.0, noise: 0.0, pace: 0.2, longest: 0.1 };
    let options = params(&net, Wake::KFac).adaptive_kl(rule);
    let options = Params { damping: Damping::Eigenvalue(1e-12), ..options };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    let (x, y) = (random(9, &[9, 4])?, random(10, &[9, 3])?);
    for _ in 0..60 {
        step(&net, &mut opt, &x, &y)?;
    }
    let slope = mean_loss(Likelihood::Gaussian, &(net.forward)(&x)?, &y)?.backward()?;
    for name in net.names() {
        let left = flat(slope.get(&net.var(&name)).unwrap()).iter().fold(0.0f64, |m, v| m.max(v.abs()));
        assert!(left < 1e-6, "{name}: {left}");
    }
    Ok(())
}

#[test]
fn early_refreshes_come_at_powers_of_two() -> Result<()> {
    for early_refresh in [false, true] {
        let net = linear(11)?;
        let every = Every { factors: 6, inverses: 9 };
        let options = Params { every, early_refresh, ..params(&net, Wake::KFac) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        for k in 0..20 {
            let expected = k % 6 == 0 || (early_refresh && [1, 2, 4].contains(&k));
            assert_eq!(opt.curvature_due(), expected, "step {k}");
            let before = opt.factors("fc").map(|(a, _)| flat(&a));
            step(&net, &mut opt, &random(100 + k, &[9, 4])?, &random(200 + k, &[9, 3])?)?;
            let changed = before != opt.factors("fc").map(|(a, _)| flat(&a));
            assert_eq!(changed, expected, "step {k}");
        }
    }
    Ok(())
}

#[test]
fn the_summary_knows_the_bytes_of_all_state() -> Result<()> {
    fn check(wake: impl Into<Wake> + Clone, change: impl Fn(Params) -> Params) -> Result<()> {
        let net = Net::of(DType::F32, 1, small)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, change(params(&net, wake)))?;
        for k in 0..3 {
            let (x, y) = small_batch(k, 9, DType::F32)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)?;
        }
        // What the wake looks back at is the averaged models' gradient itself, but where it is taken literally.
        let shared = |name: &str| opt.params().carry == Carry::Gradient && name.ends_with("/mean");
        let (tensors, _) = saved(&opt)?;
        let state = tensors.iter().filter(|(name, _)| name.starts_with("kronwake/") && !shared(name));
        let bytes: usize = state.map(|(_, (_, _, bytes))| bytes.len()).sum();
        assert_eq!(opt.summary().bytes(), bytes, "{}", opt.params().wake.name());
        Ok(())
    }
    check(Wake::KFac, |p| Params { momentum: 0.5, ..p })?;
    check(Wake::KFac, |p| Params { ekfac: true, ..p })?;
    check(So::default(), |p| Params { average: Some(Average::default()), ..p })?;
    check(TwoRate::default(), |p| p.adaptive_kl(AdaptiveKl::default()))?;
    check(TwoRate::default(), |p| Params { carry: Carry::Literal, ..p })?;
    check(TwoRate { model_decay: 0.5, ..TwoRate::q(0.3, QSolve::Factor) }, |p| p)
}

/// With room to spare a step is the full one: from anywhere to the least-squares solution, ridge where there is decay.
#[test]
fn a_long_step_ends_at_the_minimum() -> Result<()> {
    for (decay, weight_decay) in [(Decay::AfterWake, 0.3), (Decay::Loss, 0.3), (Decay::AfterWake, 0.0)] {
        let net = linear(5)?;
        let options = params(&net, Wake::KFac).fixed_kl(1e9);
        let options = Params { damping: Damping::Eigenvalue(1e-12), decay, weight_decay, ..options };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let (x, y) = (random(6, &[9, 4])?, random(7, &[9, 3])?);
        step(&net, &mut opt, &x, &y)?;
        let loss = mean_loss(Likelihood::Gaussian, &(net.forward)(&x)?, &y)?;
        let grads = loss.backward()?;
        let elements = net.elements("fc", 0, 1);
        let slope =
            column(&elements, |var| grads.get(var).unwrap().clone()) + values_at(&elements) * weight_decay;
        assert!(slope.norm_max() < 1e-9, "{decay:?} {weight_decay}: {}", slope.norm_max());
    }
    Ok(())
}

#[test]
fn relative_damping_is_the_curvature_that_noise_meets() -> Result<()> {
    for kind in [DampingKind::Eigenvalue, DampingKind::Pi] {
        let net = Net::of(DType::F64, 1, small)?;
        let damping = Damping::Relative(Relative { kind, fraction: 0.05 });
        let mut opt = NaturalGradient::from_varmap(
            &net.varmap,
            Params { damping, ..params(&net, TwoRate::default()) },
        )?;
        assert_eq!(opt.damping(), 0.0);
        let mut last = 0.0;
        for k in 0..7 {
            let (x, y) = small_batch(k, 9, DType::F64)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)?;
            if k % 3 == 0 {
                let (mut squares, mut trace) = (0.0, 0.0);
                for block in opt.block_names() {
                    let (a, g) = opt.factors(block).unwrap();
                    let f = kron(&of_group(&a, 0), &of_group(&g, 0));
                    squares += f.norm_l2().powi(2);
                    trace += f.diagonal().column_vector().sum();
                }
                last = 0.05 * squares / trace;
            }
            assert!((opt.damping() / last - 1.0).abs() < 1e-12, "step {k}: {} {last}", opt.damping());
        }
    }
    Ok(())
}

#[test]
fn averages_are_weighted_by_a_power_of_the_step() -> Result<()> {
    for dtype in [DType::F64, DType::BF16] {
        let net = Net::of(dtype, 1, small)?;
        let average = Some(Average { power: 2.0 });
        let mut opt = NaturalGradient::from_varmap(
            &net.varmap,
            Params { average, ..params(&net, TwoRate::default()) },
        )?;
        assert!(opt.averages().is_empty());
        let mut seen: Vec<Vec<Tensor>> = vec![];
        for k in 0..6 {
            let (x, y) = small_batch(k, 9, dtype)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&mean_loss(Likelihood::Categorical, &z.to_dtype(DType::F64)?, &y)?)?;
            seen.push(net.values()?);
        }
        // The recursion's weights for power 2 are i (i + 1).
        let weight = |i: usize| ((i + 1) * (i + 2)) as f64;
        let total: f64 = (0..seen.len()).map(weight).sum();
        let mut expected = vec![];
        for at in 0..seen[0].len() {
            let mut sum = seen[0][at].zeros_like()?.to_dtype(DType::F64)?;
            for (i, values) in seen.iter().enumerate() {
                sum = (sum + (values[at].to_dtype(DType::F64)? * (weight(i) / total))?)?;
            }
            expected.push(sum);
        }
        // A bf16 Var is its f32 master rounded to 8 bits.
        let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-2 };
        for ((name, found), expected) in opt.averages().iter().zip(&expected) {
            assert_close(found, expected, tolerance, &format!("{dtype:?} {name}"));
        }
        let stepped = net.values()?;
        let shown = opt.at_average(|| net.values())?;
        for (shown, expected) in shown.iter().zip(&expected) {
            assert_close(shown, expected, 1e-2, "shown");
        }
        assert_says(opt.at_average(|| -> Result<()> { candle_core::bail!("broken") }), &["broken"]);
        for (now, stepped) in net.values()?.iter().zip(&stepped) {
            assert_close(now, stepped, 0.0, "put back");
        }
        opt.adopt_average()?;
        for (now, expected) in net.values()?.iter().zip(&expected) {
            assert_close(now, expected, 1e-2, "adopted");
        }
    }
    Ok(())
}

#[test]
fn without_averages_the_parameters_stand() -> Result<()> {
    let net = linear(1)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, Wake::KFac))?;
    let x = random(1, &[2, 4])?;
    let (before, shown) = ((net.forward)(&x)?, opt.at_average(|| (net.forward)(&x))?);
    assert_close(&shown, &before, 0.0, "no average");
    step(&net, &mut opt, &x, &Tensor::zeros((2, 3), DType::F64, &Device::Cpu)?)?;
    assert!(opt.averages().is_empty());
    Ok(())
}
