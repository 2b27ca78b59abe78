//! Tunes hyperparameters of a trained net by its evidence; `cargo run --release --example tune -- --help` lists what can be chosen.

mod args;
mod grid;
mod load;
mod predict;
mod report;

use crate::program;
use args::Args;
use candle_core::{Result, bail};
use clap::Parser;
use kronwake::evidence::{Hyper, ParamsTune, Problem, tune};
use kronwake::nn::init;
use kronwake::tape::Likelihood;
use load::Net;
use report::At;
use std::process::ExitCode;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start(args.threads, || work(&args))
}

fn work(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    let loaded = load::examples(args, &device)?;
    println!("{}", loaded.title);
    let net = Net::new(&args.model, args.dtype, &device)?;
    // The file's order is that in which precisions are given.
    let order = match &args.checkpoint {
        Some(path) => net.load(path)?,
        None if loaded.likelihood != Likelihood::Categorical => {
            bail!(
                "without --checkpoint a classifier is trained first: give --checkpoint for another likelihood"
            )
        }
        None => {
            net.train(args, &loaded.train)?;
            init::named(&net.vars)?.into_iter().map(|(name, _)| name).collect()
        }
    };
    if args.steps > 0 {
        program::make_folder("--out", &args.out)?;
    }
    let patterns: Vec<&str> = args.part.iter().map(String::as_str).collect();
    let problem = match patterns.as_slice() {
        [] => Problem::new(&net.tape, &net.vars, &net, loaded.likelihood)?,
        patterns => Problem::of_part(&net.tape, &net.vars, &net, loaded.likelihood, patterns)?,
    };
    let parameters = problem.parameters();
    let numbers: usize = parameters.iter().map(|p| p.tensor.elem_count()).sum();
    let place = |name: &String| parameters.iter().position(|p| &p.name == name);
    let order: Vec<usize> = order.iter().filter_map(place).collect();
    let names: Vec<&str> = order.iter().map(|&at| parameters[at].name.as_str()).collect();
    println!("{} tensors of {numbers} parameters: {}", names.len(), names.join(", "));
    let hyper = hyperparameters(args, &problem, &order)?;
    let outputs = net.tape.layers().last().map_or(1, |layer| layer.out_features());
    let examples = loaded.train.len();
    let estimators = args.estimators(examples, numbers, outputs)?;

    let start = estimators.evaluate.evaluate(&problem, &loaded.train, &hyper, args.seed)?;
    let before = At::new(start.clone(), &hyper)?;
    let mut after = At::new(start, &hyper)?;
    if args.steps > 0 {
        let params = ParamsTune { steps: args.steps, lr: args.lr, seed: args.seed };
        let bar = program::bar(args.steps, 0, "{msg}")?;
        tune(&problem, &loaded.train, &estimators.tune, &hyper, &params, |step, evidence| {
            bar.set_position(step as u64);
            bar.set_message(format!("log evidence {:.1}", evidence.log_evidence));
        })?;
        bar.finish_and_clear();
        let end = estimators.evaluate.evaluate(&problem, &loaded.train, &hyper, args.seed)?;
        after = At::new(end, &hyper)?;
    }
    println!("{} of {examples} examples in parts of {}", args.bound.name(), estimators.batch);
    report::print((args.steps > 0).then_some(&before), &after, parameters, examples)?;
    if args.steps > 0 {
        if let Some(test) = &loaded.test {
            predict::print(&problem, &loaded.train, test, &hyper)?;
        }
        let path = args.out.join("evidence.svg");
        let count = grid::draw(&problem, &loaded.train, &path)?;
        println!("evidence of the first {count} examples over a grid of precisions: {}", path.display());
    }
    if let Some(path) = &args.json {
        report::write(path, args, &estimators, [&before, &after], parameters, &order, examples)?;
    }
    Ok(())
}

/// The hyperparameters to start from; `order` is that of the precisions given.
fn hyperparameters(args: &Args, problem: &Problem<'_>, order: &[usize]) -> Result<Hyper> {
    let mut hyper = Hyper::new(problem, args.prior.structure(), 1.0)?;
    match args.prior_precision.as_slice() {
        [one] => hyper.set_precisions(&[*one])?,
        given if given.len() != order.len() => {
            bail!("--prior-precision: {} numbers, expected 1 or {}, one a tensor", given.len(), order.len())
        }
        given => {
            if hyper.groups().len() != order.len() {
                bail!("--prior-precision with one number a tensor needs --prior tensor or none")
            }
            let mut all = vec![0.0; order.len()];
            for (&tensor, &value) in order.iter().zip(given) {
                all[tensor] = value;
            }
            hyper.set_precisions(&all)?;
        }
    }
    hyper = if args.tune_temperature {
        hyper.tune_temperature(args.temperature)?
    } else {
        hyper.with_temperature(args.temperature)?
    };
    match (problem.likelihood(), args.fix_noise) {
        (Likelihood::Gaussian, false) => hyper.tune_noise(args.noise),
        (Likelihood::Gaussian, true) => hyper.with_noise(args.noise),
        _ => Ok(hyper),
    }
}
