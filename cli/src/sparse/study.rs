//! The study: how few weights each penalty and each way of pruning leaves at a given accuracy.
//!
//! All is chosen by the held-out images. A run trains one net and prunes it in all ways; its test accuracy is read once for each way and
//! target, for the net that was chosen.

use super::Args;
use super::net::{Net, Pace, Split};
use super::penalty::{Choice, Penalized};
use super::prune::{By, How, prune};
use super::store;
use candle_core::{Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// What `--stage` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Tries three factors of each penalty with one seed
    Tune,
    /// Runs the factors that were best there with five other seeds
    Final,
    /// Prints the tables, as markdown
    Report,
}

/// Wanted test accuracies.
pub const TARGETS: [f64; 2] = [0.98, 0.975];
/// How much lower the held-out images may be: on them the nets of `study-mnist.md`, with the same split, are 0.20 to 0.36 % worse.
pub const MARGIN: f64 = 0.002;
const TUNE_SEED: u64 = 100;
const SEEDS: [u64; 5] = [1, 2, 3, 4, 5];
/// Numbers of weights, biases apart, when nothing is trained after pruning.
const ONCE: [usize; 8] = [100_000, 60_000, 36_000, 22_000, 13_000, 8_000, 5_000, 3_200];
/// The same when masked training follows each.
const TUNED: [usize; 10] = [16_000, 10_000, 6_500, 5_000, 4_000, 3_500, 3_100, 2_700, 2_300, 2_000];

/// A way of pruning.
pub struct Way {
    pub name: &'static str,
    by: By,
    /// Whether a net of fewer weights is made of the one before, and not of the dense one.
    goes_on: bool,
    tuned: bool,
    /// Whether it takes part in the choice of the factors.
    pub chooses: bool,
}

const fn way(name: &'static str, by: By, goes_on: bool, tuned: bool, chooses: bool) -> Way {
    Way { name, by, goes_on, tuned, chooses }
}

pub const WAYS: [Way; 5] = [
    way("magnitude", By::Magnitude, false, false, false),
    way("kronecker", By::Kronecker, false, false, false),
    way("kronecker, iterated", By::Kronecker, true, false, false),
    way("magnitude, tuned", By::Magnitude, true, true, false),
    way("kronecker, tuned", By::Kronecker, true, true, true),
];

/// One training with all that follows it.
#[derive(Clone, Copy, Debug)]
struct Job {
    stage: &'static str,
    penalized: Penalized,
    seed: u64,
}

impl Job {
    fn is(&self, record: &Value) -> bool {
        let Penalized { choice, factor } = self.penalized;
        record["stage"] == self.stage
            && record["penalty"] == choice.name()
            && record["factor"] == factor
            && record["seed"] == self.seed
    }
}

/// Runs the jobs that are not in `path`, of `--part`.
pub fn study(args: &Args, split: &Split, path: &Path) -> Result<()> {
    let jobs = match args.stage {
        Stage::Tune => tune_jobs(),
        Stage::Final => final_jobs(&store::read(path)?)?,
        Stage::Report => vec![],
    };
    let part = args.part.unwrap_or_default();
    for job in jobs.into_iter().skip(part.index).step_by(part.of) {
        if !store::read(path)?.iter().any(|record| job.is(record)) {
            store::append(path, &run(args, split, job)?)?;
        }
    }
    Ok(())
}

fn tune_jobs() -> Vec<Job> {
    let job =
        |choice, factor| Job { stage: "tune", penalized: Penalized { choice, factor }, seed: TUNE_SEED };
    let of = |&choice: &Choice| choice.factors().iter().map(move |&factor| job(choice, factor));
    Choice::ALL.iter().flat_map(of).collect()
}

fn final_jobs(records: &[Value]) -> Result<Vec<Job>> {
    let missing = tune_jobs().into_iter().find(|job| !records.iter().any(|record| job.is(record)));
    if let Some(Job { penalized: Penalized { choice, factor }, .. }) = missing {
        bail!("--stage final: the tune stage has no result of {} {factor} yet", choice.name())
    }
    let of = |seed| Choice::ALL.map(|choice| Job { stage: "final", penalized: best(records, choice), seed });
    Ok(SEEDS.into_iter().flat_map(of).collect())
}

/// The factor with the least geometric mean of weights over ways and targets; a target that is missed counts as a dense net.
pub fn best(records: &[Value], choice: Choice) -> Penalized {
    let cost = |factor: f64| -> f64 {
        let job = Job { stage: "tune", penalized: Penalized { choice, factor }, seed: TUNE_SEED };
        let Some(record) = records.iter().find(|record| job.is(record)) else { return f64::MAX };
        let curves = WAYS.iter().filter(|way| way.chooses).map(|way| &record["curves"][way.name]);
        let points = curves.flat_map(|curve| TARGETS.map(|target| fewest(curve, target)));
        points.map(|point| point.map_or(266_610.0, |p| p["nonzeros"].as_f64().unwrap_or(f64::MAX)).ln()).sum()
    };
    let factor = choice.factors().iter().copied().min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
    Penalized { choice, factor: factor.unwrap_or_default() }
}

/// The point of a curve with the fewest weights whose held-out accuracy is `target` less the margin.
pub fn fewest(curve: &Value, target: f64) -> Option<&Value> {
    let good = |p: &&Value| p["held"].as_f64().is_some_and(|held| held >= target - MARGIN - 1e-9);
    curve.as_array()?.iter().filter(good).min_by_key(|p| p["nonzeros"].as_u64())
}

fn run(args: &Args, split: &Split, job: Job) -> Result<Value> {
    let Job { penalized, seed, .. } = job;
    let clock = Instant::now();
    let pace = Pace { epochs: args.epochs, lr: args.lr, batch: args.batch, dropout: args.dropout, seed };
    let dense = Net::random(seed)?;
    dense.train(&split.train, pace, penalized, false)?;
    let (mut curves, mut chosen) = (json!({}), json!({}));
    for way in WAYS.iter().filter(|way| way.chooses || job.stage == "final") {
        let tune = Pace { epochs: if way.tuned { args.tune_epochs } else { 0 }, ..pace };
        let how = How {
            by: way.by,
            correct: way.by == By::Kronecker,
            rounds: args.rounds,
            tune,
            penalty: penalized.tuning(),
        };
        let (mut nets, mut curve): (Vec<Net>, Vec<Value>) = (vec![], vec![]);
        for count in if way.tuned { TUNED.as_slice() } else { &ONCE } {
            let from = nets.last().filter(|_| way.goes_on).unwrap_or(&dense);
            let net = prune(from, &split.train, how, *count)?;
            let held = net.accuracy(&split.held)?;
            curve.push(
                json!({ "kept": count, "nonzeros": net.nonzeros()?, "widths": net.widths()?, "held": held }),
            );
            nets.push(net);
        }
        let curve = Value::from(curve);
        if job.stage == "final" {
            for target in TARGETS {
                let Some(point) = fewest(&curve, target) else { continue };
                let at = curve.as_array().and_then(|all| all.iter().position(|p| p == point));
                let Some(net) = at.and_then(|at| nets.get(at)) else { continue };
                let mut point = point.clone();
                point["test"] = net.accuracy(&split.test)?.into();
                chosen[way.name][target.to_string()] = point;
            }
        }
        curves[way.name] = curve;
    }
    let (held, seconds) = (dense.accuracy(&split.held)?, clock.elapsed().as_secs_f64());
    println!("{} {} {} seed {seed}: {seconds:.0} s", job.stage, penalized.choice.name(), penalized.factor);
    Ok(json!({
        "stage": job.stage, "penalty": penalized.choice.name(), "factor": penalized.factor, "seed": seed, "epochs": args.epochs,
        "tune_epochs": args.tune_epochs, "rounds": args.rounds, "batch": args.batch, "dropout": args.dropout, "lr": args.lr, "seconds": seconds,
        "dense": held, "curves": curves, "chosen": chosen,
    }))
}
