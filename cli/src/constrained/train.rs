//! One run.

use super::Args;
use crate::data::{Data, Part, order};
use crate::measure;
use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::nn::{self, Linear, Module, Optimizer, SGD, VarBuilder, VarMap, init, loss};
use kronwake::optim::Schedule;
use kronwake::penalty::{Constraints, Dual, FeasibleSet, Grouping, Lp, Omega, Report, Rule};
use std::sync::Arc;
use std::time::Instant;

/// What keeps the weights small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Nothing,
    Decay,
    MaxNorm,
    Multipliers,
}

impl Method {
    pub fn title(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Decay => "weight decay",
            Self::MaxNorm => "max-norm",
            Self::Multipliers => "multipliers",
        }
    }

    fn rules(self, args: &Args) -> Vec<(&'static str, Rule)> {
        let (grouping, radius) = (Grouping::Rows, args.radius);
        let project = Rule::Project { set: FeasibleSet::MaxNorm { grouping, radius } };
        let dual = Dual::nu_pi(0.05, 1e-3, 0.9);
        let lagrangian = Rule::Lagrangian { omega: Omega::Norm(grouping), bound: radius.into(), dual };
        let penalize = Rule::Penalize { penalty: Arc::new(Lp::l2()), factor: args.decay };
        match self {
            Self::Nothing => vec![("*", Rule::Free)],
            Self::Decay => vec![("*.bias", Rule::Free), ("*.weight", penalize)],
            Self::MaxNorm => vec![("*", Rule::Free), ("fc1.weight", project)],
            Self::Multipliers => vec![("*", Rule::Free), ("fc1.weight", lagrangian)],
        }
    }
}

/// Multipliers and excesses of the hidden units after a step.
pub struct At {
    pub step: usize,
    pub report: Report,
}

/// What a run has led to.
pub struct Run {
    pub train_loss: f64,
    pub train_accuracy: f64,
    pub test_accuracy: f64,
    /// Of the weights into a hidden unit.
    pub largest_norm: f64,
    /// Hidden units that are zero for all test images.
    pub dead: usize,
    pub seconds: f64,
    /// Empty without multipliers.
    pub trace: Vec<At>,
}

struct Net {
    fc1: Linear,
    fc2: Linear,
}

impl Net {
    fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        self.fc1.forward(&x.flatten_from(1)?)?.relu()
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.hidden(x)?)
    }
}

/// Steps between two records of the multipliers.
const EVERY: usize = 10;

pub fn train(args: &Args, data: &Data, method: Method) -> Result<Run> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let net = Net { fc1: nn::linear(784, 128, vb.pp("fc1"))?, fc2: nn::linear(128, 10, vb.pp("fc2"))? };
    init::seeded_uniform(&init::named(&varmap)?, args.seed)?;
    let mut constraints = Constraints::new(&varmap, &method.rules(args))?;
    let mut sgd = SGD::new(varmap.all_vars(), args.lr)?;
    let batch = |part: &Part, places: &[usize]| data.batch(part, places, DType::F32, &Device::Cpu);
    let started = Instant::now();
    let (mut trace, mut step) = (vec![], 0);
    let steps = args.epochs * data.train.len().div_ceil(args.batch);
    let schedule = Schedule::cosine(args.lr, steps + 1, 0, 0.0)?;
    for epoch in 0..args.epochs {
        for places in order(data.train.len(), Some(args.seed), epoch).chunks(args.batch) {
            let (x, y) = batch(&data.train, places)?;
            let loss = (loss::cross_entropy(&net.forward(&x)?, &y)? + constraints.loss()?)?;
            if !loss.to_scalar::<f32>()?.is_finite() {
                bail!("{}: the loss is not finite in epoch {}; lower --lr", method.title(), epoch + 1)
            }
            sgd.set_learning_rate(schedule.at(step));
            sgd.backward_step(&loss)?;
            constraints.after_step(schedule.at(step))?;
            step += 1;
            if step % EVERY == 0 {
                trace.extend(constraints.report()?.into_iter().map(|(_, report)| At { step, report }));
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let measured = |part: &Part| {
        measure::evaluate(&order(part.len(), None, 0), |places| {
            let (x, y) = batch(part, places)?;
            Ok((net.forward(&x)?, y))
        })
    };
    let (train_loss, train_accuracy) = measured(&data.train)?;
    let (images, _) = batch(&data.test, &order(data.test.len(), None, 0))?;
    let active =
        net.hidden(&images)?.max(0)?.gt(0f32)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    let norms = net.fc1.weight().detach().sqr()?.sum(1)?.sqrt()?.max(0)?.to_scalar::<f32>()?;
    Ok(Run {
        train_loss,
        train_accuracy,
        test_accuracy: measured(&data.test)?.1,
        largest_norm: norms.into(),
        dead: 128 - active as usize,
        seconds,
        trace,
    })
}
