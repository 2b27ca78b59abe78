//! Weight decay, max-norm and multipliers at a high learning rate; `cargo run --release --example constrained -- --help` lists what
//! can be chosen.

mod plot;
mod train;

use crate::data::Data;
use crate::program;
use crate::values::{count, not_negative, positive};
use candle_core::Result;
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use train::{Method, train};

/// Bounds on the weights of hidden units, against weight decay.
///
/// Trains a net 784-128-10 with ReLU on 6,000 bundled images of Fashion-MNIST by plain SGD, four times from the same weights: without
/// regularization, with an L2 penalty, with the norm of the weights into each hidden unit projected to at most --radius after every step, and
/// with a multiplier for each hidden unit that keeps it there. Prints a table, and plots the multipliers to DIR/multipliers.svg.
#[derive(Parser, Clone, Debug)]
#[command(name = "constrained", allow_negative_numbers = true)]
pub struct Args {
    /// Learning rate at first; it falls to zero by half a cosine
    #[arg(long, default_value_t = 0.7, value_parser = positive)]
    lr: f64,
    /// Passes over the training set
    #[arg(long, default_value_t = 10, value_parser = count)]
    epochs: usize,
    /// Images of a step
    #[arg(long, default_value_t = 64, value_parser = count)]
    batch: usize,
    /// Largest norm of the weights into a hidden unit
    #[arg(long, default_value_t = 2.0, value_parser = not_negative)]
    radius: f64,
    /// Factor of the L2 penalty, the sum of the squared weights
    #[arg(long, default_value_t = 5e-4, value_parser = not_negative)]
    decay: f64,
    /// Of the first weights and the order of the images
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the plot
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start(None, || compare(&args))
}

fn compare(args: &Args) -> Result<()> {
    program::make_folder("--out", &args.out)?;
    let data = Data::bundled()?;
    println!("{}", data.title);
    println!(
        "{:<14}{:>12}{:>10}{:>10}{:>14}{:>7}{:>9}",
        "method", "train loss", "train %", "test %", "largest norm", "dead", "seconds"
    );
    for method in [Method::Nothing, Method::Decay, Method::MaxNorm, Method::Multipliers] {
        let run = train(args, &data, method)?;
        println!(
            "{:<14}{:>12.4}{:>10.1}{:>10.1}{:>14.3}{:>7}{:>9.1}",
            method.title(),
            run.train_loss,
            100.0 * run.train_accuracy,
            100.0 * run.test_accuracy,
            run.largest_norm,
            run.dead,
            run.seconds
        );
        if !run.trace.is_empty() {
            let path = args.out.join("multipliers.svg");
            plot::multipliers(&path, &run.trace)?;
            let active =
                run.trace.last().map_or(0, |at| at.report.alpha.iter().filter(|&&a| a > 0.0).count());
            println!("{:<14}{active} of the multipliers are above zero; see {}", "", path.display());
        }
    }
    Ok(())
}
