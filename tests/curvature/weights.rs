//! Weighted and ignored loss terms: the curvature is that of the very loss, by dense Fisher matrices, by duplicated examples and by hand.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use faer::Mat;
use kronwake::curvature::{Collect, Damping, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    Bias, Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, So, TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Head, Likelihood, Terms};

const CPU: &Device = &Device::Cpu;
const ALL: [Likelihood; 3] = [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian];

fn weights(values: &[f64]) -> Result<Tensor> {
    Tensor::new(values, CPU)
}

/// `sum_n w_n l_n / total`.
fn weighted_loss(likelihood: Likelihood, z: &Tensor, y: &Tensor, w: &Tensor, total: f64) -> Result<Tensor> {
    (term_losses(likelihood, z, y)? * w)?.sum_all()? / total
}

/// `sum_n w_n J_n^T H_n J_n / total` for the elements of a block.
fn dense(
    net: &Net,
    block: &str,
    likelihood: Likelihood,
    x: &Tensor,
    w: &[f64],
    total: f64,
) -> Result<Mat<f64>> {
    let elements = net.elements(block, 0, 1);
    let z = (net.forward)(x)?;
    let classes = z.elem_count() / w.len();
    let jacobian = jacobian(&elements, 0.1, &|| (net.forward)(x))?;
    let mut sum = Mat::zeros(elements.len(), elements.len());
    for (n, (z, w)) in flat(&z).chunks(classes).zip(w).enumerate() {
        let rows = jacobian.subrows(n * classes, classes);
        sum += rows.transpose() * hessian(likelihood, z) * rows * (*w / total);
    }
    Ok(sum)
}

fn deep_linear(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 2, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(x)?)))
}

fn mlp(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
}

/// A net of a position's own layers, with a term for every position.
fn positions_of_their_own(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 2, vb.pp("b"))?);
    Ok(Box::new(move |x| b.forward(&a.forward(&x.reshape((x.dim(0)?, 3, 3))?)?)))
}

/// Of deep linear nets with Gaussian outputs the weighted Fisher is a Kronecker product of the factors, in one batch and in two.
#[test]
fn factors_of_deep_linear_nets_are_the_dense_fisher() -> Result<()> {
    let w = [0.5, 3., 0., 1., 2.5, 0.25];
    for over in [None, Some(11.0)] {
        let terms = |w: &[f64]| -> Result<Terms> {
            let terms = Terms::weighted(&weights(w)?)?;
            Ok(over.map_or(terms.clone(), |total| terms.over(total / 2.0)))
        };
        let total = over.unwrap_or(w.iter().sum());
        let net = Net::of(DType::F64, 3, deep_linear)?;
        let x = random(5, &[6, 3])?;
        for parts in [&[(0, 6)][..], &[(0, 2), (2, 4)]] {
            // One call over half of the total would be twice the Fisher.
            let total = if parts.len() == 1 { over.map_or(total, |total| total / 2.0) } else { total };
            let mut kfac = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
            for &(from, n) in parts {
                let z = (net.forward)(&x.narrow(0, from, n)?)?;
                kfac.observe_weighted(&z, Likelihood::Gaussian, &terms(&w[from..from + n])?)?;
            }
            let z = (net.forward)(&x)?;
            kfac.backward_step(&z.sqr()?.sum_all()?)?;
            for block in ["a", "b"] {
                let (a, g) = kfac.factors(block).expect("observed");
                let found = kron(&of_group(&a, 0), &of_group(&g, 0));
                let expected = dense(&net, block, Likelihood::Gaussian, &x, &w, total)?;
                assert_same(&found, &expected, 1e-10, &format!("{block}, {over:?}, {parts:?}"));
            }
        }
    }
    Ok(())
}

#[test]
fn terms_of_positions_weigh_their_rows() -> Result<()> {
    let w = [0.5, 3., 0., 1., 2.5, 0.25];
    let net = Net::of(DType::F64, 3, positions_of_their_own)?;
    let x = random(5, &[2, 9])?;
    for fisher in [Fisher::Exact, Fisher::Empirical] {
        let mut kfac = observer(&net, fisher, Sharing::Expand, Bias::Folded)?;
        let z = (net.forward)(&x)?;
        let y = (z.detach() + random(8, &[2, 3, 2])?)?;
        let weights = weights(&w)?;
        kfac.observe_weighted(&z, Likelihood::Gaussian, &Terms::weighted(&weights.reshape((2, 3))?)?)?;
        kfac.backward_step(&weighted_loss(Likelihood::Gaussian, &z, &y, &weights, 7.25)?)?;
        let (a, g) = kfac.factors("b").expect("observed");
        if fisher == Fisher::Exact {
            for block in ["a", "b"] {
                let (a, g) = kfac.factors(block).expect("observed");
                let expected = dense(&net, block, Likelihood::Gaussian, &x, &w, 7.25)?;
                assert_same(&kron(&of_group(&a, 0), &of_group(&g, 0)), &expected, 1e-10, block);
            }
            continue;
        }
        let residuals = (&z - &y)?.reshape((6, 2))?;
        let scaled = residuals.broadcast_mul(&weights.unsqueeze(1)?)?;
        let expected = (residuals.t()?.matmul(&scaled)? / 7.25)?;
        assert_same(&of_group(&g, 0), &matrix(&expected), 1e-12, "G");
        // The same rows without the ignored one, as examples.
        let h = {
            let (w, b) = (net.var("a.weight"), net.var("a.bias"));
            x.reshape((6, 3))?.matmul(&w.t()?)?.broadcast_add(&b)?
        };
        let h = Tensor::cat(&[&h, &Tensor::ones((6, 1), DType::F64, CPU)?], 1)?;
        let expected = (h.t()?.matmul(&h.broadcast_mul(&weights.unsqueeze(1)?)?)? / 7.25)?;
        assert_same(&of_group(&a, 0), &matrix(&expected), 1e-12, "A");
    }
    Ok(())
}

/// One layer: `A` and `G` are the weighted means of `a a^T` and of the outputs' Fisher, whatever labels that is of.
#[test]
fn factors_of_one_layer() -> Result<()> {
    let net = Net::of(DType::F64, 2, |vb| {
        let layer = nn::linear(3, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    let (x, w) = (random(5, &[6, 3])?, [0.5, 3., 0., 1., 2.5, 0.25]);
    let (z, wt, total) = ((net.forward)(&x)?, weights(&w)?, 7.25);
    let rows = Tensor::cat(&[&x, &Tensor::ones((6, 1), DType::F64, CPU)?], 1)?;
    let mean = |rows: &Tensor| rows.t()?.matmul(&rows.broadcast_mul(&wt.unsqueeze(1)?)?)? / total;
    let a = matrix(&mean(&rows)?);
    let terms = Terms::weighted(&wt)?;
    for likelihood in ALL {
        let mut exact = Mat::<f64>::zeros(3, 3);
        for (z, w) in flat(&z).chunks(3).zip(w) {
            exact += hessian(likelihood, z) * (w / total);
        }
        let y = targets(9, likelihood, &z)?;
        let residuals = {
            let leaf = candle_core::Var::from_tensor(&z.detach())?;
            let grads = term_losses(likelihood, &leaf, &y)?.sum_all()?.backward()?;
            grads.get(&leaf).expect("a gradient").clone()
        };
        let empirical = matrix(&mean(&residuals)?);
        let junk = match likelihood {
            Likelihood::Categorical => {
                let mut y: Vec<i64> = y.to_dtype(DType::I64)?.to_vec1()?;
                y[2] = -100;
                Tensor::new(y, CPU)?
            }
            _ => {
                let mut y = flat(&y);
                y[7] = f64::NAN;
                Tensor::from_vec(y, (6, 3), CPU)?
            }
        };
        for (fisher, labels, expected, tolerance) in [
            (Fisher::Exact, None, &exact, 1e-12),
            (Fisher::Sampled { draws: 20_000, seed: 3 }, None, &exact, 0.02),
            (Fisher::Empirical, None, &empirical, 1e-12),
            // Labels make one pass, whatever the Fisher; the ignored one may be anything.
            (Fisher::Exact, Some(&junk), &empirical, 1e-12),
        ] {
            let what = format!("{likelihood:?}, {fisher:?}");
            let mut kfac = observer(&net, fisher, Sharing::Expand, Bias::Folded)?;
            let z = (net.forward)(&x)?;
            kfac.observe_heads(&[Head { labels, terms: terms.clone(), ..Head::new(&z, likelihood) }])?;
            kfac.backward_step(&weighted_loss(likelihood, &z, &y, &wt, total)?)?;
            let factors = kfac.factors("fc").expect("observed");
            assert_same(&of_group(&factors.0, 0), &a, 1e-12, &format!("A: {what}"));
            assert_same(&of_group(&factors.1, 0), expected, tolerance, &format!("G: {what}"));
        }
        let mut collect = Collect::new(&net.tape, likelihood, Fisher::Exact, Sharing::Reduce)?;
        collect.add_weighted(&(net.forward)(&x)?, None, &terms)?;
        let found = collect.finish()?.remove(0);
        assert_same(&of_group(&found.a, 0), &a, 1e-12, "A collected");
        assert_same(&of_group(&found.g, 0), &exact, 1e-12, "G collected");
    }
    Ok(())
}

/// By hand: 100 examples, 10 of them positive with the weight 30, outputs of 0. Newton's step of the difference is
/// `(300 - 90) / 2 / (390 / 4) = 1.0769`, whatever the loss is divided by; over the curvature of the plain mean it would be 4.2.
#[test]
fn rare_positives_take_newtons_step() -> Result<()> {
    for (likelihood, outputs) in [(Likelihood::Bernoulli, 1), (Likelihood::Categorical, 2)] {
        for total in [100.0, 390.0] {
            let net = Net::of(DType::F64, 1, |vb| {
                let layer = nn::linear_no_bias(1, outputs, vb.pp("fc"))?;
                Ok(Box::new(move |x| layer.forward(x)))
            })?;
            let var = net.var("fc.weight");
            var.set(&var.zeros_like()?)?;
            let (x, every) = (Tensor::ones((100, 1), DType::F64, CPU)?, Every { factors: 1, inverses: 1 });
            let positive: Vec<u32> = (0..100).map(|n| u32::from(n % 10 == 0)).collect();
            let y = Tensor::new(positive, CPU)?;
            let y = if outputs == 1 { y.unsqueeze(1)?.to_dtype(DType::F64)? } else { y };
            let terms = match likelihood {
                Likelihood::Categorical => Terms::of_classes(&y, &weights(&[1., 30.])?, None, 0.)?,
                _ => Terms::weighted(&((&y * 29.)? + 1.)?)?,
            };
            let terms = if total == 100.0 { terms.over(100.0) } else { terms };
            let z = (net.forward)(&x)?;
            assert!((terms.total(likelihood, &z)? - total).abs() < 1e-9);
            let params = Params {
                lr: 1.0,
                damping: Damping::Eigenvalue(1e-6),
                fisher: Fisher::Exact,
                kl_clip: None,
                every,
                ..Params::k_fac(&net.tape)
            };
            let mut kfac = NaturalGradient::from_varmap(&net.varmap, params)?;
            let w: Vec<f64> = (0..100).map(|n| if n % 10 == 0 { 30. } else { 1. }).collect();
            let loss = || weighted_loss(likelihood, &(net.forward)(&x)?, &y, &weights(&w)?, total);
            let before = flat(&loss()?)[0];
            kfac.observe_weighted(&z, likelihood, &terms)?;
            kfac.backward_step(&loss()?)?;
            let moved = flat(&var.as_detached_tensor());
            let difference = if outputs == 1 { moved[0] } else { moved[1] - moved[0] };
            assert!((difference - 14.0 / 13.0).abs() < 1e-4, "{likelihood:?} {difference}");
            let after = flat(&loss()?)[0];
            assert!(after < before, "{before} {after}");
        }
    }
    Ok(())
}

/// By hand: an ignored row adds nothing, where it used to add its own `diag(p) - p p^T`.
#[test]
fn an_ignored_row_adds_nothing() -> Result<()> {
    let net = Net::of(DType::F64, 1, |vb| {
        let layer = nn::linear_no_bias(3, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    let var = net.var("fc.weight");
    var.set(&Tensor::eye(3, DType::F64, CPU)?)?;
    // Sure of class 0, twice, and unsure between 0 and 1.
    let x = Tensor::new(&[[5., 0., 0.], [1., 1., -9.], [5., 0., 0.0f64]], CPU)?;
    let labels = Tensor::new(&[0i64, -100, 0], CPU)?;
    let p = softmax(&[5., 0., 0.]);
    let z = (net.forward)(&x)?;
    let mut kfac = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
    assert_says(kfac.observe_labels(&z, Likelihood::Categorical, &labels), &["-100", "loss term 1", "Terms"]);
    let terms = Terms::ignoring(&labels, -100)?;
    kfac.observe_weighted(&z, Likelihood::Categorical, &terms)?;
    kfac.backward_step(&z.sum_all()?)?;
    let (a, g) = kfac.factors("fc").expect("observed");
    let (a, g) = (of_group(&a, 0), of_group(&g, 0));
    // 0.00665, where a third row of about 1/4 would make it .087.
    assert!((g[(1, 1)] - p[1] * (1. - p[1])).abs() < 1e-15 && g[(1, 1)] < 0.0067, "{}", g[(1, 1)]);
    assert!((a[(0, 0)] - 25.0).abs() < 1e-13 && a[(1, 1)] == 0.0 && a[(2, 2)] == 0.0, "{a:?}");

    // The labels themselves: ranges are checked before anything is computed.
    let last = |label: i64| Tensor::new(&[0i64, 1, label], CPU);
    let before = kfac.factors("fc").expect("observed");
    for (labels, part) in [
        (last(3)?, "label 3 of loss term 2"),
        (last(-1)?, "label -1"),
        (Tensor::new(&[0, u32::MAX, 1], CPU)?, "4294967295"),
        (Tensor::new(&[[0u32, 1, 1]], CPU)?, "[1, 3]"),
    ] {
        let z = (net.forward)(&x)?;
        assert_says(kfac.observe_labels(&z, Likelihood::Categorical, &labels), &[part]);
        assert_says(
            Collect::new(&net.tape, Likelihood::Categorical, Fisher::Empirical, Sharing::Expand)?
                .add(&z, Some(&labels)),
            &[part],
        );
    }
    assert_same(&of_group(&kfac.factors("fc").expect("kept").1, 0), &of_group(&before.1, 0), 0.0, "G");
    Ok(())
}

/// A term of the weight 2 is two terms, one of weight 0 is none: for every optimizer, over several steps.
fn weights_are_copies(
    what: &str,
    fisher: Fisher,
    wake: impl Into<Wake> + Clone,
    change: impl Fn(Params) -> Params,
) -> Result<()> {
    let copies = [2usize, 0, 1, 3, 0, 1, 1, 2];
    for build in [small as fn(VarBuilder) -> Result<Forward>, |vb| {
        let net = mlp(vb)?;
        Ok(Box::new(move |x: &Tensor| net(&x.flatten_from(1)?.narrow(1, 0, 3)?)))
    }] {
        let (weighted, copied) = (Net::of(DType::F64, 1, build)?, Net::of(DType::F64, 1, build)?);
        let optimizer = |net: &Net| {
            let every = Every { factors: 2, inverses: 2 };
            let params = Params { every, fisher, ..Params::of(wake.clone(), &net.tape) };
            NaturalGradient::from_varmap(&net.varmap, change(params))
        };
        let (mut once, mut often) = (optimizer(&weighted)?, optimizer(&copied)?);
        for k in 0..5 {
            let (x, y) = small_batch(k, 8, DType::F64)?;
            let w: Vec<f64> = copies.iter().map(|&n| n as f64 / 2.0).collect();
            let rows: Vec<u32> =
                copies.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n)).collect();
            let rows = Tensor::new(rows, CPU)?;
            let z = (weighted.forward)(&x)?;
            once.observe_weighted(&z, Likelihood::Categorical, &Terms::weighted(&weights(&w)?)?)?;
            once.backward_step(&weighted_loss(Likelihood::Categorical, &z, &y, &weights(&w)?, 5.0)?)?;
            let z = (copied.forward)(&x.index_select(&rows, 0)?)?;
            often.observe(&z, Likelihood::Categorical)?;
            often.backward_step(&mean_loss(Likelihood::Categorical, &z, &y.index_select(&rows, 0)?)?)?;
            let what = format!("{}, {what}, {fisher:?}, step {k}", once.params().wake.name());
            let pairs = weighted.values()?.into_iter().zip(copied.values()?);
            for (name, (found, expected)) in weighted.names().iter().zip(pairs) {
                assert_close(&found, &expected, 1e-9, &format!("{what}: {name}"));
            }
        }
    }
    Ok(())
}

#[test]
fn weights_are_copies_of_examples() -> Result<()> {
    for fisher in [Fisher::Exact, Fisher::Empirical] {
        weights_are_copies("plain", fisher, Wake::KFac, |params| params)?;
        weights_are_copies("reduce, split", fisher, Wake::KFac, |params| Params {
            sharing: Sharing::Reduce,
            bias: Bias::Split,
            ..params
        })?;
        weights_are_copies("ekfac", fisher, Wake::KFac, |params| Params {
            ekfac: true,
            damping: Damping::Eigenvalue(0.01),
            ..params
        })?;
        weights_are_copies("ekfac, split", fisher, So::default(), |params| Params {
            ekfac: true,
            bias: Bias::Split,
            ..params
        })?;
        weights_are_copies("plain", fisher, Q::default(), |params| params)?;
        // The length of a first step that finds its own depends on the number of terms, and copies are more of them.
        weights_are_copies("of fixed divergence", fisher, TwoRate::default(), |params| {
            params.fixed_kl(0.01)
        })?;
    }
    Ok(())
}

/// QE takes divergences of the same weights.
#[test]
fn the_exact_divergence_has_the_same_weights() -> Result<()> {
    let copies = [2usize, 0, 1, 3, 0, 1, 1, 2];
    let (weighted, copied) = (Net::of(DType::F64, 1, small)?, Net::of(DType::F64, 1, small)?);
    let optimizer = |net: &Net| {
        let every = Every { factors: 1, inverses: 1 };
        let params = Params { every, fisher: Fisher::Exact, ..Params::qe_kld_wrm(&net.tape) };
        NaturalGradient::from_varmap(&net.varmap, params)
    };
    let (mut once, mut often) = (optimizer(&weighted)?, optimizer(&copied)?);
    for k in 0..5 {
        let (x, y) = small_batch(k, 8, DType::F64)?;
        let w = weights(&copies.map(|n| n as f64 / 2.0))?;
        let rows = copies.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n));
        let rows = Tensor::new(rows.collect::<Vec<_>>(), CPU)?;
        let (likelihood, terms) = (Likelihood::Categorical, Terms::weighted(&w)?);
        let z = (weighted.forward)(&x)?;
        once.observe_weighted(&z, likelihood, &terms)?;
        let loss = weighted_loss(likelihood, &z, &y, &w, 5.0)?;
        once.step_with_weighted(&loss, likelihood, &terms, &mut || (weighted.forward)(&x))?;
        let (x, y) = (x.index_select(&rows, 0)?, y.index_select(&rows, 0)?);
        let z = (copied.forward)(&x)?;
        often.observe(&z, likelihood)?;
        let loss = mean_loss(likelihood, &z, &y)?;
        often.step_with(&loss, likelihood, &mut || (copied.forward)(&x))?;
        for (name, (found, expected)) in
            weighted.names().iter().zip(weighted.values()?.into_iter().zip(copied.values()?))
        {
            assert_close(&found, &expected, 1e-9, &format!("step {k}: {name}"));
        }
    }
    Ok(())
}

/// Micro-batches of weighted losses: their step is that of the weighted mean over their union, with the empirical Fisher too.
#[test]
fn micro_batches_add_up() -> Result<()> {
    let w = [0.5, 3., 0., 1., 2.5, 0.25, 0., 0., 1.5];
    for (fisher, ekfac) in [
        (Fisher::Exact, false),
        (Fisher::Empirical, false),
        (Fisher::Empirical, true),
        (Fisher::Sampled { draws: 3, seed: 1 }, true),
    ] {
        for over in [false, true] {
            let (whole, parts) = (Net::of(DType::F64, 1, small)?, Net::of(DType::F64, 1, small)?);
            let optimizer = |net: &Net| {
                let params = Params {
                    every: Every { factors: 2, inverses: 2 },
                    fisher,
                    ekfac,
                    damping: Damping::Eigenvalue(0.01),
                    ..Params::k_fac(&net.tape)
                };
                NaturalGradient::from_varmap(&net.varmap, params)
            };
            let (mut once, mut often) = (optimizer(&whole)?, optimizer(&parts)?);
            for k in 0..4 {
                let (x, y) = small_batch(k, 9, DType::F64)?;
                let step = |net: &Net,
                            opt: &mut NaturalGradient,
                            (from, n): (usize, usize)|
                 -> Result<(Tensor, f64)> {
                    let z = (net.forward)(&x.narrow(0, from, n)?)?;
                    let w = weights(&w[from..from + n])?;
                    let terms = Terms::weighted(&w)?;
                    let terms = if over { terms.over(n as f64) } else { terms };
                    opt.observe_weighted(&z, Likelihood::Categorical, &terms)?;
                    let total = terms.total(Likelihood::Categorical, &z)?;
                    let y = y.narrow(0, from, n)?;
                    Ok((weighted_loss(Likelihood::Categorical, &z, &y, &w, total)?, total))
                };
                let (loss, _) = step(&whole, &mut once, (0, 9))?;
                once.backward_step(&loss)?;
                // With a total of its own a micro-batch may be ignored as a whole.
                let split =
                    if over { [(0, 4), (4, 2), (6, 2), (8, 1)] } else { [(0, 2), (2, 2), (4, 1), (5, 4)] };
                for part in split {
                    let (loss, total) = step(&parts, &mut often, part)?;
                    often.accumulate_weighted(&loss, total)?;
                }
                often.step_accumulated()?;
                for (name, (found, expected)) in
                    whole.names().iter().zip(parts.values()?.into_iter().zip(whole.values()?))
                {
                    let what = format!("{fisher:?} {ekfac} {over}, step {k}: {name}");
                    assert_close(&found, &expected, 1e-10, &what);
                }
            }
        }
    }
    Ok(())
}

/// Heads: the sum of their losses has the sum of their Fishers; shown one after the other they have the mean.
#[test]
fn heads_add_up() -> Result<()> {
    let built = std::cell::OnceCell::new();
    let net = Net::of(DType::F64, 2, |vb| {
        let layers =
            (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 2, vb.pp("b"))?, nn::linear(4, 3, vb.pp("c"))?);
        built.set(layers.clone()).expect("once");
        let (trunk, first, second) = layers;
        Ok(Box::new(move |x| {
            let h = trunk.forward(x)?;
            Tensor::cat(&[&first.forward(&h)?, &second.forward(&h)?], 1)
        }))
    })?;
    let heads = |x: &Tensor| -> Result<(Tensor, Tensor)> {
        let (trunk, first, second) = built.get().expect("built");
        let h = trunk.forward(x)?;
        Ok((first.forward(&h)?, second.forward(&h)?))
    };
    let (x, w) = (random(4, &[5, 3])?, [1., 0., 2., 0.5, 1.5]);
    let (mut blocks, alpha) = (vec![], [0.5, 3.0]);
    for block in ["a", "b", "c"] {
        let elements = net.elements(block, 0, 1);
        let jacobian = jacobian(&elements, 0.1, &|| (net.forward)(&x))?;
        let of = |from: usize, count: usize, w: &[f64]| {
            let mut sum = Mat::<f64>::zeros(elements.len(), elements.len());
            for (n, w) in w.iter().enumerate() {
                let rows = jacobian.subrows(n * 5 + from, count);
                sum += rows.transpose() * rows * (*w / 5.0);
            }
            sum
        };
        blocks.push((block, of(0, 2, &w), of(2, 3, &[1.; 5])));
    }
    for sharing in [Sharing::Expand, Sharing::Reduce] {
        for summed in [true, false] {
            let mut kfac = observer(&net, Fisher::Exact, sharing, Bias::Folded)?;
            let (first, second) = heads(&x)?;
            let terms = Terms::weighted(&weights(&w)?)?;
            let shown = [
                Head { terms, weight: alpha[0], ..Head::new(&first, Likelihood::Gaussian) },
                Head { weight: alpha[1], ..Head::new(&second, Likelihood::Gaussian) },
            ];
            if summed {
                kfac.observe_heads(&shown)?;
            } else {
                kfac.observe_weighted(&first, Likelihood::Gaussian, &shown[0].terms)?;
                kfac.observe(&second, Likelihood::Gaussian)?;
            }
            kfac.backward_step(&(first.sum_all()? + second.sum_all()?)?)?;
            for (block, first, second) in &blocks {
                let (a, g) = kfac.factors(block).expect("observed");
                let expected = match summed {
                    true => first * alpha[0] + second * alpha[1],
                    false => (first + second) * 0.5,
                };
                let found = kron(&of_group(&a, 0), &of_group(&g, 0));
                if *block != "a" {
                    assert_same(&found, &expected, 1e-10, &format!("{block} {sharing:?} {summed}"));
                    continue;
                }
                // The trunk's is a sum of two products, of which the factors hold the marginals.
                let trace = |m: &Mat<f64>| (0..m.nrows()).map(|i| m[(i, i)]).sum::<f64>();
                let means = trace(&found) / trace(&expected) - 1.0;
                assert!(means.abs() < 0.3, "{means}");
            }
        }
    }
    let (first, second) = heads(&x)?;
    let mut kfac = observer(&net, Fisher::Empirical, Sharing::Expand, Bias::Folded)?;
    let shown = [Head::new(&first, Likelihood::Gaussian), Head::new(&second, Likelihood::Gaussian)];
    assert_says(kfac.observe_heads(&shown), &["labels of each"]);
    assert_says(kfac.observe_heads(&[]), &["at least one head"]);
    let negative = Head { weight: -1.0, ..Head::new(&first, Likelihood::Gaussian) };
    assert_says(kfac.observe_heads(&[negative]), &["zero or more, got -1"]);
    Ok(())
}

/// A mask takes rows out, weights count those that stay; a row is ignored by either.
#[test]
fn a_mask_beside_weights() -> Result<()> {
    let build = |vb: VarBuilder| -> Result<Forward> {
        let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 2, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
    };
    let (masked, plain) = (Net::of(DType::F64, 3, build)?, Net::of(DType::F64, 3, build)?);
    let x = random(5, &[2, 3, 3])?;
    let mask = Tensor::new(&[[1u8, 1, 0], [1, 1, 1]], CPU)?;
    masked.tape.mask(Some(&mask))?;
    // Of the six positions one is padding, and another is ignored by its weight.
    let w = [0.5, 2., 0., 0., 1., 1.5];
    let (rows, kept) = (Tensor::new(&[0u32, 1, 4, 5], CPU)?, weights(&[0.5, 2., 1., 1.5])?);
    for fisher in [Fisher::Exact, Fisher::Empirical] {
        let [mut one, mut other] =
            [&masked, &plain].map(|net| observer(net, fisher, Sharing::Expand, Bias::Folded));
        let (one, other) = (one.as_mut().expect("made"), other.as_mut().expect("made"));
        let z = (masked.forward)(&x)?;
        let all = weights(&w)?.reshape((2, 3))?;
        let y = random(6, &[6, 2])?;
        one.observe_weighted(&z, Likelihood::Gaussian, &Terms::weighted(&all)?)?;
        one.backward_step(&weighted_loss(Likelihood::Gaussian, &z, &y, &all.flatten_all()?, 5.0)?)?;
        let z = (plain.forward)(&x.flatten(0, 1)?.index_select(&rows, 0)?)?;
        other.observe_weighted(&z, Likelihood::Gaussian, &Terms::weighted(&kept)?)?;
        let y = y.index_select(&rows, 0)?;
        other.backward_step(&weighted_loss(Likelihood::Gaussian, &z, &y, &kept, 5.0)?)?;
        for block in ["a", "b"] {
            let (found, expected) = (one.factors(block).expect("a"), other.factors(block).expect("b"));
            assert_close(&found.0, &expected.0, 1e-12, &format!("A of {block}, {fisher:?}"));
            assert_close(&found.1, &expected.1, 1e-12, &format!("G of {block}, {fisher:?}"));
        }
    }
    Ok(())
}

/// Blocks without a layer: with drawn labels the gradients of terms times the roots of their weights are summed, else copies of the whole
/// batch change nothing.
#[test]
fn gradient_factors_of_weighted_terms() -> Result<()> {
    let build = |vb: VarBuilder| -> Result<Forward> {
        let w = vb.get((3, 3), "w")?;
        Ok(Box::new(move |x| x.matmul(&w.t()?)))
    };
    let net = Net::of(DType::F64, 2, build)?;
    let (x, w, total) = (random(5, &[4, 3])?, weights(&[0.5, 3., 0., 1.])?, 4.5);
    let y = Tensor::new(&[0u32, 2, 1, 1], CPU)?;
    let groups = Groups(vec![Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("*") }]);
    let params =
        Params { lr: 0.0, stat_decay: 0.0, fisher: Fisher::Exact, groups, ..Params::k_fac(&net.tape) };
    let mut kfac = NaturalGradient::from_varmap(&net.varmap, params)?;
    let z = (net.forward)(&x)?;
    let head =
        Head { labels: Some(&y), terms: Terms::weighted(&w)?, ..Head::new(&z, Likelihood::Categorical) };
    kfac.observe_heads(&[head])?;
    kfac.backward_step(&weighted_loss(Likelihood::Categorical, &z, &y, &w, total)?)?;
    let (a, g) = kfac.factors("w").expect("observed");
    // D = sum_n sqrt(w_n) r_n x_n^T, and A = D^T D / total, G = D D^T over its trace.
    let mut d = Mat::<f64>::zeros(3, 3);
    for (n, (z, w)) in flat(&z).chunks(3).zip(flat(&w)).enumerate() {
        let (p, row) = (softmax(z), &flat(&x)[3 * n..3 * n + 3]);
        let label = [0, 2, 1, 1][n];
        d += Mat::from_fn(3, 3, |i, j| w.sqrt() * (p[i] - f64::from(u8::from(i == label))) * row[j]);
    }
    let (expected, square) = (d.transpose() * &d * (1.0 / total), &d * d.transpose());
    let trace = (0..3).map(|i| square[(i, i)]).sum::<f64>();
    assert_same(&of_group(&a, 0), &expected, 1e-12, "A");
    assert_same(&of_group(&g, 0), &(square * (1.0 / trace)), 1e-12, "G");
    Ok(())
}

/// The Hessian of a smoothed and weighted cross entropy as PyTorch defines it, by finite differences.
#[test]
fn label_smoothing_weighs_as_its_loss() -> Result<()> {
    let net = Net::of(DType::F64, 2, |vb| {
        let layer = nn::linear_no_bias(1, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    let (x, classes, e) = (Tensor::ones((3, 1), DType::F64, CPU)?, [1., 5., 3.], 0.2);
    let y = Tensor::new(&[2i64, -100, 1], CPU)?;
    let terms = Terms::of_classes(&y, &weights(&classes)?, Some(-100), e)?;
    let mut kfac = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
    let z = (net.forward)(&x)?;
    kfac.observe_weighted(&z, Likelihood::Categorical, &terms)?;
    kfac.backward_step(&z.sum_all()?)?;
    // The mean gradient of sum_c t_c w_c (-log p_c), t = 1 - e at the label and e / 3 everywhere, over w_2 + w_1 = 8.
    let gradient = |z: &[f64]| -> Vec<f64> {
        let p = softmax(z);
        let mut g = vec![0.0; 3];
        for label in [2, 1] {
            let t: Vec<f64> =
                (0..3).map(|c| classes[c] * (e / 3.0 + if c == label { 1.0 - e } else { 0.0 })).collect();
            let all: f64 = t.iter().sum();
            (0..3).for_each(|c| g[c] += (all * p[c] - t[c]) / 8.0);
        }
        g
    };
    let z = flat(&z)[..3].to_vec();
    let expected = Mat::from_fn(3, 3, |i, j| {
        let at = |h: f64| {
            let mut z = z.clone();
            z[j] += h;
            gradient(&z)[i]
        };
        (at(1e-4) - at(-1e-4)) / 2e-4
    });
    let (a, g) = kfac.factors("fc").expect("observed");
    assert_same(&kron(&of_group(&a, 0), &of_group(&g, 0)), &expected, 1e-7, "the Hessian");
    Ok(())
}

/// A `pos_weight`: a weight for every output.
#[test]
fn weights_of_outputs() -> Result<()> {
    let net = Net::of(DType::F64, 2, |vb| {
        let layer = nn::linear_no_bias(1, 2, vb.pp("fc"))?;
        Ok(Box::new(move |x| layer.forward(x)))
    })?;
    let x = Tensor::ones((3, 1), DType::F64, CPU)?;
    let w = Tensor::new(&[[1., 7.], [7., 1.], [1., 1f64]], CPU)?;
    let z = (net.forward)(&x)?;
    let mut kfac = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
    kfac.observe_weighted(&z, Likelihood::Bernoulli, &Terms::weighted(&w)?.over(3.0))?;
    kfac.backward_step(&z.sum_all()?)?;
    let (a, g) = kfac.factors("fc").expect("observed");
    let p = flat(&z)[..2].iter().map(|&z| sigmoid(z)).collect::<Vec<_>>();
    let expected = Mat::from_fn(2, 2, |i, j| if i == j { 3.0 * p[i] * (1. - p[i]) } else { 0.0 });
    assert_same(&kron(&of_group(&a, 0), &of_group(&g, 0)), &expected, 1e-12, "the Hessian");
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let net = Net::of(DType::F64, 2, mlp)?;
    let mut kfac = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
    let z = (net.forward)(&random(1, &[4, 3])?)?;
    let mut observe = |w: &Tensor| kfac.observe_weighted(&z, Likelihood::Categorical, &Terms::weighted(w)?);
    assert_says(observe(&weights(&[1., 2., 3.])?), &["each of the 4 loss terms", "[4]", "[3]"]);
    assert_says(observe(&weights(&[0.; 4])?), &["none of the 4", "Terms::over"]);
    assert_says(observe(&weights(&[1., 1., -1., 1.])?), &["weight 2 is -1"]);
    assert_says(observe(&weights(&[1., f64::NAN, 1., 1.])?), &["weight 1 is NaN"]);
    assert_says(observe(&Tensor::ones((4, 3), DType::F64, CPU)?), &["[4, 3]"]);
    let labels = Tensor::new(&[0i64, 7, 1, -100], CPU)?;
    assert_says(
        Terms::of_classes(&labels, &weights(&[1., 2.])?, Some(-100), 0.),
        &["label 7 of loss term 1"],
    );
    assert_says(Terms::ignoring(&labels.to_dtype(DType::F32)?, -100), &["integer labels"]);
    let terms = Terms::equal().over(0.0);
    assert_says(kfac.observe_weighted(&z, Likelihood::Categorical, &terms), &["positive total, got 0"]);
    assert_says(kfac.accumulate_weighted(&z.sum_all()?, 0.0), &["positive total"]);
    // Nothing of it stays: the plain mean is what it was.
    kfac.observe(&z, Likelihood::Categorical)?;
    kfac.backward_step(&z.sum_all()?)?;
    let mut other = observer(&net, Fisher::Exact, Sharing::Expand, Bias::Folded)?;
    other.observe(&z, Likelihood::Categorical)?;
    other.backward_step(&z.sum_all()?)?;
    assert_close(&kfac.factors("a").expect("a").1, &other.factors("a").expect("a").1, 0.0, "G");
    Ok(())
}
