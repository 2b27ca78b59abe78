//! Training: steps in epochs, an evaluation after each, and what came out.

use super::args::Args;
use super::optimizer::Tuner;
use super::task::{Batches, Forward, Inputs, Side, Task};
use crate::chart::Line;
use crate::measure::{self, mean_loss};
use crate::optimizer::Optimizer;
use crate::values::Choice;
use crate::{data, program};
use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::nn::{Lora, ParamsLora, VarBuilder, VarMap, init};
use kronwake::optim::{Group, Groups, Schedule};
use kronwake::parallel::World;
use kronwake::tape::Tape;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What was measured after an epoch; the first row is from before the first step.
pub struct Row {
    pub step: usize,
    /// Of training.
    pub seconds: f64,
    pub loss: f64,
    pub accuracy: f64,
}

/// A finished fine-tuning.
pub struct Run {
    pub choice: Choice,
    pub rows: Vec<Row>,
    /// Of the optimizer's state.
    pub bytes: usize,
    /// Of the parameters that it trained.
    pub trained: usize,
}

impl Run {
    /// The test loss, or the accuracy in percent, over steps or over seconds of training.
    pub fn line(&self, by_time: bool, accuracy: bool) -> Line {
        let point = |row: &Row| {
            let x = if by_time { row.seconds } else { row.step as f64 };
            (x, if accuracy { 100.0 * row.accuracy } else { row.loss })
        };
        (self.choice.title().to_string(), self.rows.iter().map(point).collect())
    }
}

/// How training goes.
pub struct Steps {
    pub epochs: usize,
    pub batch: usize,
    pub examples: usize,
    pub schedule: Schedule,
    pub seed: u64,
    /// The file that is written after every so many steps.
    pub save: Option<(PathBuf, usize)>,
}

impl Steps {
    pub fn new(args: &Args, epochs: usize, examples: usize, lr: f64) -> Result<Self> {
        let all = epochs * examples.div_ceil(args.batch);
        let schedule = Schedule::cosine(lr, all, args.warmup.min(all / 2), 0.05)?;
        Ok(Self { epochs, batch: args.batch, examples, schedule, seed: args.seed, save: None })
    }
}

/// Mean loss and accuracy of a model on the `count` examples that `batch` gives, of which each process takes a part.
fn evaluate(
    world: &World,
    count: usize,
    forward: &Forward,
    batch: impl Fn(&[usize]) -> Result<(Inputs, Tensor)>,
) -> Result<(f64, f64)> {
    measure::evaluate_together(world, &data::order(count, None, 0), |places| {
        let (inputs, labels) = batch(places)?;
        Ok((forward(&inputs)?, labels))
    })
}

/// Trains for all epochs; `after(optimizer, step, seconds)` is told after each.
pub fn epochs(
    tuner: &mut Tuner,
    world: &World,
    task: &dyn Task,
    steps: &Steps,
    forward: &Forward,
    batch: impl Fn(&[usize]) -> Result<(Inputs, Tensor)>,
    mut after: impl FnMut(&mut Optimizer, usize, f64) -> Result<()>,
) -> Result<()> {
    let per_epoch = steps.examples.div_ceil(steps.batch);
    let start = tuner.optimizer.steps();
    let bar = program::bar(steps.epochs * per_epoch, start, "steps, {eta} left, loss {msg}")?;
    let mut seconds = 0.0;
    for epoch in start / per_epoch..steps.epochs {
        let order = data::order(steps.examples, Some(steps.seed), epoch);
        let clock = Instant::now();
        for places in order.chunks(steps.batch).skip(tuner.optimizer.steps() - epoch * per_epoch) {
            let step = tuner.optimizer.steps();
            let own = &places[world.part(places.len())];
            if own.is_empty() {
                tuner.step_without_rows(steps.schedule.at(step))?;
            } else {
                let (inputs, labels) = batch(own)?;
                let logits = forward(&inputs)?;
                let loss = mean_loss(&logits, &labels)?;
                let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                // With several processes the optimizer says so to all.
                if !value.is_finite() && world.is_alone() {
                    bail!("the loss of step {} is {value}; a lower --lr may help", step + 1)
                }
                let now = || forward(&inputs);
                let done = tuner.step((&logits, &loss), task.mask(&inputs), steps.schedule.at(step), &now)?;
                if let Some(divergence) = done {
                    bar.suspend(|| println!("step {}\n{divergence}", step + 1));
                }
                bar.set_message(format!("{value:.3}"));
            }
            bar.inc(1);
            if let Some((path, _)) =
                steps.save.as_ref().filter(|(_, every)| tuner.optimizer.steps().is_multiple_of(*every))
            {
                tuner.optimizer.save(path)?;
            }
        }
        seconds += clock.elapsed().as_secs_f64();
        bar.suspend(|| after(&mut tuner.optimizer, (epoch + 1) * per_epoch, seconds))?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Sets the parameters to those of the checkpoint `base`, those of the head to random numbers, and all without a base; what is new, in words.
fn first_values(
    args: &Args,
    task: &dyn Task,
    vars: &VarMap,
    base: Option<&Path>,
    head: impl Fn(&String) -> bool,
) -> Result<String> {
    let mut new = init::named(vars)?;
    let Some(base) = base else {
        init::seeded_normal(&new, args.seed)?;
        return Ok(", all of them new".into());
    };
    new.retain(|(name, _)| head(name));
    init::seeded_normal(&new, args.seed)?;
    let mut checkpoint = task.read(base)?;
    checkpoint.tensors.retain(|name, _| !head(name));
    let differences = checkpoint.load_partly(vars)?;
    let lacking: Vec<String> = differences.missing.into_iter().filter(|name| !head(name)).collect();
    if !lacking.is_empty() {
        bail!("{} lacks {}", base.display(), lacking.join(", "))
    }
    let names = |names: &[String]| names.join(", ");
    let new: Vec<String> = new.into_iter().map(|(name, _)| name).collect();
    let mut text = if new.is_empty() { String::new() } else { format!(", {} new", names(&new)) };
    if !differences.unexpected.is_empty() {
        text += &format!("; not used of the checkpoint: {}", names(&differences.unexpected));
    }
    Ok(text)
}

/// Trains the model of `task` on a base's examples from random parameters, and writes it to `path`.
pub fn base(
    task: &dyn Task,
    args: &Args,
    [train, test]: [usize; 2],
    batch: &Batches,
    path: &Path,
    world: &World,
) -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, args.dtype, &args.device.open()?);
    let forward = tape.build(|| task.build(vb))?;
    init::seeded_normal(&init::named(&vars)?, args.seed)?;
    let plain = Args { lr: None, clip: None, lora: None, beta2: None, ..args.clone() };
    let mut tuner = Tuner::new(Choice::Adamw, &plain, &vars, &tape, &[])?;
    tuner.optimizer.share(world, args.placement.placement())?;
    let steps = Steps::new(args, args.base_epochs, train, tuner.optimizer.learning_rate())?;
    epochs(&mut tuner, world, task, &steps, &forward, |places| batch(Side::Train, places), |_, _, _| Ok(()))?;
    let (loss, accuracy) = evaluate(world, test, &forward, |places| batch(Side::Test, places))?;
    first_writes(world, || vars.save(path))?;
    println!(
        "base: {train} training examples, {} epochs of AdamW, test loss {loss:.4}, accuracy {:.2} %; {}",
        args.base_epochs,
        100.0 * accuracy,
        path.display()
    );
    Ok(())
}

/// Fine-tunes the model of `task` from the checkpoint `base`, or from random parameters.
pub fn tune(
    choice: Choice,
    args: &Args,
    task: &dyn Task,
    base: Option<&Path>,
    (device, world): (&Device, &World),
) -> Result<Run> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, args.dtype, device);
    let adapters = args.lora.map(|rank| {
        let layers = task.adapted();
        if layers.is_empty() {
            bail!("--lora: the model has no linear layer beside the new one")
        }
        Lora::new(ParamsLora { rank, alpha: args.alpha, layers, seed: args.seed, ..Default::default() })
    });
    let adapters = adapters.transpose()?;
    let build = || tape.build(|| task.build(vb));
    let forward = match &adapters {
        Some(lora) => lora.build(build)?,
        None => build()?,
    };
    let head = |name: &String| task.head().is_some_and(|head| name.starts_with(head));
    let new = first_values(args, task, &vars, base, head)?;
    let trained = trained(args, task, &vars, adapters.as_ref())?;
    let mut tuner = Tuner::new(choice, args, &trained, &tape, &task.ends())?;
    tuner.optimizer.share(world, args.placement.placement())?;
    let (all, some) = (measure::parameters(&vars)?, measure::parameters(&trained)?);
    println!("{}: {some} of {all} parameters are trained{new}", choice.title());
    if let (Some(table), true) = (tuner.optimizer.summary(), args.optimizer == choice) {
        println!("{table}");
    }
    let mut steps = Steps::new(args, args.epochs, task.len(Side::Train), tuner.optimizer.learning_rate())?;
    if let Some(every) = args.save_every {
        let path = args.out.join(format!("state-{}.safetensors", choice.name()));
        if args.resume && path.exists() {
            tuner.optimizer.resume(&path)?;
            println!("goes on from {} steps of {}", tuner.optimizer.steps(), path.display());
        }
        steps.save = Some((path, every));
    }
    let test = || evaluate(world, task.len(Side::Test), &forward, |places| task.batch(Side::Test, places));
    let (loss, accuracy) = test()?;
    let mut rows = vec![Row { step: tuner.optimizer.steps(), seconds: 0.0, loss, accuracy }];
    println!("  step  seconds    test loss  accuracy");
    let show = |row: &Row| {
        println!("{:6} {:8.2}   {:10.4}  {:6.2} %", row.step, row.seconds, row.loss, 100.0 * row.accuracy);
    };
    rows.iter().for_each(show);
    let batch = |places: &[usize]| task.batch(Side::Train, places);
    epochs(&mut tuner, world, task, &steps, &forward, batch, |optimizer, step, seconds| {
        optimizer.at_average(|| {
            let (loss, accuracy) = test()?;
            rows.push(Row { step, seconds, loss, accuracy });
            Ok(())
        })?;
        rows.last().map(show);
        Ok(())
    })?;
    tuner.optimizer.adopt_average()?;
    if let Some(lora) = &adapters {
        // Merging sets them to zero.
        first_writes(world, || lora.save(args.out.join(format!("adapters-{}.safetensors", choice.name()))))?;
        lora.merge(&vars)?;
    }
    let path = args.out.join(format!("tuned-{}.safetensors", choice.name()));
    first_writes(world, || vars.save(&path))?;
    println!("parameters: {}", path.display());
    Ok(Run { choice, rows, bytes: tuner.optimizer.bytes(), trained: some })
}

/// Writes a file on the first process, which all of them wait for.
fn first_writes(world: &World, write: impl FnOnce() -> Result<()>) -> Result<()> {
    let written = if world.is_first() { write() } else { Ok(()) };
    let failed = if written.is_err() { 1.0 } else { 0.0 };
    let mut failures = [failed];
    world.sum(&mut failures)?;
    match (written, failures[0] > 0.0) {
        (Ok(()), true) => bail!("the first process could not write a file"),
        (written, _) => written,
    }
}

/// The parameters that are trained: with adapters those and the new layer, else all that is not frozen.
fn trained(args: &Args, task: &dyn Task, vars: &VarMap, adapters: Option<&Lora>) -> Result<VarMap> {
    let frozen = Groups(args.freeze.iter().map(Group::named).collect());
    let mut all = init::named(vars)?;
    for pattern in &args.freeze {
        let one = Groups(vec![Group::named(pattern)]);
        if !all.iter().any(|(name, _)| one.of(name).is_some()) {
            let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
            bail!("--freeze {pattern}: matches no parameter; those are {}", names.join(", "))
        }
    }
    all.retain(|(name, _)| {
        frozen.of(name).is_none()
            && (adapters.is_none() || task.head().is_some_and(|head| name.starts_with(head)))
    });
    if let Some(lora) = adapters {
        all.extend(init::named(lora.varmap())?);
    }
    if all.is_empty() {
        bail!("--freeze leaves no parameter to train")
    }
    let chosen = VarMap::new();
    match chosen.data().lock() {
        Ok(mut data) => data.extend(all),
        Err(_) => bail!("the table of parameters was left locked by a thread that failed"),
    }
    Ok(chosen)
}

/// The fine-tunings side by side.
pub fn comparison(runs: &[Run]) -> String {
    let best = |run: &Run| run.rows.iter().map(|row| row.loss).fold(f64::INFINITY, f64::min);
    // What all of them reach.
    let target = runs.iter().map(best).fold(f64::NEG_INFINITY, f64::max);
    let mut table = format!("{:12} {:>10} {:>10} {:>9}", "optimizer", "test loss", "accuracy", "seconds");
    table += &format!(
        "   {:<24} {}\n",
        format!("test loss {target:.4} after"),
        "state, bytes (of the parameters)"
    );
    for run in runs {
        let Some(last) = run.rows.last() else { continue };
        let reached = run.rows.iter().find(|row| row.loss <= target);
        let reached =
            reached.map_or(String::new(), |row| format!("{} steps, {:.2} s", row.step, row.seconds));
        table += &format!(
            "{:12} {:10.4} {:8.2} % {:9.2}   {reached:<24} {} ({:.1} x)\n",
            run.choice.title(),
            last.loss,
            100.0 * last.accuracy,
            last.seconds,
            run.bytes,
            run.bytes as f64 / (4 * run.trained) as f64
        );
    }
    table
}
