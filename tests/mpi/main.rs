//! A rank of the checks that `scripts/check-mpi.sh` runs under mpirun: `mpi SCENARIO [ARGUMENT..]`.

#![allow(dead_code)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../parallel/harness.rs"]
mod harness;

use candle_core::{DType, Result, bail};
use common::*;
use harness::*;
use kronwake::curvature::Damping;
use kronwake::optim::{Every, NonFinite, Params, Q, So, Wake};
use kronwake::parallel::{Mpi, Placement, World};
use kronwake::tape::Fisher;
use std::path::Path;
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = Mpi::init().and_then(|world| {
        let outcome = run(&world, &arguments);
        if let Err(error) = &outcome {
            println!("rank {} says: {}", world.rank(), error.to_string().lines().next().unwrap_or_default());
        }
        outcome
    });
    std::process::exit(outcome.is_err().into());
}

fn run(world: &Mpi, arguments: &[&str]) -> Result<()> {
    world.set_time_limit(Duration::from_secs(20));
    match arguments {
        [] | ["equal"] => equal(world),
        // Messages of a few bytes, as if they were too long.
        ["pieces", bytes] => {
            world.set_largest_message(bytes.parse().map_err(candle_core::Error::wrap)?);
            world.agree("a text", &"0123456789".repeat(321))?;
            half(world)?;
            equal(world)
        }
        ["bf16"] => half(world),
        ["train", file, first, steps] => {
            let number = |text: &str| text.parse::<u64>().map_err(candle_core::Error::wrap);
            train(world, Path::new(file), number(first)?, number(steps)?)
        }
        [fault] => fail(world, fault),
        _ => bail!("unknown arguments {arguments:?}"),
    }
}

/// Uneven splits, the last rank without rows in the second.
fn splits(size: usize) -> Vec<Vec<usize>> {
    match size {
        1 => vec![vec![ROWS]],
        2 => vec![vec![6, 6], vec![9, 3], vec![12, 0]],
        _ => {
            let even = vec![ROWS / size; size];
            let mut uneven = vec![1; size];
            uneven[size - 1] = 0;
            uneven[0] = ROWS - (size - 2);
            vec![even, uneven]
        }
    }
}

fn equal(world: &World) -> Result<()> {
    let every = Every { factors: 2, inverses: 2 };
    let members: [Wake; 4] =
        [Wake::KFac, So::default().into(), Q::default().into(), "kld-wrm".parse::<Wake>()?];
    for member in members {
        for fisher in [Fisher::Sampled { draws: 2, seed: 3 }, Fisher::Exact, Fisher::Empirical] {
            let own = member.name() == "kld-wrm";
            let params = |net: &Net| {
                let params = Params::of(member.clone(), &net.tape);
                Params { fisher, every: if own { params.every } else { every }, ..params }
            };
            let first = if own { Placement::Gathered } else { Placement::Replicated };
            let training = Training { build: small, params: &params, step: &plain, placement: first };
            let (before, expected) = training.run(World::alone(), &[ROWS])?;
            let splits = splits(world.size());
            for (split, placement) in splits.iter().flat_map(|s| [(s, first), (s, Placement::Owned)]) {
                let found = Training { placement, ..training }.run(world.clone(), split)?.1;
                let (far, moved) = (apart(&found, &expected), apart(&before, &expected));
                let what = format!("{}, {fisher:?}, {split:?}, {placement:?}", member.name());
                if world.is_first() {
                    println!("{what}: {far:.1e} apart after a way of {moved:.2}");
                }
                if !(far < 1e-12 && moved > 0.02) {
                    bail!("{what}: {far:e} apart after a way of {moved}")
                }
            }
        }
    }
    Ok(())
}

/// Goes on from a file, or begins, saves, and compares with one process that never stopped.
fn train(world: &World, file: &Path, first: u64, steps: u64) -> Result<()> {
    let params = |net: &Net| Params::kld_wrm(&net.tape);
    let split = splits(world.size()).pop().unwrap_or_default();
    let part = rows(&split, world.rank());
    let mut rank = Rank::placed(world.clone(), small, &params, Placement::Owned)?;
    if first > 0 {
        rank.opt.resume(file)?;
    }
    for k in first..first + steps {
        plain(&mut rank, k, part)?;
    }
    rank.opt.save(file)?;
    let mut alone = Rank::new(World::alone(), small, &params)?;
    for k in 0..first + steps {
        plain(&mut alone, k, (0, ROWS))?;
    }
    let far = apart(&rank.net.values()?, &alone.net.values()?);
    if world.is_first() {
        println!("{} ranks after {} steps: {far:.1e} apart", world.size(), first + steps);
    }
    if far < 1e-12 { Ok(()) } else { bail!("{far:e} apart") }
}

/// Trains, and does something wrong on rank 1.
fn fail(world: &World, fault: &str) -> Result<()> {
    world.set_time_limit(Duration::from_secs(3));
    let wrong = world.rank() == 1;
    let params = |net: &Net| {
        let params = Params { non_finite: NonFinite::Error, ..Params::k_fac(&net.tape) };
        match fault {
            "options" if wrong => Params { damping: Damping::Pi(0.5), ..params },
            "seed" if wrong => Params { fisher: Fisher::Sampled { draws: 1, seed: 9 }, ..params },
            _ => params,
        }
    };
    let build = if fault == "model" && wrong { other } else { small };
    let mut rank = Rank::new(world.clone(), build, &params)?;
    let batch = small_batch(0, 6, DType::F64)?;
    for step in 0..3 {
        if step == 2 && wrong {
            match fault {
                "die" => {
                    // As by the kernel, for want of memory.
                    std::process::Command::new("kill")
                        .args(["-9", &std::process::id().to_string()])
                        .status()?;
                }
                "exit" => std::process::exit(3),
                "hang" => std::thread::sleep(Duration::from_secs(120)),
                "leave" => bail!("rank 1 cannot read its data"),
                "nan" => {
                    let nan = (&batch.0 * f64::NAN)?;
                    return rank.step(&(nan, batch.1.clone()), (0, 6));
                }
                "call" => return rank.opt.save("never"),
                other => bail!("unknown scenario {other}"),
            }
        }
        rank.step(&batch, (0, 6))?;
    }
    Ok(())
}

fn other(vb: kronwake::nn::VarBuilder) -> Result<Forward> {
    use kronwake::nn::{Module, linear};
    let fc = linear(9, 3, vb.pp("fc1"))?;
    Ok(Box::new(move |x| fc.forward(&x.flatten_from(1)?)))
}
