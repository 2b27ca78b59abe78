//! `--tune-decay`: a weight decay for every tensor, tuned while the net trains, by the evidence of the training images.

use crate::data::{Data, order};
use candle_core::{DType, Device, Result, Tensor};
use kronwake::evidence::{Examples, Hyper, ParamsTuneDuring, Problem, Structure, TuneDuring};
use kronwake::nn::{Module, VarMap};
use kronwake::tape::{Likelihood, Tape};

/// Examples of the kernel that an estimate takes.
const BATCH: usize = 100;

/// Priors that follow the evidence.
pub struct Tuning<'a> {
    during: TuneDuring,
    problem: Problem<'a>,
    examples: Examples,
}

impl<'a> Tuning<'a> {
    /// A round after each epoch of `per_epoch` steps.
    pub fn new(
        model: &'a dyn Module,
        (tape, vars): (&Tape, &VarMap),
        data: &Data,
        (dtype, device): (DType, &Device),
        per_epoch: usize,
        seed: u64,
    ) -> Result<Self> {
        let problem = Problem::new(tape, vars, model, Likelihood::Categorical)?;
        let all = order(data.train.len(), None, 0);
        let (x, y) = data.batch(&data.train, &all, dtype, device)?;
        let examples = Examples::new(x, y)?;
        let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
        let batch = BATCH.min(examples.len());
        let params =
            ParamsTuneDuring { burn_in: per_epoch, seed, ..ParamsTuneDuring::by_batches(batch, per_epoch) };
        let during = TuneDuring::new(hyper, params, examples.len())?;
        Ok(Self { during, problem, examples })
    }

    /// The mean loss of a batch with the penalty of the present priors.
    pub fn add_to(&self, loss: &Tensor) -> Result<Tensor> {
        self.during.loss(loss)
    }

    /// Counts a step; after a round what it found.
    pub fn after_step(&mut self) -> Result<Option<String>> {
        let Some(evidence) = self.during.after_step(&self.problem, &self.examples)? else { return Ok(None) };
        Ok(Some(format!(
            "      log evidence {:.0}, {:.0} effective parameters, decays {}",
            evidence.log_evidence,
            evidence.effective.iter().sum::<f64>(),
            self.decays()?
        )))
    }

    /// The decay of every tensor.
    pub fn decays(&self) -> Result<String> {
        let named = self.problem.parameters().iter().zip(self.during.weight_decays()?);
        Ok(named.map(|(p, decay)| format!("{} {decay:.1e}", p.name)).collect::<Vec<_>>().join(", "))
    }
}
