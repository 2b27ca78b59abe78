//! A whole step: its stages (`optim/step`), and what becomes of one that cannot be taken.

use super::NaturalGradient;
use super::exchange::Incoming;
use super::gradients::Backward;
use crate::curvature::{Damping, wide_dtype};
use crate::gpu::Gpu;
use crate::optim::params::NonFinite;
use crate::optim::state::block::BlockState;
use crate::optim::state::{Core, Predicted};
use crate::optim::step::gradients::{Refusal, Staged};
use crate::optim::step::host::{commit, propose};
use crate::optim::step::predict::predict;
use crate::optim::step::proposal::Proposal;
use crate::optim::step::renew::Refresh;
use crate::optim::step::run;
use crate::optim::step::work_space::{DeviceStep, Needs};
use crate::optim::wake::{Carry, Model};
use candle_core::{Result, Tensor, bail};

impl NaturalGradient {
    /// A step on this process's loss and gradients, in the order of the params, and on what the others have.
    pub(super) fn advance(&mut self, local: Result<Backward>) -> Result<()> {
        let incoming = match self.incoming(local) {
            Ok(incoming) => incoming,
            Err(refused) => return self.refuse(refused),
        };
        if self.core.ownership.is_some() {
            return self.advance_owned(incoming);
        }
        let steps = self.core.steps;
        if let Some(gpu) = self.gpu() {
            let outcome = self.advance_on(gpu, incoming).map(Some);
            return self.all_agree(steps, outcome).map(drop);
        }
        let proposed = match self.settle() {
            Ok(()) => {
                self.device = None;
                self.proposed(incoming)
            }
            Err(error) => Err(error),
        };
        let Some((proposal, predicted)) = self.all_agree(steps, proposed)? else { return Ok(()) };
        let values = proposal.values(&self.core)?;
        commit(proposal, &mut self.core, &values, None)?;
        self.core.predicted = predicted;
        Ok(())
    }

    /// The proposal, or `None` where the step is to be left out.
    pub(super) fn proposed(
        &mut self,
        Incoming { grads, loss, refresh }: Incoming,
    ) -> Result<Option<(Proposal, Option<Predicted>)>> {
        let _span = tracing::info_span!("step").entered();
        self.may_step()?;
        let proposal = refresh.and_then(|refresh| {
            self.begin_length(refresh.as_ref());
            propose(&self.core, &self.workplace, Ok(refresh.as_ref()), &grads)?
        });
        self.forget();
        match proposal {
            Ok(proposal) => {
                let predicted = predict(&self.core, &proposal, loss)?;
                Ok(Some((proposal, predicted)))
            }
            Err(refused) => self.refuse(refused).map(|()| None),
        }
    }

    /// Refuses a step at a rate that makes no sense, and one while an adaptive damping waits for the loss after the last.
    pub(super) fn may_step(&mut self) -> Result<()> {
        if self.core.predicted.is_some() {
            self.forget();
            bail!(
                "{}: adaptive damping waits for the loss after step {}; call adapt_damping(&loss) when \
                 wants_loss_after() says so",
                self.core.name(),
                self.core.steps
            )
        }
        self.check_rate()
    }

    /// Takes note of the loss terms of a step, which an adaptive length begins with; none where they are not known.
    pub(super) fn begin_length(&mut self, refresh: Option<&Refresh>) {
        self.core.begin_length(refresh.map_or(0.0, |refresh| refresh.counts.effective()));
    }

    fn check_rate(&mut self) -> Result<()> {
        let checked = self.core.check_rate();
        if checked.is_err() {
            self.forget();
        }
        checked
    }

    /// Leaves a step out, or says why it cannot be taken.
    pub(super) fn refuse(&mut self, refused: Refusal) -> Result<()> {
        let core = &mut self.core;
        match refused {
            Refusal::NonFinite(_) if core.params.non_finite == NonFinite::Skip => {
                core.skipped += 1;
                Ok(())
            }
            Refusal::NonFinite(what) => {
                bail!("{}: step {}: {what}; parameters and state are unchanged", core.name(), core.steps)
            }
            Refusal::Failed(error) => Err(error),
        }
    }

    /// The GPU that steps run on, where they run on one. Inner steps, a damping that adapts to measured losses, and the literal carry read
    /// numbers within a step, and take the host's path by tensor operations there; so do steps in which not all Vars take part, and
    /// those of several owners, who meet in between.
    pub(super) fn gpu(&self) -> Option<Gpu> {
        let core = &self.core;
        let first = core.vars.first()?;
        let gpu = Gpu::of(first.var.device())?;
        let dtype = wide_dtype(first.var.dtype());
        let alike = core.vars.iter().all(|p| {
            p.var.device().same_device(first.var.device())
                && wide_dtype(p.var.dtype()) == dtype
                && p.var.is_contiguous()
                && !p.optional
        });
        (alike && !reads_numbers(core) && !begins_late(core) && core.ownership.is_none()).then_some(gpu)
    }

    /// [`advance`](Self::advance) on a GPU.
    fn advance_on(&mut self, gpu: Gpu, incoming: Incoming) -> Result<()> {
        let _span = tracing::info_span!("step").entered();
        self.check_rate()?;
        if self.device.as_ref().is_some_and(|device| device.needs != Needs::of(&self.core)) {
            self.settle()?;
            self.device = None;
        }
        // A quadratic wake without a rate of its own inverts with the last one.
        let by_last_rate = match self.core.params.wake.model() {
            Model::Linear => false,
            Model::Quadratic(_) => self.core.given_rate().is_none(),
        };
        if by_last_rate && self.core.inverses_due() {
            self.settle()?;
        }
        let mut device = match self.device.take() {
            Some(device) => device,
            None => {
                self.moves += 1;
                DeviceStep::new(&mut self.core, gpu)?
            }
        };
        let Incoming { grads, loss: _, refresh } = incoming;
        let outcome = refresh.and_then(|refresh| self.queue(&mut device, refresh, &grads));
        self.device = Some(device);
        self.forget();
        match outcome {
            Ok(true) => self.settle(),
            Ok(false) => Ok(()),
            Err(refused) => self.refuse(refused),
        }
    }

    /// Queues a step; whether it was one that renewed curvature, where the host waits for it anyway.
    fn queue(
        &mut self,
        device: &mut DeviceStep,
        refresh: Option<Refresh>,
        grads: &[Option<Tensor>],
    ) -> Staged<bool> {
        self.begin_length(refresh.as_ref());
        if self.core.steps == 0 {
            device.set_length(self.core.slopes.length)?;
        }
        let renewing = refresh.is_some() || self.core.inverses_due();
        if !self.captured {
            device.begin(&self.core)?;
        }
        let stacked: Vec<_> = device.stacks.iter().map(|stack| stack.inverse.clone()).collect();
        let stepped = run(&self.core, device, &self.workplace, Ok(refresh.as_ref()), grads)??;

        let last_pending = std::mem::replace(&mut self.core.pending, stepped.pending);
        let last_damping = std::mem::replace(&mut self.core.damping, stepped.damping);
        let last_states: Vec<BlockState> = self.core.blocks.iter().map(|block| block.state.clone()).collect();
        for (block, state) in self.core.blocks.iter_mut().zip(stepped.states) {
            block.state = state.unwrap_or_default();
        }
        if !self.captured {
            self.count();
        }
        if !(renewing || stepped.takes_pending) {
            return Ok(false);
        }
        if renewing && !device.gone()? {
            // The factors of a step that was not taken do not count either.
            (self.core.damping, self.core.pending) = (last_damping, last_pending);
            for (block, state) in self.core.blocks.iter_mut().zip(last_states) {
                block.state = state;
            }
        } else if !(self.keep_inverses && self.move_inverses(&last_states)?) {
            self.moves += 1;
            return Ok(renewing);
        }
        for (stack, inverse) in device.stacks.iter_mut().zip(stacked) {
            stack.inverse = inverse;
        }
        Ok(renewing)
    }

    /// Counts a step that was queued.
    pub(super) fn count(&mut self) {
        self.core.steps += 1;
        for adam in &mut self.core.adam {
            adam.steps += 1;
        }
    }
}

/// Whether the host decides within a step by numbers that it reads.
fn reads_numbers(core: &Core) -> bool {
    let damping = match core.params.damping {
        Damping::Adaptive(_) => true,
        Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Relative(_) => false,
    };
    let carry = match core.params.carry {
        Carry::Literal => true,
        Carry::Gradient => false,
    };
    damping || carry || core.params.wake.inner().is_some()
}

/// Averages that begin after the first step begin with what is then the newest.
fn begins_late(core: &Core) -> bool {
    let no_mean = Needs::of(core).averaged_models && core.blocks.iter().any(|b| b.state.mean.is_none());
    let no_average = core.params.average.is_some() && core.averages.is_empty();
    core.steps > 0 && (no_mean || no_average)
}
