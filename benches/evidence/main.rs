//! The evidence measured: how fast, how near to its value for all examples, and what tuning by it does for training.
//!
//! ```text
//! cargo bench --bench evidence -- speed|grid|online|last [--data-dir DIR] [--help]
//! ```
//!
//! `speed` works on random images where it is given no folder.

mod clock;
mod grid;
mod last;
mod net;
mod online;
mod speed;

use candle_core::Result;
use clap::{Parser, Subcommand};
use kronwake_cli::{sentence, values};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "evidence", allow_negative_numbers = true)]
struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// What cargo adds
    #[arg(long, hide = true, global = true)]
    bench: bool,
    /// Threads; as many as there are cores by default
    #[arg(long, global = true, value_parser = values::count)]
    threads: Option<usize>,
}

/// What to measure.
#[derive(Subcommand)]
enum What {
    /// Seconds of a gradient by the hyperparameters
    Speed(speed::Options),
    /// The evidence over a grid of precisions, from batches of all sizes, continued from a batch, and from factors
    Grid(grid::Options),
    /// Training with decays tuned by the evidence, beside a grid of fixed ones
    Online(online::Options),
    /// The last layer of a classifier: fit, tuning and prediction, beside laplace-torch
    Last(last::Options),
}

fn work(options: Options) -> Result<()> {
    kronwake_cli::program::set_threads(options.threads)?;
    match options.what {
        Some(What::Speed(options)) => speed::measure(&options),
        Some(What::Grid(options)) => grid::measure(&options),
        Some(What::Online(options)) => online::measure(&options),
        Some(What::Last(options)) => last::measure(&options),
        None => speed::measure(&speed::Options::default()),
    }
}

fn main() -> ExitCode {
    match work(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence::sentence(&error));
            ExitCode::FAILURE
        }
    }
}
