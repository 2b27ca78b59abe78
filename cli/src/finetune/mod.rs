//! Fine-tunes a model from a safetensors checkpoint; `cargo run --release --example finetune -- --help` lists what can be chosen.

pub(crate) mod args;
mod images;
pub(crate) mod open;
mod optimizer;
mod sentences;
pub(crate) mod task;
mod text;
mod train;

use crate::processes::Processes;
use crate::{curves, program};
use args::{Args, Net};
use candle_core::{Device, Result};
use clap::Parser;
use std::process::ExitCode;
use task::Task;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start_together(args.threads, |processes| work(&args, processes))
}

/// What the options say is to be learnt.
fn task_of(args: &Args, device: &Device) -> Result<Box<dyn Task>> {
    Ok(match &args.model {
        Net::Of(spec) => Box::new(images::Images::new(args, Some(spec.clone()), device)?),
        Net::Vit => Box::new(images::Images::new(args, None, device)?),
        Net::Decoder(_) => Box::new(text::Text::new(args, device)?),
        Net::Bert => {
            let (folder, data) = args.sentences()?;
            Box::new(sentences::Sentences::new(args, folder, data, device)?)
        }
    })
}

fn work(args: &Args, processes: &Processes) -> Result<()> {
    args.check()?;
    let device = args.device.open()?;
    let world = processes.join(&device)?;
    world.agree("a command line of", &format!("{args:?}"))?;
    program::make_folder("--out", &args.out)?;
    let task = task_of(args, &device)?;
    println!("{}", task.title());
    let base = match &args.checkpoint {
        Some(path) => Some(path.clone()),
        None if args.scratch => None,
        None => {
            let path = args.out.join("base.safetensors");
            task.train_base(args, &path, world)?;
            Some(path)
        }
    };
    let mut runs = Vec::new();
    for &choice in args.runs() {
        println!();
        runs.push(train::tune(choice, args, task.as_ref(), base.as_deref(), (&device, world))?);
    }
    println!();
    println!("{}", train::comparison(&runs));
    if !world.is_first() {
        return Ok(());
    }
    let path = args.out.join("finetune.svg");
    curves::curves(&path, "step", "test loss", |by_time, accuracy| {
        runs.iter().map(|run| run.line(by_time, accuracy)).collect()
    })?;
    println!("curves: {}", path.display());
    Ok(())
}
