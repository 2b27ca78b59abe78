//! Orthogonal directions against singular value decompositions, and what follows their length.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use faer::Mat;
use kronwake::curvature::{Beyond, Damping, FactorLimit};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{
    AdaptiveKl, Every, FallbackRate, Group, Groups, NaturalGradient, Optimizer, Orthogonal, Params, StepRule,
    TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};

const DAMPING: f64 = 0.01;
const LONG: AdaptiveKl = AdaptiveKl { initial: 1e4, slope: 0.6, noise: 0.0, pace: 0.05, longest: 0.03 };

fn params(net: &Net, wake: impl Into<Wake>) -> Params {
    Params {
        damping: Damping::Eigenvalue(DAMPING),
        every: Every { factors: 1, inverses: 1 },
        early_refresh: false,
        fisher: Fisher::Exact,
        average: None,
        // So many are exact.
        orthogonal: Some(Orthogonal::Polynomials { iterations: 30 }),
        ..Params::of(wake, &net.tape)
    }
}

/// `0.18 sqrt(max) U V^T` of the matrix whose columns lie one after the other in `v`, of parts of at most `side` rows or columns.
fn orthogonal(v: &Mat<f64>, rows: usize, side: usize) -> Mat<f64> {
    let columns = v.nrows() / rows;
    let matrix = Mat::from_fn(rows, columns, |i, j| v[(j * rows + i, 0)]);
    let tall = rows > columns;
    let wide = if tall { matrix.transpose().to_owned() } else { matrix };
    let mut nearest = Mat::<f64>::zeros(wide.nrows(), wide.ncols());
    let each = wide.nrows().div_ceil(wide.nrows().div_ceil(side));
    for from in (0..wide.nrows()).step_by(each) {
        let len = each.min(wide.nrows() - from);
        let svd = wide.subrows(from, len).thin_svd().unwrap();
        let part = svd.U() * svd.V().transpose() * (0.18 * (rows.max(columns) as f64).sqrt());
        nearest.subrows_mut(from, len).copy_from(&part);
    }
    let nearest = if tall { nearest.transpose().to_owned() } else { nearest };
    Mat::from_fn(v.nrows(), 1, |i, _| nearest[(i % rows, i / rows)])
}

/// A step of the layer `fc` on `x` and random targets: its gradient, and how far its elements went.
fn gradient_and_step(
    net: &Net,
    opt: &mut NaturalGradient,
    x: &Tensor,
    k: u64,
) -> Result<(Mat<f64>, Mat<f64>)> {
    let elements = net.elements("fc", 0, 1);
    let z = (net.forward)(x)?;
    let grads = mean_loss(Likelihood::Gaussian, &z, &random(10 + k, &[9, 3])?)?.backward()?;
    let g = column(&elements, |var| grads.get(var).unwrap().clone());
    let before = values_at(&elements);
    opt.observe(&z, Likelihood::Gaussian)?;
    opt.step(&grads)?;
    Ok((g, values_at(&elements) - &before))
}

#[test]
fn steps_are_the_natural_ones_made_orthogonal() -> Result<()> {
    // So many are exact, but for singular values below a fiftieth of the largest, which these directions do not have.
    steps_are_orthogonal(Orthogonal::Polynomials { iterations: 30 }, (4, 256), 1e-9)?;
    steps_are_orthogonal(Orthogonal::Rational { terms: 8 }, (4, 256), 1e-5)?;
    steps_are_orthogonal(Orthogonal::ByDevice, (4, 256), 0.05)
}

/// Two outputs and one; of a tall matrix the input and the bias.
#[test]
fn large_directions_are_made_orthogonal_in_parts() -> Result<()> {
    for sizes in [(4, 2), (4, 1), (1, 1)] {
        steps_are_orthogonal(Orthogonal::Polynomials { iterations: 30 }, sizes, 1e-9)?;
        steps_are_orthogonal(Orthogonal::Rational { terms: 8 }, sizes, 1e-5)?;
    }
    Ok(())
}

/// Of a layer of three outputs, the whole or in parts of a longest side.
fn steps_are_orthogonal(by: Orthogonal, (inputs, side): (usize, usize), tolerance: f64) -> Result<()> {
    let learning_rate = StepRule::LearningRate;
    let fixed = StepRule::FixedKl { target: 0.004 };
    for (wake, rule, lr, inverses) in [
        (Wake::KFac, learning_rate, 0.3, 1),
        (TwoRate::default().into(), learning_rate, 0.3, 1),
        (TwoRate::default().into(), fixed, 0.7, 1),
        // Its inverse is an older one than the average that measures it.
        (TwoRate::default().into(), fixed, 0.7, 3),
        // So long that the longest step decides.
        (TwoRate::default().into(), StepRule::AdaptiveKl(LONG), 0.7, 1),
    ] {
        let net = Net::of(DType::F64, 3, |vb: VarBuilder| {
            let fc = nn::linear(inputs, 3, vb.pp("fc"))?;
            Ok(Box::new(move |x| fc.forward(x)))
        })?;
        let lr_scale = if matches!(rule, StepRule::AdaptiveKl(_)) { 2.0 } else { 1.0 };
        let groups = Groups(vec![Group { lr_scale, ..Group::named("*") }]);
        let every = Every { factors: 1, inverses };
        let options =
            Params { lr, step_rule: rule, kl_clip: None, groups, every, ..params(&net, wake.clone()) };
        let options = Params { orthogonal: Some(by), orthogonal_side: side, ..options };
        let (models, distances) = (wake.model_decay(), wake.wake_decay(options.stat_decay).unwrap_or(0.0));
        let scale = wake.rate_scale();
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let elements = net.elements("fc", 0, 1);
        let mut mean: Option<Mat<f64>> = None;
        let mut inverted = Mat::zeros(0, 0);
        for k in 0..6 {
            let (g, taken) = gradient_and_step(&net, &mut opt, &random(20 + k, &[9, inputs])?, k)?;
            let model = mean.as_ref().map_or(g.clone(), |mean| &g * (1.0 - models) + mean * models);
            let wake = mean.as_ref().map_or(model.clone(), |mean| &model - mean * distances);
            mean = Some(model);
            let (a, f) = opt.factors("fc").unwrap();
            let metric = kron(&of_group(&a, 0), &of_group(&f, 0)) + eye(elements.len()) * DAMPING;
            if k % inverses as u64 == 0 {
                inverted = metric.clone();
            }
            let direction = orthogonal(&solve(&inverted, &wake), 3, side);
            let squared = lr_scale.powi(2) * (direction.transpose() * &metric * &direction)[(0, 0)];
            let rate = match rule {
                StepRule::LearningRate => lr * scale,
                StepRule::FixedKl { target } => lr * (2.0 * target / squared).sqrt(),
                // Of the inputs and the bias.
                StepRule::AdaptiveKl(AdaptiveKl { longest, .. }) => {
                    let rate = longest / (0.18 * lr_scale * ((inputs + 1) as f64).sqrt());
                    let (kept, bound) = (opt.kl_target().unwrap(), 0.5 * (2.0 * rate).powi(2) * squared);
                    assert!(kept <= bound * (1.0 + tolerance), "step {k}: {kept} kept, {bound}");
                    assert!(k > 0 || kept >= bound * (1.0 - tolerance), "{kept} kept, {bound}");
                    lr * rate
                }
            };
            assert_same(
                &taken,
                &(&direction * -(rate * lr_scale)),
                tolerance,
                &format!("{by:?}, {}, {rule:?}, step {k}", opt.params().wake.name()),
            );
        }
    }
    Ok(())
}

/// Groups, factors in runs that do not fill up and diagonal ones: an eigenvalue floor that no eigenvalue is near makes the directions
/// outside of the eigenvectors, and measures them by products with the factors.
#[test]
fn directions_among_eigenvectors_are_those_outside_of_them() -> Result<()> {
    let run = |beyond_rows: usize, eigenvalue_floor: f64| -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let net = Net::of(DType::F64, 5, |vb: VarBuilder| {
            let grouped = nn::Conv2dConfig { groups: 2, ..Default::default() };
            let (conv, fc) = (nn::conv2d(2, 4, 2, grouped, vb.pp("conv"))?, nn::linear(16, 7, vb.pp("fc"))?);
            let head = nn::linear(7, 3, vb.pp("head"))?;
            Ok(Box::new(move |x| {
                head.forward(&fc.forward(&conv.forward(x)?.tanh()?.flatten_from(1)?)?.tanh()?)
            }))
        })?;
        let options = Params {
            lr: 0.7,
            step_rule: StepRule::FixedKl { target: 0.004 },
            kl_clip: None,
            eigenvalue_floor,
            factor_limit: FactorLimit { rows: beyond_rows, beyond: Beyond::BlockDiagonal },
            ..params(&net, TwoRate::default())
        };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let start = net.values()?;
        for k in 0..4 {
            let z = (net.forward)(&random(40 + k, &[9, 2, 3, 3])?)?;
            let loss = mean_loss(Likelihood::Gaussian, &z, &random(50 + k, &[9, 3])?)?;
            opt.observe(&z, Likelihood::Gaussian)?;
            opt.backward_step(&loss)?;
        }
        Ok((start, net.values()?))
    };
    let largest = |difference: Tensor| difference.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    for rows in [1, 3, usize::MAX] {
        let ((start, inside), (_, outside)) = (run(rows, 0.0)?, run(rows, 1e-300)?);
        for ((start, inside), outside) in start.iter().zip(&inside).zip(&outside) {
            let (moved, apart) = (largest((inside - start)?)?, largest((inside - outside)?)?);
            assert!(moved > 1e-3 && apart < 1e-9 * moved, "runs of {rows}: {apart:e} apart after {moved:e}");
        }
    }
    Ok(())
}

/// One input with a deviation of about 100, one of 300 and more, and one that is hardly there among ordinary ones: the directions, their damping
/// and their length are those of a layer `W' S [x; 1]` that sees standard ones.
#[test]
fn inputs_far_from_standard_are_seen_as_standard() -> Result<()> {
    let learning_rate = StepRule::LearningRate;
    for rule in [learning_rate, StepRule::FixedKl { target: 0.004 }] {
        let net = Net::of(DType::F64, 3, |vb: VarBuilder| {
            let fc = nn::linear(4, 3, vb.pp("fc"))?;
            Ok(Box::new(move |x| fc.forward(x)))
        })?;
        let options = Params { lr: 0.1, step_rule: rule, kl_clip: None, ..params(&net, Wake::KFac) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let elements = net.elements("fc", 0, 1);
        let far = |x: Tensor| -> Result<Tensor> {
            let scale = Tensor::new(&[[1.0, 150.0, 15.0, 1e-3]], &Device::Cpu)?;
            let shift = Tensor::new(&[[0.0, 0.0, 300.0, 0.0]], &Device::Cpu)?;
            x.broadcast_mul(&scale)?.broadcast_add(&shift)
        };
        for k in 0..4 {
            let (g, taken) = gradient_and_step(&net, &mut opt, &far(random(20 + k, &[9, 4])?)?, k)?;
            let (a, f) = opt.factors("fc").unwrap();
            let (a, f) = (of_group(&a, 0), of_group(&f, 0));
            let (mean, square) = (|j: usize| a[(j, 4)], |j: usize| a[(j, j)]);
            assert!(square(1) > 100.0 && mean(2) > 200.0 && square(3) < 1e-5);
            let means = [0.0, 0.0, mean(2), 0.0];
            let variances = [1.0, square(1), square(2) - mean(2).powi(2), 1.0];
            let s = Mat::from_fn(5, 5, |i, j| match (i, j) {
                (4, _) => f64::from(j == 4),
                (_, 4) => -means[i] / (variances[i] / 10.0).sqrt().max(1.0),
                (i, j) if i == j => 1.0 / (variances[i] / 10.0).sqrt().max(1.0),
                _ => 0.0,
            });
            // A matrix by columns times `S^T`, which a gradient is multiplied with; and times `S`.
            let gradient = kron(&s, &eye(3)) * &g;
            let metric = kron(&(&s * &a * s.transpose()), &f) + eye(elements.len()) * DAMPING;
            let direction = orthogonal(&solve(&metric, &gradient), 3, 256);
            let squared = (direction.transpose() * &metric * &direction)[(0, 0)];
            let rate = match rule {
                StepRule::FixedKl { target } => 0.1 * (2.0 * target / squared).sqrt(),
                _ => 0.1,
            };
            let direction = kron(&s.transpose().to_owned(), &eye(3)) * direction;
            assert_same(&taken, &(&direction * -rate), 1e-8, &format!("{rule:?}, step {k}"));
        }
    }
    Ok(())
}

/// Adam's first step is as long as its rate.
#[test]
fn the_rest_steps_at_the_same_rate() -> Result<()> {
    let moved = |step_rule: StepRule, lr: f64, fallback_rate: FallbackRate| -> Result<f64> {
        let net = Net::of(DType::F64, 1, small)?;
        let wake = Wake::KFac;
        let options = Params { step_rule, lr, kl_clip: None, fallback_rate, ..params(&net, wake) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let before = flat(&net.var("gain"))[0];
        let (x, y) = small_batch(1, 9, DType::F64)?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)?;
        Ok((flat(&net.var("gain"))[0] - before).abs())
    };
    let close =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    let own = Params::k_fac(&Tape::new()).fallback_adam.lr;
    close(moved(StepRule::LearningRate, 0.3, FallbackRate::Own)?, own);
    close(moved(StepRule::LearningRate, 0.3, FallbackRate::OfStep(2.0))?, 0.6);
    assert_eq!(moved(StepRule::LearningRate, 0.0, FallbackRate::OfStep(2.0))?, 0.0);
    // The rate of a divergence is as its root.
    let of = |target, share| moved(StepRule::FixedKl { target }, 1.0, FallbackRate::OfStep(share));
    close(of(0.004, 2.0)?, 2.0 * of(0.001, 2.0)?);
    close(of(0.004, 2.0)?, 4.0 * of(0.004, 0.5)?);
    Ok(())
}

#[test]
fn tables_are_left_to_adam_unless_asked_for() -> Result<()> {
    let kronecker = Group { rule: Some(UpdateRule::Kronecker), ..Group::named("words.weight") };
    for (orthogonal, groups, expected) in [
        (Some(Orthogonal::default()), Groups::default(), "adam"),
        (Some(Orthogonal::default()), Groups(vec![kronecker]), "words"),
        (None, Groups::default(), "words"),
    ] {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (words, fc) =
            tape.build(|| Ok((nn::embedding(7, 4, vb.pp("words"))?, nn::linear(4, 3, vb.pp("fc"))?)))?;
        let params = Params { orthogonal, groups, ..Params::kld_wrm(&tape) };
        let mut opt = NaturalGradient::from_varmap(&vars, params)?;
        let rows = opt.summary().rows;
        let found = rows.iter().find(|row| row.var == "words.weight").map(|row| row.rule.as_str());
        assert_eq!(found, Some(expected));
        let before = flat(words.embeddings());
        let ids = Tensor::new(&[1u32, 2, 2, 6], &Device::Cpu)?;
        for _ in 0..3 {
            let z = fc.forward(&words.forward(&ids)?)?;
            opt.observe(&z, Likelihood::Categorical)?;
            let y = Tensor::new(&[0u32, 1, 1, 2], &Device::Cpu)?;
            opt.backward_step(&nn::loss::cross_entropy(&z, &y)?)?;
        }
        let after = flat(words.embeddings());
        let moved: Vec<bool> =
            before.chunks(4).zip(after.chunks(4)).map(|(before, after)| before != after).collect();
        assert_eq!(moved, [false, true, true, false, false, false, true], "{expected}");
    }
    Ok(())
}

#[test]
fn senseless_options_are_refused() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    for (by, found) in [
        (Orthogonal::Polynomials { iterations: 0 }, ["iteration", "got 0"]),
        (Orthogonal::Rational { terms: 0 }, ["1 to 8 terms", "got 0"]),
        (Orthogonal::Rational { terms: 9 }, ["1 to 8 terms", "got 9"]),
    ] {
        let options = Params { orthogonal: Some(by), ..params(&net, Wake::KFac) };
        assert_says(NaturalGradient::from_varmap(&net.varmap, options), &["kfac", found[0], found[1]]);
    }
    let none = Params { orthogonal_side: 0, ..params(&net, Wake::KFac) };
    assert_says(NaturalGradient::from_varmap(&net.varmap, none), &["kfac", "orthogonal_side", "got 0"]);
    let negative = Params { fallback_rate: FallbackRate::OfStep(-1.0), ..params(&net, Wake::KFac) };
    assert_says(NaturalGradient::from_varmap(&net.varmap, negative), &["kfac", "fallback_rate", "-1"]);
    Ok(())
}
