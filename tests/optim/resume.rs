//! Half a run, saved and resumed in a fresh model, is the whole run to the last bit; what does not fit is refused.

use crate::common::*;
use candle_core::{D, DType, Device, Result, Tensor};
use kronwake::curvature::{Adaptive, Beyond, Damping, DampingKind, FactorLimit, Inverse, Sharing};
use kronwake::nn::{self, Module};
use kronwake::optim::{
    AdaptiveKl, Bias, Carry, Every, Group, Groups, Inner, NaturalGradient, Optimizer, Params, ParamsAdamW, Q,
    QSolve, Qe, So, TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood};
use std::path::Path;

/// A step of any optimizer, given how the outputs are computed.
type Step = fn(&mut NaturalGradient, &Tensor, &dyn Fn() -> Result<Tensor>) -> Result<()>;

fn plain(opt: &mut NaturalGradient, loss: &Tensor, _: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    opt.backward_step(loss)
}

fn with_closure(
    opt: &mut NaturalGradient,
    loss: &Tensor,
    outputs: &dyn Fn() -> Result<Tensor>,
) -> Result<()> {
    opt.step_with(loss, Likelihood::Categorical, &mut || outputs())
}

/// Steps `from..to` of a run with a falling rate.
fn train(
    net: &Net,
    opt: &mut NaturalGradient,
    step: Step,
    dtype: DType,
    (from, to): (usize, usize),
) -> Result<()> {
    let loss_on = |k: usize| -> Result<(Tensor, Tensor)> {
        let (x, y) = small_batch(k as u64, 9, dtype)?;
        let z = (net.forward)(&x)?;
        let loss = mean_loss(Likelihood::Categorical, &z.to_dtype(DType::F64)?, &y)?;
        Ok((z, loss))
    };
    for k in from..to {
        // Late, so that a prediction waits while the state is saved.
        if opt.wants_loss_after() {
            opt.adapt_damping(&loss_on(k - 1)?.1)?;
        }
        opt.set_learning_rate(0.05 / (1.0 + k as f64 / 10.0));
        let (z, loss) = loss_on(k)?;
        opt.observe(&z, Likelihood::Categorical)?;
        let (x, _) = small_batch(k as u64, 9, dtype)?;
        step(opt, &loss, &|| (net.forward)(&x))?;
    }
    Ok(())
}

/// Periods at which half of the run is no refresh of anything.
fn params(net: &Net, wake: impl Into<Wake> + Clone) -> Params {
    Params {
        every: Every { factors: 3, inverses: 7 },
        fallback_adam: ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() },
        ..Params::of(wake, &net.tape)
    }
}

fn check(
    what: &str,
    dtype: DType,
    step: Step,
    wake: impl Into<Wake> + Clone,
    change: impl Fn(Params) -> Params,
) -> Result<()> {
    let optimizer = |net: &Net| NaturalGradient::from_varmap(&net.varmap, change(params(net, wake.clone())));
    let whole = Net::of(dtype, 1, small)?;
    let mut opt = optimizer(&whole)?;
    train(&whole, &mut opt, step, dtype, (0, 20))?;
    let path = scratch("half");
    opt.save(&path)?;
    let half = saved(&opt)?;
    train(&whole, &mut opt, step, dtype, (20, 40))?;

    let fresh = Net::of(dtype, 2, small)?;
    let mut resumed = optimizer(&fresh)?;
    resumed.resume(&path)?;
    std::fs::remove_file(&path)?;
    assert_same_state(&saved(&resumed)?, &half, &[], &format!("{what} {dtype:?}, resumed"));
    assert_eq!((resumed.steps(), resumed.learning_rate()), (20, 0.05 / 2.9));
    train(&fresh, &mut resumed, step, dtype, (20, 40))?;
    assert_same_state(&saved(&resumed)?, &saved(&opt)?, &[], &format!("{what} {dtype:?}, whole"));
    Ok(())
}

#[test]
fn bit_for_bit() -> Result<()> {
    let pi = Damping::Pi(0.01);
    let adaptive = |kind| Damping::Adaptive(Adaptive { kind, every: 5, ..Adaptive::default() });
    let q = |solve| Q { wake_decay: Some(0.3), solve };
    let qe = |inner| Qe { wake_decay: None, solve: QSolve::Factor, inner };
    let inner = Inner { steps: 2, models: 3, ..Inner::default() };
    let groups = || {
        Groups(vec![
            Group { lr_scale: 0.5, weight_decay: Some(0.01), ..Group::named("fc*") },
            Group { frozen: true, ..Group::named("fc1.bias") },
            Group { rule: Some(UpdateRule::Adam), ..Group::named("conv.*") },
        ])
    };
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        check("kfac", dtype, plain, Wake::KFac, |p| p)?;
        check("so", dtype, plain, So::default(), |p| p)?;
        check("q", dtype, plain, q(QSolve::Factor), |p| p)?;
        check("qe", dtype, with_closure, qe(Inner::default()), |p| p)?;
    }
    for dtype in [DType::F32, DType::BF16] {
        check("kld-wrm", dtype, plain, TwoRate::default(), |p| p)?;
    }
    let f32 = DType::F32;
    check(
        "kld-wrm, quadratic",
        f32,
        plain,
        TwoRate { model_decay: 0.7, ..TwoRate::q(0.3, QSolve::Factor) },
        |p| p,
    )?;
    check("kld-wrm, literal", f32, plain, TwoRate::default(), |p| Params { carry: Carry::Literal, ..p })?;
    let early = |p: Params| Params { early_refresh: true, ..p.adaptive_kl(AdaptiveKl::default()) };
    check("q, adaptive kl", f32, plain, q(QSolve::Factor), early)?;
    check("qe, adaptive kl", f32, with_closure, qe(inner.clone()), |p| p.adaptive_kl(AdaptiveKl::default()))?;
    check("so, fixed kl", f32, plain, So::default(), |p| p.fixed_kl(0.01))?;
    check("qe, fixed kl", f32, with_closure, qe(inner.clone()), |p| p.fixed_kl(0.01))?;
    check("kfac, momentum", f32, plain, Wake::KFac, |p| Params { momentum: 0.9, weight_decay: 0.01, ..p })?;
    check("kfac, ekfac", f32, plain, Wake::KFac, |p| Params { ekfac: true, ..p })?;
    check("so, ekfac", f32, plain, So::default(), |p| Params { ekfac: true, momentum: 0.5, ..p })?;
    check("so, newton", f32, plain, So::default(), |p| Params {
        damping: pi,
        inverse: Inverse::Newton,
        ..p
    })?;
    check("so, cholesky", f32, plain, So::default(), |p| Params {
        damping: pi,
        inverse: Inverse::Cholesky,
        ..p
    })?;
    check("so, split", f32, plain, So::default(), |p| Params {
        bias: Bias::Split,
        sharing: Sharing::Reduce,
        ..p
    })?;
    check("so, groups", f32, plain, So::default(), |p| Params { groups: groups(), ..p })?;
    let by_gradient = Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("fc?.weight") };
    let by_gradient = Groups(vec![by_gradient]);
    check("kfac, gradient-only", f32, plain, Wake::KFac, |p| Params { groups: by_gradient.clone(), ..p })?;
    check("kld-wrm, gradient-only", DType::BF16, plain, TwoRate::default(), |p| Params {
        groups: by_gradient.clone(),
        ..p
    })?;
    for beyond in [Beyond::BlockDiagonal, Beyond::Diagonal] {
        let factor_limit = FactorLimit { rows: 3, beyond };
        check("so, runs", f32, plain, So::default(), |p| Params { factor_limit, ..p })?;
        check("kfac, runs, ekfac", f32, plain, Wake::KFac, |p| Params { factor_limit, ekfac: true, ..p })?;
        let exact = |p| Params { factor_limit, damping: pi, ..p };
        check("q, runs, exact", f32, plain, q(QSolve::Exact), exact)?;
        for inverse in [Inverse::Newton, Inverse::Cholesky] {
            let iterated = |p| Params { factor_limit, damping: pi, inverse, ..p };
            check("kld-wrm, runs", f32, plain, TwoRate::default(), iterated)?;
        }
    }
    let factor_limit = FactorLimit { rows: 3, beyond: Beyond::LowRank { rank: 2 } };
    for dtype in [DType::F64, f32, DType::BF16] {
        check("so, low rank", dtype, plain, So::default(), |p| Params { factor_limit, ..p })?;
        let literal =
            |p| Params { factor_limit, damping: pi, inverse: Inverse::Newton, carry: Carry::Literal, ..p };
        check("kld-wrm, low rank", dtype, plain, TwoRate::default(), literal)?;
        check("q, low rank", dtype, plain, q(QSolve::Factor), |p| Params { factor_limit, ..p })?;
        for rank in [1, 2] {
            let factor_limit = FactorLimit { rows: 3, beyond: Beyond::LowRank { rank } };
            let exact = |p| Params { factor_limit, damping: pi, ..p };
            check("q, low rank, exact", dtype, plain, q(QSolve::Exact), exact)?;
        }
    }
    check("so, groups", DType::BF16, plain, So::default(), |p| Params {
        groups: groups(),
        momentum: 0.5,
        ..p
    })?;
    check("kfac, empirical", f32, plain, Wake::KFac, |p| Params { fisher: Fisher::Empirical, ..p })?;
    check("kfac, exact", f32, plain, Wake::KFac, |p| Params { fisher: Fisher::Exact, ..p })?;
    check("q, exact", f32, plain, q(QSolve::Exact), |p| Params { damping: pi, momentum: 0.5, ..p })?;
    check("qe, more", f32, with_closure, qe(inner), |p| Params {
        groups: groups(),
        rms_clip: Some(1.0),
        ..p
    })?;
    for kind in [DampingKind::Eigenvalue, DampingKind::Pi] {
        check("kfac, adaptive", f32, plain, Wake::KFac, |p| Params { damping: adaptive(kind), ..p })?;
        check("q, adaptive", f32, plain, q(QSolve::Factor), |p| Params { damping: adaptive(kind), ..p })?;
    }
    Ok(())
}

/// The same net with a wider layer.
fn wider(vb: nn::VarBuilder) -> Result<Forward> {
    let conv = nn::conv2d(1, 2, 2, Default::default(), vb.pp("conv"))?;
    let gain = vb.get(8, "gain")?;
    let (fc1, fc2) = (nn::linear(8, 5, vb.pp("fc1"))?, nn::linear(5, 3, vb.pp("fc2"))?);
    Ok(Box::new(move |x| {
        let x = conv.forward(x)?.tanh()?.flatten_from(1)?.broadcast_mul(&gain)?;
        fc2.forward(&fc1.forward(&x)?.tanh()?)
    }))
}

/// Resumes from `path`, expects an error that says all of `parts`, and nothing changed.
fn refuses(net: Net, options: Params, path: &Path, parts: &[&str]) -> Result<()> {
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    train(&net, &mut opt, plain, DType::F64, (0, 2))?;
    let before = saved(&opt)?;
    assert_says(opt.resume(path), parts);
    assert_same_state(&saved(&opt)?, &before, &[], parts[0]);
    Ok(())
}

/// EKFAC has no use for low rank, whether its own factors are chosen by cost or given.
#[test]
fn ekfac_and_a_file_of_low_rank() -> Result<()> {
    let k_fac = |net: &Net, beyond| {
        let factor_limit = FactorLimit { rows: 3, beyond };
        Params { factor_limit, ..params(net, Wake::KFac) }
    };
    let net = Net::of(DType::F64, 3, small)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, k_fac(&net, Beyond::LowRank { rank: 2 }))?;
    train(&net, &mut opt, plain, DType::F64, (0, 3))?;
    let path = scratch("low-rank");
    opt.save(&path)?;
    for beyond in [Beyond::ByCost, Beyond::BlockDiagonal] {
        let other = Net::of(DType::F64, 3, small)?;
        let options = Params { ekfac: true, ..k_fac(&other, beyond) };
        refuses(
            other,
            options,
            &path,
            &[
                "kronwake/conv/factor_a [1, 3, 5] is of low rank, and ekfac needs eigenvectors in all 5 directions: resume without ekfac, or",
            ],
        )?;
    }
    // Without it the file's shapes are taken.
    let other = Net::of(DType::F64, 3, small)?;
    NaturalGradient::from_varmap(&other.varmap, k_fac(&other, Beyond::ByCost))?.resume(&path)?;
    std::fs::remove_file(&path).map_err(candle_core::Error::wrap)
}

/// `t` with the element at the start of its flat order replaced.
fn poisoned(t: &Tensor, value: f64) -> Result<Tensor> {
    let mut values = flat(t);
    values[0] = value;
    Tensor::from_vec(values, t.dims(), &Device::Cpu)?.to_dtype(t.dtype())
}

#[test]
fn mismatches() -> Result<()> {
    let so = |net: &Net| Params { momentum: 0.5, ..params(net, So::default()) };
    let fresh = || Net::of(DType::F64, 3, small);
    let net = fresh()?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, so(&net))?;
    train(&net, &mut opt, plain, DType::F64, (0, 5))?;
    let path = scratch("good");
    opt.save(&path)?;
    let good = Checkpoint::read(&path, &Device::Cpu)?;
    let bytes = std::fs::read(&path)?;

    let other = fresh()?;
    let options = params(&other, Wake::KFac);
    refuses(other, options, &path, &["state of so-kld-wrm, expected kfac"])?;
    let other = Net::of(DType::F64, 3, wider)?;
    let options = so(&other);
    let shapes =
        ["fc1.weight is F64 [4, 8], expected F64 [5, 8]", "fc2.weight is", "kronwake/fc1/factor_g is"];
    refuses(other, options, &path, &shapes)?;

    type Edit = fn(&mut Checkpoint) -> Result<()>;
    let edits: Vec<(Edit, &[&str])> = vec![
        (
            |c| {
                for name in [
                    "fc1.weight",
                    "kronwake/fc2/factor_a",
                    "kronwake/conv/carry",
                    "kronwake/gain/first_moment",
                ] {
                    c.tensors.remove(name);
                }
                c.tensors.insert("stranger".into(), Tensor::zeros(3, DType::F64, &Device::Cpu)?);
                c.tensors.insert("fc2.bias".into(), c.tensors["fc2.bias"].to_dtype(DType::F32)?);
                Ok(())
            },
            &[
                "missing fc1.weight [4, 8]",
                "missing kronwake/fc2/factor_a [1, 5, 5]",
                "missing kronwake/conv/carry",
                "missing kronwake/gain/first_moment [8]",
                "unexpected stranger",
                "fc2.bias is F32 [3], expected F64 [3]",
            ],
        ),
        (|c| replace(c, "kronwake/fc1/factor_a", f64::NAN), &["kronwake/fc1/factor_a has NaN"]),
        (
            |c| replace(c, "kronwake/fc1/factor_g", -1.0),
            &["kronwake/fc1/factor_g has a negative diagonal element"],
        ),
        (
            |c| replace(c, "kronwake/gain/second_moment", f64::INFINITY),
            &["kronwake/gain/second_moment has NaN"],
        ),
        (|c| replace(c, "gain", f64::NAN), &["gain has NaN"]),
        (|c| remove(c, "kronwake/fc1/scale"), &["missing the inverse of block fc1"]),
        (|c| remove(c, "kronwake/fc1/velocity"), &["tensors, expected"]),
        (|c| note(c, "steps", None), &["metadata kronwake: steps is missing"]),
        (|c| note(c, "steps", Some("few")), &["kronwake: steps is \"few\""]),
        (|c| note(c, "format", Some("2")), &["state of format 2, expected 1"]),
        (|c| note(c, "format", None), &["no optimizer state"]),
        (|c| note(c, "lr", Some("NaN")), &["lr is NaN"]),
        (|c| note(c, "damping", Some("-1")), &["damping is -1"]),
        (|c| note(c, "previous_rate", Some("inf")), &["previous_rate is inf"]),
        (|c| note(c, "models", Some("1000000000000")), &["1000000000000 stored models"]),
    ];
    for (edit, parts) in edits {
        let mut file = good.clone();
        edit(&mut file)?;
        file.write(&path)?;
        let other = fresh()?;
        let options = so(&other);
        refuses(other, options, &path, parts)?;
    }
    let mut broken = bytes.clone();
    broken[12] ^= 0x55;
    for (content, part) in [
        (&bytes[..bytes.len() - 8], "not a whole safetensors file"),
        (&bytes[..5], "not a whole safetensors file"),
        (&broken, "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
    ] {
        std::fs::write(&path, content)?;
        let other = fresh()?;
        let options = so(&other);
        refuses(other, options, &path, &[part])?;
    }
    std::fs::remove_file(&path)?;
    let other = fresh()?;
    let options = so(&other);
    refuses(other, options, &path, &["cannot be read"])
}

fn replace(file: &mut Checkpoint, name: &str, value: f64) -> Result<()> {
    let tensor = poisoned(&file.tensors[name], value)?;
    file.tensors.insert(name.into(), tensor);
    Ok(())
}

fn remove(file: &mut Checkpoint, name: &str) -> Result<()> {
    assert!(file.tensors.remove(name).is_some(), "no {name}");
    Ok(())
}

fn note(file: &mut Checkpoint, name: &str, value: Option<&str>) -> Result<()> {
    let text = file.metadata.entry("kronwake".into()).or_default();
    let kept = text.lines().filter(|line| !line.starts_with(&format!("{name} = ")));
    *text =
        kept.map(str::to_string).chain(value.map(|v| format!("{name} = {v}"))).collect::<Vec<_>>().join("\n");
    Ok(())
}

/// What a resumed run has learned is in the file, and the file is a model checkpoint too.
#[test]
fn file_is_a_model() -> Result<()> {
    let net = Net::of(DType::F64, 4, small)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, Wake::KFac))?;
    train(&net, &mut opt, plain, DType::F64, (0, 3))?;
    let path = scratch("model");
    opt.save(&path)?;
    let file = Checkpoint::read(&path, &Device::Cpu)?;
    std::fs::remove_file(&path)?;
    for name in net.names() {
        assert_eq!(flat(&file.tensors[&name]), flat(net.var(&name).as_tensor()), "{name}");
    }
    let (x, _) = small_batch(0, 2, DType::F64)?;
    assert_eq!((net.forward)(&x)?.dim(D::Minus1)?, 3);
    Ok(())
}
