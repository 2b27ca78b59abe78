//! A first-order optimizer of several processes.

use super::slot::Way;
use super::{FirstOrder, Update};
use crate::optim::identity::{Lines, hash, of_var, version};
use crate::optim::share::{Brought, NOT_COUNTED, Share, Slot, add_gradients, read_gradients};
use crate::optim::step::gradients::{Refusal, Staged};
use crate::parallel::{Form, Placement, Trouble, World};
use candle_core::{Error, Result, Tensor, backprop::GradStore, bail};

type Grads = Vec<Option<Tensor>>;

impl<P: Update> FirstOrder<P> {
    /// Ties this optimizer to those of the other processes of `world`, so that each step is the one on the mean gradient over all processes'
    /// loss terms.
    ///
    /// Each process builds the same model and the same optimizer; the parameters become rank 0's. From then on every process makes the
    /// same calls: [`count_terms`](Self::count_terms) at every step, then `backward_step`, whose loss is the mean over its own terms. What
    /// goes wrong on one process is an error on all that names its rank. In a world of one nothing changes.
    ///
    /// # Errors
    /// On all processes: when options, Vars, steps taken or state differ, with the first thing that does; when a process does not come; with
    /// [`Placement::Gathered`], which is for Kronecker factors. [`Placement::ByCost`] is [`Placement::Replicated`] here.
    pub fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        if world.is_alone() {
            return Ok(());
        }
        let mut lines = vec![version(), ("optimizer".into(), P::NAME.into())];
        for slot in &self.slots {
            let trained =
                format!("{:?}, rate times {}, decay {:?}", slot.way, slot.lr_scale, slot.weight_decay);
            lines.push(of_var(&slot.name, &slot.var, &trained));
        }
        lines.push(("options".into(), format!("{:?}", self.params)));
        lines.push(("non_finite".into(), format!("{:?}", self.non_finite)));
        lines.push(("a number of steps of".into(), self.steps.to_string()));
        let placement = match placement {
            // A step is short beside the messages.
            Placement::ByCost => Placement::Replicated,
            Placement::Replicated | Placement::Gathered | Placement::Owned => placement,
        };
        let share = Share::new(world, placement, P::NAME, lines)?;
        // All have the same placement here, so all refuse.
        if placement == Placement::Gathered {
            bail!(
                "{}: expected Placement::Replicated or Placement::Owned, got Gathered, which divides the inverses of Kronecker factors",
                P::NAME
            )
        }
        if !self.owners.is_empty() {
            bail!(
                "{}: expected an optimizer with all of its state, got one that shares it with others already",
                P::NAME
            )
        }
        // Before any parameter is another.
        share.agree_on((P::NAME, "share", self.steps), &Self::state_of(), self.state_hashes())?;
        let vars: Vec<_> = self.slots.iter().map(|slot| slot.var.clone()).collect();
        let wide = self.slots.iter_mut().filter_map(|slot| slot.wide.as_mut()).collect();
        share.take_values_of_first((P::NAME, self.steps), &vars, wide)?;
        self.shared = Some(share);
        if placement == Placement::Owned {
            self.owners = self.slot_owners(world.size());
            self.keep_own();
        }
        Ok(())
    }

    /// Says that the coming step's loss is the mean over `terms` loss terms (examples, for a classifier) of this process, also none, or has
    /// the weights of that many. Several calls add up. With one process nothing happens.
    pub fn count_terms(&mut self, terms: f64) {
        if let Some(share) = &mut self.shared {
            share.count(terms);
        }
    }

    /// The step of a process that has no rows of this batch: `count_terms(0)` and `backward_step` in one.
    ///
    /// # Errors
    /// When the optimizer is not shared with other processes, and as any step.
    pub fn step_without_rows(&mut self) -> Result<()> {
        if self.shared.is_none() {
            bail!("{}: expected a batch with rows, got none, and there is no other process", P::NAME)
        }
        self.count_terms(0.0);
        self.advance(Ok(self.no_gradients()))
    }

    /// Replaces the gradients in `grads` by their means over the loss terms of all processes, to be clipped, say, before
    /// [`step`](candle_nn::Optimizer::step) takes them. With one process nothing happens.
    ///
    /// # Errors
    /// On all processes: when a gradient is missing or not finite on one, or its terms were not counted.
    pub fn mean_gradients(&mut self, grads: &mut GradStore) -> Result<()> {
        let Some(mut share) = self.shared.take() else { return Ok(()) };
        let local = match share.terms.is_some_and(|total| total > 0.0) {
            true => self.picked(grads),
            false => Ok(self.no_gradients()),
        };
        // All need all of them.
        let forms: Vec<_> = self.forms().into_iter().map(|slot| Slot { owner: None, ..slot }).collect();
        let means = share.means(P::NAME, self.steps, &forms, local);
        self.shared = Some(share);
        for (slot, mean) in self.trained().zip(means?) {
            if let Some(mean) = mean {
                grads.insert(&slot.var, mean);
            }
        }
        Ok(())
    }

    /// The gradients of the coming step: this process's, or the means of all. A local error is everybody's too, but for what this process could not
    /// make of the sums, the inner result.
    pub(super) fn incoming(&mut self, local: Result<Grads>) -> Staged<Result<Grads>> {
        let Some(mut share) = self.shared.take() else {
            let grads = local?;
            self.check_finite(&grads)?;
            return Ok(Ok(grads));
        };
        let incoming = self.of_all(&mut share, local);
        self.shared = Some(share);
        incoming
    }

    fn of_all(&self, share: &mut Share, local: Result<Grads>) -> Staged<Result<Grads>> {
        let (mut sums, slots) = (share.sums(), self.forms());
        let values: Result<Vec<_>> = self.slots.iter().map(|s| Ok((s.name.as_str(), s.value()?))).collect();
        let (values, valued) = match values {
            Ok(values) => (values, Ok(())),
            Err(error) => (vec![], Err(error)),
        };
        let own = match (share.terms, valued.and(local)) {
            (None, _) => Err(Refusal::Failed(Error::Msg(NOT_COUNTED.into()))),
            (_, Err(error)) => Err(Refusal::Failed(error)),
            (Some(total), Ok(grads)) => {
                let brought = Brought { total, loss: None, passes: 0 };
                add_gradients(&mut sums, &slots, &grads, total).map(|()| brought)
            }
        };
        let alike = [("learning rate", *self.params.clone().lr())];
        let told = share.step(P::NAME, self.steps, own.map_err(Trouble::from), &alike, &values)?;
        let mut totals = share.add(sums)?;
        // What fails from here on, on this process alone, is brought to the next meeting.
        Ok(read_gradients(&mut totals, &slots, told.total).map(|(grads, _)| grads))
    }

    fn forms(&self) -> Vec<Slot<'_>> {
        let trained = self.slots.iter().enumerate().filter(|(_, slot)| slot.way != Way::Frozen);
        let slots = trained.map(|(index, slot)| Slot {
            name: &slot.name,
            form: Form::wide(slot.var.as_tensor()),
            optional: false,
            owner: self.owner(index),
        });
        slots.collect()
    }

    /// What a process without rows brings.
    pub(super) fn no_gradients(&self) -> Grads {
        self.trained().map(|_| None).collect()
    }

    pub(super) fn has_no_rows(&self) -> bool {
        self.shared.as_ref().is_some_and(Share::has_no_rows)
    }

    /// Forgets what was counted of a step.
    pub(super) fn forget(&mut self) {
        if let Some(share) = &mut self.shared {
            share.forget();
        }
    }

    /// Whether scaled gradients are finite on all processes.
    pub(super) fn all_finite(&mut self, local: Result<(Grads, bool)>, scale: f64) -> Result<(Grads, bool)> {
        match &mut self.shared {
            Some(share) => share.all_finite(P::NAME, self.steps, local, scale),
            None => local,
        }
    }

    /// What all have computed, unless one could not.
    pub(super) fn all_agree<T>(&self, outcome: Result<T>) -> Result<T> {
        match self.shared.is_some() {
            true => {
                let local = outcome.as_ref().map(drop).map_err(|error| Trouble::failed(error).error());
                self.all_did("commit", local)?;
                outcome
            }
            false => outcome,
        }
    }

    /// Says to all how something that each did for itself went: on all the same outcome.
    pub(super) fn all_did(&self, call: &'static str, outcome: Result<()>) -> Result<()> {
        match &self.shared {
            Some(share) => share.all_did((P::NAME, call, self.steps), outcome),
            None => outcome,
        }
    }

    pub(super) fn writes(&self) -> bool {
        self.shared.as_ref().is_none_or(|share| share.world.is_first())
    }

    /// Compares the state of all processes hash by hash, where there are several, after each has come to its own as `outcome` says.
    pub(super) fn agree_on_state(&self, outcome: Result<()>) -> Result<()> {
        let Some(share) = &self.shared else { return outcome };
        let hashes = outcome.and_then(|()| self.state_hashes());
        // One that could not take its state may have other steps.
        share.agree_on((P::NAME, "resume", 0), &Self::state_of(), hashes)
    }

    fn state_hashes(&self) -> Result<Lines> {
        let line = |slot: &super::slot::Slot| {
            Ok((format!("for {} a state of hash", slot.name), format!("{:016x}", hash(slot.state.iter())?)))
        };
        self.slots.iter().map(line).collect()
    }

    /// What is compared of all processes.
    fn state_of() -> String {
        format!("{}: the state (resume the same file on all processes)", P::NAME)
    }
}
