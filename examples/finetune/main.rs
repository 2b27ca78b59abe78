//! Fine-tunes a model from a safetensors checkpoint; `cargo run --release --example finetune -- --help` lists what can be chosen.

mod args;
#[path = "../mnist/chart.rs"]
mod chart;
#[path = "../mnist/curves.rs"]
mod curves;
#[allow(dead_code)]
#[path = "../mnist/data.rs"]
mod data;
#[allow(dead_code)]
#[path = "../mnist/first_order.rs"]
mod first_order;
#[path = "../mnist/idx.rs"]
mod idx;
mod images;
#[allow(dead_code)]
#[path = "../mnist/model.rs"]
mod model;
#[allow(dead_code)]
#[path = "../models/mod.rs"]
mod models;
mod optimizer;
#[path = "../mnist/random.rs"]
mod random;
#[path = "../mnist/sentence.rs"]
mod sentence;
mod sentences;
#[path = "../mnist/start.rs"]
mod start;
mod task;
mod text;
mod train;
#[allow(dead_code)]
#[path = "../mnist/values.rs"]
mod values;
#[allow(dead_code)]
#[path = "../mnist/weights.rs"]
mod weights;

use args::{Args, Net};
use candle_core::{Result, bail};
use clap::Parser;
use std::process::ExitCode;
use task::Task;

fn main() -> ExitCode {
    let args = Args::parse();
    start::start(args.threads, || work(&args))
}

fn work(args: &Args) -> Result<()> {
    args.check()?;
    if let Err(e) = std::fs::create_dir_all(&args.out) {
        bail!("--out {}: cannot be made ({e})", args.out.display())
    }
    let device = args.device.open()?;
    let task: Box<dyn Task> = match &args.model {
        Net::Of(spec) => Box::new(images::Images::new(args, Some(spec.clone()), &device)?),
        Net::Vit => Box::new(images::Images::new(args, None, &device)?),
        Net::Decoder => Box::new(text::Text::new(args, &device)),
        Net::Bert => {
            let (folder, data) = args.sentences()?;
            Box::new(sentences::Sentences::new(args, folder, data, &device)?)
        }
    };
    println!("{}", task.title());
    let base = match &args.checkpoint {
        Some(path) => Some(path.clone()),
        None if args.scratch => None,
        None => {
            let path = args.out.join("base.safetensors");
            task.train_base(args, &path)?;
            Some(path)
        }
    };
    let mut runs = Vec::new();
    for &choice in args.optimizer.each() {
        println!();
        runs.push(train::tune(choice, args, task.as_ref(), base.as_deref(), &device)?);
    }
    println!();
    println!("{}", train::comparison(&runs));
    let path = args.out.join("finetune.svg");
    curves::curves(&path, "step", "test loss", |by_time, accuracy| {
        runs.iter().map(|run| run.line(by_time, accuracy)).collect()
    })?;
    println!("curves: {}", path.display());
    Ok(())
}
