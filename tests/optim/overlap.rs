//! Inverses made beside the steps: which step uses which, by dense solves; that a run can stop while some are on their way; refusals.

use crate::common::wakes::{DAMPING, Factors, damped};
use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::curvature::{Damping, Inverse, Relative};
use kronwake::optim::{Every, Model, NaturalGradient, Optimizer, Params, Q, QSolve, Qe, So, TwoRate, Wake};
use kronwake::tape::Likelihood;

const LIKELIHOOD: Likelihood = Likelihood::Categorical;
const STEPS: usize = 15;

/// The step whose inverses step `now` uses, of those that are due at the steps `due`.
fn used(due: &[usize], overlap: usize, now: usize) -> usize {
    let ready = |&(index, &from): &(usize, &usize)| {
        let next = due.get(index + 1).copied().unwrap_or(usize::MAX);
        // The first are waited for.
        from == 0 || from.saturating_add(overlap).min(next) <= now
    };
    due.iter().enumerate().filter(ready).map(|(_, from)| *from).max().unwrap_or(0)
}

#[test]
fn steps_use_the_inverses_of_their_time() -> Result<()> {
    assert_eq!([0, 3, 4, 6, 7, 11].map(|now| used(&[0, 4, 8], 3, now)), [0, 0, 0, 0, 4, 8]);
    for damping in [Damping::Eigenvalue(DAMPING), Damping::Pi(DAMPING)] {
        for (overlap, early, inverse) in [
            (0, false, Inverse::Eigen),
            (1, false, Inverse::Cholesky),
            (3, false, Inverse::Newton),
            (3, true, Inverse::Eigen),
            (4, false, Inverse::Eigen),
            (100, false, Inverse::Newton),
            (usize::MAX, true, Inverse::Eigen),
        ] {
            let inverse = if matches!(damping, Damping::Pi(_)) { inverse } else { Inverse::Eigen };
            let due: Vec<usize> = match early {
                false => vec![0, 4, 8, 12],
                true => vec![0, 1, 2, 4, 8, 12],
            };
            let net = wakes::net(1)?;
            let every = Every { factors: 2, inverses: 4 };
            let params = Params {
                every,
                overlap,
                early_refresh: early,
                inverse,
                lr: 0.3,
                ..wakes::params(&net, Wake::KFac, damping)
            };
            let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
            let names: Vec<String> = opt.block_names().into_iter().map(String::from).collect();
            let mut history: Vec<Vec<Factors>> = vec![];
            for step in 0..STEPS {
                let x = random(step as u64, &[9, 3])?;
                let y = labels(step as u64, 9, 2)?;
                let z = (net.forward)(&x)?;
                opt.observe(&z, LIKELIHOOD)?;
                let loss = mean_loss(LIKELIHOOD, &z, &y)?;
                let grads = loss.backward()?;
                let elements: Vec<_> = names.iter().map(|name| net.elements(name, 0, 1)).collect();
                let before: Vec<_> = elements.iter().map(|e| values_at(e)).collect();
                opt.backward_step(&loss)?;
                let factors = |name: &String| {
                    let (a, g) = opt.factors(name).expect("observed");
                    (of_group(&a, 0), of_group(&g, 0))
                };
                history.push(names.iter().map(factors).collect());
                for (block, elements) in elements.iter().enumerate() {
                    let gradient = column(elements, |var| grads.get(var).expect("trained").clone());
                    let curvature = &history[used(&due, overlap, step)][block];
                    let expected = &before[block] - solve(&damped(curvature, damping), &gradient) * 0.3;
                    let what =
                        format!("{damping:?} {inverse:?} overlap {overlap}, early {early}, step {step}");
                    assert_same(&values_at(elements), &expected, 1e-8, &what);
                }
            }
        }
    }
    Ok(())
}

fn params(net: &Net, wake: impl Into<Wake> + Clone, overlap: usize) -> Params {
    Params { overlap, every: Every { factors: 3, inverses: 6 }, ..Params::of(wake, &net.tape) }
}

fn train(net: &Net, opt: &mut NaturalGradient, steps: std::ops::Range<usize>) -> Result<()> {
    for step in steps {
        let (x, y) = small_batch(step as u64, 9, DType::F64)?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, LIKELIHOOD)?;
        opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)?;
    }
    Ok(())
}

/// Saved at every step from the first inverses begun to the next ones, a run goes on as it would have.
fn resumes(wake: impl Into<Wake> + Clone, change: impl Fn(Params) -> Params) -> Result<()> {
    let new = |seed| -> Result<(Net, NaturalGradient)> {
        let net = Net::of(DType::F64, seed, small)?;
        let opt = NaturalGradient::from_varmap(&net.varmap, change(params(&net, wake.clone(), 4)))?;
        Ok((net, opt))
    };
    let (net, mut whole) = new(1)?;
    train(&net, &mut whole, 0..20)?;
    let path = scratch("overlap");
    for stop in 6..13 {
        let (net, mut first) = new(1)?;
        train(&net, &mut first, 0..stop)?;
        first.save(&path)?;
        let under_way = Checkpoint::read(&path, net.var("fc1.weight").device())?;
        let under_way = under_way.tensors.keys().any(|name| name.contains("/ahead_"));
        // Begun at the steps 6 and 12, used from 10 and 16 on.
        assert_eq!(under_way, (7..=10).contains(&stop), "{stop}");
        train(&net, &mut first, stop..20)?;
        let (net, mut second) = new(2)?;
        second.resume(&path)?;
        train(&net, &mut second, stop..20)?;
        for (opt, who) in [(&first, "saved"), (&second, "resumed")] {
            assert_same_state(&saved(opt)?, &saved(&whole)?, &[], &format!("{who} at {stop}"));
        }
    }
    std::fs::remove_file(&path)?;
    Ok(())
}

#[test]
fn a_run_stops_and_goes_on_while_inverses_are_under_way() -> Result<()> {
    resumes(Wake::KFac, |p| p)?;
    resumes(So::default(), |p| Params { damping: Damping::Pi(0.01), inverse: Inverse::Newton, ..p })?;
    resumes(TwoRate::default(), |p| Params { early_refresh: false, ..p })?;
    resumes(So::default(), |p| Params { ekfac: true, ..p })
}

/// The damping that is found with the factors belongs to their inverses.
#[test]
fn a_damping_waits_with_its_inverses() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    let damping = Damping::Relative(Relative::default());
    let params = Params { damping, early_refresh: false, ..params(&net, So::default(), 4) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
    let mut found = vec![];
    for step in 0..13 {
        train(&net, &mut opt, step..step + 1)?;
        found.push(opt.damping());
    }
    assert!(found[..10].iter().all(|damping| *damping == found[0]), "{found:?}");
    assert!(found[10] != found[0] && found[12] == found[10], "{found:?}");
    Ok(())
}

/// A step that fails leaves what is under way as it was.
#[test]
fn a_step_that_fails_changes_nothing() -> Result<()> {
    for (bad, what) in [(6, "begins"), (8, "waits"), (10, "takes")] {
        let new = || -> Result<(Net, NaturalGradient)> {
            let net = Net::of(DType::F64, 1, small)?;
            let opt = NaturalGradient::from_varmap(&net.varmap, params(&net, So::default(), 4))?;
            Ok((net, opt))
        };
        let ((net, mut opt), (plain_net, mut plain)) = (new()?, new()?);
        train(&net, &mut opt, 0..bad)?;
        let (x, _) = small_batch(bad as u64, 9, DType::F64)?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, LIKELIHOOD)?;
        let poison = (net.var("fc1.weight").as_tensor() * f64::NAN)?.sum_all()?;
        assert!(opt.step(&(z.sum_all()? + poison)?.backward()?).is_err());
        train(&net, &mut opt, bad..20)?;
        train(&plain_net, &mut plain, 0..20)?;
        assert_same_state(&saved(&opt)?, &saved(&plain)?, &[], what);
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    fn refused(wake: impl Into<Wake> + Clone) -> Result<()> {
        let net = Net::of(DType::F64, 1, small)?;
        let built = NaturalGradient::from_varmap(&net.varmap, params(&net, wake, 2));
        assert_says(built.map(drop), &["own step", "expected overlap 0, got 2"]);
        Ok(())
    }
    refused(Q::default())?;
    refused(Qe::default())?;
    refused(TwoRate { model: Model::Quadratic(QSolve::Factor), ..TwoRate::default() })?;

    let net = Net::of(DType::F64, 1, small)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net, Wake::KFac, 4))?;
    train(&net, &mut opt, 0..8)?;
    let path = scratch("overlap-broken");
    opt.save(&path)?;
    let file = Checkpoint::read(&path, net.var("fc1.weight").device())?;
    let numbers = file.metadata["kronwake"].clone();
    type Change<'a> = &'a dyn Fn(&mut Checkpoint);
    let late: Change<'_> = &|file| {
        file.metadata.insert("kronwake".into(), numbers.replace("ahead_from = 6", "ahead_from = 9"));
    };
    let damping: Change<'_> = &|file| {
        file.metadata.insert("kronwake".into(), numbers.replace("ahead_damping = ", "ahead_damping = -"));
    };
    let shape: Change<'_> = &|file| {
        let wrong = Tensor::zeros((1, 2, 2), DType::F64, net.var("fc1.weight").device()).expect("made");
        file.tensors.insert("kronwake/fc1/ahead_basis_a".into(), wrong);
    };
    for (change, part) in [
        (late, "inverses of step 9, expected one up to 8"),
        (damping, "ahead_damping is -"),
        (shape, "kronwake/fc1/ahead_basis_a is F64 [1, 2, 2]"),
    ] {
        let mut broken = file.clone();
        change(&mut broken);
        broken.write(&path)?;
        let before = saved(&opt)?;
        assert_says(opt.resume(&path), &[part]);
        assert_same_state(&saved(&opt)?, &before, &[], part);
    }
    std::fs::remove_file(&path)?;
    Ok(())
}
