//! The first-order optimizers of several processes.

use super::harness::*;
use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::nn::{self, Dropout, Module, VarBuilder};
use kronwake::optim::{
    FirstOrder, NonFinite, Optimizer, ParamsAdamW, ParamsMuon, ParamsSgd, ParamsShampoo, ParamsSoap, Update,
};
use kronwake::parallel::{Placement, World};

type Build = fn(VarBuilder) -> Result<Forward>;

/// A net whose gradients leave at most one direction without curvature. Of several, SOAP's basis is what rounding makes of it.
pub fn square(vb: VarBuilder) -> Result<Forward> {
    let (fc1, fc2) = (nn::linear(9, 4, vb.pp("fc1"))?, nn::linear(4, 4, vb.pp("fc2"))?);
    Ok(Box::new(move |x| fc2.forward(&fc1.forward(&x.flatten_from(1)?)?.tanh()?)))
}

fn run<P: Update + 'static>(
    world: World,
    split: &[usize],
    build: Build,
    params: P,
    placement: Placement,
) -> Result<Vec<Tensor>> {
    let net = Net::of(DType::F64, 1 + world.rank() as u64, build)?;
    let mut opt = FirstOrder::from_varmap(&net.varmap, params)?;
    let all = opt.bytes();
    opt.share(&world, placement)?;
    if placement == Placement::Owned && !world.is_alone() && all > 0 {
        // Nobody holds all, and together they hold it once.
        let mut held = [opt.bytes() as f64];
        assert!(opt.bytes() < all);
        world.sum(&mut held)?;
        assert_eq!(held, [all as f64]);
    }
    let dropout = Dropout::seeded(0.2, 5)?;
    let (from, n) = rows(split, world.rank());
    for k in 0..20 {
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        opt.set_learning_rate(opt.learning_rate() * 0.99);
        if n == 0 {
            opt.step_without_rows()?;
            continue;
        }
        dropout.set_step(k);
        dropout.set_first_row(from as u64);
        let z = (net.forward)(&dropout.forward(&x.narrow(0, from, n)?, true)?)?;
        opt.count_terms(n as f64);
        opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n)?)?)?;
    }
    net.values()
}

fn check<P: Update + 'static>(build: Build, params: P) -> Result<()> {
    let expected = run(World::alone(), &[ROWS], build, params.clone(), Placement::ByCost)?;
    let moved = apart(&Net::of(DType::F64, 1, build)?.values()?, &expected);
    assert!(moved > 0.02, "{params:?}: moved by {moved}");
    let mut largest = 0f64;
    for (split, placement) in SPLITS.iter().flat_map(|s| [(s, Placement::ByCost), (s, Placement::Owned)]) {
        let found = ranks(split.len(), |world| run(world, split, build, params.clone(), placement));
        for (rank, found) in found.into_iter().enumerate() {
            let far = apart(&found?, &expected);
            assert!(
                far < 1e-12,
                "{params:?}, {split:?}, {placement:?}, rank {rank}: {far:e} apart after a way of {moved}"
            );
            largest = largest.max(far);
        }
    }
    println!("{}: at most {largest:e} apart after a way of {moved:.2}", std::any::type_name::<P>());
    Ok(())
}

#[test]
fn all_take_one_process_s_steps_with_dropout() -> Result<()> {
    check(small, ParamsSgd { lr: 0.1, momentum: 0.9, ..Default::default() })?;
    check(small, ParamsAdamW { lr: 0.01, ..Default::default() })?;
    check(small, ParamsMuon { lr: 0.02, ..Default::default() })?;
    // In a direction without gradient, a softmax's, SOAP divides rounding by eps.
    check(square, ParamsSoap { lr: 0.01, period: 3, max_dim: 4, eps: 1e-4, ..Default::default() })?;
    check(square, ParamsShampoo { lr: 0.01, period: 3, max_dim: 4, ..Default::default() })
}

#[test]
fn what_is_not_finite_on_one_is_left_out_on_all_or_an_error_of_all() -> Result<()> {
    let step = |world: World, non_finite: NonFinite, bad: bool| -> Result<(usize, Vec<Tensor>)> {
        let net = Net::of(DType::F64, 1, small)?;
        let mut opt = FirstOrder::from_varmap(&net.varmap, ParamsAdamW::default())?;
        opt.non_finite = non_finite;
        opt.share(&world, Placement::Replicated)?;
        let (x, y) = small_batch(0, 6, DType::F64)?;
        let loss = mean_loss(LIKELIHOOD, &(net.forward)(&x)?, &y)?;
        opt.count_terms(6.);
        opt.backward_step(&if bad && world.rank() == 1 { (loss * f64::NAN)? } else { loss })?;
        Ok((opt.skipped(), net.values()?))
    };
    for said in sentences(ranks(3, |world| step(world, NonFinite::Error, true))) {
        assert!(said.contains("rank 1: the gradient of conv.bias has NaN"), "{said}");
    }
    for skipped in ranks(3, |world| step(world, NonFinite::Skip, true)) {
        let (skipped, values) = skipped?;
        assert_eq!(skipped, 1);
        assert_eq!(apart(&values, &Net::of(DType::F64, 1, small)?.values()?), 0.0);
    }
    Ok(())
}

#[test]
fn gradients_are_added_up_in_bfloat16_within_the_bound_of_rounding() -> Result<()> {
    for size in [2, 3] {
        ranks(size, |world| half(&world)).into_iter().collect::<Result<Vec<()>>>()?;
    }
    Ok(())
}
