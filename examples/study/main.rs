//! Compares optimizers under equal budgets; `cargo run --release --example study -- --help` lists what can be chosen.

mod args;
#[path = "../mnist/chart.rs"]
mod chart;
#[allow(dead_code)]
#[path = "../mnist/data.rs"]
mod data;
mod drive;
#[allow(dead_code)]
#[path = "../mnist/first_order.rs"]
mod first_order;
#[path = "../mnist/idx.rs"]
mod idx;
mod methods;
#[path = "../mnist/model.rs"]
mod model;
mod plan;
mod plot;
#[path = "../mnist/random.rs"]
mod random;
mod report;
mod run;
#[path = "../mnist/sentence.rs"]
mod sentence;
mod setting;
mod stats;
mod store;
#[allow(dead_code)]
#[path = "../mnist/weights.rs"]
mod weights;
mod work;

use args::Args;
use candle_core::{Result, bail};
use clap::Parser;
use data::Data;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    // SAFETY: no other thread runs yet. candle reads the variable when it first multiplies matrices: each worker is one
    // thread.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    match study(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence::sentence(&error));
            ExitCode::FAILURE
        }
    }
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
            write(path, &text)?;
        }
        if let Some(dir) = &args.plots {
            if let Err(e) = std::fs::create_dir_all(dir) {
                bail!("--plots {}: cannot be made ({e})", dir.display());
            }
            plot::seconds(&done, &dir.join("seconds.svg"))?;
            plot::random(&done, &dir.join("random.svg"))?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    match std::fs::write(path, text) {
        Ok(()) => Ok(()),
        Err(e) => bail!("--report {}: cannot be written ({e})", path.display()),
    }
}
