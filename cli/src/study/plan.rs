//! Which runs there are, and what each needs of the runs before it.

use super::args::Args;
use super::methods::Method;
use super::setting::Setting;
use super::store::{Done, Key, Record};
use candle_core::{Result, bail};
use clap::ValueEnum;

/// A part of a method's budget, in the order of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Stage {
    /// Random settings, a few epochs, one seed
    Random,
    /// Each near the best so far
    Local,
    /// The best of both, trained longer
    Long,
    /// The tuned setting over fresh seeds, with the test set
    Final,
    /// The random settings on two more seeds
    Robust,
    /// Tables and plots of what is there
    Report,
}

/// More seeds of each random setting.
const ROBUST_SEEDS: usize = 2;
/// Seeds of a study: `--seed` times this is the one of tuning, the next ones those of robustness.
const SEEDS: u64 = 1000;
/// The first fresh seed, counted from that of tuning.
const FRESH: u64 = 100;

impl Stage {
    /// As the log spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Local => "local",
            Self::Long => "long",
            Self::Final => "final",
            Self::Robust => "robust",
            Self::Report => "report",
        }
    }

    /// Runs of a method in this stage.
    fn count(self, args: &Args) -> usize {
        match self {
            Self::Random => args.random,
            Self::Local => args.local,
            Self::Long => args.long.min(args.random + args.local),
            Self::Final => args.seeds,
            Self::Robust => ROBUST_SEEDS * args.random,
            Self::Report => 0,
        }
    }
}

/// A run to be done.
#[derive(Clone)]
pub struct Job {
    pub method: &'static Method,
    pub stage: Stage,
    pub index: usize,
    pub seed: u64,
    pub setting: Setting,
    pub epochs: usize,
}

impl Job {
    pub fn key(&self) -> Key {
        (self.method.name.to_string(), self.stage, self.index)
    }
}

/// What a worker can do.
pub enum Next {
    Run(Box<Job>),
    /// Every job that is left needs one that is running.
    Wait,
    Finished,
}

/// How many runs there are.
pub fn total(args: &Args) -> usize {
    args.methods.len() * args.stages.iter().map(|stage| stage.count(args)).sum::<usize>()
}

/// The first job that is neither done nor running and needs nothing that is not done.
///
/// # Errors
/// When a run of the log has another setting or seed than its job, or no running job will ever make another one possible.
pub fn next(args: &Args, done: &Done, running: &[Key]) -> Result<Next> {
    let mut left = None;
    for method in &args.methods {
        let mut stages = args.stages.clone();
        stages.sort_unstable();
        stages.dedup();
        for stage in stages {
            for index in 0..stage.count(args) {
                let key = (method.name.to_string(), stage, index);
                let job = if running.contains(&key) { None } else { job(args, method, stage, index, done)? };
                match (job, done.get(&key)) {
                    (None, _) => left = Some(key),
                    (Some(job), None) => return Ok(Next::Run(Box::new(job))),
                    (Some(job), Some(found)) => check(&job, found)?,
                }
            }
        }
    }
    match left {
        None => Ok(Next::Finished),
        Some((method, stage, _)) if running.is_empty() => {
            bail!("{method}: the stage {} needs stages that --stages leaves out", stage.name())
        }
        Some(_) => Ok(Next::Wait),
    }
}

fn check(job: &Job, found: &Record) -> Result<()> {
    let (setting, seed, epochs) = (&found.setting, found.seed, found.epochs);
    if (setting, seed, epochs) != (&job.setting, job.seed, job.epochs) {
        bail!(
            "the log's run {} {} {} has seed {seed}, {epochs} epochs and {setting}, but expected seed {}, {} epochs and {}",
            job.method.name,
            job.stage.name(),
            job.index,
            job.seed,
            job.epochs,
            job.setting
        );
    }
    Ok(())
}

/// The job, if all that it needs is done.
fn job(args: &Args, method: &'static Method, stage: Stage, index: usize, done: &Done) -> Result<Option<Job>> {
    let random = |index| Setting::random(method.knobs(), args.seed, index);
    let tuning = args.seed.wrapping_mul(SEEDS);
    let (short, long) = (args.short_epochs, args.epochs);
    let (setting, seed, epochs) = match stage {
        Stage::Random => (Some(random(index)), tuning, short),
        Stage::Local => {
            let best = ranked(args, method, args.local.min(index), done);
            let near = best
                .and_then(|best| best.first().copied())
                .map(|best| best.setting.near(method.knobs(), args.seed, index));
            (near.transpose()?, tuning, short)
        }
        Stage::Long => {
            let best = ranked(args, method, args.local, done);
            (best.and_then(|best| best.get(index).map(|run| run.setting.clone())), tuning, long)
        }
        Stage::Final => {
            (tuned(args, method, done).map(|run| run.setting.clone()), tuning + FRESH + index as u64, long)
        }
        Stage::Robust => {
            (Some(random(index % args.random)), tuning + 1 + (index / args.random) as u64, short)
        }
        Stage::Report => (None, 0, 0),
    };
    Ok(setting.map(|setting| Job { method, stage, index, seed, setting, epochs }))
}

/// The runs of a stage's first `count` jobs, if all are done.
fn runs<'a>(method: &Method, stage: Stage, count: usize, done: &'a Done) -> Option<Vec<&'a Record>> {
    (0..count).map(|index| done.get(&(method.name.to_string(), stage, index))).collect()
}

/// Best first: the random runs and the first `local` runs near their best. Of equals, the earlier.
fn ranked<'a>(args: &Args, method: &Method, local: usize, done: &'a Done) -> Option<Vec<&'a Record>> {
    let mut all = runs(method, Stage::Random, args.random, done)?;
    all.extend(runs(method, Stage::Local, local, done)?);
    all.sort_by(|a, b| b.held_out().total_cmp(&a.held_out()));
    Some(all)
}

/// The longer run whose setting is the method's tuned one.
fn tuned<'a>(args: &Args, method: &Method, done: &'a Done) -> Option<&'a Record> {
    let mut all = runs(method, Stage::Long, Stage::Long.count(args), done)?;
    all.sort_by(|a, b| b.held_out().total_cmp(&a.held_out()));
    all.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn args(line: &str) -> Args {
        let counts = "study --data-dir d --random 4 --local 3 --long 2 --seeds 2";
        Args::parse_from(counts.split(' ').chain(line.split_whitespace()))
    }

    /// An accuracy that depends on the run alone.
    fn result(job: &Job) -> Record {
        let held = 0.9 + (job.setting.number("lr").unwrap() * 1e4).sin() / 20.0;
        Record { held: vec![held; job.epochs], ..Record::new(job) }
    }

    #[test]
    fn one_worker_or_three_and_stopped_or_not_give_the_same_runs() {
        let args = args("--methods sgd,kfac");
        assert_eq!(total(&args), 2 * (4 + 3 + 2 + 2 + 8));
        let mut all: Vec<Done> = Vec::new();
        for workers in [1, 3] {
            let (mut done, mut running) = (Done::new(), Vec::<Job>::new());
            loop {
                let keys: Vec<Key> = running.iter().map(Job::key).collect();
                match next(&args, &done, &keys).unwrap() {
                    Next::Run(job) => running.push(*job),
                    Next::Wait => {}
                    Next::Finished if running.is_empty() => break,
                    Next::Finished => panic!("finished with running jobs"),
                }
                if running.len() == workers || keys.len() == running.len() {
                    let job = running.remove(0);
                    done.insert(job.key(), result(&job));
                }
            }
            assert_eq!(done.len(), total(&args));
            all.push(done);
        }
        assert_eq!(all[0], all[1]);

        let get = |stage, index| &all[0][&("kfac".to_string(), stage, index)];
        let tuning: Vec<_> = (0..4).map(|i| get(Stage::Random, i)).collect();
        let best = tuning.iter().max_by(|a, b| a.held_out().total_cmp(&b.held_out())).unwrap();
        let kfac = args.methods[1];
        assert_eq!(get(Stage::Local, 0).setting, best.setting.near(kfac.knobs(), 0, 0).unwrap());
        let (a, b) = (get(Stage::Long, 0), get(Stage::Long, 1));
        assert!(a.held_out() >= b.held_out() && a.held_out() >= best.held_out());
        assert_eq!(get(Stage::Final, 1).setting, a.setting);
        assert_eq!((get(Stage::Final, 1).seed, get(Stage::Robust, 5).seed), (101, 2));
        assert_eq!(get(Stage::Robust, 5).setting, get(Stage::Random, 1).setting);
    }

    #[test]
    fn what_cannot_go_on_is_said() {
        let message = |args: &Args, done: &Done| next(args, done, &[]).err().unwrap().to_string();
        let late = args("--methods sgd --stages final");
        assert!(message(&late, &Done::new()).contains("the stage final needs stages"));
        let args = args("--methods sgd");
        let Ok(Next::Run(mut job)) = next(&args, &Done::new(), &[]) else { panic!("no first job") };
        let mut done = Done::new();
        job.seed = 7;
        done.insert(job.key(), result(&job));
        assert!(message(&args, &done).contains("the log's run sgd random 0 has seed 7, 3 epochs and"));
    }
}
