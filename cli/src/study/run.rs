//! A run: one setting trained from one seed.

use super::args::Args;
use super::methods::Context;
use super::plan::{Job, Stage};
use super::store::Record;
use crate::data::{self, Data, Part};
use crate::measure::{self, mean_loss};
use crate::model::{Dropout, Model};
use crate::optimizer::{Optimizer, Pass};
use candle_core::{DType, Device, Result};
use kronwake::nn::{VarBuilder, VarMap, init};
use kronwake::optim::Every;
use kronwake::tape::Tape;
use std::time::Instant;

/// Steps over which the rate rises.
const WARMUP: usize = 30;
const DEVICE: Device = Device::Cpu;

/// The data with its fixed split.
pub struct Split {
    pub data: Data,
    /// Places in the training set.
    train: Vec<usize>,
    held: Vec<usize>,
}

impl Split {
    pub fn new(data: Data) -> Self {
        let (train, held) = data::split(data.train.len());
        Self { data, train, held }
    }
}

/// What the learning rate of step `step` (from 0) of `steps` is multiplied with: half a cosine from 1 to 5 %, times a
/// linear warm-up.
fn rate(step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps.saturating_sub(1).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    (0.05 + 0.95 * cosine) * ((step + 1) as f64 / WARMUP as f64).min(1.0)
}

/// The share of the examples at `places` whose largest logit is their label's.
fn accuracy(model: &Model, data: &Data, part: &Part, places: &[usize]) -> Result<f64> {
    let found = measure::evaluate(places, |places| {
        let (x, y) = data.batch(part, places, DType::F32, &DEVICE)?;
        Ok((model.forward(&x, None)?, y))
    });
    Ok(found?.1)
}

/// Trains the job's setting; a run whose numbers are not finite any more ends there.
pub fn train(args: &Args, split: &Split, job: &Job) -> Result<Record> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let model =
        tape.build(|| Model::new(&args.model, VarBuilder::from_varmap(&vars, DType::F32, &DEVICE)))?;
    init::seeded_uniform(&init::named(&vars)?, job.seed)?;
    let every = Every { factors: args.factor_every, inverses: args.inverse_every };
    let context = Context { vars: &vars, tape: &tape, head: args.model.head(), every, seed: job.seed };
    let mut optimizer = (job.method.build)(&job.setting, &context)?;
    let peak = optimizer.learning_rate();

    let data = &split.data;
    let steps = job.epochs * split.train.len().div_ceil(args.batch);
    let all_of_test = data::order(data.test.len(), None, 0);
    let mut record = Record::new(job);
    let (mut step, mut seconds) = (0, 0.0);
    for epoch in 0..job.epochs {
        let clock = Instant::now();
        let order = data::order(split.train.len(), Some(job.seed), epoch);
        let mut sum = 0.0;
        for chunk in order.chunks(args.batch) {
            let places: Vec<usize> = chunk.iter().map(|&i| split.train[i]).collect();
            optimizer.set_learning_rate(peak * rate(step, steps));
            let dropout = Dropout { p: args.dropout, seed: job.seed, step, first_row: 0 };
            let Some(loss) = take_step(&model, data, &places, dropout, &mut optimizer)? else {
                record.diverged = true;
                return Ok(record);
            };
            sum += loss * places.len() as f64;
            step += 1;
        }
        seconds += clock.elapsed().as_secs_f64();
        record.loss.push(sum / split.train.len() as f64);
        record.seconds.push((seconds * 1e3).round() / 1e3);
        optimizer.at_average(|| {
            record.held.push(accuracy(&model, data, &data.train, &split.held)?);
            if job.stage == Stage::Final {
                record.test.push(accuracy(&model, data, &data.test, &all_of_test)?);
            }
            Ok(())
        })?;
    }
    Ok(record)
}

/// The batch's mean loss before the step; nothing if it, or what the optimizer made of it, is not finite.
fn take_step(
    model: &Model,
    data: &Data,
    places: &[usize],
    dropout: Dropout,
    optimizer: &mut Optimizer,
) -> Result<Option<f64>> {
    let (x, y) = data.batch(&data.train, places, DType::F32, &DEVICE)?;
    let logits = model.forward(&x, Some(dropout))?;
    let loss = mean_loss(&logits, &y)?;
    let mean = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    let pass = Pass {
        logits: &logits,
        loss: &loss,
        logits_now: &|| model.forward(&x, None),
        loss_now: &|| mean_loss(&model.forward(&x, Some(dropout))?, &y),
    };
    Ok((mean.is_finite() && optimizer.step(&pass)?).then_some(mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_for_thirty_steps_and_falls_to_a_twentieth() {
        let cosine = |k: f64| 0.05 + 0.475 * (1.0 + (std::f64::consts::PI * k / 293.0).cos());
        for (step, expected) in [
            (0, 1.0 / 30.0),
            (14, 0.5 * cosine(14.0)),
            (29, cosine(29.0)),
            (30, cosine(30.0)),
            (200, cosine(200.0)),
            (293, 0.05),
        ] {
            assert!((rate(step, 294) - expected).abs() < 1e-12, "{step}");
        }
        assert!(rate(0, 1).is_finite());
    }
}
