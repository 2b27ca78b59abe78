//! Steps and files of processes each of which owns a part of the state.

use super::NaturalGradient;
use super::exchange::Incoming;
use crate::optim::share::Values;
use crate::optim::state::{Elsewhere, Predicted};
use crate::optim::step::carry::{self, Carried};
use crate::optim::step::gradients::{Refusal, Staged};
use crate::optim::step::host::{commit_carried, propose, slope};
use crate::optim::step::predict::predict;
use crate::optim::step::proposal::Proposal;
use crate::parallel::{Form, Reader, Trouble, Writer};
use candle_core::{Device, Error, Result};

/// What a process has computed of a step, before anything has changed.
struct Own {
    proposal: Proposal,
    predicted: Option<Predicted>,
    carries: Vec<Option<Carried>>,
    /// With the slope along the step, and the change of the loss that the model predicts.
    values: Values,
}

/// Whose state a message to the writing process is: the number of a block, or of a Var without one.
pub(super) enum Owned {
    Block(usize),
    Adam(usize),
}

impl NaturalGradient {
    /// [`advance`](Self::advance) where each process owns a part of the state: each computes what is its own, and all have the parameters.
    pub(super) fn advance_owned(&mut self, incoming: Incoming) -> Result<()> {
        // These fail on all or on none, who have the same options and the same steps behind them.
        self.settle()?;
        self.device = None;
        self.may_step()?;
        let (own, all) = match self.own_part(incoming).and_then(|own| self.with_others(own)) {
            Ok(stepped) => stepped,
            Err(refused) => return self.refuse(refused),
        };
        let Own { proposal, predicted, carries, values: _ } = own;
        let [slope, change] = [0, 1].map(|index| all.sums.get(index).copied().unwrap_or(0.0));
        let takes_part: Vec<bool> = all.values.iter().map(Option::is_some).collect();
        let values = all.values.into_iter().zip(&self.core.vars);
        // A Var cannot be set to an alias of itself.
        let values = values.map(|(value, param)| value.map_or_else(|| param.snapshot(), Ok));
        let values = values.collect::<Result<Vec<_>>>()?;
        commit_carried(proposal, &mut self.core, (&values, &takes_part), carries, slope)?;
        self.core.took_part(&takes_part);
        self.core.predicted = predicted.map(|predicted| Predicted { change, ..predicted });
        Ok(())
    }

    /// This process's part of a step, or what it refuses alone. What is refused by all is no part.
    fn own_part(&mut self, Incoming { grads, loss, refresh }: Incoming) -> Staged<Staged<Own>> {
        let _span = tracing::info_span!("step").entered();
        let (refresh, refused) = match refresh {
            Ok(refresh) => {
                self.begin_length(refresh.as_ref());
                (refresh, None)
            }
            // To be brought to the first of the meetings within.
            Err(refused) => (None, Some(refused)),
        };
        let seen = refused.map_or(Ok(refresh.as_ref()), Err);
        let proposal = propose(&self.core, &self.workplace, seen, &grads);
        self.forget();
        Ok(proposal?.and_then(|proposal| {
            let predicted = predict(&self.core, &proposal, loss)?;
            let carries = carry::host(&self.core, &proposal, None)?;
            let sums = vec![slope(&carries), predicted.map_or(0.0, |predicted| predicted.change)];
            let values = Values { values: proposal.moved(&self.core)?, sums };
            Ok(Own { proposal, predicted, carries, values })
        }))
    }

    /// This process's part, and the values that all have computed with the sums over all parts.
    fn with_others(&mut self, own: Staged<Own>) -> Staged<(Own, Values)> {
        let core = &self.core;
        let (Some(share), Some(owned)) = (&mut self.shared, &core.ownership) else {
            return Err(Refusal::Failed(Error::Msg(format!("{}: expected owners, got none", core.name()))));
        };
        let forms: Vec<Form> = core.vars.iter().map(|param| Form::wide(param.var.as_tensor())).collect();
        let of = (owned.params.as_slice(), forms.as_slice());
        let own = own.map_err(Trouble::from);
        let local = own.as_ref().map(|own| &own.values).map_err(Trouble::clone);
        let all = share.values_of_owners((core.name(), core.steps), of, local)?;
        Ok((own?, all))
    }

    /// What others own of the state, block by block and then Var by Var, on rank 0; all call it. Of the ranks that do not write only little is
    /// in memory at a time.
    pub(super) fn gather_elsewhere(&self) -> Result<Vec<(Owned, Vec<u8>)>> {
        let mut found = vec![];
        let (Some(share), Some(owned)) = (&self.shared, &self.core.ownership) else { return Ok(found) };
        let core = &self.core;
        let place = (core.name(), core.steps);
        for (index, block) in core.blocks.iter().enumerate() {
            let message = share.state_of_owner(place, owned.blocks[index], || {
                let slots = block.state.slots();
                let mut message = Writer::default();
                message.number(slots.len());
                for (name, tensor) in slots {
                    message.bytes(name.as_bytes());
                    message.tensor(&tensor.contiguous()?)?;
                }
                Ok(message.0)
            })?;
            found.extend(message.map(|message| (Owned::Block(index), message)));
        }
        for (index, adam) in core.adam.iter().enumerate() {
            let message = share.state_of_owner(place, owned.params[adam.param], || {
                let mut message = Writer::default();
                message.number(adam.steps);
                message.number(adam.moments.is_some().into());
                if let Some((first, second)) = &adam.moments {
                    message.tensor(first)?;
                    message.tensor(second)?;
                }
                Ok(message.0)
            })?;
            found.extend(message.map(|message| (Owned::Adam(index), message)));
        }
        Ok(found)
    }

    /// What [`gather_elsewhere`](Self::gather_elsewhere) has brought.
    pub(super) fn elsewhere(&self, messages: Vec<(Owned, Vec<u8>)>) -> Result<Elsewhere> {
        let (core, mut found) = (&self.core, Elsewhere::default());
        for (of, message) in messages {
            let mut reader = Reader(&message);
            match of {
                Owned::Block(index) => {
                    for _ in 0..reader.number()? {
                        let name = String::from_utf8_lossy(reader.bytes()?).into_owned();
                        found.add(&core.blocks[index].name, &name, reader.tensor(&Device::Cpu)?);
                    }
                }
                Owned::Adam(index) => {
                    let param = core.adam[index].param;
                    let (steps, has_moments) = (reader.number()?, reader.number()? > 0);
                    found.adam_steps.insert(param, steps);
                    if has_moments {
                        let name = &core.vars[param].name;
                        found.add(name, "first_moment", reader.tensor(&Device::Cpu)?);
                        found.add(name, "second_moment", reader.tensor(&Device::Cpu)?);
                    }
                }
            }
        }
        Ok(found)
    }
}
