use super::super::{GroupLasso, Grouping, Lp, SparseGroupLasso};
use super::*;
use crate::gpu::emulate::emulate;
use crate::ops::testing::{assert_close, random, values};
use crate::penalty::AugmentedLagrangian;
use candle_core::{DType, Device};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};

mod through;
mod total;

/// `sum |w|`.
#[derive(Debug)]
struct Lasso;

impl Penalty for Lasso {
    fn name(&self) -> String {
        "lasso".into()
    }
    fn value(&self, w: &Tensor) -> Result<Tensor> {
        w.abs()?.sum_all()
    }
    fn gradient(&self, w: &Tensor) -> Result<Tensor> {
        w.sign()
    }
    fn prox(&self, w: &Tensor, step: f64) -> Result<Tensor> {
        if step == 0.0 {
            return Ok(w.clone());
        }
        w.sign()? * (w.abs()? - step)?.relu()?
    }
}

fn varmap(vars: &[(&str, &[f64])]) -> VarMap {
    let varmap = VarMap::new();
    for (name, values) in vars {
        let var = Var::new(*values, &Device::Cpu).unwrap();
        varmap.data().lock().unwrap().insert((*name).to_string(), var);
    }
    varmap
}

fn get(varmap: &VarMap, name: &str) -> Vec<f64> {
    varmap.data().lock().unwrap()[name].to_vec1().unwrap()
}

fn lasso(factor: f64) -> Rule {
    Rule::Penalize { penalty: Arc::new(Lasso), factor }
}

fn prox(factor: f64) -> Rule {
    Rule::Proximal { penalty: Arc::new(Lasso), factor }
}

fn ball(radius: f64) -> Rule {
    Rule::Project { set: FeasibleSet::L2 { radius } }
}

fn lagrangian() -> Rule {
    Rule::Lagrangian {
        omega: Omega::Norm(Grouping::Whole),
        bound: Bound::AtMost(1.0),
        dual: Dual::ascent(0.5),
    }
}

#[test]
fn rules_apply_in_order_to_all_that_match() -> Result<()> {
    let map = varmap(&[("a.w", &[3.0, 4.5]), ("b.w", &[6.0, 8.0]), ("b.bias", &[7.0])]);
    let rules = [("*.w", prox(5.0)), ("a.*", ball(1.0)), ("*.bias", Rule::Free), ("b.w", lagrangian())];
    let mut constraints = Constraints::new(&map, &rules)?;
    constraints.after_step(0.1)?;
    // a.w: (2.5, 4) after the threshold of 0.5, then norm 1. b.w: (5.5, 7.5).
    let norm = 2.5f64.hypot(4.0);
    for (found, expected) in get(&map, "a.w").iter().zip([2.5 / norm, 4.0 / norm]) {
        assert!((found - expected).abs() < 1e-15);
    }
    assert_eq!(get(&map, "b.w"), [5.5, 7.5]);
    assert_eq!(get(&map, "b.bias"), [7.0]);
    let report = constraints.report()?;
    let excess = 5.5f64.hypot(7.5) - 1.0;
    assert_eq!(report.len(), 1);
    assert_eq!((report[0].0, &report[0].1.excess), ("b.w", &vec![excess]));
    assert_eq!(report[0].1.alpha, [0.5 * excess]);
    constraints.after_step(0.0)?; // the penalty gives the Var's own storage back
    assert_eq!(get(&map, "b.w"), [5.5, 7.5]);
    Ok(())
}

#[test]
fn the_loss_adds_up() -> Result<()> {
    let map = varmap(&[("a", &[3.0, -4.0]), ("b", &[2.0])]);
    let mut constraints = Constraints::new(&map, &[("*", lasso(0.5)), ("a", lagrangian())])?;
    assert_eq!(constraints.loss()?.to_scalar::<f64>()?, 4.5);
    constraints.after_step(0.1)?; // alpha = 2
    let loss = constraints.loss()?;
    assert!((loss.to_scalar::<f64>()? - 12.5).abs() < 1e-12);
    let grads = loss.backward()?;
    let data = map.data().lock().unwrap();
    assert_eq!(grads.get(&data["b"]).unwrap().to_vec1::<f64>()?, [0.5]);
    let a = grads.get(&data["a"]).unwrap().to_vec1::<f64>()?;
    assert!((a[0] - 1.7).abs() < 1e-12 && (a[1] + 2.1).abs() < 1e-12, "{a:?}");
    drop(data);
    assert_eq!(Constraints::new(&map, &[("*", Rule::Free)])?.loss()?.to_scalar::<f64>()?, 0.0);
    // f32 and f64 together make f64.
    map.data().lock().unwrap().insert("c".into(), Var::new(&[2f32], &Device::Cpu)?);
    assert_eq!(Constraints::new(&map, &[("*", lasso(1.0))])?.loss()?.to_scalar::<f64>()?, 11.0);
    Ok(())
}

#[test]
fn gradients_are_those_of_the_loss() -> Result<()> {
    let map = VarMap::new();
    for (stream, (name, dims)) in
        [("a.w", [4, 3]), ("b.w", [2, 4]), ("c", [3, 3]), ("d", [2, 2])].iter().enumerate()
    {
        let var = Var::from_tensor(&random(stream as u64, dims)?)?;
        map.data().lock().unwrap().insert((*name).into(), var);
    }
    let penalize = |penalty: Arc<dyn Penalty>| Rule::Penalize { penalty, factor: 0.3 };
    let sparse = SparseGroupLasso::new(0.4, Grouping::Columns, true)?;
    let dual = Dual { augmented: 0.7, ..Dual::ascent(0.5) };
    let rules = [
        ("*", Rule::Free),
        ("?", penalize(Arc::new(Lp::l1()))),
        ("a.w", penalize(Arc::new(GroupLasso::default()))),
        ("b.w", penalize(Arc::new(sparse))),
        ("c", penalize(Arc::new(Spatial::default()))),
        ("c", lasso(0.2)),
        ("*.w", Rule::SpatialTotal { penalty: Spatial::default(), factor: 0.1 }),
        ("a.w", Rule::Lagrangian { omega: Omega::Norm(Grouping::Rows), bound: Bound::AtMost(0.5), dual }),
        ("d", Rule::Lagrangian { omega: Omega::L1(Grouping::Whole), bound: Bound::AtMost(9.0), dual }),
    ];
    let mut constraints = Constraints::new(&map, &rules)?;
    constraints.after_step(0.1)?;
    let vars: Vec<(String, Var)> = map.data().lock().unwrap().clone().into_iter().collect();
    // `d` has no part in the loss.
    let mut loss = Tensor::new(0f64, &Device::Cpu)?;
    for (_, var) in vars.iter().filter(|(name, _)| name != "d") {
        loss = (loss + var.as_tensor().powf(3.0)?.sum_all()?)?;
    }
    let expected = (&loss + constraints.loss()?)?.backward()?;
    let mut grads = loss.backward()?;
    let value = constraints.add_gradients(&mut grads)?;
    assert_close(&value, &[constraints.loss()?.to_scalar()?], 1e-15);
    for (name, var) in &vars {
        let (found, expected) = (grads.get(var).unwrap(), expected.get(var).unwrap());
        assert_close(found, &values(expected)?, 1e-14);
        assert_eq!(found.dims(), var.dims(), "{name}");
    }
    // The Vars of one pattern together, and no others.
    let total = Rule::SpatialTotal { penalty: Spatial::default(), factor: 0.1 };
    let together = Constraints::new(&map, &[("*", Rule::Free), ("*.w", total)])?.loss()?;
    let layer = |name: &str| {
        let var = &vars.iter().find(|(n, _)| n == name).unwrap().1;
        Spatial::default().value(var)?.to_scalar::<f64>()
    };
    assert_close(&together, &[0.1 * (layer("a.w")?.exp() + layer("b.w")?.exp()).ln()], 1e-14);
    // Nothing is added where something is wrong.
    let broken = varmap(&[("a", &[1.0, 2.0]), ("b", &[1.0, f64::NAN])]);
    let constraints = Constraints::new(&broken, &[("*", penalize(Arc::new(Lp::l2())))])?;
    let a = broken.data().lock().unwrap()["a"].clone();
    let mut grads = a.sum_all()?.backward()?;
    let error = constraints.add_gradients(&mut grads).unwrap_err().to_string();
    assert!(error.contains("constraints: b"), "{error}");
    assert_eq!(grads.get(&a).unwrap().to_vec1::<f64>()?, [1.0, 1.0]);
    assert_eq!(
        Constraints::new(&broken, &[("*", Rule::Free)])?.add_gradients(&mut grads)?.to_scalar::<f64>()?,
        0.0
    );
    Ok(())
}

/// Soft thresholds after each step reach the lasso's solution with its exact zeros, with any optimizer that descends.
#[test]
fn any_optimizer() -> Result<()> {
    let target = Tensor::new(&[2.0, -0.3, -1.5], &Device::Cpu)?;
    fn run<O: Optimizer>(map: &VarMap, mut optimizer: O, rule: Rule, target: &Tensor) -> Result<Vec<f64>> {
        let mut constraints = Constraints::new(map, &[("w", rule)])?;
        for step in 0..3000 {
            optimizer.set_learning_rate(if step < 2000 { 0.05 } else { 0.002 });
            let w = map.data().lock().unwrap()["w"].clone();
            let loss = ((w.as_tensor() - target)?.sqr()?.sum_all()? * 0.5)?;
            optimizer.backward_step(&(loss + constraints.loss()?)?)?;
            constraints.after_step(optimizer.learning_rate())?;
        }
        Ok(get(map, "w"))
    }
    let map = || varmap(&[("w", &[0.1, 0.1, 0.1])]);
    let sgd = |map: &VarMap| SGD::new(map.all_vars(), 0.05);
    let adam =
        |map: &VarMap| AdamW::new(map.all_vars(), ParamsAdamW { weight_decay: 0.0, ..Default::default() });
    let solved = |found: &[f64], expected: [f64; 3], tolerance: f64| {
        assert!(
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance),
            "{found:?} {expected:?}"
        );
    };
    let here = map();
    let found = run(&here, sgd(&here)?, prox(0.5), &target)?;
    solved(&found, [1.5, 0.0, -1.0], 1e-9);
    assert_eq!(found[1], 0.0);
    let side = FeasibleSet::Box { bound: 1.0 };
    for exact in [true, false] {
        let here = map();
        let rule = Rule::Project { set: side };
        let found = if exact {
            run(&here, sgd(&here)?, rule, &target)?
        } else {
            run(&here, adam(&here)?, rule, &target)?
        };
        solved(&found, [1.0, -0.3, -1.0], 1e-6);
        assert_eq!(side.violation(&Tensor::new(found, &Device::Cpu)?)?, 0.0);
    }
    Ok(())
}

fn refused(map: &VarMap, rules: &[(&str, Rule)]) -> String {
    let error = Constraints::new(map, rules).unwrap_err();
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn refusals_name_the_vars() {
    let map = varmap(&[("a.w", &[1.0]), ("b.w", &[1.0])]);
    let expected = "constraints: \"c*\" matches no Var; the Vars are a.w, b.w";
    assert!(refused(&map, &[("*", Rule::Free), ("c*", ball(1.0))]).starts_with(expected));
    let expected = "constraints: no rule for b.w; if none is meant, give them Rule::Free";
    assert!(refused(&map, &[("a*", ball(1.0))]).starts_with(expected));
    for rule in [
        lasso(-1.0),
        prox(f64::NAN),
        Rule::SpatialTotal { penalty: Spatial::default(), factor: -1.0 },
        ball(-1.0),
        Rule::Project {
            set: FeasibleSet::MaxNorm { grouping: Grouping::Blocks { rows: 0, columns: 1 }, radius: 1.0 },
        },
        Rule::Lagrangian {
            omega: Omega::Norm(Grouping::Rows),
            bound: Bound::AtMost(f64::NAN),
            dual: Dual::ascent(1.0),
        },
    ] {
        let error = refused(&map, &[("*", Rule::Free), ("b*", rule)]);
        assert!(error.starts_with("constraints: b.w"), "{error}");
    }
    map.data().lock().unwrap().insert("n".into(), Var::new(&[1u32], &Device::Cpu).unwrap());
    assert!(refused(&map, &[("*", ball(1.0))]).starts_with("constraints: n"));
    assert!(Constraints::new(&map, &[("*.w", ball(1.0)), ("n", Rule::Free)]).is_ok());
}

#[test]
fn all_or_nothing() -> Result<()> {
    let map = varmap(&[("a", &[3.0, 4.0]), ("b", &[3.0, 4.0]), ("c", &[1.0, f64::NAN])]);
    let rules = [("a", ball(1.0)), ("b", lagrangian()), ("c", ball(1.0))];
    let mut constraints = Constraints::new(&map, &rules)?;
    let error = constraints.after_step(0.1).unwrap_err().to_string();
    assert!(error.contains("constraints: c") && error.contains("finite"), "{error}");
    assert_eq!(get(&map, "a"), [3.0, 4.0]);
    assert_eq!(constraints.report()?[0].1.alpha, [0.0]);
    let mut constraints = Constraints::new(&map, &[("a", prox(1.0)), ("?", Rule::Free)])?;
    assert!(constraints.after_step(f64::NAN).is_err());
    Ok(())
}

#[test]
fn masked_weights_stay_zero() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let map = VarMap::new();
        let start = Tensor::new(&[3f64, 0.0, -2.0, 1.0], &Device::Cpu)?.to_dtype(dtype)?;
        map.data().lock().unwrap().insert("w".into(), Var::from_tensor(&start)?);
        let mask = Tensor::new(&[1u8, 0, 0, 7], &Device::Cpu)?;
        let mut constraints = Constraints::new(&map, &[("w", Rule::Mask { mask })])?;
        // With momentum, which would move them even without a gradient.
        let mut adam = AdamW::new(map.all_vars(), ParamsAdamW { lr: 0.1, ..Default::default() })?;
        for _ in 0..3 {
            let w = map.data().lock().unwrap()["w"].clone();
            adam.backward_step(&(w.as_tensor() - 5.0)?.sqr()?.sum_all()?)?;
            constraints.after_step(f64::NAN)?; // the learning rate is the proximal steps' alone
            let found: Vec<f64> = w.to_dtype(DType::F64)?.to_vec1()?;
            assert!(found[1] == 0.0 && found[2] == 0.0 && found[0] > 3.0 && found[3] > 1.0, "{found:?}");
        }
    }
    // Zero times NaN is NaN; a masked weight is zero all the same, on a GPU too, and so is what a rule after the mask sees.
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for rules in [1, 2] {
            let step = || -> Result<Vec<f64>> {
                let (nan, inf) = (f64::NAN, f64::INFINITY);
                let start = Tensor::new(&[3.0, nan, -inf, inf, 4.0], &Device::Cpu)?.to_dtype(dtype)?;
                let map = VarMap::new();
                map.data().lock().unwrap().insert("w".into(), Var::from_tensor(&start)?);
                let mask = Tensor::new(&[1u8, 0, 0, 0, 1], &Device::Cpu)?;
                let rules = &[("w", Rule::Mask { mask }), ("w", ball(1.0))][..rules];
                Constraints::new(&map, rules)?.after_step(0.1)?;
                let w = map.data().lock().unwrap()["w"].clone();
                values(&w)
            };
            let kept = if rules == 1 { [3.0, 4.0] } else { [0.6, 0.8] };
            for found in [step()?, emulate(step)?] {
                assert_eq!(found[1..4].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0; 3], "{found:?}");
                assert!((found[0] - kept[0]).abs() + (found[4] - kept[1]).abs() < 0.01, "{found:?}");
            }
        }
    }
    let map = varmap(&[("w", &[1.0, 2.0])]);
    for (mask, part) in [
        (Tensor::new(&[1u8], &Device::Cpu)?, "expected a mask of U8 [2], got U8 [1]"),
        (Tensor::new(&[1f64, 0.0], &Device::Cpu)?, "got F64 [2]"),
    ] {
        let error = Constraints::new(&map, &[("w", Rule::Mask { mask })]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}
