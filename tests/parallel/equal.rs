//! Every member of the family, on any split of the rows, leads where one process does on the whole batch.

use super::harness::*;
use crate::common::*;
use candle_core::Result;
use kronwake::curvature::{Damping, Relative};
use kronwake::optim::{Every, Params, Q, So, Wake};
use kronwake::tape::Fisher;

const EVERY: Every = Every { factors: 2, inverses: 2 };

fn check(what: &str, splits: &[&[usize]], params: &(dyn Fn(&Net) -> Params + Sync)) -> Result<()> {
    let far = Training { build: small, params, steps: 20 }.check(what, splits)?;
    println!("{what}: {far:e}");
    Ok(())
}

fn with_fishers(wake: impl Into<Wake> + Clone) -> Result<()> {
    let wake: Wake = wake.into();
    for fisher in [Fisher::Sampled { draws: 2, seed: 3 }, Fisher::Exact, Fisher::Empirical] {
        let what = format!("{}, {fisher:?}", wake.name());
        check(&what, &SPLITS, &|net| Params { fisher, every: EVERY, ..Params::of(wake.clone(), &net.tape) })?;
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
    check("kld-wrm", &SPLITS, &|net| Params::kld_wrm(&net.tape))
}

#[test]
fn pi_and_relative_dampings() -> Result<()> {
    for damping in [Damping::Pi(0.01), Damping::Relative(Relative::default())] {
        check(&format!("{damping:?}"), &SPLITS, &|net| Params {
            damping,
            every: EVERY,
            ..Params::k_fac(&net.tape)
        })?;
    }
    Ok(())
}
