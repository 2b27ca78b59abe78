//! What a step takes in: this process's gradients and factors, or those of all processes that share the optimizer.

use super::NaturalGradient;
use super::gradients::Backward;
use crate::curvature::{FactorSums, Joint, Kept, LayerFactors};
use crate::optim::placement;
use crate::optim::share::{Brought, NOT_COUNTED, Share, Slot, add_gradients, read_gradients};
use crate::optim::state::pending::Others;
use crate::optim::step::gradients::{Refusal, Staged};
use crate::optim::step::renew::Refresh;
use crate::optim::wake::Model;
use crate::parallel::{Form, Kind, Place, Placement, Sums, Totals, Trouble, World};
use candle_core::{Result, Tensor, bail};

/// What a step takes in. With several processes it is made of what all have brought, and equal on all.
pub(super) struct Incoming {
    pub grads: Vec<Option<Tensor>>,
    pub loss: Option<f64>,
    pub refresh: Staged<Option<Refresh>>,
}

/// What this process has seen of a step and does not add up at once.
#[derive(Default)]
struct Here {
    /// The gradients of drawn labels, which as many passes have as on other processes.
    drawn: Vec<Vec<Tensor>>,
    /// Records, which EKFAC's moments are sums over.
    kept: Vec<Kept>,
}

impl NaturalGradient {
    /// Ties this optimizer to those of the other processes of `world`, so that each step is the one that one process would take on all
    /// processes' rows: gradients, factors and counts are added up over them, with the weights of their loss terms.
    ///
    /// Each process builds the same model and the same optimizer; the parameters become rank 0's. Call it before the first step, or after all
    /// have resumed the same file. From then on every process makes the same calls: [`observe`](Self::observe) at *every* step, which counts
    /// its rows, then `backward_step`, whose loss is the mean over its own rows. A process without rows calls
    /// [`step_without_rows`](Self::step_without_rows). What goes wrong on one process is an error on all, at the step, that names its rank.
    /// In a world of one nothing changes. While it runs a process other than rank 0 holds its parameters twice.
    ///
    /// # Errors
    /// On all processes: when options, Vars, blocks, steps taken or state differ, with the first thing that does; when a process does not
    /// come; with QE, whose inner steps evaluate the model on rows of one process; with [`Placement::Owned`] and
    /// [`Params::ekfac`](crate::optim::Params::ekfac), whose moments need eigenvectors where the rows are; with inverses that are made beside the steps
    /// ([`Params::overlap`](crate::optim::Params::overlap)) under any placement but [`Placement::Replicated`].
    pub fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        if world.is_alone() {
            return Ok(());
        }
        let (name, steps) = (self.core.name(), self.core.steps);
        let settled = self.settle().map(|()| vec![]).map_err(|error| Trouble::failed(&error));
        // Before anything is compared: one whose GPU has failed has other steps.
        world.meet(Place { of: name, call: "share", step: 0 }, settled).map_err(Trouble::error)?;
        if self.core.ownership.is_some() {
            bail!(
                "{name}: expected an optimizer with all of its state, got one that shares it with others already"
            )
        }
        let placement = match placement {
            Placement::ByCost => placement::cheapest(&self.core, world),
            Placement::Replicated | Placement::Gathered | Placement::Owned => placement,
        };
        let share = Share::new(world, placement, name, self.core.identity())?;
        // All have the same options here, so all refuse.
        if self.core.params.wake.inner().is_some() {
            bail!(
                "{name}: expected a member whose step is one evaluation of the model, got inner steps, whose closure sees one process's rows alone"
            )
        }
        if self.core.params.ekfac && placement == Placement::Owned {
            bail!(
                "{name}: expected Placement::Replicated or Gathered with ekfac, whose moments need the eigenvectors where the rows are, got Owned"
            )
        }
        if placement != Placement::Replicated && self.core.params.overlap > 0 {
            bail!(
                "{name}: expected Placement::Replicated with inverses that are made beside the steps (overlap {}), got {placement:?}",
                self.core.params.overlap
            )
        }
        // Before any parameter is another.
        share.agree_on((name, "share", steps), &self.state_of(), self.core.state_hashes())?;
        let vars = self.core.vars.iter().map(|param| &param.var);
        let vars: Vec<_> = vars.chain(self.core.frozen.iter().map(|(_, var)| var)).cloned().collect();
        let masters = self.core.vars.iter_mut().filter_map(|param| param.master.as_mut()).collect();
        share.take_values_of_first((name, steps), &vars, masters)?;
        self.device = None;
        let others = || Some(Others { world: world.clone(), of: name });
        if self.core.params.ekfac {
            self.workplace.with_rows = others();
        }
        self.workplace.division = share.division.clone();
        if placement == Placement::Owned {
            let owners = placement::unit_owners(&self.core, world.size());
            self.core.ownership = Some(self.core.ownership(world.rank(), &owners));
            self.core.keep_own();
            self.workplace.owners = others();
        }
        self.shared = Some(share);
        Ok(())
    }

    /// Compares the state of all processes hash by hash, where there are several, after each has come to its own as `outcome` says.
    pub(super) fn agree_on_state(&self, outcome: Result<()>) -> Result<()> {
        let Some(share) = &self.shared else { return outcome };
        // One that could not take its state has other steps.
        share.agree_on(
            (self.core.name(), "resume", 0),
            &self.state_of(),
            outcome.and_then(|()| self.core.state_hashes()),
        )
    }

    /// What is compared of all processes.
    fn state_of(&self) -> String {
        format!("{}: the state (resume the same file on all processes)", self.core.name())
    }

    /// What is brought to a step: this process's part, or everybody's. A local error is everybody's too.
    pub(super) fn incoming(&mut self, local: Result<Backward>) -> Staged<Incoming> {
        let incoming = match self.shared.take() {
            None => local.map_err(Refusal::Failed).map(|(loss, grads)| {
                let refresh = match loss {
                    Some(loss) if !loss.is_finite() => Err(Refusal::NonFinite(format!("the loss is {loss}"))),
                    _ => self.take_factors(),
                };
                Incoming { grads, loss, refresh }
            }),
            Some(mut share) => {
                let incoming = self.of_all(&mut share, local);
                share.forget();
                self.shared = Some(share);
                incoming
            }
        };
        if incoming.is_err() {
            self.forget();
        }
        incoming
    }

    /// Meets the others with this process's part of the step, and adds all parts up.
    fn of_all(&mut self, share: &mut Share, local: Result<Backward>) -> Staged<Incoming> {
        let (name, steps) = (self.core.name(), self.core.steps);
        let joint_due = self.curvature_due();
        let mut seen = Here::default();
        let own =
            local.map_err(Refusal::Failed).and_then(|local| self.own(share, local, joint_due, &mut seen));
        let Here { drawn, kept } = seen;
        let alike = [("learning rate", self.core.params.lr), ("damping", self.core.damping)];
        let values: Vec<_> =
            self.core.vars.iter().map(|param| (param.name.as_str(), param.value())).collect();
        let (mut sums, brought) = match own {
            Ok((sums, brought)) => (sums, Ok(brought)),
            Err(refused) => (share.sums(), Err(Trouble::from(refused))),
        };
        share.last_terms = brought.as_ref().map_or(0.0, |brought| brought.total);
        let told = share.step(name, steps, brought, &alike, &values)?;
        let forms: Vec<_> = self.without_layer().collect();
        if told.passes > 0 && !forms.is_empty() {
            // How many passes there are was not known before to those without rows.
            let added = add_drawn(&mut sums, told.passes, &forms, &drawn);
            share.meet((name, "drawn", steps), added.map(|()| vec![]).map_err(Trouble::from))?;
        }
        let mut totals = share.add(sums)?;
        let refresh = joint_due.then_some(told.passes);
        // What fails from here on, on this process alone, is brought to the next meeting.
        Ok(match self.of_totals(&mut totals, told.total, refresh, &forms, kept) {
            Ok((grads, refresh)) => Incoming { grads, loss: told.loss, refresh: Ok(refresh) },
            Err(error) => {
                let grads = vec![None; self.core.vars.len()];
                Incoming { grads, loss: told.loss, refresh: Err(Refusal::Failed(error)) }
            }
        })
    }

    /// The mean gradients over `total` loss terms, and what renews the curvature with so many `passes` of drawn labels, if it is due.
    fn of_totals(
        &mut self,
        totals: &mut Totals,
        total: f64,
        passes: Option<usize>,
        forms: &[(Option<usize>, Form)],
        kept: Vec<Kept>,
    ) -> Result<(Vec<Option<Tensor>>, Option<Refresh>)> {
        let (mut grads, took_part) = read_gradients(totals, &self.slots(), total)?;
        let refresh = match passes {
            Some(passes) => {
                let joint = self.joint();
                let (mut layers, counts) = joint.read(totals)?;
                for (layer, kept) in layers.iter_mut().zip(kept) {
                    layer.kept = kept;
                }
                let averaged = !joint.last.is_empty();
                let mut drawn = Vec::with_capacity(passes);
                for _ in 0..passes {
                    let read = |(owner, form): &(_, Form)| totals.tensor(Kind::Exact, *owner, form, 1.0);
                    drawn.push(forms.iter().map(read).collect::<Result<Vec<_>>>()?);
                }
                Some(Refresh { layers, averaged, counts, drawn })
            }
            None => None,
        };
        let mut taking_part: Vec<_> = took_part.into_iter().map(|took| took.then_some(())).collect();
        self.sit_out(&mut taking_part)?;
        for (grad, taking_part) in grads.iter_mut().zip(taking_part) {
            *grad = grad.take().filter(|_| taking_part.is_some());
        }
        Ok((grads, refresh))
    }

    /// This process's part of a step, with what is not added up at once in `here`.
    fn own(
        &mut self,
        share: &mut Share,
        (loss, grads): Backward,
        due: bool,
        here: &mut Here,
    ) -> Staged<(Sums, Brought)> {
        if let Some(kept) = share.kept.take() {
            return Err(Refusal::Failed(kept));
        }
        self.core.check_rate()?;
        if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            return Err(Refusal::NonFinite(format!("the loss is {loss}")));
        }
        let Some(total) = share.terms else {
            let what = format!("{}: step {}: {NOT_COUNTED}", self.core.name(), self.core.steps);
            return Err(Refusal::Failed(candle_core::Error::Msg(what)));
        };
        let mut sums = share.sums();
        add_gradients(&mut sums, &self.slots(), &grads, total)?;
        let mut passes = 0;
        if due {
            let observed = self.take_sums(total > 0.0)?;
            let (factors, gradients) = observed.map_or((None, vec![]), |(sums, drawn)| (Some(sums), drawn));
            passes = gradients.len();
            here.drawn = gradients;
            let (kept, wrong) = self.joint().add(factors, &mut sums)?;
            here.kept = kept;
            if let Some(whose) = wrong {
                return Err(Refusal::NonFinite(format!("{whose} has NaN or infinite elements")));
            }
        }
        Ok((sums, Brought { total, loss, passes }))
    }

    pub(super) fn slots(&self) -> Vec<Slot<'_>> {
        let slot = |param: &'_ super::super::state::param::Param| Form::wide(param.var.as_tensor());
        let slots = self.core.vars.iter().enumerate();
        let slots = slots.map(|(index, param)| Slot {
            name: &param.name,
            form: slot(param),
            optional: param.optional,
            owner: self.core.owner_of_param(index),
        });
        slots.collect()
    }

    /// The forms of the gradients of blocks without a layer, and who alone needs them, if one does.
    fn without_layer(&self) -> impl Iterator<Item = (Option<usize>, Form)> {
        let blocks = self.core.blocks.iter().enumerate().filter(|(_, block)| block.layer.is_none());
        blocks.map(|(index, block)| {
            let like = Form::wide(self.core.vars[block.params[0]].var.as_tensor());
            (self.core.owner_of_block(index), Form { dims: block.shape().to_vec(), ..like })
        })
    }

    fn joint(&self) -> Joint<'_> {
        let (last, decay) = self.averages_to_join();
        let mut owners = vec![None; self.layers.len()];
        for (index, block) in self.core.blocks.iter().enumerate() {
            if let Some(layer) = block.layer {
                owners[layer] = self.core.owner_of_block(index);
            }
        }
        let sharing = self.core.params.sharing;
        Joint { wants: &self.wants, layers: &self.layers, sharing, last, decay, owners }
    }

    /// The averages that factors join as they are computed, and how much of these stays. None where something needs the factors of the
    /// batch alone, as a quadratic wake's model does.
    pub(super) fn averages_to_join(&self) -> (Vec<LayerFactors>, f64) {
        // Owners alone have averages.
        if self.core.ownership.is_some() {
            return (vec![], 0.0);
        }
        match self.core.params.wake.model() {
            Model::Linear => {}
            Model::Quadratic(_) => return (vec![], 0.0),
        }
        let mut last = vec![LayerFactors::default(); self.layers.len()];
        for block in &self.core.blocks {
            if let Some(layer) = block.layer {
                block.last_factors(&mut last[layer]);
            }
        }
        (last, self.core.params.stat_decay)
    }

    /// Asks all whether they will take the step that they have computed after `steps` others, before any does.
    pub(super) fn all_agree<T>(&mut self, steps: usize, outcome: Result<Option<T>>) -> Result<Option<T>> {
        match &mut self.shared {
            Some(share) => share.agree(self.core.name(), steps, outcome),
            None => outcome,
        }
    }
}

/// Adds the gradients of drawn labels, or nothing of a process without rows, to what all add up.
fn add_drawn(
    sums: &mut Sums,
    passes: usize,
    forms: &[(Option<usize>, Form)],
    drawn: &[Vec<Tensor>],
) -> Staged<()> {
    for pass in 0..passes {
        for (index, (owner, form)) in forms.iter().enumerate() {
            let drawn = drawn.get(pass).and_then(|pass| pass.get(index));
            sums.tensor(Kind::Exact, *owner, drawn, form, 1.0, || "a gradient of drawn labels".into())?;
        }
    }
    match sums.not_finite()? {
        Some(whose) => Err(Refusal::NonFinite(format!("{whose} has NaN or infinite elements"))),
        None => Ok(()),
    }
}

/// What was seen of a step: sums of factors, and the gradients of drawn labels.
pub(super) type Seen = (FactorSums, Vec<Vec<Tensor>>);

#[cfg(test)]
mod tests;
