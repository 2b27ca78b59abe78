//! Compares optimizers under equal budgets; `cargo run --release --example study -- --help` lists what can be chosen.

mod args;
mod methods;
mod plan;
mod plot;
mod report;
mod run;
mod setting;
mod store;
mod work;

use crate::data::Data;
use crate::program;
use args::Args;
use candle_core::{Result, bail};
use clap::Parser;
use std::process::ExitCode;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    // Each worker is one thread.
    program::start(Some(1), || study(&args))
}

fn study(args: &Args) -> Result<()> {
    if args.trains() {
        let Some(dir) = &args.data_dir else { bail!("--data-dir is needed to train") };
        let split = run::Split::new(Data::from_dir(dir, args.dataset)?);
        println!("{}", split.data.title);
        let (log, done) = store::Log::open(&args.out, &args.protocol())?;
        work::work(args, &split, log, done)?;
    }
    if args.stages.contains(&plan::Stage::Report) {
        let (protocol, done) = store::read(&args.out)?;
        let text = report::markdown(&protocol, &done, &args.thresholds);
        println!("{text}");
        if let Some(path) = &args.report {
            program::write("--report", path, &text)?;
        }
        if let Some(dir) = &args.plots {
            program::make_folder("--plots", dir)?;
            plot::seconds(&done, &dir.join("seconds.svg"))?;
            plot::random(&done, &dir.join("random.svg"))?;
        }
    }
    Ok(())
}
