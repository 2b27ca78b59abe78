//! Steps of several processes, of which one cannot take its part.

use crate::gpu::emulate::emulate;
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::ops::testing::{random, values};
use crate::optim::{Every, Group, Groups, NaturalGradient, Optimizer, Params, So, UpdateRule, Wake};
use crate::parallel::{Placement, Threads, World, testing};
use crate::tape::{Likelihood, Tape};
use candle_core::{DType, Device, Result, Tensor};

/// Parameters after some steps of a rank on its part of six rows.
fn train(world: &World, wake: Wake, placement: Placement) -> Result<Vec<Vec<f64>>> {
    let (tape, vars) = (Tape::new(), VarMap::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let (a, b) = tape.build(|| Ok((nn::linear(5, 34, vb.pp("a"))?, nn::linear(34, 3, vb.pp("b"))?)))?;
    let mut named: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (_, var)) in named.iter().enumerate() {
        var.set(&random((index + 10 * world.rank()) as u64, var.dims())?)?;
    }
    let every = Every { factors: 2, inverses: 2 };
    let mut opt = NaturalGradient::from_varmap(&vars, Params { every, ..Params::of(wake, &tape) })?;
    opt.share(world, placement)?;
    let (x, y) = (random(90, &[6, 5])?, Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?);
    let (from, n) = if world.is_alone() { (0, 6) } else { [(0, 4), (4, 2)][world.rank()] };
    for _ in 0..6 {
        let outputs = b.forward(&a.forward(&x.narrow(0, from, n)?)?.tanh()?)?;
        opt.observe(&outputs, Likelihood::Categorical)?;
        opt.backward_step(&nn::loss::cross_entropy(&outputs, &y.narrow(0, from, n)?)?)?;
    }
    opt.settle()?;
    named.iter().map(|(_, var)| values(var)).collect()
}

#[test]
fn tensors_on_a_gpu_are_added_up_there_and_by_way_of_the_host() -> Result<()> {
    let wakes: [Wake; 3] = [Wake::KFac, So::default().into(), "kld-wrm".parse()?];
    let placements = [Placement::Replicated, Placement::Gathered, Placement::Gathered];
    let owned = wakes.clone().map(|wake| (wake, Placement::Owned));
    for (wake, placement) in wakes.into_iter().zip(placements).chain(owned) {
        let expected = emulate(|| train(&World::alone(), wake.clone(), placement))?;
        let run = &|world: World| emulate(|| train(&world, wake.clone(), placement));
        let trained = |worlds: Vec<World>| -> Vec<_> {
            std::thread::scope(|scope| {
                let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(move || run(world))).collect();
                ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
            })
        };
        let found = [Threads::worlds(2), testing::worlds(2)].into_iter().flat_map(trained);
        for found in found {
            for (found, expected) in found?.iter().flatten().zip(expected.iter().flatten()) {
                let far = (found - expected).abs();
                assert!(far < 1e-11, "{}: {found}, expected {expected}", wake.name());
            }
        }
    }
    Ok(())
}

/// What the ranks of a world say of a step whose drawn gradients `spoil` has changed on rank 1, and what becomes of the parameters. Rank 2 has
/// no rows.
fn drawn(world: &World, placement: Placement, spoil: fn(&Tensor) -> Result<Tensor>) -> Result<String> {
    world.set_time_limit(std::time::Duration::from_secs(20));
    let (tape, vars) = (Tape::new(), VarMap::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let (a, b) = tape.build(|| Ok((nn::linear(5, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?)))?;
    let by_gradient = Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("a.weight") };
    let params = Params { groups: Groups(vec![by_gradient]), ..Params::k_fac(&tape) };
    let mut opt = NaturalGradient::from_varmap(&vars, params)?;
    opt.share(world, placement)?;
    let before = b.weight().copy()?;
    let stepped = match world.rank() {
        2 => opt.step_without_rows(),
        rank => {
            let (x, y) = (random(rank as u64, &[3, 5])?, Tensor::new(&[0u32, 1, 2], &Device::Cpu)?);
            let z = b.forward(&a.forward(&x)?.tanh()?)?;
            opt.observe(&z, Likelihood::Categorical)?;
            let drawn = opt.observed.iter_mut().flat_map(|seen| seen.drawn.iter_mut().flatten());
            for gradient in drawn.filter(|_| rank == 1) {
                *gradient = spoil(gradient)?;
            }
            opt.backward_step(&nn::loss::cross_entropy(&z, &y)?)
        }
    };
    assert_eq!(values(b.weight())?, values(&before)?);
    Ok(stepped.err().map_or(String::new(), |error| error.to_string()))
}

#[test]
fn drawn_gradients_that_one_cannot_add_are_said_on_all() -> Result<()> {
    type Spoil = fn(&Tensor) -> Result<Tensor>;
    let cases: [(Spoil, &str); 2] = [
        (|g| g.narrow(1, 0, 2)?.contiguous(), "rank 1: parallel: expected a tensor [1, 4, 5] to add, got"),
        (|g| g * f64::NAN, "kfac: step 0: rank 1: a gradient of drawn labels has NaN or infinite elements"),
    ];
    for (spoil, expected) in cases {
        for placement in [Placement::Replicated, Placement::Owned] {
            for worlds in [Threads::worlds(3), testing::worlds(3)] {
                let said: Vec<_> = std::thread::scope(|scope| {
                    let run = |world: World| scope.spawn(move || drawn(&world, placement, spoil));
                    let ranks: Vec<_> = worlds.into_iter().map(run).collect();
                    ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
                });
                for said in said {
                    let said = said?;
                    assert!(said.starts_with(expected), "{said:?}, expected {expected:?}");
                }
            }
        }
    }
    Ok(())
}
