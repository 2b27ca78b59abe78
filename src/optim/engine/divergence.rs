//! The KL divergence of a step: measured, and as the averaged curvature has it.

use super::NaturalGradient;
use super::inner_steps::Outputs;
use crate::curvature::factor_product;
use crate::ops::dense::dot;
use crate::optim::numbers::scalar;
use crate::tape::{Likelihood, Terms};
use candle_core::{Result, Tensor, bail};
use std::fmt;

/// What a step did to the model's predictions on its batch; see [`NaturalGradient::step_measured`].
///
/// All divergences are symmetric ones, half the sum of both directions, in nats, means over loss terms. Where predictions are changed a little,
/// a divergence is `1/2 s^T F s` with the Fisher matrix `F` of the model and the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct StepDivergence {
    /// That between the predictions before and after the step.
    pub measured: f64,
    /// That between the predictions before the step and those with the Vars moved that no block holds, and no others.
    pub rest: f64,
    /// What each block does, in the order of [`NaturalGradient::block_names`].
    pub blocks: Vec<BlockDivergence>,
}

/// A block's part in a [`StepDivergence`].
#[derive(Debug, Clone, PartialEq)]
pub struct BlockDivergence {
    /// The block's, as in [`NaturalGradient::block_names`].
    pub name: String,
    /// That between the predictions before the step and those with this block moved alone.
    pub measured: f64,
    /// `1/2 <s, G s A>` with the averaged factors and the block's step `s`. `None` before its first factors.
    pub predicted: Option<f64>,
}

impl StepDivergence {
    /// The sum of what the blocks' factors predict; Vars without a block have no part in it.
    pub fn predicted(&self) -> f64 {
        self.blocks.iter().filter_map(|block| block.predicted).sum()
    }

    /// The sum of what the blocks and the rest do alone.
    pub fn apart(&self) -> f64 {
        self.rest + self.blocks.iter().map(|block| block.measured).sum::<f64>()
    }
}

/// The whole and a line for each block, as a table.
impl fmt::Display for StepDivergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:32} {:>10} {:>10}", "divergence, nats", "measured", "predicted")?;
        writeln!(f, "{:32} {:10.3e} {:10.3e}", "the whole step", self.measured, self.predicted())?;
        writeln!(f, "{:32} {:10.3e}", "blocks and the rest apart", self.apart())?;
        for BlockDivergence { name, measured, predicted } in &self.blocks {
            match predicted {
                Some(predicted) => writeln!(f, "{name:32} {measured:10.3e} {predicted:10.3e}")?,
                None => writeln!(f, "{name:32} {measured:10.3e}")?,
            }
        }
        write!(f, "{:32} {:10.3e}", "the rest", self.rest)
    }
}

impl NaturalGradient {
    /// Takes a step as [`step_with_weighted`](Self::step_with_weighted) does, and measures what it does to the model's predictions: the whole
    /// step, and what each block does alone. It tells whether a length in nats is to be believed: `measured` beyond
    /// [`predicted`](StepDivergence::predicted) in single blocks is stale curvature, or one that no Kronecker product is; the whole beyond
    /// [`apart`](StepDivergence::apart) is what blocks do together.
    ///
    /// It runs the model once for each block and three times more, beside what QE's step does. The weight decay of the step is part of what is measured.
    ///
    /// # Errors
    /// As `step_with_weighted`. For an optimizer that shares its steps with other processes. A step that was taken stays, whatever fails after it.
    pub fn step_measured(
        &mut self,
        loss: &Tensor,
        likelihood: Likelihood,
        terms: &Terms,
        outputs: &mut Outputs<'_>,
    ) -> Result<StepDivergence> {
        if self.shared.is_some() {
            bail!(
                "{}: step_measured sees the rows of one process, and this optimizer shares its steps",
                self.core.name()
            )
        }
        let before = self.snapshots()?;
        let old = outputs()?.detach();
        self.step_with_weighted(loss, likelihood, terms, outputs)?;
        let after = self.snapshots()?;
        let measured = self.divergences(&before, &after, &mut || {
            scalar(&symmetric_divergence((likelihood, terms), &outputs()?, &old)?)
        });
        // The Vars hold trial values now, whatever happened.
        self.show_all(&after)?;
        measured
    }

    /// The values of all Vars, which later writes do not change.
    pub(super) fn snapshots(&self) -> Result<Vec<Tensor>> {
        self.core.vars.iter().map(|param| param.snapshot()).collect()
    }

    /// The divergences of the step from `before` to `after`, where `now` measures that of the values that the Vars hold.
    fn divergences(
        &self,
        before: &[Tensor],
        after: &[Tensor],
        now: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<StepDivergence> {
        self.show_all(after)?;
        let measured = now()?;
        let mut alone = |moved: &dyn Fn(usize) -> bool| {
            for (index, param) in self.core.vars.iter().enumerate() {
                param.show(if moved(index) { &after[index] } else { &before[index] })?;
            }
            now()
        };
        let mut blocks = Vec::with_capacity(self.core.blocks.len());
        for block in &self.core.blocks {
            let predicted = match (&block.state.factor_a, &block.state.factor_g) {
                (Some(a), Some(g)) => {
                    let step = block.matrix(|index| &after[index] - &before[index])?;
                    Some(0.5 * dot(&step, &factor_product(a, g, &step, &block.name)?)?)
                }
                _ => None,
            };
            let measured = alone(&|index| block.params.contains(&index))?;
            blocks.push(BlockDivergence { name: block.name.clone(), measured, predicted });
        }
        let held = |index| self.core.blocks.iter().any(|block| block.params.contains(&index));
        let rest = alone(&|index| !held(index))?;
        Ok(StepDivergence { measured, rest, blocks })
    }
}

/// Half the sum of both divergences between the predictions of `outputs` and of `old`, a mean over loss terms, weighted as the loss is. For an
/// exponential family with natural parameters `z` and means `p` that is `1/2 <p - q, z - z_j>`: the log-normalizers cancel.
pub(super) fn symmetric_divergence(
    (likelihood, terms): (Likelihood, &Terms),
    outputs: &Tensor,
    old: &Tensor,
) -> Result<Tensor> {
    let terms = terms.of(likelihood, outputs)?;
    let apart = ((likelihood.mean(outputs)? - likelihood.mean(old)?)? * (outputs - old)?)?;
    terms.times(&apart)?.sum_all()? * (0.5 / terms.total)
}
