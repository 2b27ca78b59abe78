//! One multiplier for several Vars.

use super::*;

fn duals() -> [Dual; 4] {
    let options = AugmentedLagrangian { penalty: 2.0, ..Default::default() };
    [
        Dual::nu_pi(1.0, 0.1, 0.0),
        Dual { augmented: 1.0, ..Dual::ascent(0.05) },
        Dual { cap: Some(9.0), ..Dual::nu_pi(0.5, 0.05, 0.5) },
        Dual::augmented_lagrangian(options),
    ]
}

/// The least `1/2 sum (w - target)^2` under `rule`, by gradient descent; the report.
fn solve(rule: &Rule, pattern: &str, targets: &[(&str, Tensor)]) -> Result<(VarMap, Vec<(String, Report)>)> {
    let map = VarMap::new();
    for (name, target) in targets {
        map.data().lock().unwrap().insert((*name).into(), Var::from_tensor(&(target * 0.1)?)?);
    }
    let mut constraints = Constraints::new(&map, &[("*", Rule::Free), (pattern, rule.clone())])?;
    for step in 0..4000 {
        let vars = map.data().lock().unwrap().clone();
        let mut loss = Tensor::new(0f64, &Device::Cpu)?;
        for (name, target) in targets {
            loss = (loss + ((vars[*name].as_tensor() - target)?.sqr()?.sum_all()? * 0.5)?)?;
        }
        // Both ways to the gradient.
        let grads = if step % 2 == 0 {
            (loss + constraints.loss()?)?.backward()?
        } else {
            let mut grads = loss.backward()?;
            constraints.add_gradients(&mut grads)?;
            grads
        };
        for var in vars.values() {
            var.set(&(var.as_detached_tensor() - (grads.get(var).unwrap() * 0.05)?)?)?;
        }
        constraints.after_step(0.05)?;
    }
    let report = constraints.report()?.into_iter().map(|(name, report)| (name.into(), report)).collect();
    Ok((map, report))
}

fn found(map: &VarMap, name: &str) -> Vec<f64> {
    values(&map.data().lock().unwrap()[name]).unwrap()
}

fn near(found: &[f64], expected: &[f64]) {
    let near = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-8);
    assert!(near, "{found:?}, expected {expected:?}");
}

/// `(3, 4)` lies in two Vars: its nearest point of norm 1 is `(0.6, 0.8)`, whose multiplier is 4.
#[test]
fn a_ball_of_several_vars() -> Result<()> {
    let target = |x: f64| Tensor::new(&[[x]], &Device::Cpu);
    let targets = [("a.w", target(3.0)?), ("b.w", target(4.0)?), ("c", target(7.0)?)];
    for dual in duals() {
        for bound in [Bound::AtMost(1.0), Bound::Equal(1.0)] {
            let rule = Rule::LagrangianTotal { omega: Omega::Norm(Grouping::Whole), bound, dual };
            let (map, report) = solve(&rule, "*.w", &targets)?;
            near(&found(&map, "a.w"), &[0.6]);
            near(&found(&map, "b.w"), &[0.8]);
            near(&found(&map, "c"), &[7.0]);
            assert_eq!((report.len(), report[0].0.as_str()), (1, "*.w"));
            near(&report[0].1.alpha, &[4.0]);
            near(&report[0].1.excess, &[0.0]);
        }
        // `3 - alpha + 2.5 - alpha = 1`.
        let targets = [("a.w", target(3.0)?), ("b.w", target(-2.5)?)];
        let bound = Bound::AtMost(1.0);
        let rule = Rule::LagrangianTotal { omega: Omega::L1(Grouping::Whole), bound, dual };
        let (map, report) = solve(&rule, "*", &targets)?;
        near(&found(&map, "a.w"), &[0.75]);
        near(&found(&map, "b.w"), &[-0.25]);
        near(&report[0].1.alpha, &[2.25]);
    }
    Ok(())
}

/// A unit is a row of the weight and an element of the bias: of the first the norm is 13, the second is inside.
#[test]
fn units_with_their_biases() -> Result<()> {
    let targets = [
        ("fc.weight", Tensor::new(&[[3.0, 4.0], [0.1, 0.2]], &Device::Cpu)?),
        ("fc.bias", Tensor::new(&[12.0, 0.3], &Device::Cpu)?),
    ];
    for dual in duals() {
        let dual = Dual { cap: None, ..dual };
        let bound = Bound::AtMost(1.0);
        let rule = Rule::LagrangianTotal { omega: Omega::Norm(Grouping::Rows), bound, dual };
        let (map, report) = solve(&rule, "fc.*", &targets)?;
        near(&found(&map, "fc.weight"), &[3.0 / 13.0, 4.0 / 13.0, 0.1, 0.2]);
        near(&found(&map, "fc.bias"), &[12.0 / 13.0, 0.3]);
        near(&report[0].1.alpha, &[12.0, 0.0]);
    }
    Ok(())
}

#[test]
fn refused() -> Result<()> {
    let map = varmap(&[("a", &[3.0, 4.0]), ("b", &[1.0])]);
    let total = |grouping, bound| Rule::LagrangianTotal {
        omega: Omega::Norm(grouping),
        bound: Bound::AtMost(bound),
        dual: Dual::ascent(0.1),
    };
    for (grouping, bound, part) in [
        (Grouping::Rows, 1.0, "constraints: ?"),
        (Grouping::Rows, 1.0, "expected as many of each tensor, got [2, 1]"),
        (Grouping::Whole, -1.0, "multiplier: bound"),
    ] {
        let error = Constraints::new(&map, &[("?", total(grouping, bound))]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut constraints = Constraints::new(&map, &[("?", total(Grouping::Whole, 1.0))])?;
    constraints.after_step(0.1)?;
    let before = constraints.report()?[0].1.alpha.clone();
    map.data().lock().unwrap()["b"].set(&Tensor::new(&[f64::NAN], &Device::Cpu)?)?;
    for error in [
        constraints.after_step(0.1).unwrap_err(),
        constraints.loss().unwrap_err(),
        constraints.report().unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("constraints: ?") && error.contains("finite"), "{error}");
    }
    map.data().lock().unwrap()["b"].set(&Tensor::new(&[1.0], &Device::Cpu)?)?;
    assert_eq!(constraints.report()?[0].1.alpha, before);
    map.data().lock().unwrap().insert("n".into(), Var::new(&[1u32], &Device::Cpu)?);
    let error = Constraints::new(&map, &[("?", total(Grouping::Whole, 1.0))]).unwrap_err().to_string();
    assert!(error.contains("constraints: n") && error.contains("floating point"), "{error}");
    Ok(())
}
