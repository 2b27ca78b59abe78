//! What goes wrong on one rank is said on all of them, and nobody waits.

use super::harness::*;
use crate::common::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::curvature::{Damping, Inverse};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{Every, Group, Groups, NaturalGradient, NonFinite, Optimizer, Params};
use kronwake::parallel::{Placement, World};
use kronwake::tape::{Fisher, Likelihood};
use std::time::{Duration, Instant};

/// Asserts that all ranks say the same, and it has `parts`.
#[track_caller]
fn all_say<T>(outcomes: Vec<Result<T>>, parts: &[&str]) {
    let said = sentences(outcomes);
    for sentence in &said {
        assert_eq!(sentence, &said[0]);
        for part in parts {
            assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
        }
    }
}

fn other(vb: VarBuilder) -> Result<Forward> {
    let (fc1, fc2) = (nn::linear(9, 5, vb.pp("fc1"))?, nn::linear(5, 3, vb.pp("fc2"))?);
    Ok(Box::new(move |x| fc2.forward(&fc1.forward(&x.flatten_from(1)?)?.tanh()?)))
}

#[test]
fn other_models_options_and_seeds() {
    let with = |change: fn(Params) -> Params| {
        ranks(3, move |world| {
            let params = |net: &Net| match world.rank() {
                2 => change(Params::k_fac(&net.tape)),
                _ => Params::k_fac(&net.tape),
            };
            Rank::new(world.clone(), small, &params).map(drop)
        })
    };
    all_say(
        with(|p| Params { damping: Damping::Pi(0.5), ..p }),
        &["rank 2 has damping Pi(0.5)", "rank 0 has damping Eigenvalue"],
    );
    all_say(with(|p| Params { momentum: 0.25, ..p }), &["rank 2 has momentum 0.25", "momentum 0.0"]);
    let seed = |p| Params { fisher: Fisher::Sampled { draws: 1, seed: 9 }, ..p };
    all_say(with(seed), &["rank 2 has fisher", "seed: 9", "seed: 0"]);
    let models = ranks(2, |world| {
        let build = if world.rank() == 1 { other } else { small };
        Rank::new(world, build, &|net| Params::k_fac(&net.tape)).map(drop)
    });
    all_say(models, &["kfac: share: rank 1 has Var fc1.bias", "where rank 0 has Var conv.bias"]);
    let qe = ranks(2, |world| Rank::new(world, small, &|net| Params::qe_kld_wrm(&net.tape)).map(drop));
    all_say(qe, &["inner steps"]);
}

/// A step in which rank 1 does something else.
fn step(world: World, non_finite: NonFinite, wrong: &dyn Fn(&mut Rank) -> Result<()>) -> Result<Rank> {
    let params = |net: &Net| Params { non_finite, ..Params::k_fac(&net.tape) };
    let mut rank = Rank::new(world, small, &params)?;
    let batch = small_batch(0, 6, DType::F64)?;
    rank.step(&batch, (0, 6))?;
    if rank.world.rank() == 1 {
        wrong(&mut rank)?;
    } else {
        rank.step(&batch, (0, 6))?;
    }
    Ok(rank)
}

fn nan(rank: &mut Rank) -> Result<()> {
    let (x, y) = small_batch(0, 6, DType::F64)?;
    let z = (rank.net.forward)(&x)?;
    rank.opt.observe(&z, LIKELIHOOD)?;
    rank.opt.backward_step(&(mean_loss(LIKELIHOOD, &z, &y)? * f64::NAN)?)
}

#[test]
fn nan_on_one_rank() -> Result<()> {
    all_say(
        ranks(3, |w| step(w, NonFinite::Error, &nan).map(drop)),
        &["kfac: step 1: rank 1: the loss is NaN; parameters and state are unchanged"],
    );
    let infinite = |rank: &mut Rank| {
        let (x, y) = small_batch(0, 6, DType::F64)?;
        let z = (rank.net.forward)(&(x * f64::INFINITY)?)?;
        rank.opt.observe(&z, LIKELIHOOD)?;
        rank.opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)
    };
    all_say(ranks(2, |w| step(w, NonFinite::Error, &infinite).map(drop)), &["rank 1", "NaN"]);
    let left_out = ranks(3, |w| {
        let mut rank = step(w, NonFinite::Skip, &nan)?;
        let values = rank.net.values()?;
        rank.step(&small_batch(1, 6, DType::F64)?, (0, 6))?;
        Ok((rank.opt.skipped(), rank.opt.steps(), values, rank.net.values()?))
    });
    let left_out = left_out.into_iter().collect::<Result<Vec<_>>>()?;
    for (skipped, steps, values, after) in &left_out {
        assert_eq!((*skipped, *steps), (1, 2));
        assert_eq!((apart(values, &left_out[0].2), apart(after, &left_out[0].3)), (0.0, 0.0));
    }
    Ok(())
}

#[test]
fn calls_that_go_wrong_on_one_rank() {
    let said = |wrong: fn(&mut Rank) -> Result<()>| {
        ranks(3, move |world| step(world, NonFinite::Error, &wrong).map(drop))
    };
    // A gradient is missing.
    all_say(
        said(|rank| {
            let (x, _) = small_batch(0, 6, DType::F64)?;
            rank.opt.observe(&(rank.net.forward)(&x)?, LIKELIHOOD)?;
            rank.opt.backward_step(&rank.net.var("gain").sqr()?.sum_all()?)
        }),
        &["rank 1: kfac: no gradient for conv.bias"],
    );
    // The rows were not counted.
    all_say(
        said(|rank| {
            let (x, y) = small_batch(0, 6, DType::F64)?;
            rank.opt.backward_step(&mean_loss(LIKELIHOOD, &(rank.net.forward)(&x)?, &y)?)
        }),
        &["rank 1: kfac: step 1", "call observe at every step"],
    );
    // Outputs that the likelihood does not take, which observe would refuse at once.
    all_say(
        said(|rank| {
            let (x, y) = small_batch(0, 6, DType::F64)?;
            let z = (rank.net.forward)(&x)?;
            rank.opt.observe(&z.flatten_all()?, Likelihood::Gaussian)?;
            rank.opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)
        }),
        &["rank 1: "],
    );
    // Another learning rate.
    all_say(
        said(|rank| {
            rank.opt.set_learning_rate(0.5);
            rank.step(&small_batch(0, 6, DType::F64)?, (0, 6))
        }),
        &["rank 1 has the learning rate 0.5, where rank 0 has 0.075"],
    );
    // Another call.
    let calls = sentences(said(|rank| rank.opt.save(scratch("never"))));
    assert!(calls[0].contains("rank 1 is in save of kfac after 1 steps, and rank 0 in step"), "{calls:?}");
    assert!(calls[1].contains("rank 0 is in step of kfac after 1 steps, and rank 1 in save"), "{calls:?}");
}

#[test]
fn ranks_that_leave_or_do_not_come() {
    let begun = Instant::now();
    let left = ranks(3, |world| {
        let mut rank = Rank::new(world, small, &|net| Params::k_fac(&net.tape))?;
        if rank.world.rank() == 1 {
            candle_core::bail!("rank 1 has left, as it said itself");
        }
        rank.step(&small_batch(0, 6, DType::F64)?, (0, 6))
    });
    for said in sentences(left) {
        assert!(said.contains("rank 1 has left"), "{said}");
    }
    let late = ranks(3, |world| {
        world.set_time_limit(Duration::from_millis(300));
        let mut rank = Rank::new(world, small, &|net| Params::k_fac(&net.tape))?;
        if rank.world.rank() == 2 {
            std::thread::sleep(Duration::from_millis(1500));
        }
        rank.step(&small_batch(0, 6, DType::F64)?, (0, 6))
    });
    let said = sentences(late);
    assert!(said[0].contains("rank 2 did not come within 0.3 s"), "{said:?}");
    assert!(said[1].contains("rank 2"), "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

/// A frozen Var of a type that is not sent.
#[test]
fn values_that_rank_0_cannot_give() {
    let shared = ranks(3, |world| {
        world.set_time_limit(Duration::from_secs(20));
        let net = Net::of(DType::F64, 1 + world.rank() as u64, other)?;
        let scales = Var::from_tensor(&Tensor::zeros(3, DType::F8E4M3, &Device::Cpu)?)?;
        net.varmap.data().lock().expect("a lock").insert("scales".into(), scales);
        let groups = Groups(vec![Group { frozen: true, ..Group::named("scales") }]);
        let params = Params { groups, ..Params::k_fac(&net.tape) };
        let before = net.values()?;
        let shared = NaturalGradient::from_varmap(&net.varmap, params)?.share(&world, Placement::Replicated);
        assert_eq!(apart(&net.values()?[..4], &before[..4]), 0.0);
        shared
    });
    all_say(shared, &["rank 0: parallel: expected a tensor of f64, f32, f16 or bf16, got F8E4M3"]);
}

/// Two layers on inputs of their own; those of the second are all 1, so that its factor A of 34 rows is of rank one.
fn apart_inputs(vb: VarBuilder) -> Result<Forward> {
    let (a, b) = (nn::linear(50, 3, vb.pp("a"))?, nn::linear(33, 3, vb.pp("b"))?);
    Ok(Box::new(move |x| {
        a.forward(x)? + b.forward(&Tensor::ones((x.dim(0)?, 33), x.dtype(), x.device())?)?
    }))
}

/// A step on this rank's part of 120 rows.
fn gaussian_step(rank: &mut Rank, k: u64) -> Result<()> {
    let (x, y) = (random(300 + k, &[120, 50])?, random(400 + k, &[120, 3])?);
    let part = rank.world.part(120);
    let (x, y) = (x.narrow(0, part.start, part.len())?, y.narrow(0, part.start, part.len())?);
    let z = (rank.net.forward)(&x)?;
    rank.opt.observe(&z, Likelihood::Gaussian)?;
    rank.opt.backward_step(&mean_loss(Likelihood::Gaussian, &z, &y)?)
}

/// An inverse that its owner alone makes, and cannot: rank 1 has the second layer's, which is the smaller one.
#[test]
fn an_inverse_that_fails_on_its_owner() -> Result<()> {
    let params = |damping: f64| {
        move |net: &Net| Params {
            damping: Damping::Pi(damping),
            inverse: Inverse::Cholesky,
            every: Every { factors: 1, inverses: 1 },
            ..Params::k_fac(&net.tape)
        }
    };
    const NONE: f64 = 1e-60;
    for placement in [Placement::Gathered, Placement::Owned] {
        // The first one has none to go on with.
        let said = ranks(2, |world| {
            world.set_time_limit(Duration::from_secs(20));
            let mut rank = Rank::placed(world, apart_inputs, &params(NONE), placement)?;
            let before = rank.net.values()?;
            let outcome = gaussian_step(&mut rank, 0);
            assert_eq!(apart(&rank.net.values()?, &before), 0.0);
            assert_eq!(rank.opt.steps(), 0);
            outcome
        });
        all_say(said, &["rank 1: b: expected a positive definite matrix"]);
        // A later one keeps the last, as on one process.
        let train = |world: World| -> Result<Vec<Tensor>> {
            world.set_time_limit(Duration::from_secs(20));
            let mut rank = Rank::placed(world, apart_inputs, &params(0.1), placement)?;
            gaussian_step(&mut rank, 0)?;
            let without_damping = params(NONE)(&rank.net);
            rank.opt.set_params(without_damping)?;
            gaussian_step(&mut rank, 1)?;
            rank.net.values()
        };
        let expected = train(World::alone())?;
        for found in ranks(2, train) {
            let far = apart(&found?, &expected);
            assert!(far < 1e-12, "{placement:?}: {far:e}");
        }
    }
    Ok(())
}

#[test]
fn parameters_that_part_are_noticed() -> Result<()> {
    let outcomes = ranks(2, |world| {
        let net = Net::of(DType::F64, 1, other)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, Params::k_fac(&net.tape))?;
        opt.share(&world, Placement::Replicated)?;
        let (x, y) = small_batch(0, 6, DType::F64)?;
        for k in 0..101 {
            if (k, world.rank()) == (50, 1) {
                let value: Tensor = (net.var("fc2.bias").as_tensor() + 1e-9)?;
                net.var("fc2.bias").set(&value)?;
            }
            let z = (net.forward)(&x)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)?;
        }
        Ok(())
    });
    all_say(outcomes, &["kfac: step 100: the parameters have parted: rank 1 has for"]);
    Ok(())
}

#[test]
fn files_are_of_any_number_of_processes() -> Result<()> {
    let params = |net: &Net| Params::kld_wrm(&net.tape);
    let path = scratch("shared");
    let from = |world: World, split: &[usize], first: u64, steps: u64, save: bool| -> Result<Vec<Tensor>> {
        let part = rows(split, world.rank());
        let mut rank = Rank::new(world, small, &params)?;
        if first > 0 {
            rank.opt.resume(&path)?;
        }
        for k in first..first + steps {
            plain(&mut rank, k, part)?;
        }
        if save {
            rank.opt.save(&path)?;
        }
        rank.net.values()
    };
    let expected = from(World::alone(), &[ROWS], 0, 15, false)?;
    let ways: [[&[usize]; 3]; 2] = [[&[6, 6], &[12], &[5, 4, 3]], [&[12], &[2, 0, 7, 3], &[6, 6]]];
    for way in ways {
        for (index, split) in way.iter().enumerate() {
            let first = 5 * index as u64;
            for (rank, found) in
                ranks(split.len(), |world| from(world, split, first, 5, index < 2)).into_iter().enumerate()
            {
                let found = found?;
                if index == 2 {
                    let far = apart(&found, &expected);
                    assert!(far < 1e-12, "{way:?}, rank {rank}: {far:e}");
                }
            }
        }
    }
    std::fs::remove_file(&path)?;
    all_say(ranks(2, |world| from(world, &[6, 6], 5, 1, false)), &["rank 0: ", "kronwake"]);
    Ok(())
}
