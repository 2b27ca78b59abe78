//! Trains small networks on 28x28 images; `cargo run --release --example mnist -- --help` lists what can be chosen.

mod args;
mod chart;
mod curves;
mod data;
mod defaults;
mod feed;
mod first_order;
mod idx;
mod model;
mod optimizer;
mod penalty;
mod random;
mod report;
mod sentence;
mod start;
mod trace;
mod train;
mod tuning;
mod values;
mod weights;

use args::Args;
use candle_core::{Result, bail};
use data::{Data, Name};
use std::process::ExitCode;
use values::Choice;

fn main() -> ExitCode {
    let args = Args::from_command_line();
    start::start(args.threads, || work(&args))
}

fn work(args: &Args) -> Result<()> {
    let times = trace::Times::install(args.trace);
    let device = args.device.open()?;
    let data = match (&args.data_dir, args.dataset) {
        (None, None) => Data::bundled()?,
        (Some(dir), name) => Data::from_dir(dir, name.unwrap_or(Name::Mnist))?,
        (None, Some(name)) => Data::download(name)?,
    };
    println!("{}", data.title);
    if let Err(e) = std::fs::create_dir_all(&args.out) {
        bail!("--out {}: cannot be made ({e})", args.out.display());
    }
    let choices: &[Choice] = match args.optimizer {
        Choice::Compare => &[Choice::Kldwrm, Choice::So, Choice::Kfac, Choice::Adamw],
        ref one => std::slice::from_ref(one),
    };
    let mut log = report::Log::create(args.log.as_deref())?;
    let mut runs = Vec::new();
    for &choice in choices {
        println!();
        runs.push(train::run(choice, args, &data, &device, &mut log)?);
    }
    println!();
    if runs.len() > 1 {
        println!("{}", report::comparison(&runs));
    }
    if args.trace {
        println!("{}", times.table());
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
