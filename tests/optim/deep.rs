//! Steps on graphs that are deeper than a stack.

use crate::common::*;
use candle_core::{DType, Device, Result};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::tape::{Fisher, Likelihood, Tape};

/// 30,000 operations behind a layer, in a thread of 512 KiB: the backward passes for curvature and gradient go through.
#[test]
fn a_step_has_room() -> Result<()> {
    let work = || -> Result<()> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let layer = tape.build(|| nn::linear(3, 2, vb.pp("fc")))?;
        let params = Params { fisher: Fisher::Exact, ..Params::kld_wrm(&tape) };
        let mut opt = NaturalGradient::from_varmap(&vars, params)?;
        let mut z = layer.forward(&random(1, &[4, 3])?)?;
        for _ in 0..30_000 {
            z = (z * 1.0)?;
        }
        opt.observe(&z, Likelihood::Categorical)?;
        let loss = nn::loss::cross_entropy(&z, &labels(2, 4, 2)?)?;
        opt.backward_step(&loss)?;
        // The end of a graph's life recurses too, and is the caller's.
        kronwake::stack::deep(move || drop((loss, z)));
        Ok(())
    };
    let thread = std::thread::Builder::new().stack_size(512 << 10).spawn(work)?;
    thread.join().expect("no overflow")
}
