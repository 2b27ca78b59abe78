//! LeNet-300-100 with few weights; `cargo run --release --example sparse -- --help` lists what can be chosen.

mod net;
mod penalty;
mod prune;
mod report;
mod store;
mod study;
mod tables;

use crate::data::{Data, Name};
use crate::program;
use crate::values::{count, fraction, not_negative, positive};
use candle_core::{Result, bail};
use clap::Parser;
use net::{Net, Pace, Split};
use penalty::{Choice, Penalized};
use prune::{By, How};
use std::path::PathBuf;
use std::process::ExitCode;
use study::Stage;

/// Trains LeNet-300-100 with a penalty, removes weights step by step, and says what that costs.
///
/// Without --data-dir on 6,000 bundled images of Fashion-MNIST, a sixth of which is held out: by these images alone is chosen. From the
/// trained net weights are removed down to --keep of them, on the way to which every fifth of those left goes at a time; the rest is corrected
/// (--correct) and trained further (--tune-epochs). Prints nonzeros, live pixels and units and accuracies at each step and a picture of the
/// pixels that are left, and writes the smallest net that loses no more than --loss to DIR: dense.safetensors, compact.safetensors without
/// dead units and pixels, and sparse.safetensors with indices and values.
#[derive(Parser, Clone, Debug)]
#[command(name = "sparse", allow_negative_numbers = true)]
pub struct Args {
    /// What keeps weights small in training
    #[arg(long, value_enum, default_value_t = Choice::L1, conflicts_with = "study")]
    penalty: Choice,
    /// Factor of the penalty; each has its own default
    #[arg(long, value_parser = not_negative, conflicts_with = "study")]
    factor: Option<f64>,
    /// By what the weights that go are chosen
    #[arg(long, value_enum, default_value_t = By::Kronecker, conflicts_with = "study")]
    prune: By,
    /// Correct the weights that stay, by the optimal brain surgeon: true or false
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, conflicts_with = "study")]
    correct: bool,
    /// Rounds in which the weights of one step go
    #[arg(long, default_value_t = 2, value_parser = count)]
    rounds: usize,
    /// Passes over the training set after each step, with masks
    #[arg(long, default_value_t = 5)]
    tune_epochs: usize,
    /// Passes over the training set before
    #[arg(long, default_value_t = 15, value_parser = count)]
    epochs: usize,
    /// Learning rate at first; it falls to zero by half a cosine, before and after each step
    #[arg(long, default_value_t = 2e-3, value_parser = positive)]
    lr: f64,
    /// Images of a step
    #[arg(long, default_value_t = 256, value_parser = count)]
    batch: usize,
    /// Share of the pixels that are dropped at random in training
    #[arg(long, default_value_t = 0.15, value_parser = fraction)]
    dropout: f64,
    /// The fewest weights
    #[arg(long, default_value_t = 1000, value_parser = count, conflicts_with = "study")]
    keep: usize,
    /// Share of the held-out images that the saved net may lose
    #[arg(long, default_value_t = 0.01, value_parser = fraction, conflicts_with = "study")]
    loss: f64,
    /// Of the first weights and the order of the images
    #[arg(long, default_value_t = 0, conflicts_with = "study")]
    seed: u64,
    /// Folder with the four IDX files of MNIST, in place of the bundled images
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Folder for the files
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
    /// Runs the study of benches/results/sparse-mnist.md, with all penalties; results are added to FILE, and what is there is not run again
    #[arg(long, value_name = "FILE")]
    study: Option<PathBuf>,
    /// What to do of the study: first tune, then final, then report
    #[arg(long, value_enum, default_value_t = Stage::Report, requires = "study")]
    stage: Stage,
    /// Of the study's runs only every N-th from the K-th (from 1): for processes side by side
    #[arg(long, value_name = "K/N", requires = "study")]
    part: Option<ShareOf>,
}

/// Every `of`-th of a list, from place `index`.
#[derive(Clone, Copy, Debug)]
struct ShareOf {
    index: usize,
    of: usize,
}

impl Default for ShareOf {
    fn default() -> Self {
        Self { index: 0, of: 1 }
    }
}

impl std::str::FromStr for ShareOf {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((k, n)) if (1..=n).contains(&k) => Ok(Self { index: k - 1, of: n }),
            _ => Err("expected K/N with K from 1 to N".into()),
        }
    }
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start(None, || work(&args))
}

fn work(args: &Args) -> Result<()> {
    if let (Some(path), Stage::Report) = (&args.study, args.stage) {
        print!("{}", tables::markdown(&store::read(path)?));
        return Ok(());
    }
    let data = match &args.data_dir {
        Some(dir) => Data::from_dir(dir, Name::Mnist)?,
        None => Data::bundled()?,
    };
    println!("{}", data.title.split(", normalized").next().unwrap_or_default());
    let split = Split::new(data)?;
    match &args.study {
        Some(path) => study::study(args, &split, path),
        None => sparse(args, &split),
    }
}

fn sparse(args: &Args, split: &Split) -> Result<()> {
    program::make_folder("--out", &args.out)?;
    let pace =
        Pace { epochs: args.epochs, lr: args.lr, batch: args.batch, dropout: args.dropout, seed: args.seed };
    let factor = args.factor.unwrap_or(args.penalty.factors()[0]);
    let penalized = Penalized { choice: args.penalty, factor };
    let dense = Net::random(args.seed)?;
    let clock = std::time::Instant::now();
    dense.train(&split.train, pace, penalized, false)?;
    println!(
        "penalty {} {factor}, {} epochs of {} images: {:.1} s",
        args.penalty.name(),
        args.epochs,
        split.train.len(),
        clock.elapsed().as_secs_f64()
    );
    let tune = Pace { epochs: args.tune_epochs, ..pace };
    let how =
        How { by: args.prune, correct: args.correct, rounds: args.rounds, tune, penalty: penalized.tuning() };
    println!("{}", report::HEADER);
    let whole = report::Row::of(&dense, split)?;
    println!("{whole}");
    let (mut last, mut chosen) = (None, None);
    for count in prune::levels(40_000, args.keep, 0.8) {
        let net = prune::prune(last.as_ref().unwrap_or(&dense), &split.train, how, count)?;
        let row = report::Row::of(&net, split)?;
        println!("{row}");
        if row.held >= whole.held - args.loss {
            chosen = Some((row, Net::of(&net.weights()?, &net.inputs)?));
        }
        last = Some(net);
    }
    let Some((row, net)) = chosen else {
        bail!("every step lost more than --loss {} of the held-out images; nothing is written", args.loss)
    };
    println!("\nthe smallest net that loses at most {} of the held-out images:\n{row}\n", args.loss);
    println!("{}", report::picture(&net)?);
    report::save(&dense, &net, split, &args.out)
}
