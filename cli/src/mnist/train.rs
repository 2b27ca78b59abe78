//! The training loop: steps in epochs, an evaluation after each, stops on a loss that is no number.

use super::args::Args;
use super::optimizer;
use super::penalty::{self, Penalized};
use super::report::{self, Log, Row};
use super::tuning::Tuning;
use crate::chart::Line;
use crate::data::{self, Data};
use crate::feed::Feed;
use crate::measure::{self, Outcome, Sums, mean_loss};
use crate::model::{Dropout, Model};
use crate::optimizer::{Optimizer, Pass, natural_step};
use crate::program;
use crate::sentence::sentence;
use crate::values::{Choice, ScheduleKind};
use candle_core::{DType, Device, Result, Tensor, bail};
use indicatif::ProgressBar;
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{VarBuilder, VarMap, init};
use kronwake::optim::{Replay, Schedule};
use kronwake::parallel::World;
use kronwake::tape::Tape;
use std::path::Path;
use std::time::Instant;
use tracing::info_span;

/// Steps whose outcomes are read together where reading waits for the device.
const READ_EVERY: usize = 32;

/// A finished training.
pub struct Run {
    pub choice: Choice,
    pub rows: Vec<Row>,
    pub vars: VarMap,
}

impl Run {
    /// Its training loss, or the test accuracy in percent, over epochs or over seconds of training.
    pub fn line(&self, by_time: bool, accuracy: bool) -> Line {
        let mut seconds = 0.0;
        let point = |row: &Row| {
            seconds += row.seconds;
            let x = if by_time { seconds } else { row.epoch as f64 };
            (x, if accuracy { 100.0 * row.test_accuracy } else { row.train_loss })
        };
        (self.choice.title().to_string(), self.rows.iter().map(point).collect())
    }
}

/// How many steps there are, in steps since the start of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    per_epoch: usize,
    /// The length that the learning rate's schedule has.
    horizon: usize,
    /// Where to stop.
    end: usize,
}

impl Plan {
    fn new(args: &Args, examples: usize) -> Result<Self> {
        let per_epoch = examples.div_ceil(args.batch);
        let horizon = match (args.epochs, args.steps) {
            (None, Some(steps)) => steps,
            (epochs, _) => epochs.unwrap_or(10) * per_epoch,
        };
        let end = args.steps.unwrap_or(horizon);
        if end > horizon {
            bail!("--steps {end} is more than the {horizon} steps of --epochs {}", horizon / per_epoch);
        }
        Ok(Self { per_epoch, horizon, end })
    }
}

fn schedule(kind: ScheduleKind, lr: f64, horizon: usize, warmup: usize) -> Result<Schedule> {
    match kind {
        ScheduleKind::Constant => Ok(Schedule::Constant(lr)),
        ScheduleKind::Cosine => Schedule::cosine(lr, horizon, warmup.min(horizon / 4), 0.05),
    }
}

/// Stops on a loss that is no number; `step` counts from 0.
fn check(choice: Choice, loss: f64, step: usize) -> Result<()> {
    if !loss.is_finite() {
        let name = choice.name();
        bail!("{name}: the loss of step {} is {loss}; a lower --lr or more --damping may help", step + 1);
    }
    Ok(())
}

/// Trains a fresh model with the optimizer `choice`; prints a row an epoch and logs it.
pub fn run(
    choice: Choice,
    args: &Args,
    data: &Data,
    (device, world): (&Device, &World),
    log: &mut Log,
) -> Result<Run> {
    let together = [("--graph", args.graph), ("--tune-decay", args.tune_decay)];
    if let Some((flag, _)) = together.iter().find(|(_, given)| *given && !world.is_alone()) {
        bail!("{flag} is for one process, and mpirun started {}", world.size());
    }
    let vars = VarMap::new();
    let tape = Tape::new();
    let model = tape.build(|| Model::new(&args.model, VarBuilder::from_varmap(&vars, args.dtype, device)))?;
    match &args.init {
        Some(path) => load(&vars, path)?,
        None => init::seeded_uniform(&init::named(&vars)?, args.seed)?,
    }
    let mut optimizer = optimizer::build(choice, args, data.train.len(), &vars, &tape)?;
    optimizer.share(world, args.placement.placement())?;
    let plan = Plan::new(args, data.train.len())?;
    let schedule =
        schedule(args.schedule, optimizer.learning_rate(), plan.horizon, optimizer::warmup(&optimizer))?;
    println!(
        "{}, {} parameters: {}",
        choice.title(),
        measure::parameters(&vars)?,
        optimizer::settings(&optimizer)
    );
    if let (Some(table), true) = (optimizer.summary(), args.optimizer == choice) {
        println!("{table}");
    }
    let examples = data.train.len();
    let penalty = args.penalty.zip(args.factor);
    let penalized =
        penalty.map(|(spec, factor)| Penalized::new(spec, factor, &vars, examples)).transpose()?;
    if let Some(penalized) = &penalized {
        println!("{}", penalized.text);
    }
    if let Some(path) = &args.resume {
        optimizer.resume(path)?;
    }
    let start = optimizer.steps();
    if start >= plan.end {
        bail!("training already has the {start} steps of --resume: give more --epochs or --steps");
    }
    println!("{}", report::HEADER);

    let bar = program::bar(plan.end, start, "steps, {eta} left, loss {msg}")?;
    let feed = Feed::new(data, &data.train, args.dtype, device)?;
    let test = Feed::new(data, &data.test, args.dtype, device)?;
    let all_of_test = data::order(test.len(), None, 0);
    let optimizer = &mut optimizer;
    let forward = |x: &Tensor| model.forward(x, None);
    let tuning = match args.tune_decay {
        true => {
            let place = (args.dtype, device);
            Some(Tuning::new(&forward, (&tape, &vars), data, place, plan.per_epoch, args.seed)?)
        }
        false => None,
    };
    let (replay, at_once) = (args.graph.then(Replay::new), if device.is_cpu() { 1 } else { READ_EVERY });
    let model = &model;
    let mut looped = Loop {
        choice,
        args,
        world,
        feed,
        model,
        optimizer,
        penalized,
        tuning,
        plan,
        schedule,
        replay,
        batch: None,
        at_once,
    };
    let mut rows = Vec::new();
    for epoch in start / plan.per_epoch..plan.end.div_ceil(plan.per_epoch) {
        let (mut row, sums) = looped.epoch(epoch, &bar, log)?;
        (row.train_loss, row.train_accuracy) = sums.means();
        looped.optimizer.at_average(|| {
            (row.test_loss, row.test_accuracy) = measure::evaluate_together(world, &all_of_test, |places| {
                let (x, y) = test.batch(places)?;
                Ok((model.forward(&x, None)?, y))
            })?;
            Ok(())
        })?;
        bar.suspend(|| println!("{row}"));
        log.write(&row)?;
        rows.push(row);
    }
    bar.finish_and_clear();
    if let Some(tuning) = &looped.tuning {
        println!("weight decays at the end: {}", tuning.decays()?);
    }
    if let Some(path) = &args.save {
        optimizer.save(path)?;
        println!("state for --resume: {}", path.display());
    }
    optimizer.adopt_average()?;
    if args.penalty.is_some() {
        let (zeros, all) = penalty::zeros(&vars)?;
        println!("weights that are zero: {zeros} of {all}");
    }
    Ok(Run { choice, rows, vars })
}

/// Sets every parameter from the safetensors file of --init; all that does not fit is in one error, and nothing is changed then.
fn load(vars: &VarMap, path: &Path) -> Result<()> {
    match Checkpoint::read(path, &Device::Cpu)?.load_into(vars) {
        Err(e) => bail!("--init {}: {}", path.display(), sentence(&e)),
        loaded => loaded,
    }
}

/// What stays the same during a training.
struct Loop<'a> {
    choice: Choice,
    args: &'a Args,
    world: &'a World,
    feed: Feed<'a>,
    model: &'a Model,
    optimizer: &'a mut Optimizer,
    penalized: Option<Penalized>,
    tuning: Option<Tuning<'a>>,
    plan: Plan,
    schedule: Schedule,
    /// Under --graph, with the batch that its recorded steps read.
    replay: Option<Replay<Outcome>>,
    batch: Option<(Tensor, Tensor)>,
    /// Steps whose outcomes are read together.
    at_once: usize,
}

impl Loop<'_> {
    /// The steps of `epoch` (from 0) that are still to be done; the row has no results yet.
    fn epoch(&mut self, epoch: usize, bar: &ProgressBar, log: &mut Log) -> Result<(Row, Sums)> {
        let (args, plan) = (self.args, self.plan);
        let shuffle = (!args.no_shuffle).then_some(args.seed);
        let order = data::order(self.feed.len(), shuffle, epoch);
        let first = self.optimizer.steps() - epoch * plan.per_epoch;
        let many = plan.end - self.optimizer.steps();
        let mut sums = Sums::default();
        let mut row = Row { optimizer: self.choice.name(), epoch: epoch + 1, ..Row::default() };
        let clock = Instant::now();
        let batches: Vec<_> = order.chunks(args.batch).skip(first).take(many).collect();
        for batches in batches.chunks(self.at_once) {
            let before = self.optimizer.steps();
            let mut outcomes = Vec::with_capacity(batches.len());
            for places in batches {
                let step = self.optimizer.steps();
                row.lr = self.schedule.at(step);
                self.optimizer.set_learning_rate(row.lr);
                outcomes.push(self.step(places, step)?);
                if let (Some(path), Some(every)) = (&args.save, args.save_every)
                    && self.optimizer.steps().is_multiple_of(every)
                {
                    self.optimizer.save(path)?;
                }
                if let Some(found) = self.tuning.as_mut().map(Tuning::after_step).transpose()?.flatten() {
                    bar.suspend(|| println!("{found}"));
                }
            }
            for (index, read) in Outcome::read_together(self.world, &outcomes)?.into_iter().enumerate() {
                let (loss, _) = read;
                check(self.choice, loss, before + index)?;
                sums.add(read, batches[index].len());
                bar.set_message(format!("{loss:.3}"));
                bar.inc(1);
                if args.steps.is_some() {
                    log.write_step(self.choice, before + index + 1, loss)?;
                }
            }
        }
        row.seconds = clock.elapsed().as_secs_f64();
        row.step = self.optimizer.steps();
        Ok((row, sums))
    }

    /// One step on the examples at `places`.
    fn step(&mut self, places: &[usize], step: usize) -> Result<Outcome> {
        let part = self.world.part(places.len());
        let first_row = part.start;
        if part.is_empty() {
            self.optimizer.step_without_rows()?;
            if let Some(penalized) = &mut self.penalized {
                penalized.after_step(self.optimizer)?;
            }
            return Outcome::none();
        }
        let places = &places[part];
        let (x, y) = self.feed.batch(places)?;
        let (args, model, choice) = (self.args, self.model, self.choice);
        // With several processes the optimizer says so to all.
        let read = self.at_once == 1 && self.world.is_alone();
        let dropout = Some(Dropout { p: args.dropout, seed: args.seed, step, first_row });
        let (penalized, tuning) = (self.penalized.as_ref(), self.tuning.as_ref());
        let pass = |advance: &mut dyn FnMut(&Pass) -> Result<bool>, x: &Tensor, y: &Tensor| {
            let forward = |dropout| info_span!("forward").in_scope(|| model.forward(x, dropout));
            let logits = forward(dropout)?;
            let loss = mean_loss(&logits, y)?;
            if read {
                check(choice, loss.to_dtype(DType::F64)?.to_scalar()?, step)?;
            }
            let objective = |loss: Tensor| match (penalized, tuning) {
                (Some(penalized), _) => penalized.add_to(&loss),
                (_, Some(tuning)) => tuning.add_to(&loss),
                _ => Ok(loss),
            };
            advance(&Pass {
                logits: &logits,
                loss: &objective(loss.clone())?,
                logits_now: &|| forward(None),
                loss_now: &|| objective(mean_loss(&forward(dropout)?, y)?),
            })?;
            Outcome::of(&logits, y, &loss)
        };
        let full = places.len() == args.batch;
        let (replay, natural) = match (self.replay.as_mut().filter(|_| full), &mut *self.optimizer) {
            (Some(replay), Optimizer::Natural(natural)) => (replay, natural),
            (_, optimizer) => {
                let outcome = pass(&mut |pass| optimizer.step(pass), &x, &y)?;
                if let Some(penalized) = &mut self.penalized {
                    penalized.after_step(optimizer)?;
                }
                return Ok(outcome);
            }
        };
        // A recorded step reads its batch where it was.
        let (held_x, held_y) = match &self.batch {
            Some((held_x, held_y)) => {
                held_x.slice_set(&x, 0, 0)?;
                held_y.slice_set(&y, 0, 0)?;
                (held_x.clone(), held_y.clone())
            }
            None => (x.copy()?, y.copy()?),
        };
        self.batch = Some((held_x.clone(), held_y.clone()));
        let Outcome { loss, right, count } = replay
            .step(natural, |natural| pass(&mut |pass| natural_step(natural, pass), &held_x, &held_y))?;
        // The next repetition writes over it.
        Ok(Outcome { loss: loss.copy()?, right: right.copy()?, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn the_plan_counts_steps_from_the_start_of_training() {
        let plan = |line: &str| Plan::new(&Args::parse_from(line.split(' ')), 250);
        let expect = |per_epoch, horizon, end| Plan { per_epoch, horizon, end };
        assert_eq!(plan("mnist --batch 100").unwrap(), expect(3, 30, 30));
        assert_eq!(plan("mnist --batch 100 --epochs 4").unwrap(), expect(3, 12, 12));
        assert_eq!(plan("mnist --batch 100 --epochs 4 --steps 5").unwrap(), expect(3, 12, 5));
        assert_eq!(plan("mnist --batch 100 --steps 5").unwrap(), expect(3, 5, 5));
        let error = plan("mnist --batch 100 --epochs 1 --steps 5").unwrap_err();
        assert_eq!(sentence(&error), "--steps 5 is more than the 3 steps of --epochs 1");
    }
}
