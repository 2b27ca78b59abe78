//! Every member of the family, on any split of the rows, leads where one process does on the whole batch.

use super::harness::*;
use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::curvature::{Adaptive, Beyond, Damping, FactorLimit, Inverse, Relative, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::ops::sample::{DrawKey, categorical};
use kronwake::optim::{
    Bias, Decay, Every, Group, Groups, Optimizer, Params, Q, QSolve, So, UpdateRule, Wake,
};
use kronwake::parallel::{Placement, World};
use kronwake::tape::Fisher;

const EVERY: Every = Every { factors: 2, inverses: 2 };
const FISHERS: [Fisher; 3] = [Fisher::Sampled { draws: 2, seed: 3 }, Fisher::Exact, Fisher::Empirical];

fn with_fishers(wake: impl Into<Wake> + Clone) -> Result<()> {
    let wake: Wake = wake.into();
    for fisher in FISHERS {
        let what = format!("{}, {fisher:?}", wake.name());
        check(&what, &|net| Params { fisher, every: EVERY, ..Params::of(wake.clone(), &net.tape) })?;
    }
    Ok(())
}

#[test]
fn kfac_with_every_fisher() -> Result<()> {
    with_fishers(Wake::KFac)
}

#[test]
fn so_with_every_fisher() -> Result<()> {
    with_fishers(So::default())
}

#[test]
fn q_with_every_fisher() -> Result<()> {
    with_fishers(Q::default())
}

#[test]
fn kld_wrm_as_it_comes() -> Result<()> {
    check("kld-wrm", &|net| Params::kld_wrm(&net.tape))?;
    let params = |net: &Net| Params {
        every: Every { factors: 3, inverses: 6 },
        overlap: 2,
        early_refresh: false,
        ..Params::kld_wrm(&net.tape)
    };
    of(small, &params, &plain)
        .check("kld-wrm with steps between refreshes, and inverses beside the steps", &SPLITS)
}

#[test]
fn dampings_and_inverses() -> Result<()> {
    for damping in [Damping::Pi(0.01), Damping::Relative(Relative::default())] {
        for inverse in [Inverse::Cholesky, Inverse::Newton] {
            let damping = if inverse == Inverse::Newton { Damping::Pi(0.01) } else { damping };
            let inverse = if matches!(damping, Damping::Relative(_)) { Inverse::Eigen } else { inverse };
            check(&format!("{damping:?}, {inverse:?}"), &|net| Params {
                damping,
                inverse,
                every: EVERY,
                ..Params::k_fac(&net.tape)
            })?;
        }
    }
    let damping = Damping::Adaptive(Adaptive { every: 2, ..Default::default() });
    let params = |net: &Net| Params { damping, every: EVERY, ..Params::k_fac(&net.tape) };
    let step = |rank: &mut Rank, k, (from, n): (usize, usize)| {
        plain(rank, k, (from, n))?;
        if !rank.opt.wants_loss_after() {
            return Ok(());
        }
        // A rank without rows has none to measure; what it says does not count.
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        let (from, n) = if n == 0 { (0, 1) } else { (from, n) };
        let z = (rank.net.forward)(&x.narrow(0, from, n)?)?;
        rank.opt.adapt_damping(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n)?)?)
    };
    of(small, &params, &step).check("adaptive damping", &SPLITS)?;
    owned(small, &params, &step).check("adaptive damping, owned", &SPLITS)
}

#[test]
fn ekfac_s_moments_are_those_of_all_rows() -> Result<()> {
    for fisher in FISHERS {
        for bias in [Bias::Folded, Bias::Split] {
            let params = |net: &Net| Params {
                fisher,
                bias,
                ekfac: true,
                // The moments change between two inverses too.
                every: Every { factors: 1, inverses: 3 },
                ..Params::k_fac(&net.tape)
            };
            let what = format!("ekfac, {fisher:?}, {bias:?}");
            of(small, &params, &plain).check(&what, &SPLITS)?;
            // The wide net's factors have far more rows than there are examples: EKFAC's moments there follow the eigenvectors that rounding
            // chooses, on all processes the same.
            let gathered = Training { placement: Placement::Gathered, ..of(wide, &params, &plain) };
            let found = ranks(3, |world| gathered.run(world, &[5, 0, 7]));
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            assert!(found.iter().all(|(_, values)| apart(values, &found[0].1) == 0.0), "{what}");
        }
    }
    let owned = ranks(2, |world| {
        let params = |net: &Net| Params { ekfac: true, ..Params::k_fac(&net.tape) };
        Rank::placed(world, small, &params, Placement::Owned).map(drop)
    });
    assert!(sentences(owned).iter().all(|said| said.contains("with ekfac, whose moments need")));
    Ok(())
}

#[test]
fn options_of_blocks_and_factors() -> Result<()> {
    for fisher in FISHERS {
        let limit = |beyond| FactorLimit { rows: 3, beyond };
        check(&format!("split biases, {fisher:?}"), &|net| Params {
            fisher,
            bias: Bias::Split,
            sharing: Sharing::Reduce,
            every: EVERY,
            ..Params::k_fac(&net.tape)
        })?;
        check(&format!("limited factors, {fisher:?}"), &|net| Params {
            fisher,
            factor_limit: limit(Beyond::BlockDiagonal),
            every: EVERY,
            ..Params::k_fac(&net.tape)
        })?;
        check(&format!("factors of gradients, {fisher:?}"), &|net| Params {
            fisher,
            groups: Groups(vec![Group {
                rule: Some(UpdateRule::GradientFactors),
                ..Group::named("fc1.weight")
            }]),
            every: EVERY,
            ..Params::k_fac(&net.tape)
        })?;
    }
    check("momentum, clips and decay", &|net| Params {
        momentum: 0.5,
        weight_decay: 0.01,
        decay: Decay::Loss,
        kl_clip: Some(1e-3),
        rms_clip: Some(0.5),
        every: EVERY,
        ..Params::k_fac(&net.tape)
    })?;
    check("q, exact", &|net| Params {
        damping: Damping::Pi(0.01),
        every: EVERY,
        ..Params::of(Q { wake_decay: None, solve: QSolve::Exact }, &net.tape)
    })
}

/// A layer used twice, and one loss term for each of two positions.
fn sequence(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(3, 3, vb.pp("a"))?, nn::linear(3, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| {
        let x = x.reshape((x.dim(0)?, 3, 3))?.narrow(1, 0, 2)?;
        b.forward(&a.forward(&a.forward(&x)?.tanh()?)?.tanh()?)
    }))
}

#[test]
fn weighted_and_ignored_terms() -> Result<()> {
    let weights: Vec<f64> = (0..2 * ROWS).map(|i| [1.0, 0.0, 2.5, 0.25, 1.5][i % 5]).collect();
    let weights = Tensor::from_vec(weights, (ROWS, 2), &candle_core::Device::Cpu)?;
    for fisher in FISHERS {
        for sharing in [Sharing::Expand, Sharing::Reduce] {
            let params = |net: &Net| Params { fisher, sharing, every: EVERY, ..Params::k_fac(&net.tape) };
            let step = |rank: &mut Rank, k, (from, n): (usize, usize)| {
                if n == 0 {
                    return rank.opt.step_without_rows();
                }
                let (x, _) = small_batch(k, ROWS, DType::F64)?;
                let y = labels(900 + k, 2 * ROWS, 3)?.narrow(0, 2 * from, 2 * n)?;
                let z = (rank.net.forward)(&x.narrow(0, from, n)?)?;
                let w = weights.narrow(0, from, n)?;
                rank.opt.observe_weighted(&z, LIKELIHOOD, &kronwake::tape::Terms::weighted(&w)?)?;
                let losses = term_losses(LIKELIHOOD, &z, &y)?.flatten_all()?;
                let loss = ((losses * w.flatten_all()?)?.sum_all()? / w.sum_all()?)?;
                rank.opt.backward_step(&loss)
            };
            let what = format!("weighted terms, {fisher:?}, {sharing:?}");
            of(sequence, &params, &step).check(&what, &SPLITS)?;
            owned(sequence, &params, &step).check(&format!("{what}, owned"), &SPLITS)?;
        }
    }
    Ok(())
}

#[test]
fn micro_batches_of_which_ranks_have_different_numbers() -> Result<()> {
    let step = |rank: &mut Rank, k, (from, n): (usize, usize)| {
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        let at_once = 1 + 2 * rank.world.rank();
        for from_here in (from..from + n).step_by(at_once) {
            let n = at_once.min(from + n - from_here);
            let z = (rank.net.forward)(&x.narrow(0, from_here, n)?)?;
            rank.opt.observe(&z, LIKELIHOOD)?;
            rank.opt.accumulate(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from_here, n)?)?, n)?;
        }
        rank.opt.step_accumulated()
    };
    for fisher in [Fisher::Exact, Fisher::Empirical] {
        let params = |net: &Net| Params { fisher, every: EVERY, ..Params::so_kld_wrm(&net.tape) };
        of(small, &params, &step).check(&format!("{fisher:?}"), &SPLITS)?;
        owned(small, &params, &step).check(&format!("{fisher:?}, owned"), &SPLITS)?;
    }
    // Where labels are drawn all observe as often, and the rows of all first micro-batches come first.
    let params = |net: &Net| Params { every: EVERY, ..Params::k_fac(&net.tape) };
    let step = |rank: &mut Rank, k, (from, n): (usize, usize)| {
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        if rank.world.is_alone() {
            // Three rows of the first rank, then its other three after the second's three.
            let order = Tensor::new(&[0u32, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11], x.device())?;
            return rank.step(&(x.index_select(&order, 0)?, y.index_select(&order, 0)?), (0, ROWS));
        }
        for from in [from, from + n / 2] {
            let z = (rank.net.forward)(&x.narrow(0, from, n / 2)?)?;
            rank.opt.observe(&z, LIKELIHOOD)?;
            rank.opt.accumulate(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n / 2)?)?, n / 2)?;
        }
        rank.opt.step_accumulated()
    };
    of(small, &params, &step).check("drawn labels", &[&[6, 6]])
}

#[test]
fn penalties_and_clipped_gradients() -> Result<()> {
    let params = |net: &Net| Params { every: EVERY, ..Params::so_kld_wrm(&net.tape) };
    let step = |rank: &mut Rank, k, (from, n): (usize, usize)| {
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        let vars: Vec<_> = rank.net.names().iter().map(|name| rank.net.var(name)).collect();
        let penalty = (rank.net.var("fc1.weight").abs()?.sum_all()? * 0.03)?;
        let mut grads = if n == 0 {
            rank.opt.observe_without_rows()?;
            penalty.backward()?
        } else {
            let z = (rank.net.forward)(&x.narrow(0, from, n)?)?;
            rank.opt.observe(&z, LIKELIHOOD)?;
            (mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n)?)? + penalty)?.backward()?
        };
        rank.opt.mean_gradients(&mut grads)?;
        kronwake::optim::clip_gradients(&mut grads, &vars, 0.3)?;
        rank.opt.step(&grads)
    };
    // The factors are those of gradients before the clip.
    let params = |net: &Net| Params { fisher: Fisher::Exact, ..params(net) };
    of(small, &params, &step).check("penalty and clip", &SPLITS)?;
    owned(small, &params, &step).check("penalty and clip, owned", &SPLITS)
}

/// Labels by the public sampler: by the global row they are those that the optimizer draws, by the local one they are not.
#[test]
fn labels_keyed_by_the_local_row_lead_elsewhere() -> Result<()> {
    let params =
        |net: &Net| Params { fisher: Fisher::Sampled { draws: 1, seed: 0 }, ..Params::k_fac(&net.tape) };
    let run = |world: World, split: &[usize], global: bool| -> Result<Vec<Tensor>> {
        let (from, n) = rows(split, world.rank());
        let mut rank = Rank::new(world, small, &params)?;
        for k in 0..Training::STEPS {
            let (x, y) = small_batch(k, ROWS, DType::F64)?;
            let z = (rank.net.forward)(&x.narrow(0, from, n)?)?;
            let first_row = if global { from as u64 } else { 0 };
            let drawn = categorical(&z, DrawKey { seed: 0, step: k, draw: 0, first_row })?;
            rank.opt.observe_labels(&z, LIKELIHOOD, &Tensor::from_vec(drawn, n, z.device())?)?;
            rank.opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n)?)?)?;
        }
        rank.net.values()
    };
    let training = of(small, &params, &plain);
    let expected = training.run(World::alone(), &[ROWS])?.1;
    let split: &[usize] = &[7, 5];
    let far = |global: bool| -> Result<f64> {
        let found = ranks(2, |world| run(world, split, global)).swap_remove(1)?;
        Ok(apart(&found, &expected))
    };
    let (global, local) = (far(true)?, far(false)?);
    assert!(global < 1e-12, "{global:e}");
    assert!(local > 0.005, "{local:e}");
    println!("local rows: {local} apart");
    Ok(())
}

/// Factors of 40 and 41 rows, which are divided, and smaller ones, which all decompose.
pub fn wide(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(9, 40, vb.pp("a"))?, nn::linear(40, 40, vb.pp("b"))?);
    let c = nn::linear(40, 3, vb.pp("c"))?;
    Ok(Box::new(move |x| c.forward(&b.forward(&a.forward(&x.flatten_from(1)?)?.tanh()?)?.tanh()?)))
}

#[test]
fn gathered_inverses_are_divided_and_lead_where_one_process_does() -> Result<()> {
    let placement = Placement::Gathered;
    for (damping, inverse) in [
        (Damping::Eigenvalue(0.01), Inverse::Eigen),
        (Damping::Pi(0.01), Inverse::Cholesky),
        (Damping::Pi(0.01), Inverse::Newton),
    ] {
        let params = |net: &Net| Params { damping, inverse, every: EVERY, ..Params::k_fac(&net.tape) };
        let what = format!("gathered, {inverse:?}");
        Training { build: wide, params: &params, step: &plain, placement }.check(&what, &SPLITS)?;
        let together = ranks(2, |world| {
            let mut rank = Rank::placed(world, wide, &params, placement)?;
            for k in 0..5 {
                rank.step(&small_batch(k, 6, DType::F64)?, (0, 6))?;
            }
            let summary = rank.opt.summary();
            assert!(summary.to_string().contains("b: G is decomposed by 1, A by 0"), "{summary}");
            Ok(summary.together.expect("processes"))
        });
        for (rank, together) in together.into_iter().enumerate() {
            let together = together?;
            // At steps 0, 2 and 4: of 41, 41, 40 and 40 rows two each, and those of 10 and 3.
            assert_eq!((together.rank, together.size, together.decomposed), (rank, 2, 3 * 4));
            let owners = [("a", [Some(0), None]), ("b", [Some(1), Some(0)]), ("c", [None, Some(1)])];
            let found: Vec<_> = together.owners.iter().map(|(name, of)| (name.as_str(), *of)).collect();
            assert_eq!(found, owners);
            // a, b and c have 400, 1640 and 123 elements.
            assert_eq!(together.gradient_bytes, 8 * (400 + 1640 + 123));
            assert_eq!(together.factor_bytes, 8 * (100 + 1600 + 1681 + 1600 + 1681 + 9));
        }
    }
    let overlap = ranks(2, |world| {
        Rank::placed(world, wide, &|net| Params { overlap: 2, ..Params::k_fac(&net.tape) }, placement)
            .map(drop)
    });
    assert!(sentences(overlap).iter().all(|said| said.contains("(overlap 2), got Gathered")));
    Ok(())
}
