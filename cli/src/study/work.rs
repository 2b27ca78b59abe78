//! The workers: runs side by side, each on one thread.

use super::args::Args;
use super::plan::{self, Job, Next};
use super::run::{self, Split};
use super::store::{Done, Key, Log, Record};
use crate::program;
use candle_core::{Error, Result, bail};
use indicatif::ProgressBar;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the workers share.
struct Shared<'a> {
    args: &'a Args,
    split: &'a Split,
    bar: ProgressBar,
    state: Mutex<State>,
    /// Told of every run that has ended.
    ended: Condvar,
}

struct State {
    log: Log,
    done: Done,
    running: Vec<Key>,
    failed: Option<Error>,
}

/// Does all runs of `args` that the log does not have yet.
pub fn work(args: &Args, split: &Split, log: Log, done: Done) -> Result<()> {
    // A run that no longer is in the plan, as after fewer --seeds, is no progress.
    let total = plan::total(args);
    let asked =
        |key: &Key| args.methods.iter().any(|method| method.name == key.0) && args.stages.contains(&key.1);
    let known = done.keys().filter(|key| asked(key)).count().min(total);
    let bar = program::bar(total, known, "runs, {elapsed}, last: {msg}")?;
    let state = State { log, done, running: Vec::new(), failed: None };
    let shared = Shared { args, split, bar, state: Mutex::new(state), ended: Condvar::new() };
    std::thread::scope(|scope| {
        for _ in 0..args.workers {
            scope.spawn(|| shared.worker());
        }
    });
    shared.bar.finish_and_clear();
    match shared.lock().failed.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Shared<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until nothing is left, or something failed.
    fn worker(&self) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(Error::wrap);
        let pool = match pool {
            Ok(pool) => pool,
            Err(error) => return self.fail(error),
        };
        loop {
            match self.take() {
                Ok(Some(job)) => {
                    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        pool.install(|| run::train(self.args, self.split, &job))
                    }));
                    let name = format!("{} {} {}", job.method.name, job.stage.name(), job.index);
                    let found = found.unwrap_or_else(|_| bail!("the thread panicked"));
                    let ended = found.and_then(|record| self.end(&job, record));
                    if let Err(error) = ended {
                        return self.fail(error.context(format!("{name} ({})", job.setting)));
                    }
                }
                Ok(None) => return,
                Err(error) => return self.fail(error),
            }
        }
    }

    /// The next job, once there is one; none when the work ends.
    fn take(&self) -> Result<Option<Job>> {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() {
                return Ok(None);
            }
            match plan::next(self.args, &state.done, &state.running)? {
                Next::Run(job) => {
                    state.running.push(job.key());
                    return Ok(Some(*job));
                }
                Next::Wait => state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner),
                Next::Finished => return Ok(None),
            }
        }
    }

    fn end(&self, job: &Job, record: Record) -> Result<()> {
        let mut state = self.lock();
        state.log.append(&record)?;
        let (accuracy, key) = (100.0 * record.held_out(), job.key());
        state.running.retain(|other| *other != key);
        state.done.insert(key, record);
        self.ended.notify_all();
        self.bar.set_message(format!(
            "{} {} {}, {accuracy:.2} %",
            job.method.name,
            job.stage.name(),
            job.index
        ));
        self.bar.inc(1);
        Ok(())
    }

    /// Stops all workers after their present run; the first error counts.
    fn fail(&self, error: Error) {
        self.lock().failed.get_or_insert(error);
        self.ended.notify_all();
    }
}
