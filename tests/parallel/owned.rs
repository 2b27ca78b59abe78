//! Processes each of which owns a part of the blocks: what they hold, send and say.

use super::equal::wide;
use super::harness::*;
use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::curvature::{Damping, Inverse};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    Average, Every, FirstOrder, Group, Groups, NonFinite, Optimizer, Params, ParamsSoap, StepRule, UpdateRule,
};
use kronwake::parallel::{Placement, World};
use kronwake::tape::Fisher;

const EVERY: Every = Every { factors: 2, inverses: 2 };

#[test]
fn each_holds_and_sends_its_part() -> Result<()> {
    let params = |net: &Net| Params { every: EVERY, ..Params::k_fac(&net.tape) };
    let together = ranks(2, |world| {
        let mut rank = Rank::placed(world, wide, &params, Placement::Owned)?;
        for k in 0..4 {
            rank.step(&small_batch(k, 6, DType::F64)?, (0, 6))?;
        }
        let has_factors = ["a", "b", "c"].map(|block| rank.opt.factors(block).is_some());
        let summary = rank.opt.summary();
        assert!(summary.to_string().contains("\nb: owned by 0"), "{summary}");
        let all: usize =
            summary.blocks.iter().map(|b| b.factor_bytes + b.inverse_bytes + b.other_bytes).sum();
        Ok((summary.together.expect("processes"), has_factors, all))
    });
    let together = together.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(together[0].0.held_bytes + together[1].0.held_bytes, together[0].2);
    // Elements of the parameters, and of both factors, of a, b and c; b, the largest, goes to 0 and the others to 1.
    let (values, factors) = ([400, 1640, 123], [100 + 1600, 1681 + 1600, 1681 + 9]);
    for (rank, (together, has_factors, _)) in together.into_iter().enumerate() {
        let own = [rank == 1, rank == 0, rank == 1];
        assert_eq!(has_factors, own);
        assert_eq!(together.placement, Placement::Owned);
        let owned: Vec<_> = together.owned.iter().map(|(name, owner)| (name.as_str(), *owner)).collect();
        assert_eq!(owned, [("a", 1), ("b", 0), ("c", 1)]);
        let of = |numbers: [usize; 3], mine: bool| -> usize {
            numbers.iter().zip(own).filter(|(_, own)| *own == mine).map(|(n, _)| 8 * n).sum()
        };
        // To the owner gradients, and factors at every other step; from it the parameters.
        let step = of(values, false) + of(factors, false) / 2 + of(values, true);
        assert_eq!(together.step_bytes, step);
        // Counts and lengths are a little more.
        let sent = together.sent_bytes as f64 / (4 * step) as f64;
        assert!((1.0..1.02).contains(&sent), "{sent}");
    }
    Ok(())
}

#[test]
fn states_of_all_kinds_lead_where_one_process_does() -> Result<()> {
    let with = |what: &str, change: fn(Params) -> Params| {
        let params =
            |net: &Net| change(Params { average: Some(Average::default()), ..Params::kld_wrm(&net.tape) });
        owned(small, &params, &plain).check(what, &SPLITS)
    };
    // The gain is Adam's, and the length follows from the slopes.
    with("averages", |p| p)?;
    with("a learning rate", |p| Params { step_rule: StepRule::LearningRate, lr: 0.05, ..p })?;
    with("momentum", |p| Params { momentum: 0.5, ..p })?;
    for (damping, inverse) in [
        (Damping::Eigenvalue(0.01), Inverse::Eigen),
        (Damping::Pi(0.01), Inverse::Cholesky),
        (Damping::Pi(0.01), Inverse::Newton),
    ] {
        let params = |net: &Net| Params { damping, inverse, every: EVERY, ..Params::k_fac(&net.tape) };
        owned(wide, &params, &plain).check(&format!("owned, {inverse:?}"), &SPLITS)?;
    }
    Ok(())
}

/// Two layers of which a batch uses one, by the sign of its first number.
fn experts(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(9, 4, vb.pp("a"))?, nn::linear(9, 4, vb.pp("b"))?);
    let c = nn::linear(4, 3, vb.pp("c"))?;
    Ok(Box::new(move |x| {
        let first = x.flatten_all()?.get(0)?.to_scalar::<f64>()?;
        let x = x.flatten_from(1)?;
        c.forward(&if first > 0.0 { a.forward(&x)? } else { b.forward(&x)? }.tanh()?)
    }))
}

#[test]
fn blocks_may_sit_out_steps() -> Result<()> {
    let params = |net: &Net| {
        let optional = |name: &str| Group { optional: true, ..Group::named(name) };
        let groups = Groups(vec![optional("a.*"), optional("b.*")]);
        Params { groups, every: EVERY, fisher: Fisher::Exact, ..Params::kld_wrm(&net.tape) }
    };
    // The whole batch goes one way, so that a part of it does too.
    let step = |rank: &mut Rank, k: u64, part: (usize, usize)| {
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        let sign = if k % 3 == 1 { -1.0 } else { 1.0 };
        rank.step(&((x.abs()? * sign)?, y), part)
    };
    owned(experts, &params, &step).check("optional blocks", &SPLITS)
}

#[test]
fn what_an_owner_alone_cannot_compute_is_everybody_s_error() -> Result<()> {
    let run = |world: World, non_finite: NonFinite| -> Result<(usize, usize, f64)> {
        let params = |net: &Net| Params { every: EVERY, non_finite, ..Params::k_fac(&net.tape) };
        let mut rank = Rank::placed(world, wide, &params, Placement::Owned)?;
        let (x, y) = small_batch(0, 6, DType::F64)?;
        rank.step(&(x.clone(), y.clone()), (0, 6))?;
        let before: Vec<Tensor> = rank.net.values()?.iter().map(Tensor::copy).collect::<Result<_>>()?;
        // The square of this gradient is no number, and rank 1 alone has the block.
        let z = (rank.net.forward)(&x)?;
        rank.opt.observe(&z, LIKELIHOOD)?;
        let steep = (rank.net.var("a.weight").sum_all()? * 1e200)?;
        rank.opt.backward_step(&(mean_loss(LIKELIHOOD, &z, &y)? + steep)?)?;
        let still = apart(&rank.net.values()?, &before);
        rank.step(&(x, y), (0, 6))?;
        Ok((rank.opt.skipped(), rank.opt.steps(), still))
    };
    for said in sentences(ranks(3, |world| run(world, NonFinite::Error))) {
        assert!(said.contains("kfac: step 1: rank 1: the direction of block a overflows"), "{said}");
    }
    for skipped in ranks(3, |world| run(world, NonFinite::Skip)) {
        assert_eq!(skipped?, (1, 2, 0.0));
    }
    let nan = |world: World| -> Result<()> {
        let mut rank = Rank::placed(world, wide, &|net| Params::k_fac(&net.tape), Placement::Owned)?;
        let (x, y) = small_batch(0, 6, DType::F64)?;
        let z = (rank.net.forward)(&x)?;
        rank.opt.observe(&z, LIKELIHOOD)?;
        let wrong = if rank.world.rank() == 2 { f64::NAN } else { 1.0 };
        rank.opt.backward_step(&(mean_loss(LIKELIHOOD, &z, &y)? * wrong)?)
    };
    for said in sentences(ranks(3, nan)) {
        assert!(said.contains("rank 2: the loss is NaN"), "{said}");
    }
    Ok(())
}

#[test]
fn what_does_not_go_with_owners_is_refused() {
    let overlap = ranks(2, |world| {
        let params = |net: &Net| Params { overlap: 2, ..Params::k_fac(&net.tape) };
        Rank::placed(world, wide, &params, Placement::Owned).map(drop)
    });
    for said in sentences(overlap) {
        assert!(said.contains("(overlap 2), got Owned"), "{said}");
    }
    let later = ranks(2, |world| {
        let mut rank = Rank::placed(world, wide, &|net| Params::k_fac(&net.tape), Placement::Owned)?;
        rank.opt.set_params(Params { overlap: 2, ..rank.opt.params().clone() })
    });
    for said in sentences(later) {
        assert!(said.contains("expected overlap 0 where processes divide"), "{said}");
    }
    let twice = ranks(2, |world| {
        let mut rank = Rank::placed(world, wide, &|net| Params::k_fac(&net.tape), Placement::Owned)?;
        rank.opt.share(&rank.world, Placement::Replicated)
    });
    for said in sentences(twice) {
        assert!(said.contains("shares it with others already"), "{said}");
    }
}

#[test]
fn files_of_any_placement_are_read_by_any_other() -> Result<()> {
    use Placement::{Gathered, Owned, Replicated};
    let params = |net: &Net| {
        let groups = Groups(vec![Group { rule: Some(UpdateRule::Adam), ..Group::named("c.bias") }]);
        Params { groups, average: Some(Average::default()), ..Params::kld_wrm(&net.tape) }
    };
    let path = scratch("owned");
    let from = |world: World, split: &[usize], first: u64, placement| -> Result<Vec<Tensor>> {
        let part = rows(split, world.rank());
        let mut rank = Rank::placed(world, wide, &params, placement)?;
        if first > 0 {
            rank.opt.resume(&path)?;
        }
        for k in first..first + 5 {
            plain(&mut rank, k, part)?;
        }
        rank.opt.save(&path)?;
        rank.net.values()
    };
    for first in [0, 5, 10, 15] {
        from(World::alone(), &[ROWS], first, Replicated)?;
    }
    let expected_file = std::fs::read(&path)?.len();
    let mut alone = Rank::new(World::alone(), wide, &params)?;
    (0..20).try_for_each(|k| plain(&mut alone, k, (0, ROWS)))?;
    let expected = alone.net.values()?;
    let ways: [[(&[usize], Placement); 4]; 2] = [
        [(&[6, 6], Owned), (&[12], Replicated), (&[2, 0, 7, 3], Owned), (&[5, 4, 3], Gathered)],
        [(&[5, 4, 3], Replicated), (&[9, 3], Owned), (&[5, 4, 3], Owned), (&[12], Owned)],
    ];
    for way in ways {
        for (index, (split, placement)) in way.into_iter().enumerate() {
            let found = ranks(split.len(), |world| from(world, split, 5 * index as u64, placement));
            for (rank, found) in found.into_iter().enumerate() {
                let found = found?;
                if index == 3 {
                    let far = apart(&found, &expected);
                    assert!(far < 1e-12, "{way:?}, rank {rank}: {far:e}");
                }
            }
        }
        // The same tensors, and numbers that may differ in their last digits.
        assert!(std::fs::read(&path)?.len().abs_diff(expected_file) < 200);
    }
    std::fs::remove_file(&path).map_err(candle_core::Error::wrap)
}

#[test]
fn files_of_first_order_owners() -> Result<()> {
    let path = scratch("owned-soap");
    let params = ParamsSoap { lr: 0.01, period: 3, max_dim: 4, eps: 1e-4, ..Default::default() };
    let from = |world: World, first: u64, placement| -> Result<Vec<Tensor>> {
        let net = Net::of(DType::F64, 1, super::first_order::square)?;
        let mut opt = FirstOrder::from_varmap(&net.varmap, params)?;
        opt.share(&world, placement)?;
        if first > 0 {
            opt.resume(&path)?;
        }
        let rows = world.part(ROWS);
        for k in first..first + 5 {
            let (x, y) = small_batch(k, ROWS, DType::F64)?;
            let z = (net.forward)(&x.narrow(0, rows.start, rows.len())?)?;
            opt.count_terms(rows.len() as f64);
            opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, rows.start, rows.len())?)?)?;
        }
        opt.save(&path)?;
        net.values()
    };
    let mut ends = vec![];
    for sizes in [[1, 1, 1], [2, 1, 4]] {
        for (index, size) in sizes.into_iter().enumerate() {
            let found = ranks(size, |world| from(world, 5 * index as u64, Placement::Owned));
            ends.push(found.into_iter().collect::<Result<Vec<_>>>()?.swap_remove(size - 1));
        }
    }
    let far = apart(&ends[5], &ends[2]);
    assert!(far < 1e-12, "{far:e}");
    let gathered = sentences(ranks(2, |world| from(world, 0, Placement::Gathered)));
    assert!(gathered[1].contains("soap: expected Placement::Replicated or Placement::Owned"), "{gathered:?}");
    std::fs::remove_file(&path).map_err(candle_core::Error::wrap)
}

/// Three layers of one size, which can be given out.
fn deep(vb: VarBuilder) -> Result<Forward> {
    let layer = |name| nn::linear(300, 300, vb.pp(name));
    let (a, b, c) = (layer("a")?, layer("b")?, layer("c")?);
    Ok(Box::new(move |x| c.forward(&b.forward(&a.forward(x)?)?)))
}

/// One layer of two factors.
fn one(vb: VarBuilder) -> Result<Forward> {
    let a = nn::linear(400, 400, vb.pp("a"))?;
    Ok(Box::new(move |x| a.forward(x)))
}

#[test]
fn the_cheapest_placement_follows_from_shapes() -> Result<()> {
    let chosen =
        |build: fn(VarBuilder) -> Result<Forward>, every: usize, overlap: usize| -> Result<Placement> {
            let params = |net: &Net| {
                let every = Every { factors: every, inverses: every };
                Params { every, overlap, ..Params::k_fac(&net.tape) }
            };
            let found = ranks(2, |world| {
                let rank = Rank::placed(world, build, &params, Placement::default())?;
                Ok(rank.opt.summary().together.expect("processes").placement)
            });
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            assert_eq!(found[0], found[1]);
            Ok(found[0])
        };
    // In milliseconds, by the table of the guide, of two processes in f64 at period 10. Each layer has 9 (300^3 + 301^3) multiplications of
    // inverses and 300 301 (2 601 + 10) of a step, 722,400 bytes of gradients and 1,444,808 of factors.
    // replicated: 3 (48.8e6 + 109.4e6) / 2e7 + (2.167 + 0.433) = 26.3; gathered: about 23.4; owned: 2 158.2e6 / 2e7 + 2.38 + 0.05 = 18.3.
    assert_eq!(chosen(deep, 10, 0)?, Placement::Owned);
    // At each step one layer's inverses are most of it, 1157e6 / 2e7 = 57.8, and two can share them.
    assert_eq!(chosen(one, 1, 0)?, Placement::Gathered);
    // Beside the steps all make them.
    assert_eq!(chosen(one, 1, 2)?, Placement::Replicated);
    // Of some thousand multiplications no message is worth its time.
    assert_eq!(chosen(small, 10, 0)?, Placement::Replicated);
    Ok(())
}
