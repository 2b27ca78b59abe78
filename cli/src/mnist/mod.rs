//! Trains small networks on 28x28 images; `cargo run --release --example mnist -- --help` lists what can be chosen.

mod args;
mod defaults;
mod optimizer;
mod penalty;
mod report;
mod train;
mod tuning;

use crate::data::Data;
use crate::processes::Processes;
use crate::values::Choice;
use crate::{curves, program, trace};
use args::Args;
use candle_core::Result;
use std::process::ExitCode;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::from_command_line();
    program::start_together(args.threads, |processes| work(&args, processes))
}

fn work(args: &Args, processes: &Processes) -> Result<()> {
    let device = args.device.open()?;
    let world = processes.join(&device)?;
    world.agree("a command line of", &format!("{args:?}"))?;
    let times = trace::Times::install(args.trace);
    let data = Data::open(args.data_dir.as_deref(), args.dataset)?;
    println!("{}", data.title);
    program::make_folder("--out", &args.out)?;
    let choices: &[Choice] = match args.optimizer {
        Choice::Compare => &[Choice::Kldwrm, Choice::So, Choice::Kfac, Choice::Adamw],
        ref one => std::slice::from_ref(one),
    };
    let mut log = report::Log::create(args.log.as_deref().filter(|_| world.is_first()))?;
    let mut runs = Vec::new();
    for &choice in choices {
        println!();
        runs.push(train::run(choice, args, &data, (&device, world), &mut log)?);
    }
    println!();
    if runs.len() > 1 {
        println!("{}", report::comparison(&runs));
    }
    if args.trace {
        println!("{}", times.table());
    }
    if !world.is_first() {
        return Ok(());
    }
    let (curves, parameters) = (args.out.join("curves.svg"), args.out.join("model.safetensors"));
    curves::curves(&curves, "epoch", "training loss", |by_time, accuracy| {
        runs.iter().map(|run| run.line(by_time, accuracy)).collect()
    })?;
    println!("curves: {}", curves.display());
    if let Some(first) = runs.first() {
        first.vars.save(&parameters)?;
        println!("parameters after {}: {}", first.choice.name(), parameters.display());
    }
    Ok(())
}
