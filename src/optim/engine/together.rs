//! What several processes call together, beside the step: the rows that each was shown, and steps without any.

use super::NaturalGradient;
use super::gradients::Backward;
use crate::optim::share::{Share, Slot};
use crate::parallel::Trouble;
use crate::tape::Head;
use candle_core::{Result, backprop::GradStore, bail};

impl NaturalGradient {
    /// [`observe`](Self::observe) of a process that has no rows of this batch, or no micro-batch left where others have.
    ///
    /// # Errors
    /// When the optimizer is not shared with other processes.
    pub fn observe_without_rows(&mut self) -> Result<()> {
        if self.shared.is_none() {
            bail!("{}: expected a batch with rows, got none, and there is no other process", self.core.name())
        }
        self.observe_with_others(&[])
    }

    /// The step of a process that has no rows of this batch: `observe` and `backward_step` in one.
    ///
    /// # Errors
    /// As [`observe_without_rows`](Self::observe_without_rows), and as any step.
    pub fn step_without_rows(&mut self) -> Result<()> {
        self.observe_without_rows()?;
        let none = self.no_gradients();
        self.advance(Ok(none))
    }

    /// Replaces the gradients in `grads` by their means over the loss terms of all processes, to be clipped, say, before
    /// [`step`](candle_nn::Optimizer::step) takes them. Call `observe` before, which counts the terms. With one process nothing happens.
    ///
    /// # Errors
    /// On all processes: when a gradient is missing or not finite on one, or `observe` was not called there.
    pub fn mean_gradients(&mut self, grads: &mut GradStore) -> Result<()> {
        let Some(mut share) = self.shared.take() else { return Ok(()) };
        let local = match share.terms.is_some_and(|total| total > 0.0) {
            true => self.gradients(grads),
            false => Ok(self.no_gradients().1),
        };
        // All need all of them.
        let slots: Vec<_> = self.slots().into_iter().map(|slot| Slot { owner: None, ..slot }).collect();
        let means = share.means(self.core.name(), self.core.steps, &slots, local);
        self.shared = Some(share);
        for (param, mean) in self.core.vars.iter().zip(means?) {
            if let Some(mean) = mean {
                grads.insert(&param.var, mean);
            }
        }
        Ok(())
    }

    /// Counts the rows of all processes where their labels are drawn, which are keyed by the row of the whole batch, and takes note of the
    /// heads of this one. What goes wrong after that is everybody's error at the step.
    pub(super) fn observe_with_others(&mut self, heads: &[Head<'_>]) -> Result<()> {
        let Some(mut share) = self.shared.take() else { return Ok(()) };
        let first_rows = self.first_rows(&mut share, heads);
        let observed = first_rows.map(|(total, rows, any)| {
            share.count(total);
            if any { self.observe_here(heads, rows.as_deref()) } else { Ok(()) }
        });
        match observed {
            Ok(Ok(())) => {
                self.shared = Some(share);
                Ok(())
            }
            Ok(Err(error)) => {
                share.keep(error);
                self.shared = Some(share);
                Ok(())
            }
            Err(error) => {
                share.forget();
                self.shared = Some(share);
                self.forget();
                Err(error)
            }
        }
    }

    /// The total of the first head's terms, the rows of the whole batch that the heads' first rows are, where that matters, and whether there
    /// are any rows here.
    fn first_rows(&mut self, share: &mut Share, heads: &[Head<'_>]) -> Result<(f64, Option<Vec<u64>>, bool)> {
        let counted = counted(heads);
        if !(self.curvature_due() && self.core.params.fisher.draws()) {
            return Ok(match counted {
                Ok((total, terms)) => (total, None, terms.iter().any(|&terms| terms > 0.0)),
                Err(error) => {
                    share.keep(error);
                    (0.0, None, false)
                }
            });
        }
        let name = self.core.name();
        let (total, local) = match counted {
            Ok((total, terms)) => (total, Ok(terms)),
            Err(error) => (0.0, Err(Trouble::failed(&error))),
        };
        let told = share.meet((name, "observe", self.core.steps), local).map_err(Trouble::error)?;
        let rank = share.world.rank();
        let heads = told.iter().map(Vec::len).max().unwrap_or(0);
        if let Some(other) = told.iter().position(|terms| !terms.is_empty() && terms.len() != heads) {
            bail!("{name}: rank {other} shows {} heads, and others {heads}", told[other].len())
        }
        let of = |terms: &Vec<f64>, head: usize| terms.get(head).copied().unwrap_or(0.0) as u64;
        let mut rows = vec![];
        for head in 0..heads {
            rows.push(share.rows + told[..rank].iter().map(|terms| of(terms, head)).sum::<u64>());
            share.rows += told.iter().map(|terms| of(terms, head)).sum::<u64>();
        }
        let any = told[rank].iter().any(|&terms| terms > 0.0);
        Ok((total, Some(rows), any))
    }

    /// Whether the gradients of a scaled loss are finite on all processes.
    pub(super) fn all_finite(
        &mut self,
        local: Result<(Backward, bool)>,
        scale: f64,
    ) -> Result<(Backward, bool)> {
        match &mut self.shared {
            Some(share) => share.all_finite(self.core.name(), self.core.steps, local, scale),
            None => local,
        }
    }

    /// Forgets the step under way, here and of what is shared.
    pub(super) fn forget_with_others(&mut self) {
        self.forget();
        if let Some(share) = &mut self.shared {
            share.forget();
        }
    }

    /// The mean of a loss over the last step's loss terms of all processes.
    pub(super) fn mean_loss(
        &mut self,
        call: &'static str,
        loss: impl FnOnce() -> Result<f64>,
    ) -> Result<f64> {
        let Some(share) = &mut self.shared else { return loss() };
        let terms = share.last_terms;
        let local = if terms > 0.0 { loss() } else { Ok(0.0) };
        let local = local.map(|loss| vec![terms, loss]).map_err(|error| Trouble::failed(&error));
        let told = share.meet((self.core.name(), call, self.core.steps), local).map_err(Trouble::error)?;
        let total: f64 = told.iter().map(|numbers| numbers[0]).sum();
        Ok(told.iter().map(|numbers| numbers[0] * numbers[1]).sum::<f64>() / total)
    }

    /// Says to all how something that each did for itself went: on all the same outcome.
    pub(super) fn all_did(&self, call: &'static str, outcome: Result<()>) -> Result<()> {
        match &self.shared {
            Some(share) => share.all_did((self.core.name(), call, self.core.steps), outcome),
            None => outcome,
        }
    }

    /// Whether this process writes files: rank 0 does, or the only one.
    pub(super) fn writes(&self) -> bool {
        self.shared.as_ref().is_none_or(|share| share.world.is_first())
    }

    /// Whether this process was shown a batch without rows.
    pub(super) fn has_no_rows(&self) -> bool {
        self.shared.as_ref().is_some_and(Share::has_no_rows)
    }

    /// What a process without rows brings to a step.
    pub(super) fn no_gradients(&self) -> Backward {
        (None, vec![None; self.core.vars.len()])
    }
}

/// The total of the first head's terms, and how many terms each head has.
fn counted(heads: &[Head<'_>]) -> Result<(f64, Vec<f64>)> {
    let mut terms = Vec::with_capacity(heads.len());
    let mut total = 0.0;
    for (index, head) in heads.iter().enumerate() {
        if head.outputs.elem_count() == 0 {
            terms.push(0.0);
            continue;
        }
        let weights = head.weights(None)?;
        terms.push(weights.terms as f64);
        if index == 0 {
            total = weights.total;
        }
    }
    Ok((total, terms))
}
