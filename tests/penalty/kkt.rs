//! Constrained optima: those with known weights and multipliers, and the conditions of Karush, Kuhn and Tucker elsewhere.

use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::penalty::{AugmentedLagrangian, Bound, Dual, FeasibleSet, Grouping, Kkt, Multiplier, Omega};

const ELEMENTS: Grouping = Grouping::Blocks { rows: 1, columns: 1 };

fn flat(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance), "{a:?}\nexpected {b:?}");
}

/// `1/2 tr (W - A) H (W - A)^T`.
struct Bowl {
    a: Tensor,
    h: Tensor,
}

impl Bowl {
    fn new(a: &[[f64; 3]; 2], h: &[[f64; 3]; 3]) -> Result<Self> {
        Ok(Self { a: Tensor::new(a, &Device::Cpu)?, h: Tensor::new(h, &Device::Cpu)? })
    }

    fn loss(&self, w: &Tensor) -> Result<Tensor> {
        let d = (w - &self.a)?;
        (d.matmul(&self.h)? * &d)?.sum_all()? * 0.5
    }

    fn gradient(&self, w: &Tensor) -> Result<Tensor> {
        (w.detach() - &self.a)?.matmul(&self.h)
    }
}

const A: [[f64; 3]; 2] = [[3.0, -0.2, 0.0], [4.0, 0.4, -2.0]];
const ROUND: [[f64; 3]; 3] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
const STEEP: [[f64; 3]; 3] = [[3.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.5]];

/// Gradient descent on the Lagrangian with an update of the multipliers after each step.
fn solve(
    bowl: &Bowl,
    omega: Omega,
    bound: impl Into<Bound>,
    dual: Dual,
    steps: usize,
) -> Result<(Tensor, Multiplier)> {
    let w = Var::from_tensor(&bowl.a.zeros_like()?)?;
    let mut multiplier = Multiplier::new(omega, bound, dual, w.dims())?;
    for _ in 0..steps {
        let loss = (bowl.loss(&w)? + multiplier.term(&w)?)?;
        let grads = loss.backward()?;
        let grad = grads.get(&w).unwrap();
        w.set(&(w.as_detached_tensor() - (grad * 0.05)?)?)?;
        multiplier.update(&w)?;
    }
    Ok((w.as_detached_tensor(), multiplier))
}

fn duals() -> [Dual; 7] {
    let growing = AugmentedLagrangian { penalty: 0.5, growth: 1.01, limit: 4.0, ..Default::default() };
    [
        Dual::ascent(0.05),
        Dual::nu_pi(1.0, 0.1, 0.0),
        Dual::nu_pi(0.5, 0.05, 0.5),
        Dual { augmented: 1.0, ..Dual::ascent(0.05) },
        Dual { restart: Some(0.2), cap: Some(50.0), ..Dual::nu_pi(1.0, 0.1, 0.0) },
        Dual::augmented_lagrangian(AugmentedLagrangian { penalty: 2.0, ..Default::default() }),
        Dual::augmented_lagrangian(growing),
    ]
}

#[test]
fn a_box_has_a_multiplier_for_each_weight() -> Result<()> {
    let bowl = Bowl::new(&A, &ROUND)?;
    for dual in duals() {
        // Those outside come to the bound, and pull with what they are cut by.
        let (w, multiplier) = solve(&bowl, Omega::L1(ELEMENTS), 1.0, dual, 3000)?;
        close(&flat(&w), &[1.0, -0.2, 0.0, 1.0, 0.4, -1.0], 1e-9);
        close(&multiplier.alpha()?, &[2.0, 0.0, 0.0, 3.0, 0.0, 1.0], 1e-9);
    }
    Ok(())
}

#[test]
fn a_ball() -> Result<()> {
    let bowl = Bowl::new(&A, &ROUND)?;
    let norm = flat(&bowl.a.sqr()?.sum_all()?)[0].sqrt();
    let shrunk: Vec<f64> = flat(&bowl.a).iter().map(|a| a * 2.0 / norm).collect();
    for dual in duals() {
        let (w, multiplier) = solve(&bowl, Omega::Norm(Grouping::Whole), 2.0, dual, 3000)?;
        close(&flat(&w), &shrunk, 1e-9);
        close(&multiplier.alpha()?, &[norm - 2.0], 1e-9);
    }
    // The same ball by squares: w (1 + 2 alpha) = a.
    for dual in [Dual::ascent(0.01), Dual::nu_pi(0.02, 0.01, 0.0)] {
        let (w, multiplier) = solve(&bowl, Omega::SquaredNorm(Grouping::Whole), 4.0, dual, 4000)?;
        close(&flat(&w), &shrunk, 1e-9);
        close(&multiplier.alpha()?, &[(norm / 2.0 - 1.0) / 2.0], 1e-9);
    }
    Ok(())
}

#[test]
fn columns_have_multipliers_of_their_own() -> Result<()> {
    let bowl = Bowl::new(&A, &ROUND)?;
    let small = 0.2f64.hypot(0.4);
    for dual in duals() {
        // Norms 5, sqrt(0.2) and 2, of which the second is inside.
        let (w, multiplier) = solve(&bowl, Omega::Norm(Grouping::Columns), 1.0, dual, 3000)?;
        close(&flat(&w), &[0.6, -0.2, 0.0, 0.8, 0.4, -1.0], 1e-9);
        close(&multiplier.alpha()?, &[4.0, 0.0, 1.0], 1e-9);
        let report = multiplier.report(&w)?;
        close(&report.excess, &[0.0, small - 1.0, 0.0], 1e-9);
        close(&report.slackness, &[0.0; 3], 1e-8);
    }
    Ok(())
}

/// `w - a + alpha w / ||w|| = 0` leads to `||w|| = k` along `a` with `alpha = ||a|| - k`, which is negative where weights are to be longer.
#[test]
fn equalities_have_multipliers_of_either_sign() -> Result<()> {
    let bowl = Bowl::new(&A, &ROUND)?;
    let norm = flat(&bowl.a.sqr()?.sum_all()?)[0].sqrt();
    let along = |k: f64| flat(&bowl.a).iter().map(|a| a * k / norm).collect::<Vec<_>>();
    for dual in duals().into_iter().map(|dual| Dual { restart: None, ..dual }) {
        for k in [2.0, 8.0] {
            let (w, multiplier) = solve(&bowl, Omega::Norm(Grouping::Whole), Bound::Equal(k), dual, 4000)?;
            close(&flat(&w), &along(k), 1e-9);
            close(&multiplier.alpha()?, &[norm - k], 1e-9);
            let kkt = multiplier.kkt(&w, &bowl.gradient(&w)?)?;
            assert!(kkt.stationarity < 1e-8 && kkt.violation < 1e-8, "{kkt:?}");
            assert_eq!(multiplier.report(&w)?.infeasible(10), [0; 0]);
        }
        // Norms 5, sqrt(0.2) and 2: the second column is too short.
        let (w, multiplier) = solve(&bowl, Omega::Norm(Grouping::Columns), Bound::Equal(1.0), dual, 4000)?;
        let small = 0.2f64.hypot(0.4);
        close(&flat(&w), &[0.6, -0.2 / small, 0.0, 0.8, 0.4 / small, -1.0], 1e-9);
        close(&multiplier.alpha()?, &[4.0, small - 1.0, 1.0], 1e-9);
    }
    // By squares: w (1 + 2 alpha) = a.
    for (k, dual) in [(4.0, Dual::nu_pi(0.02, 0.01, 0.0)), (49.0, Dual::nu_pi(0.02, 0.01, 0.0))] {
        let (w, multiplier) = solve(&bowl, Omega::SquaredNorm(Grouping::Whole), Bound::Equal(k), dual, 6000)?;
        close(&flat(&w), &along(k.sqrt()), 1e-8);
        close(&multiplier.alpha()?, &[(norm / k.sqrt() - 1.0) / 2.0], 1e-8);
    }
    Ok(())
}

/// The least `-w^2 / 2` with `|w| <= 2` or `|w| = 2`: at 2, where `alpha = 2` holds what pulls outwards. The Lagrangian bends downwards there,
/// so that only a penalty above 1 makes a minimum of it.
#[test]
fn the_method_of_multipliers_bends_the_lagrangian() -> Result<()> {
    let run = |dual: Dual, bound: Bound| -> Result<[f64; 3]> {
        let w = Var::new(&[1.5f64], &Device::Cpu)?;
        let mut multiplier = Multiplier::new(Omega::L1(Grouping::Whole), bound, dual, &[1])?;
        for _ in 0..2000 {
            let loss = (multiplier.term(&w)? - (w.sqr()?.sum_all()? * 0.5)?)?;
            let grads = loss.backward()?;
            w.set(&(w.as_detached_tensor() - (grads.get(&w).unwrap() * 0.05)?)?)?;
            multiplier.update(&w)?;
        }
        let report = multiplier.report(&w)?;
        Ok([flat(&w)[0], report.alpha[0], report.penalty[0]])
    };
    for bound in [Bound::AtMost(2.0), Bound::Equal(2.0)] {
        let fixed = |penalty: f64| AugmentedLagrangian { penalty, ..Default::default() };
        close(&run(Dual::augmented_lagrangian(fixed(5.0)), bound)?, &[2.0, 2.0, 5.0], 1e-9);
        // A penalty that is too small, and the same one where it may grow.
        assert!((run(Dual::augmented_lagrangian(fixed(0.5)), bound)?[1] - 2.0).abs() > 0.5);
        let growing = AugmentedLagrangian { growth: 1.1, limit: 8.0, ..fixed(0.5) };
        let [w, alpha, penalty] = run(Dual::augmented_lagrangian(growing), bound)?;
        close(&[w, alpha], &[2.0, 2.0], 1e-9);
        assert!(penalty > 1.0 && penalty <= 8.0, "{penalty}");
        assert!((run(Dual::ascent(0.05), bound)?[0] - 2.0).abs() > 0.5);
    }
    Ok(())
}

/// A rate of 0.1 for 1,000 steps at a norm of 100 with a bound of 1, and then a norm of 0.9.
#[test]
fn multipliers_wind_up_and_need_not() -> Result<()> {
    let (far, inside) = (Tensor::new(&[100.0], &Device::Cpu)?, Tensor::new(&[0.9], &Device::Cpu)?);
    let run = |dual: Dual, steps: usize| -> Result<(f64, f64)> {
        let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 1.0, dual, &[1])?;
        for _ in 0..1000 {
            multiplier.update(&far)?;
        }
        let high = multiplier.alpha()?[0];
        for _ in 0..steps {
            multiplier.update(&inside)?;
        }
        Ok((high, multiplier.alpha()?[0]))
    };
    let plain = Dual::ascent(0.1);
    let (high, low) = run(plain, 100)?;
    close(&[high, low], &[9900.0, 9899.0], 1e-8);
    // The cap holds the integral too: 5 is gone after 500 steps of 0.01.
    close(&[run(Dual { cap: Some(5.0), ..plain }, 499)?.1], &[0.01], 1e-9);
    close(&[run(Dual { cap: Some(5.0), ..plain }, 501)?.1], &[0.0], 0.0);
    // All that is remembered begins anew, the average too, and a penalty that has grown.
    for dual in [plain, Dual::nu_pi(3.0, 0.1, 0.99)] {
        let dual = Dual { restart: Some(0.05), ..dual };
        assert_eq!(run(dual, 1)?.1, 0.0);
        assert!(run(Dual { restart: Some(0.2), ..dual }, 1)?.1 > 9000.0, "0.9 is inside by 0.1 alone");
    }
    let growing = AugmentedLagrangian { growth: 2.0, limit: 64.0, ..Default::default() };
    let dual = Dual { restart: Some(0.0), ..Dual::augmented_lagrangian(growing) };
    let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 1.0, dual, &[1])?;
    for _ in 0..10 {
        multiplier.update(&far)?;
    }
    assert_eq!(multiplier.report(&far)?.penalty, [64.0]);
    multiplier.update(&inside)?;
    let report = multiplier.report(&inside)?;
    assert_eq!((report.alpha, report.penalty), (vec![0.0], vec![1.0]));
    // An equality's cap is for both signs.
    let dual = Dual { cap: Some(5.0), ..plain };
    let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), Bound::Equal(200.0), dual, &[1])?;
    for _ in 0..10 {
        multiplier.update(&far)?;
    }
    assert_eq!(multiplier.alpha()?, [-5.0]);
    Ok(())
}

/// A sphere of radius 2 and a norm of at most 1 have no point in common: the multiplier grows for nothing, and the report shows it. A bound
/// that can be met, however late, shows nothing.
#[test]
fn infeasible_constraints_show() -> Result<()> {
    let sphere = FeasibleSet::Sphere { grouping: Grouping::Rows, radius: 2.0 };
    let w = Var::new(&[[1.0, 0.0], [0.6, 0.8]], &Device::Cpu)?;
    let target = Tensor::new(&[[3.0, 4.0], [0.0, 1.0]], &Device::Cpu)?;
    let omega = Omega::Norm(Grouping::Rows);
    for (bound, expected) in [(1.0, vec![0, 1]), (2.5, vec![])] {
        let mut multiplier = Multiplier::new(omega, bound, Dual::ascent(0.1), w.dims())?;
        for step in 1..=300 {
            let loss = (((w.as_tensor() - &target)?.sqr()?.sum_all()? * 0.5)? + multiplier.term(&w)?)?;
            let grads = loss.backward()?;
            w.set(&sphere.project(&(w.as_detached_tensor() - (grads.get(&w).unwrap() * 0.05)?)?)?)?;
            multiplier.update(&w)?;
            let report = multiplier.report(&w)?;
            assert_eq!(report.stalled, vec![if expected.is_empty() { 0 } else { step - 1 }; 2]);
        }
        let report = multiplier.report(&w)?;
        assert_eq!(report.infeasible(100), expected);
        let grown = if expected.is_empty() { 0.0 } else { 30.0 };
        close(&report.alpha, &[grown; 2], 1e-9);
    }
    // From far away, slowly.
    let bowl = Bowl::new(&A, &ROUND)?;
    let w = Var::from_tensor(&(&bowl.a * 10.0)?)?;
    let mut multiplier = Multiplier::new(Omega::Norm(Grouping::Whole), 2.0, Dual::ascent(0.01), w.dims())?;
    for _ in 0..3000 {
        let grads = (bowl.loss(&w)? + multiplier.term(&w)?)?.backward()?;
        w.set(&(w.as_detached_tensor() - (grads.get(&w).unwrap() * 0.05)?)?)?;
        multiplier.update(&w)?;
        assert_eq!(multiplier.report(&w)?.infeasible(100), [0; 0]);
    }
    Ok(())
}

fn assert_solved(kkt: Kkt) {
    assert!(kkt.stationarity < 1e-7 && kkt.violation < 1e-8 && kkt.complementarity < 1e-7, "{kkt:?}");
}

#[test]
fn three_routes_lead_to_one_optimum() -> Result<()> {
    let bowl = Bowl::new(&A, &STEEP)?;
    for grouping in [Grouping::Rows, Grouping::Columns, Grouping::Whole] {
        let (w, multiplier) =
            solve(&bowl, Omega::SquaredNorm(grouping), 1.0, Dual::nu_pi(0.1, 0.05, 0.0), 8000)?;
        assert_solved(multiplier.kkt(&w, &bowl.gradient(&w)?)?);
        // Reprojection after each step of gradient descent.
        let set = FeasibleSet::MaxNorm { grouping, radius: 1.0 };
        let mut projected = bowl.a.zeros_like()?;
        for _ in 0..4000 {
            projected = set.project(&(&projected - (bowl.gradient(&projected)? * 0.05)?)?)?;
        }
        close(&flat(&projected), &flat(&w), 1e-7);
        // The penalty with the multipliers as fixed factors.
        let mut penalized = bowl.a.zeros_like()?;
        let factors = match grouping {
            Grouping::Rows => Tensor::new(multiplier.alpha()?, &Device::Cpu)?.reshape((2, 1))?,
            Grouping::Columns => Tensor::new(multiplier.alpha()?, &Device::Cpu)?.reshape((1, 3))?,
            _ => Tensor::new(multiplier.alpha()?, &Device::Cpu)?.reshape((1, 1))?,
        };
        for _ in 0..4000 {
            let slope = (bowl.gradient(&penalized)? + penalized.broadcast_mul(&(&factors * 2.0)?)?)?;
            penalized = (&penalized - (slope * 0.05)?)?;
        }
        close(&flat(&penalized), &flat(&w), 1e-6);
    }
    Ok(())
}

/// Where the optimum is at a kink, subgradients count: at zero weights a multiplier of at least the slope's norm solves.
#[test]
fn kinks() -> Result<()> {
    let bowl = Bowl::new(&A, &ROUND)?;
    let zero = bowl.a.zeros_like()?;
    let mut multiplier =
        Multiplier::new(Omega::Norm(Grouping::Columns), 0.0, Dual::ascent(1.0), zero.dims())?;
    let before = multiplier.kkt(&zero, &bowl.gradient(&zero)?)?;
    assert!((before.stationarity - (25.0f64 + 0.2 + 4.0).sqrt()).abs() < 1e-12);
    multiplier.update(&bowl.a)?; // to the norms of the columns, which are just enough
    assert_solved(multiplier.kkt(&zero, &bowl.gradient(&zero)?)?);
    let mut multiplier = Multiplier::new(Omega::L1(ELEMENTS), 0.0, Dual::ascent(1.0), zero.dims())?;
    multiplier.update(&bowl.a)?;
    assert_solved(multiplier.kkt(&zero, &bowl.gradient(&zero)?)?);
    Ok(())
}

/// Where the Lagrangian has no curvature, plain ascent circles about the solution; the proportional part stops it.
#[test]
fn the_controller_damps() -> Result<()> {
    // min -w subject to |w| <= 1, whose Lagrangian is linear: w = 1, alpha = 1.
    let run = |dual: Dual| -> Result<f64> {
        let w = Var::new(&[0.5f64], &Device::Cpu)?;
        let mut multiplier = Multiplier::new(Omega::L1(Grouping::Whole), 1.0, dual, &[1])?;
        let mut late = 0.0f64;
        for step in 0..4000 {
            let grads = (multiplier.term(&w)? - w.sum_all()?)?.backward()?;
            w.set(&(w.as_detached_tensor() - (grads.get(&w).unwrap() * 0.05)?)?)?;
            multiplier.update(&w)?;
            if step >= 3900 {
                late = late.max(multiplier.report(&w)?.excess[0].abs());
            }
        }
        Ok(late)
    };
    assert!(run(Dual::ascent(0.05))? > 0.1);
    assert!(run(Dual::nu_pi(1.0, 0.05, 0.0))? < 1e-9);
    assert!(run(Dual { augmented: 1.0, ..Dual::ascent(0.05) })? < 0.05);
    Ok(())
}

#[test]
fn the_term_has_its_value_and_gradient() -> Result<()> {
    let x = Tensor::new(&A, &Device::Cpu)?;
    for omega in [
        Omega::Norm(Grouping::Columns),
        Omega::SquaredNorm(Grouping::Rows),
        Omega::L1(Grouping::Blocks { rows: 2, columns: 2 }),
    ] {
        let dual = Dual { augmented: 0.7, ..Dual::ascent(0.3) };
        let mut multiplier = Multiplier::new(omega, 0.9, dual, x.dims())?;
        multiplier.update(&x)?;
        let report = multiplier.report(&x)?;
        let expected: f64 =
            report.slackness.iter().zip(&report.excess).map(|(s, e)| s + 0.35 * e.max(0.0).powi(2)).sum();
        let value = |x: &[f64]| -> Result<f64> {
            multiplier.term(&Tensor::from_slice(x, (2, 3), &Device::Cpu)?)?.to_scalar()
        };
        assert!((value(&flat(&x))? - expected).abs() < 1e-12 * expected);
        let w = Var::from_tensor(&x)?;
        let gradient = flat(multiplier.term(&w)?.backward()?.get(&w).unwrap());
        for i in 0..6 {
            let at = |h: f64| {
                let mut x = flat(&x);
                x[i] += h;
                value(&x)
            };
            let slope = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            assert!((slope - gradient[i]).abs() < 1e-7, "{omega:?} {i}: {slope} {}", gradient[i]);
        }
        for (dtype, out) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::F32)] {
            let w = Var::from_tensor(&x.to_dtype(dtype)?)?;
            let term = multiplier.term(&w)?;
            assert_eq!(term.dtype(), out);
            let value = f64::from(term.to_scalar::<f32>()?);
            assert!((value - expected).abs() < 0.02 * expected, "{dtype:?}");
            assert_eq!(term.backward()?.get(&w).unwrap().dtype(), dtype);
        }
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let omega = Omega::Norm(Grouping::Rows);
    for (bound, dual) in [
        (-1.0, Dual::ascent(0.1)),
        (f64::NAN, Dual::ascent(0.1)),
        (1.0, Dual::ascent(-0.1)),
        (1.0, Dual::ascent(0.0)),
        (1.0, Dual::nu_pi(f64::INFINITY, 0.1, 0.0)),
        (1.0, Dual::nu_pi(0.1, 0.1, 1.0)),
        (1.0, Dual { augmented: -1.0, ..Dual::ascent(0.1) }),
    ] {
        assert!(Multiplier::new(omega, bound, dual, &[2, 2]).is_err(), "{bound} {dual:?}");
    }
    let plain = Dual::ascent(0.1);
    let augmented = |options: AugmentedLagrangian| Dual::augmented_lagrangian(options);
    let default = AugmentedLagrangian::default();
    for (bound, dual, part) in [
        (Bound::Equal(-1.0), plain, "multiplier: bound: expected a finite number of zero or more, got -1"),
        (1.0.into(), Dual { cap: Some(0.0), ..plain }, "multiplier: cap: expected a finite number above 0"),
        (1.0.into(), Dual { cap: Some(f64::INFINITY), ..plain }, "multiplier: cap:"),
        (1.0.into(), Dual { restart: Some(-0.1), ..plain }, "multiplier: restart: expected a finite number"),
        (Bound::Equal(1.0), Dual { restart: Some(0.1), ..plain }, "restart: an equality is never feasible"),
        (1.0.into(), Dual { kappa_i: 0.1, ..augmented(default) }, "kappa_i: an augmented Lagrangian goes by"),
        (1.0.into(), Dual { kappa_p: 0.1, ..augmented(default) }, "kappa_p: an augmented Lagrangian goes by"),
        (1.0.into(), Dual { nu: 0.1, ..augmented(default) }, "nu: an augmented Lagrangian goes by"),
        (1.0.into(), Dual { augmented: 0.1, ..augmented(default) }, "augmented: an augmented Lagrangian"),
        (1.0.into(), augmented(AugmentedLagrangian { penalty: 0.0, ..default }), "multiplier: penalty:"),
        (1.0.into(), augmented(AugmentedLagrangian { growth: 0.9, ..default }), "multiplier: growth:"),
        (1.0.into(), augmented(AugmentedLagrangian { tolerance: -1.0, ..default }), "multiplier: tolerance:"),
        (
            1.0.into(),
            augmented(AugmentedLagrangian { limit: 0.5, ..default }),
            "multiplier: limit: expected a",
        ),
    ] {
        let error = Multiplier::new(omega, bound, dual, &[2, 2]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut multiplier = Multiplier::new(omega, 1.0, Dual::ascent(0.1), &[2])?;
    multiplier.update(&Tensor::new(&[3.0, 0.5], &Device::Cpu)?)?;
    let before = multiplier.alpha()?;
    for w in [Tensor::new(&[1.0, f64::NAN], &Device::Cpu)?, Tensor::new(&[1.0], &Device::Cpu)?] {
        assert!(
            multiplier.term(&w).is_err() && multiplier.update(&w).is_err() && multiplier.report(&w).is_err()
        );
    }
    assert_eq!(multiplier.alpha()?, before);
    Ok(())
}

/// Columns that are kept short while a net with half-precision Vars trains: their masters stay in the set too, so that the next step
/// starts there. With f32 Vars, `constrain` and `after_step` are one.
#[test]
fn masters_are_projected() -> Result<()> {
    use kronwake::nn::{self, Module, Optimizer, VarBuilder, VarMap, loss};
    use kronwake::optim::{NaturalGradient, Params};
    use kronwake::penalty::{Constraints, Rule};
    use kronwake::tape::{Likelihood, Tape};

    let set = FeasibleSet::MaxNorm { grouping: Grouping::Rows, radius: 0.25 };
    let train = |dtype: DType, masters: bool| -> Result<(Tensor, Tensor)> {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
        let tape = Tape::new();
        let model = tape.build(|| nn::linear(3, 2, vb.pp("fc")))?;
        let start = Tensor::new(&[[0.1f32, 0.0, 0.05], [0.0, 0.1, -0.05]], &Device::Cpu)?.to_dtype(dtype)?;
        varmap.data().lock().unwrap()["fc.weight"].set(&start)?;
        varmap.data().lock().unwrap()["fc.bias"].set(&start.get(0)?.narrow(0, 0, 2)?)?;
        let mut opt = NaturalGradient::from_varmap(&varmap, Params { lr: 0.5, ..Params::k_fac(&tape) })?;
        let rules = [("*.weight", Rule::Project { set }), ("*.bias", Rule::Free)];
        let mut constraints = Constraints::new(&varmap, &rules)?;
        let x = Tensor::new(&[[1f32, 0., 1.], [0., 1., 1.], [1., 1., 0.]], &Device::Cpu)?.to_dtype(dtype)?;
        let y = Tensor::new(&[0u32, 1, 0], &Device::Cpu)?;
        for _ in 0..20 {
            let logits = model.forward(&x)?.to_dtype(DType::F32)?;
            opt.observe(&logits, Likelihood::Categorical)?;
            opt.backward_step(&loss::cross_entropy(&logits, &y)?)?;
            if masters { opt.constrain(&mut constraints)? } else { constraints.after_step(0.5)? }
        }
        let before = varmap.data().lock().unwrap()["fc.weight"].copy()?;
        // A step of no length shows the masters.
        opt.set_learning_rate(0.0);
        let logits = model.forward(&x)?.to_dtype(DType::F32)?;
        opt.observe(&logits, Likelihood::Categorical)?;
        opt.backward_step(&loss::cross_entropy(&logits, &y)?)?;
        let after = varmap.data().lock().unwrap()["fc.weight"].copy()?;
        Ok((before, after))
    };
    let (a, b) = (train(DType::F32, true)?.0, train(DType::F32, false)?.0);
    assert_eq!(a.to_vec2::<f32>()?, b.to_vec2::<f32>()?);
    let (before, after) = train(DType::BF16, true)?;
    assert_eq!(before.to_dtype(DType::F32)?.to_vec2::<f32>()?, after.to_dtype(DType::F32)?.to_vec2::<f32>()?);
    assert!(set.violation(&after)? <= 0.25 * 0.01);
    let (_, after) = train(DType::BF16, false)?;
    assert!(set.violation(&after)? > 0.25 * 0.01, "without the masters the next step undoes the projection");
    Ok(())
}
