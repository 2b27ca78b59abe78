//! Tunes hyperparameters of a trained net by its evidence; `cargo run --release --example tune -- --help` lists what can be chosen.

mod args;
mod finetuned;
mod grid;
mod load;
mod predict;
mod report;

use crate::finetune::args::Net as Of;
use crate::model::Spec;
use crate::program;
use args::Args;
use candle_core::{Device, Result, Tensor, bail};
use clap::Parser;
use kronwake::evidence::{Evidence, Examples, Hyper, ParamsTune, Problem, tune};
use kronwake::nn::{Module, VarMap, init};
use kronwake::tape::{Likelihood, Tape};
use load::Net;
use report::At;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start(args.threads, || work(&args))
}

/// A net with its parameters and examples.
struct Subject {
    vars: VarMap,
    tape: Tape,
    model: Box<dyn Module>,
    /// Names of parameters in the order in which precisions are given.
    order: Vec<String>,
    train: Examples,
    test: Option<Examples>,
    likelihood: Likelihood,
    /// Patterns of the parameters that the evidence is of; none for all.
    part: Vec<String>,
    /// Whether the examples are tokens, and which of them are there.
    text: bool,
    /// The prior's means, where they are not all zero.
    means: Option<BTreeMap<String, Tensor>>,
}

/// A net of its own, from a file or trained first.
fn plain(args: &Args, spec: &Spec, device: &Device) -> Result<Subject> {
    let loaded = load::examples(args, device)?;
    println!("{}", loaded.title);
    let net = Net::new(spec, args.dtype, device)?;
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
    Ok(Subject {
        vars: net.vars.clone(),
        tape: net.tape.clone(),
        model: Box::new(net),
        order,
        train: loaded.train,
        test: loaded.test,
        likelihood: loaded.likelihood,
        part: args.part.clone(),
        text: false,
        means: None,
    })
}

fn work(args: &Args) -> Result<()> {
    args.check()?;
    let device = args.device.open()?;
    let subject = match &args.model {
        Of::Of(spec) if !args.is_finetuned() => plain(args, spec, &device)?,
        _ => finetuned::subject(args, &device)?,
    };
    if args.steps > 0 {
        program::make_folder("--out", &args.out)?;
    }
    let patterns: Vec<&str> = subject.part.iter().map(String::as_str).collect();
    let model = subject.model.as_ref();
    let mut problem = match patterns.as_slice() {
        [] => Problem::new(&subject.tape, &subject.vars, model, subject.likelihood)?,
        patterns => Problem::of_part(&subject.tape, &subject.vars, model, subject.likelihood, patterns)?,
    };
    // A new last layer alone has no values before.
    if let Some(means) = &subject.means
        && problem.parameters().iter().any(|p| means.contains_key(&p.name))
    {
        problem = problem.with_prior_mean(means)?;
    }
    let parameters = problem.parameters();
    let numbers: usize = parameters.iter().map(|p| p.tensor.elem_count()).sum();
    let place = |name: &String| parameters.iter().position(|p| &p.name == name);
    let order: Vec<usize> = subject.order.iter().filter_map(place).collect();
    let names: Vec<&str> = order.iter().map(|&at| parameters[at].name.as_str()).collect();
    println!("{} tensors of {numbers} parameters: {}", names.len(), names.join(", "));
    let hyper = hyperparameters(args, &problem, &order)?;
    let outputs = subject.tape.layers().last().map_or(1, |layer| layer.out_features());
    let train = match args.first {
        Some(first) if args.is_finetuned() && first < subject.train.len() => {
            subject.train.select(&(0..first).collect::<Vec<_>>())?
        }
        _ => subject.train.clone(),
    };
    let (train, test) = match subject.text {
        true => {
            let test = subject.test.as_ref().map(finetuned::shortest_first).transpose()?;
            (finetuned::shortest_first(&train)?, test)
        }
        false => (train, subject.test),
    };
    let examples = train.len();
    let estimators = args.estimators(examples, numbers, outputs)?;

    let params = ParamsTune { steps: args.steps, lr: args.lr, seed: args.seed };
    let bar = program::bar(args.steps, 0, "{msg}")?;
    let watch = |step: usize, evidence: &Evidence| {
        bar.set_position(step as u64);
        bar.set_message(format!("log evidence {:.1}", evidence.log_evidence));
    };
    let clock = Instant::now();
    let mut kept = None;
    let (before, after) = if estimators.tune == estimators.evaluate && !estimators.tune.is_random() {
        // The examples are read once for all.
        let fit = estimators.evaluate.fit(&problem, &train, args.seed)?;
        let before = At::new(fit.evidence(&hyper)?, &hyper)?;
        let after = At::new(fit.tune(&hyper, &params, watch)?, &hyper)?;
        kept = Some(fit);
        (before, after)
    } else {
        let evaluate = || estimators.evaluate.evaluate(&problem, &train, &hyper, args.seed);
        let start = evaluate()?;
        let before = At::new(start.clone(), &hyper)?;
        let end = match args.steps {
            0 => start,
            _ => {
                tune(&problem, &train, &estimators.tune, &hyper, &params, watch)?;
                evaluate()?
            }
        };
        (before, At::new(end, &hyper)?)
    };
    bar.finish_and_clear();
    let seconds = clock.elapsed().as_secs_f64();
    println!(
        "{} of {examples} examples in parts of {}, {seconds:.1} s",
        args.bound().name(),
        estimators.batch
    );
    report::print((args.steps > 0).then_some(&before), &after, parameters, examples)?;
    if args.tune_temperature && args.steps > 0 && problem.likelihood() != Likelihood::Gaussian {
        println!(
            "The temperature is that of the last step and not a best one: with probabilities of classes the evidence rises with it without end; \
             --temperature T fixes it."
        );
    }
    let mut held_out = None;
    if args.steps > 0 {
        if let Some(test) = &test {
            held_out = predict::held_out(args, &problem, (&train, kept.as_ref()), test, &hyper)?;
        }
        if !args.is_finetuned() {
            let path = args.out.join("evidence.svg");
            let count = grid::draw(&problem, &train, &path)?;
            println!("evidence of the first {count} examples over a grid of precisions: {}", path.display());
        }
    }
    if let Some(path) = &args.json {
        report::write(path, args, &estimators, [&before, &after], parameters, &order, held_out)?;
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
