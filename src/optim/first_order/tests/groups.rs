//! Groups, resumption, half types and refusals of the rules of matrices.

use super::*;
use crate::optim::{Group, UpdateRule};

/// A net of three layers' weights and a bias, under their names.
fn net(dtype: DType) -> VarMap {
    let vars = VarMap::new();
    for (index, (name, dims)) in
        [("embed", &[4usize, 3][..]), ("conv", &[3, 2, 2]), ("head", &[2, 3]), ("bias", &[3])]
            .into_iter()
            .enumerate()
    {
        let value = dense::Matrix::random(1, dims.iter().product(), index as u64);
        let value = Tensor::from_vec(value.values, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        vars.data().lock().unwrap().insert(name.into(), Var::from_tensor(&value).unwrap());
    }
    vars
}

fn var(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

fn value(vars: &VarMap, name: &str) -> Vec<f64> {
    let value = var(vars, name).flatten_all().unwrap();
    value.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// A loss in which all take part, with other gradients at each step.
fn loss(vars: &VarMap, step: usize) -> Result<Tensor> {
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for name in ["embed", "conv", "head", "bias"] {
        let v = var(vars, name).to_dtype(DType::F64)?.flatten_all()?;
        let target = dense::Matrix::random(1, v.elem_count(), 40 + step as u64).values;
        let difference = (v - Tensor::new(target, &Device::Cpu)?)?;
        sum = (sum + difference.powf(4.0)?.sum_all()?)?;
    }
    Ok(sum)
}

fn run<P: Update>(opt: &mut FirstOrder<P>, vars: &VarMap, steps: std::ops::Range<usize>) -> Result<()> {
    steps.into_iter().try_for_each(|step| opt.backward_step(&loss(vars, step)?))
}

fn path(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("kronwake-{name}-{}.safetensors", std::process::id()))
}

/// What every rule has to do, with `matrices` the Vars that its own rule is for.
fn all_of<P: Update + std::fmt::Debug>(params: P) -> Result<()> {
    let file = path(P::NAME);
    let groups = || {
        Groups(vec![
            Group {
                rule: Some(UpdateRule::Adam),
                lr_scale: 0.5,
                weight_decay: Some(0.3),
                ..Group::named("head")
            },
            Group { frozen: true, ..Group::named("embed") },
        ])
    };
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        // Resumed bit for bit, at a step where bases and roots are stale, with a step left out before.
        let (first, second) = (net(dtype), net(dtype));
        let mut straight = FirstOrder::from_varmap_with(&first, params.clone(), groups())?;
        straight.non_finite = NonFinite::Skip;
        run(&mut straight, &first, 0..2)?;
        straight.backward_step(&(loss(&first, 2)? * f64::INFINITY)?)?;
        run(&mut straight, &first, 3..6)?;
        assert_eq!((straight.steps(), straight.skipped()), (6, 1));
        straight.save(&file)?;
        let mut resumed = FirstOrder::from_varmap_with(&second, params.clone(), groups())?;
        resumed.resume(&file)?;
        assert_eq!((resumed.steps(), resumed.skipped()), (6, 1));
        run(&mut straight, &first, 6..12)?;
        run(&mut resumed, &second, 6..12)?;
        for name in ["embed", "conv", "head", "bias"] {
            assert_eq!(value(&first, name), value(&second, name), "{} {dtype:?} {name}", P::NAME);
        }
        // Frozen is frozen; the head is AdamW's at its rate and decay.
        assert_eq!(value(&first, "embed"), value(&net(dtype), "embed"));
        let alone = net(dtype);
        let only = VarMap::new();
        only.data().lock().unwrap().insert("head".into(), var(&alone, "head"));
        let mut lr = params.clone();
        let mut adam = params.adam().unwrap();
        adam.lr = *lr.lr() * 0.5;
        adam.weight_decay = 0.3;
        let mut adam = AdamW::from_varmap(&only, adam)?;
        adam.non_finite = NonFinite::Skip;
        for step in 0..12 {
            let factor = if step == 2 { f64::INFINITY } else { 1.0 };
            adam.backward_step(&(loss(&alone, step)? * factor)?)?;
        }
        assert_eq!(value(&first, "head"), value(&alone, "head"), "{}", P::NAME);
        // Near what f64 comes to.
        let exact = net(DType::F64);
        let mut opt = FirstOrder::from_varmap_with(&exact, params.clone(), groups())?;
        opt.non_finite = NonFinite::Skip;
        let tolerance = if dtype == DType::BF16 { 0.05 } else { 1e-3 };
        for step in 0..12 {
            let factor = if step == 2 { f64::INFINITY } else { 1.0 };
            opt.backward_step(&(loss(&exact, step)? * factor)?)?;
        }
        assert_near(&value(&first, "conv"), &value(&exact, "conv"), tolerance);
        assert_ne!(value(&first, "conv"), value(&net(dtype), "conv"));
    }
    // Without frozen Vars the state has more.
    let vars = net(DType::F64);
    let mut opt = FirstOrder::from_varmap(&vars, params.clone())?;
    let before = ["embed", "conv", "head", "bias"].map(|name| value(&vars, name));
    says(opt.resume(&file), "is missing: another model or optimizer wrote this file");
    // Errors leave everything as it was.
    says(
        opt.backward_step(&(loss(&vars, 0)? * f64::NAN)?),
        "the gradient of bias has NaN or infinite elements",
    );
    says(opt.backward_step(&var(&vars, "head").sum_all()?), "bias got no gradient");
    assert_eq!(["embed", "conv", "head", "bias"].map(|name| value(&vars, name)), before);
    assert_eq!((opt.steps(), opt.skipped()), (0, 0));
    // A scaled loss is the loss, and an overflow is left out.
    let (plain, scaled) = (net(DType::F32), net(DType::F32));
    let mut a = FirstOrder::from_varmap(&plain, params.clone())?;
    let mut b = FirstOrder::from_varmap(&scaled, params.clone())?;
    let mut scale = LossScale::default();
    assert!(
        !b.backward_step_scaled(&(loss(&scaled, 0)? * 1e300)?, &mut LossScale { scale: 1e300, ..scale })?
    );
    for step in 0..4 {
        a.backward_step(&loss(&plain, step)?)?;
        assert!(b.backward_step_scaled(&loss(&scaled, step)?, &mut scale)?);
    }
    assert_eq!((b.steps(), b.skipped()), (5, 1));
    assert_near(&value(&scaled, "conv"), &value(&plain, "conv"), 1e-4);
    std::fs::remove_file(&file)?;
    Ok(())
}

#[test]
fn muon_is_resumed_grouped_and_refuses() -> Result<()> {
    all_of(ParamsMuon { lr: 0.02, ..Default::default() })
}

#[test]
fn soap_is_resumed_grouped_and_refuses() -> Result<()> {
    all_of(ParamsSoap { lr: 0.01, period: 3, ..Default::default() })
}

#[test]
fn shampoo_is_resumed_grouped_and_refuses() -> Result<()> {
    all_of(ParamsShampoo { lr: 0.01, period: 3, eps: 1e-2, ..Default::default() })?;
    let factors = ShampooFactors::KlDivergence;
    all_of(ParamsShampoo {
        lr: 0.01,
        period: 3,
        eps: 1e-2,
        grafting: Grafting::None,
        factors,
        ..Default::default()
    })
}

/// Rates and decays of groups by SGD's formula, the first step from rest.
#[test]
fn groups_hold_for_sgd_and_adamw_too() -> Result<()> {
    let vars = net(DType::F64);
    let before = ["conv", "head", "bias"].map(|name| value(&vars, name));
    let groups = Groups(vec![
        Group { frozen: true, ..Group::named("embed") },
        Group { lr_scale: 0.1, weight_decay: Some(0.5), ..Group::named("head") },
    ]);
    let mut opt = Sgd::from_varmap_with(
        &vars,
        ParamsSgd { lr: 0.01, weight_decay: 0.2, ..Default::default() },
        groups,
    )?;
    let grads = loss(&vars, 0)?.backward()?;
    // A frozen Var may lack a gradient.
    let mut without = loss(&vars, 0)?.backward()?;
    without.remove(&var(&vars, "embed"));
    opt.step(&without)?;
    for (name, before, rate, decay) in
        [("conv", &before[0], 0.01, 0.2), ("head", &before[1], 0.001, 0.5), ("bias", &before[2], 0.01, 0.2)]
    {
        let grad = grads.get(&var(&vars, name)).unwrap().flatten_all()?.to_vec1::<f64>()?;
        let expected: Vec<f64> = before.iter().zip(&grad).map(|(p, g)| p - rate * (g + decay * p)).collect();
        assert_near(&value(&vars, name), &expected, 1e-14);
    }
    // AdamW's first step is the sign of the gradient.
    let groups = Groups(vec![Group { lr_scale: 0.1, weight_decay: Some(0.0), ..Group::named("head") }]);
    let vars = net(DType::F64);
    let before = value(&vars, "head");
    let mut opt =
        AdamW::from_varmap_with(&vars, ParamsAdamW { lr: 0.01, eps: 1e-16, ..Default::default() }, groups)?;
    let grads = loss(&vars, 0)?.backward()?;
    opt.step(&grads)?;
    let grad = grads.get(&var(&vars, "head")).unwrap().flatten_all()?.to_vec1::<f64>()?;
    let expected: Vec<f64> = before.iter().zip(&grad).map(|(p, g)| p - 0.001 * g.signum()).collect();
    assert_near(&value(&vars, "head"), &expected, 1e-9);
    Ok(())
}

/// AdamW's own rate follows the learning rate in proportion, and is 0 where that is.
#[test]
fn the_rate_of_the_rest_follows() -> Result<()> {
    let first_moves = |lr: f64, later: &[f64]| -> Result<(f64, f64)> {
        let vars = net(DType::F64);
        let fallback_adam = FallbackAdam { lr: Some(0.002), ..ParamsMuon::default().fallback_adam };
        let params = ParamsMuon { lr, weight_decay: 0.0, fallback_adam, ..Default::default() };
        let mut opt = Muon::from_varmap(&vars, params)?;
        later.iter().for_each(|&lr| opt.set_learning_rate(lr));
        let before = (value(&vars, "bias"), value(&vars, "conv"));
        opt.backward_step(&loss(&vars, 0)?)?;
        let moved =
            |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        Ok((moved(before.0, value(&vars, "bias")), moved(before.1, value(&vars, "conv"))))
    };
    assert!((first_moves(0.01, &[])?.0 - 0.002).abs() < 1e-8);
    assert!((first_moves(0.01, &[0.005])?.0 - 0.001).abs() < 1e-8);
    assert!((first_moves(0.0, &[0.01])?.0 - 0.002).abs() < 1e-8);
    assert_eq!(first_moves(0.01, &[0.0])?, (0.0, 0.0));
    assert_eq!(first_moves(0.0, &[])?, (0.0, 0.0));
    Ok(())
}

#[test]
fn what_a_rule_does_not_use_is_refused() -> Result<()> {
    let vars = net(DType::F32);
    let with = |group: Group| Muon::from_varmap_with(&vars, ParamsMuon::default(), Groups(vec![group]));
    let limit = Some(crate::curvature::FactorLimit::default());
    says(with(Group { optional: true, ..Group::named("head") }), "optional is for NaturalGradient");
    says(with(Group { factor_limit: limit, ..Group::named("head") }), "soap and shampoo have max_dim");
    says(
        with(Group { rule: Some(UpdateRule::Kronecker), ..Group::named("head") }),
        "group \"head\": the rule Kronecker is for NaturalGradient, not for muon",
    );
    says(with(Group::named("haed")), "group \"haed\": matches no Var");
    let adam = Groups(vec![Group { rule: Some(UpdateRule::Adam), ..Group::named("head") }]);
    says(Sgd::from_varmap_with(&vars, ParamsSgd::default(), adam.clone()), "sgd has no Adam beside it");
    AdamW::from_varmap_with(&vars, ParamsAdamW::default(), adam)?;
    let muon = |params| Muon::from_varmap(&vars, params).map(drop);
    let soap = |params| Soap::from_varmap(&vars, params).map(drop);
    let shampoo = |params| Shampoo::from_varmap(&vars, params).map(drop);
    let (m, s, h) = (ParamsMuon::default, ParamsSoap::default, ParamsShampoo::default);
    says(muon(ParamsMuon { lr: -1.0, ..m() }), "expected lr of at least 0, got -1");
    says(muon(ParamsMuon { momentum: 1.0, ..m() }), "expected momentum in [0, 1), got 1");
    says(muon(ParamsMuon { steps: 0, ..m() }), "expected steps of at least 1, got 0");
    says(muon(ParamsMuon { weight_decay: -0.1, ..m() }), "expected weight_decay of at least 0, got -0.1");
    let rest = FallbackAdam { lr: Some(f64::NAN), ..m().fallback_adam };
    says(muon(ParamsMuon { fallback_adam: rest, ..m() }), "expected fallback_adam.lr of at least 0, got NaN");
    let rest = FallbackAdam { beta2: 1.0, ..m().fallback_adam };
    says(soap(ParamsSoap { fallback_adam: rest, ..s() }), "expected fallback_adam.beta2 in [0, 1), got 1");
    says(soap(ParamsSoap { shampoo_beta: Some(1.0), ..s() }), "expected shampoo_beta in [0, 1), got 1");
    says(soap(ParamsSoap { period: 0, ..s() }), "expected period of at least 1, got 0");
    says(soap(ParamsSoap { eps: 0.0, ..s() }), "expected eps above 0, got 0");
    says(soap(ParamsSoap { max_dim: 0, ..s() }), "expected max_dim of at least 1, got 0");
    says(shampoo(ParamsShampoo { beta2: 0.0, ..h() }), "expected beta2 in (0, 1], got 0");
    says(shampoo(ParamsShampoo { exponent: Some(0.0), ..h() }), "expected exponent in (0, 1], got 0");
    let kl = ParamsShampoo { factors: ShampooFactors::KlDivergence, ..h() };
    says(shampoo(ParamsShampoo { exponent: Some(0.25), ..kl }), "expected no exponent or 0.5");
    says(shampoo(ParamsShampoo { beta2: 1.0, ..kl }), "expected beta2 below 1");
    Ok(())
}

/// Rows without a gradient, and steps without any.
#[test]
fn nothing_comes_of_no_gradient() -> Result<()> {
    fn quiet<P: Update>(params: P) -> Result<()> {
        let w = Var::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu)?;
        let mut opt = FirstOrder::new(vec![w.clone()], params)?;
        for step in 0..30 {
            let mut grads = w.sum_all()?.backward()?;
            let row = if step % 3 == 0 { 0f32 } else { step as f32 };
            grads.insert(&w, Tensor::new(&[[0f32, 0.0, 0.0], [row, -row, 0.5 * row]], &Device::Cpu)?);
            opt.step(&grads)?;
        }
        let values = w.to_vec2::<f32>()?;
        assert_eq!(values[0], [1.0, 2.0, 3.0], "{}", P::NAME);
        assert!(values[1].iter().all(|v| v.is_finite() && v.abs() < 20.0), "{}: {values:?}", P::NAME);
        assert!(values[1][0] < 4.0, "{}: {values:?}", P::NAME);
        Ok(())
    }
    quiet(ParamsMuon { weight_decay: 0.0, ..Default::default() })?;
    quiet(ParamsSoap { weight_decay: 0.0, period: 2, ..Default::default() })?;
    quiet(ParamsShampoo { weight_decay: 0.0, period: 2, ..Default::default() })
}
