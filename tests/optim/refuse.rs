//! What is refused, with which words, and that nothing has changed then.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor, backprop::GradStore};
use kronwake::curvature::{Adaptive, Damping, Inverse, Relative, Sharing};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{
    AdaptiveKl, Average, Bias, Every, Group, Groups, Inner, NaturalGradient, NonFinite, Optimizer, Params, Q,
    QSolve, Qe, So, TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};

const LIKELIHOOD: Likelihood = Likelihood::Categorical;

fn constructed(wake: impl Into<Wake> + Clone, change: impl Fn(Params) -> Params) -> Result<NaturalGradient> {
    let net = Net::of(DType::F64, 1, small)?;
    NaturalGradient::from_varmap(&net.varmap, change(Params { ..Params::of(wake, &net.tape) }))
}

#[test]
fn options() {
    const KL: AdaptiveKl = AdaptiveKl { initial: 0.01, slope: 0.2, noise: 0.0, pace: 0.05, longest: 0.1 };
    type P = Params;
    type Change = fn(P) -> P;
    fn adaptive(change: fn(Adaptive) -> Adaptive) -> Damping {
        Damping::Adaptive(change(Adaptive::default()))
    }
    fn group(group: Group) -> Groups {
        Groups(vec![group])
    }
    let cases: Vec<(Change, &[&str])> = vec![
        (|p| P { lr: -1.0, ..p }, &["kfac: expected lr to be zero or more, got -1"]),
        (|p| P { lr: f64::NAN, ..p }, &["lr", "NaN"]),
        (|p| P { stat_decay: 1.0, ..p }, &["expected stat_decay in [0, 1), got 1"]),
        (|p| P { momentum: 1.5, ..p }, &["expected momentum in [0, 1), got 1.5"]),
        (|p| P { weight_decay: f64::INFINITY, ..p }, &["expected weight_decay to be zero or more, got inf"]),
        (|p| P { eigenvalue_floor: -1.0, ..p }, &["expected eigenvalue_floor to be zero or more"]),
        (|p| P { kl_clip: Some(0.0), ..p }, &["expected kl_clip to be positive, got 0"]),
        (|p| P { rms_clip: Some(f64::NAN), ..p }, &["expected rms_clip to be positive, got NaN"]),
        (|p| P { every: Every { factors: 0, inverses: 1 }, ..p }, &["expected periods of at least one step"]),
        (|p| P { every: Every { factors: 1, inverses: 0 }, ..p }, &["expected periods of at least one step"]),
        (|p| P { fisher: Fisher::Sampled { draws: 0, seed: 0 }, ..p }, &["at least one draw"]),
        (|p| P { damping: Damping::Eigenvalue(0.0), ..p }, &["damping: expected a positive number, got 0"]),
        (|p| P { damping: Damping::Pi(f64::NAN), ..p }, &["damping: expected a positive number, got NaN"]),
        (
            |p| P { damping: adaptive(|a| Adaptive { factor: 1.0, ..a }), ..p },
            &["adaptation factor in (0, 1), got 1"],
        ),
        (|p| P { damping: adaptive(|a| Adaptive { every: 0, ..a }), ..p }, &["adaptation period"]),
        (
            |p| P { damping: adaptive(|a| Adaptive { min: 1.0, ..a }), ..p },
            &["expected 0 < min <= initial <= max"],
        ),
        (|p| P { inverse: Inverse::Cholesky, ..p }, &["eigenvalue damping needs Inverse::Eigen", "Cholesky"]),
        (|p| P { inverse: Inverse::Newton, ..p }, &["eigenvalue damping needs Inverse::Eigen", "Newton"]),
        (
            |p| P { eigenvalue_floor: 1e-3, damping: Damping::Pi(0.1), ..p },
            &["eigenvalue_floor applies to eigenvalue"],
        ),
        (
            |p| P { ekfac: true, damping: Damping::Pi(0.1), ..p },
            &["ekfac needs eigenvalue damping, got Pi(0.1)"],
        ),
        (|p| P { ekfac: true, sharing: Sharing::Reduce, ..p }, &["needs Sharing::Expand, got Reduce"]),
        (
            |p| P { damping: Damping::Relative(Relative { fraction: 0.0, ..Relative::default() }), ..p },
            &["damping: expected a positive fraction, got 0"],
        ),
        (|p| p.fixed_kl(-1.0), &["kfac: expected a positive KL target, got -1"]),
        (
            |p| P { kl_clip: Some(0.1), ..p.fixed_kl(0.01) },
            &["a step of KL 0.01 has no use for kl_clip, got 0.1"],
        ),
        (|p| p.adaptive_kl(AdaptiveKl { initial: f64::NAN, ..KL }), &["a positive KL target, got NaN"]),
        (
            |p| p.adaptive_kl(AdaptiveKl { noise: -1.0, ..KL }),
            &["terms of the noise to be 0 or more, got -1"],
        ),
        (|p| p.adaptive_kl(AdaptiveKl { slope: 2.0, ..KL }), &["the slope to aim at in [-1, 1], got 2"]),
        (|p| p.adaptive_kl(AdaptiveKl { pace: -0.1, ..KL }), &["expected a pace in [0, 1], got -0.1"]),
        (|p| p.adaptive_kl(AdaptiveKl { longest: 0.0, ..KL }), &["a longest step above 0, got 0"]),
        (
            |p| P { average: Some(Average { power: f64::NAN }), ..p },
            &["expected average.power to be zero or more, got NaN"],
        ),
        (
            |p| P { groups: group(Group::named("fc3.*")), ..p },
            &["\"fc3.*\": matches no Var", "conv.weight", "gain"],
        ),
        (
            |p| P { groups: group(Group { lr_scale: -1.0, ..Group::named("*") }), ..p },
            &["lr_scale", "got -1"],
        ),
        (
            |p| P { groups: group(Group { weight_decay: Some(f64::NAN), ..Group::named("*") }), ..p },
            &["weight_decay"],
        ),
        (
            |p| P { groups: group(Group { rule: Some(UpdateRule::Kronecker), ..Group::named("gain") }), ..p },
            &["gain belongs to no tapped layer"],
        ),
    ];
    for (change, parts) in cases {
        assert_says(constructed(Wake::KFac, change), parts);
    }
    let exact = Q { wake_decay: None, solve: QSolve::Exact };
    assert_says(constructed(exact.clone(), |p| p), &["q-kld-wrm: the exact solve needs pi damping"]);
    assert_says(constructed(Q::default(), |p| Params { ekfac: true, ..p }), &["works with K-FAC and SO"]);
    assert_says(
        constructed(So { wake_decay: Some(1.0) }, |p| p),
        &["so-kld-wrm: expected wake_decay in [0, 1), got 1"],
    );
    let two = |model_decay, wake_decay| TwoRate { model_decay, wake_decay, ..TwoRate::default() };
    assert_says(constructed(two(1.0, 0.5), |p| p), &["kld-wrm: expected model_decay in [0, 1), got 1"]);
    assert_says(constructed(two(0.5, f64::NAN), |p| p), &["kld-wrm: expected wake_decay in [0, 1), got NaN"]);
    for (inner, part) in [
        (Inner { lr: -1.0, ..Inner::default() }, "expected inner lr and scale to be zero or more, got -1"),
        (Inner { scale: f64::NAN, ..Inner::default() }, "zero or more, got"),
        (Inner { momentum: 1.0, ..Inner::default() }, "inner momentum in [0, 1), got 1"),
        (Inner { models: 1, ..Inner::default() }, "expected 2 or more models"),
    ] {
        assert_says(constructed(Qe { inner, ..Qe::default() }, |p| p), &["qe-kld-wrm", part]);
    }
}

/// An optimizer after two steps on its net, with the curvature due at every step.
fn started(
    wake: impl Into<Wake> + Clone,
    change: impl Fn(Params) -> Params,
) -> Result<(Net, NaturalGradient)> {
    let net = Net::of(DType::F64, 1, small)?;
    let params = Params { every: Every { factors: 1, inverses: 1 }, ..Params::of(wake, &net.tape) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, change(params))?;
    good_step(&net, &mut opt)?;
    good_step(&net, &mut opt)?;
    Ok((net, opt))
}

fn outputs(net: &Net) -> Result<Tensor> {
    (net.forward)(&small_batch(0, 6, DType::F64)?.0)
}

fn loss(z: &Tensor) -> Result<Tensor> {
    mean_loss(LIKELIHOOD, z, &small_batch(0, 6, DType::F64)?.1)
}

fn good_step(net: &Net, opt: &mut NaturalGradient) -> Result<()> {
    let z = outputs(net)?;
    opt.observe(&z, LIKELIHOOD)?;
    opt.backward_step(&loss(&z)?)
}

/// Gradients of a good loss, of which one element of one Var's is replaced.
fn spoilt_gradients(net: &Net, name: &str, value: f64) -> Result<GradStore> {
    let mut grads = loss(&outputs(net)?)?.backward()?;
    let var = net.var(name);
    let mut values = flat(grads.get(&var).unwrap());
    values[0] = value;
    grads.insert(&var, Tensor::from_vec(values, var.dims(), &Device::Cpu)?);
    Ok(grads)
}

/// A step that must fail.
type Bad = fn(&Net, &mut NaturalGradient) -> Result<()>;

/// Steps with something not finite in them, and what the refusal names.
const NON_FINITE: &[(Bad, &str)] = &[
    (
        |net, opt| {
            let z = outputs(net)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.backward_step(&(loss(&z)? * f64::NAN)?)
        },
        "the loss is NaN",
    ),
    (
        |net, opt| {
            let z = outputs(net)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.backward_step(&(loss(&z)? * f64::INFINITY)?)
        },
        "the loss is inf",
    ),
    (
        |net, opt| {
            opt.observe(&outputs(net)?, LIKELIHOOD)?;
            opt.step(&spoilt_gradients(net, "fc1.weight", f64::NAN)?)
        },
        "the gradient of fc1.weight has NaN",
    ),
    (
        |net, opt| {
            opt.observe(&outputs(net)?, LIKELIHOOD)?;
            opt.step(&spoilt_gradients(net, "fc2.bias", f64::INFINITY)?)
        },
        "the gradient of fc2.bias has NaN",
    ),
    (
        |net, opt| {
            opt.observe(&outputs(net)?, LIKELIHOOD)?;
            opt.step(&spoilt_gradients(net, "gain", f64::NAN)?)
        },
        "the gradient of gain has NaN",
    ),
    (
        |net, opt| {
            let z = outputs(net)?;
            let labels = Tensor::full(f64::NAN, z.dims(), &Device::Cpu)?;
            opt.observe_labels(&z, Likelihood::Gaussian, &labels)?;
            opt.backward_step(&loss(&z)?)
        },
        "factor G of block conv has NaN",
    ),
    (
        |net, opt| {
            let z = (net.forward)(&(small_batch(0, 6, DType::F64)?.0 * f64::NAN)?)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.backward_step(&loss(&z)?)
        },
        "NaN",
    ),
    (
        |net, opt| {
            let z = outputs(net)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.accumulate(&loss(&z)?, 6)?;
            let z = outputs(net)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.accumulate(&(loss(&z)? * f64::NAN)?, 6)?;
            opt.step_accumulated()
        },
        "the loss is NaN",
    ),
];

#[test]
fn non_finite() -> Result<()> {
    for fisher in [Fisher::Sampled { draws: 1, seed: 0 }, Fisher::Empirical, Fisher::Exact] {
        for (bad, part) in NON_FINITE {
            let (net, mut opt) = started(Wake::KFac, |p| Params { fisher, ..p })?;
            let before = saved(&opt)?;
            assert_says(bad(&net, &mut opt), &[part, "parameters and state are unchanged"]);
            assert_same_state(&saved(&opt)?, &before, &[], part);
            good_step(&net, &mut opt)?;

            let (net, mut opt) =
                started(Wake::KFac, |p| Params { fisher, non_finite: NonFinite::Skip, ..p })?;
            let before = saved(&opt)?;
            bad(&net, &mut opt)?;
            assert_eq!((opt.skipped(), opt.steps()), (1, 2), "{part}");
            assert_same_state(&saved(&opt)?, &before, &["skipped"], part);
            good_step(&net, &mut opt)?;
        }
    }
    Ok(())
}

#[test]
fn steps() -> Result<()> {
    let cases: Vec<(Bad, &[&str])> = vec![
        (|net, opt| opt.backward_step(&loss(&outputs(net)?)?), &["step 2 needs the curvature; call observe"]),
        (
            |_, opt| opt.observe(&Tensor::zeros((0, 3), DType::F64, &Device::Cpu)?, LIKELIHOOD),
            &["at least one example, got [0, 3]"],
        ),
        (|_, opt| opt.observe(&Tensor::new(1f64, &Device::Cpu)?, LIKELIHOOD), &["got []"]),
        (|net, opt| opt.observe(&outputs(net)?.detach(), LIKELIHOOD), &["no tapped layer took part"]),
        (
            |net, opt| {
                let z = outputs(net)?;
                opt.observe(&z, LIKELIHOOD)?;
                opt.backward_step(&net.var("gain").sqr()?.sum_all()?)
            },
            &[
                "no gradient for conv.bias, conv.weight, fc1.bias, fc1.weight, fc2.bias, fc2.weight",
                "frozen: true",
            ],
        ),
        (
            |net, opt| {
                let z = outputs(net)?;
                opt.observe(&z, LIKELIHOOD)?;
                opt.backward_step(&z)
            },
            &["loss: expected a scalar, got shape [6, 3]"],
        ),
        (
            |net, opt| opt.observe_labels(&outputs(net)?, LIKELIHOOD, &labels(0, 5, 3)?),
            &["labels: expected 6 class numbers", "got [5]"],
        ),
        (
            |net, opt| opt.observe_labels(&outputs(net)?, Likelihood::Gaussian, &random(0, &[6, 2])?),
            &["labels: expected targets of shape [6, 3], got [6, 2]"],
        ),
        (
            |net, opt| {
                opt.set_learning_rate(f64::NAN);
                let result = good_step(net, opt);
                opt.set_learning_rate(0.075);
                result
            },
            &["expected a learning rate of zero or more, got NaN"],
        ),
        (|net, opt| opt.accumulate(&loss(&outputs(net)?)?, 0), &["a micro-batch without loss terms"]),
        (|_, opt| opt.step_accumulated(), &["nothing was accumulated"]),
        (
            |_, opt| opt.set_params(Params { bias: Bias::Split, ..opt.params().clone() }),
            &["tape, groups, bias, limits, budget, sharing and ekfac are fixed"],
        ),
        (|_, opt| opt.set_params(Params { momentum: 2.0, ..opt.params().clone() }), &["momentum"]),
    ];
    for (bad, parts) in cases {
        let (net, mut opt) = started(Wake::KFac, |p| p)?;
        let before = saved(&opt)?;
        assert_says(bad(&net, &mut opt), parts);
        assert_same_state(&saved(&opt)?, &before, &[], parts[0]);
        good_step(&net, &mut opt)?;
    }
    Ok(())
}

#[test]
fn between_steps() -> Result<()> {
    let (net, mut opt) = started(Wake::KFac, |p| Params { fisher: Fisher::Empirical, ..p })?;
    let z = outputs(&net)?;
    opt.observe(&z, LIKELIHOOD)?;
    assert_says(opt.observe(&z, LIKELIHOOD), &["observe was called twice before a backward pass"]);
    assert_says(opt.save(scratch("never")), &["save between two steps"]);
    opt.backward_step(&loss(&z)?)?;

    let adaptive = Damping::Adaptive(Adaptive { every: 3, ..Adaptive::default() });
    let (net, mut opt) = started(Wake::KFac, |p| Params { damping: adaptive, ..p })?;
    let grads = loss(&outputs(&net)?)?.backward()?;
    opt.observe(&outputs(&net)?, LIKELIHOOD)?;
    assert_says(opt.step(&grads), &["adaptive damping needs the loss"]);
    good_step(&net, &mut opt)?;
    let before = saved(&opt)?;
    assert_says(good_step(&net, &mut opt), &["waits for the loss after step 3; call adapt_damping"]);
    assert_same_state(&saved(&opt)?, &before, &[], "adaptive");
    assert!(opt.wants_loss_after());
    opt.adapt_damping(&loss(&outputs(&net)?)?)?;
    good_step(&net, &mut opt)?;

    let net = Net::of(DType::F64, 1, small)?;
    let opt = NaturalGradient::new(net.varmap.all_vars(), Params::so_kld_wrm(&net.tape))?;
    assert_says(opt.save(scratch("never")), &["a Var of shape [8] has no name", "from_varmap"]);
    Ok(())
}

#[test]
fn closures() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    let params = Params { every: Every { factors: 1, inverses: 1 }, ..Params::qe_kld_wrm(&net.tape) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
    let step = |opt: &mut NaturalGradient, closure: &mut dyn FnMut() -> Result<Tensor>| {
        let z = outputs(&net)?;
        opt.observe(&z, LIKELIHOOD)?;
        opt.step_with(&loss(&z)?, LIKELIHOOD, closure)
    };
    step(&mut opt, &mut || outputs(&net))?;
    let before = saved(&opt)?;
    let mut calls = 0.0;
    let mut noisy = || {
        calls += 1.0;
        outputs(&net)? + calls
    };
    assert_says(step(&mut opt, &mut noisy), &["two calls of the closure differ", "dropout or sampling"]);
    assert_same_state(&saved(&opt)?, &before, &[], "noisy");
    let broken = &mut || candle_core::bail!("broken");
    assert_says(step(&mut opt, broken), &["broken"]);
    assert_same_state(&saved(&opt)?, &before, &[], "broken");
    let z = outputs(&net)?;
    assert_says(
        opt.backward_step(&loss(&z)?),
        &["backward_step cannot evaluate the model again; call step_with"],
    );
    assert_says(opt.step(&loss(&z)?.backward()?), &["step cannot evaluate the model again; call step_with"]);
    assert_says(
        opt.accumulate(&loss(&z)?, 6),
        &["accumulate cannot evaluate the model again; call step_with"],
    );
    assert_same_state(&saved(&opt)?, &before, &[], "step");
    step(&mut opt, &mut || outputs(&net))
}

#[test]
fn layers() -> Result<()> {
    let net = Net::of(DType::F64, 1, |vb| {
        let (fc, conv) =
            (nn::linear(8, 4, vb.pp("fc"))?, nn::conv2d(2, 3, 2, Default::default(), vb.pp("deep.conv"))?);
        Ok(Box::new(move |x| if x.rank() == 4 { conv.forward(x) } else { fc.forward(x) }))
    })?;
    for (dims, parts) in [
        (&[5, 7][..], &["layer fc", "[.., 8]", "[5, 7]"][..]),
        (&[8], &["layer fc", "rank 2"]),
        (&[5, 3, 4, 4], &["layer deep.conv", "expects 2 input channels, got 3"]),
        (&[5, 2, 1, 4], &["layer deep.conv", "larger than input (1, 4)"]),
    ] {
        assert_says((net.forward)(&random(0, dims)?), parts);
    }
    for (dims, name) in [(&[5, 8][..], "layer fc"), (&[5, 2, 4, 4], "layer deep.conv")] {
        assert_says((net.forward)(&random(0, dims)?.to_dtype(DType::F32)?), &[name, "F64", "F32"]);
    }
    Ok(())
}

/// Without a tape all would be left to Adam, at a rate that was never chosen.
#[test]
fn a_model_that_was_not_built_on_the_tape() -> Result<()> {
    let vars = VarMap::new();
    let _ = small(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let params = Params::kld_wrm(&Tape::new());
    assert_says(
        NaturalGradient::from_varmap(&vars, params.clone()).map(drop),
        &["kld-wrm: no Var has a Kronecker block", "tape.build", "UpdateRule::Adam"],
    );
    let asked = |rule| Groups(vec![Group { rule: Some(rule), ..Group::named("*.weight") }]);
    for rule in [UpdateRule::Adam, UpdateRule::GradientFactors] {
        NaturalGradient::from_varmap(&vars, Params { groups: asked(rule), ..params.clone() })?;
    }
    Ok(())
}

#[test]
fn another_member_of_the_family() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, Params::so_kld_wrm(&net.tape))?;
    assert_says(
        opt.set_params(Params::k_fac(&net.tape)),
        &["so-kld-wrm: the member of the family is fixed at construction, got kfac"],
    );
    Ok(())
}
