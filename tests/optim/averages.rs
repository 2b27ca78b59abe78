//! Averaged parameters under constraints: of what these let through, and let through themselves.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use kronwake::optim::{Average, Every, NaturalGradient, Optimizer, Params};
use kronwake::penalty::{Constraints, FeasibleSet, Grouping, Rule};
use kronwake::tape::Likelihood;

const POWER: f64 = 3.0;

fn trained(net: &Net) -> Result<NaturalGradient> {
    let every = Every { factors: 2, inverses: 2 };
    let average = Some(Average { power: POWER });
    NaturalGradient::from_varmap(&net.varmap, Params { every, average, ..Params::kld_wrm(&net.tape) })
}

fn step(net: &Net, opt: &mut NaturalGradient, k: u64) -> Result<()> {
    let (x, y) = small_batch(k, 9, DType::F64)?;
    let z = (net.forward)(&x)?;
    opt.observe(&z, Likelihood::Categorical)?;
    opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)
}

/// A weight of two dimensions, whose rows are bounded.
fn weight(net: &Net) -> String {
    net.names().into_iter().find(|name| net.var(name).rank() == 2).expect("a linear layer")
}

/// Steps under a rule, and the averages that follow from the values after each constraint by hand, before they are let through.
fn run(rule: &Rule, steps: u64) -> Result<(Net, NaturalGradient, Tensor)> {
    let net = Net::of(DType::F64, 1, small)?;
    let name = weight(&net);
    let mut opt = trained(&net)?;
    let mut constraints = Constraints::new(&net.varmap, &[("*", Rule::Free), (name.as_str(), rule.clone())])?;
    let mut by_hand: Option<Tensor> = None;
    for k in 0..steps {
        step(&net, &mut opt, k)?;
        opt.constrain(&mut constraints)?;
        let value = net.var(&name).as_detached_tensor().copy()?;
        let share = (POWER + 1.0) / ((k + 1) as f64 + POWER);
        by_hand = Some(match by_hand {
            Some(average) => ((average * (1.0 - share))? + (value * share)?)?,
            None => value,
        });
    }
    Ok((net, opt, by_hand.expect("steps were taken")))
}

fn largest_row(w: &Tensor) -> Result<f64> {
    w.sqr()?.sum(1)?.sqrt()?.max(0)?.to_scalar()
}

#[test]
fn of_a_convex_set_are_in_it() -> Result<()> {
    let radius = 0.3;
    let rule = Rule::Project { set: FeasibleSet::MaxNorm { grouping: Grouping::Rows, radius } };
    let (net, mut opt, by_hand) = run(&rule, 12)?;
    let name = weight(&net);
    let found = opt.averages().into_iter().find(|(n, _)| *n == name).expect("averaged").1.clone();
    assert_close(&found, &by_hand, 1e-12, "the average of what was let through");
    opt.at_average(|| {
        assert!(largest_row(net.var(&name).as_tensor())? <= radius * (1.0 + 1e-12));
        Ok(())
    })?;
    opt.adopt_average()?;
    assert!(largest_row(net.var(&name).as_tensor())? <= radius * (1.0 + 1e-12));
    // The bound is one that the training meets.
    assert!(largest_row(&by_hand)? > 0.9 * radius);
    Ok(())
}

#[test]
fn of_a_sphere_are_on_it() -> Result<()> {
    let set = FeasibleSet::Sphere { grouping: Grouping::Rows, radius: 0.7 };
    let (net, mut opt, by_hand) = run(&Rule::Project { set }, 9)?;
    let norms = |w: &Tensor| -> Result<Vec<f64>> { w.sqr()?.sum(1)?.sqrt()?.to_vec1() };
    // A mean of points of a sphere is inside.
    assert!(norms(&by_hand)?.iter().any(|norm| (norm - 0.7).abs() > 1e-6));
    let path = scratch("sphere");
    opt.save(&path)?;
    let saved = Checkpoint::read(&path, &Device::Cpu)?;
    std::fs::remove_file(&path)?;
    opt.adopt_average()?;
    let name = weight(&net);
    let state = &saved.tensors[&format!("kronwake/{name}/average")];
    for w in [net.var(&name).as_tensor(), state] {
        assert!(norms(w)?.iter().all(|norm| (norm - 0.7).abs() < 1e-12), "{:?}", norms(w)?);
    }
    Ok(())
}

#[test]
fn of_masked_weights_are_zero() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    let name = weight(&net);
    let mut opt = trained(&net)?;
    let keep: Vec<u8> = (0..net.var(&name).elem_count()).map(|i| (i % 3 == 0).into()).collect();
    let mask = Tensor::from_vec(keep.clone(), net.var(&name).dims(), &Device::Cpu)?;
    let zero: Vec<bool> = keep.iter().map(|&keep| keep == 0).collect();
    let mut constraints =
        Constraints::new(&net.varmap, &[("*", Rule::Free), (name.as_str(), Rule::Mask { mask })])?;
    // Pruned in the middle of the training, when the averages are full.
    for k in 0..12 {
        step(&net, &mut opt, k)?;
        if k >= 6 {
            opt.constrain(&mut constraints)?;
        }
    }
    opt.adopt_average()?;
    for (w, zero) in flat(net.var(&name).as_tensor()).into_iter().zip(zero) {
        assert_eq!(w == 0.0, zero);
    }
    Ok(())
}

#[test]
fn after_a_plain_after_step_go_through_by_hand() -> Result<()> {
    let set = FeasibleSet::MaxNorm { grouping: Grouping::Rows, radius: 0.3 };
    let net = Net::of(DType::F64, 1, small)?;
    let name = weight(&net);
    let mut opt = trained(&net)?;
    let mut constraints =
        Constraints::new(&net.varmap, &[("*", Rule::Free), (name.as_str(), Rule::Project { set })])?;
    for k in 0..8 {
        step(&net, &mut opt, k)?;
        constraints.after_step(1.0)?;
    }
    opt.adopt_average_through(&constraints)?;
    assert!(largest_row(net.var(&name).as_tensor())? <= 0.3 * (1.0 + 1e-12));
    Ok(())
}
