//! A first-order optimizer of processes each of which owns the state of a part of the parameters.

use super::slot::{Slot, Way};
use super::{FirstOrder, Next, Update};
use crate::optim::share::Values;
use crate::parallel::{Form, Reader, Trouble, Writer, spread};
use candle_core::{Device, Result, Tensor, bail};

impl<P: Update> FirstOrder<P> {
    /// Who of `ranks` owns the state of each slot: those whose steps take longest first, each goes to whom has the least to do.
    pub(super) fn slot_owners(&self, ranks: usize) -> Vec<usize> {
        let cost = |slot: &Slot| {
            let elements = slot.var.elem_count();
            match (slot.way, slot.var.dims().first()) {
                (Way::Frozen, _) => 0.0,
                // A matrix is multiplied from both sides.
                (Way::Own, Some(&rows)) if self.params.for_matrices() && rows > 0 => {
                    elements as f64 * (rows + elements / rows) as f64
                }
                (Way::Own | Way::Adam, _) => elements as f64,
            }
        };
        spread(&self.slots.iter().map(cost).collect::<Vec<_>>(), ranks)
    }

    /// Who alone holds the state of a slot; none where all do.
    pub(super) fn owner(&self, slot: usize) -> Option<usize> {
        self.owners.get(slot).copied()
    }

    /// Drops the state that others own.
    pub(super) fn keep_own(&mut self) {
        let Some(share) = &self.shared else { return };
        let rank = share.world.rank();
        for (slot, _) in self.slots.iter_mut().zip(&self.owners).filter(|(_, owner)| **owner != rank) {
            slot.state = vec![];
        }
    }

    /// What a step has led to of all that is trained, where `next` is that of this process's own; the state of others stays with them.
    pub(super) fn with_owners(&mut self, next: Result<Vec<Next>>) -> Result<Vec<Next>> {
        let Some(mut share) = self.shared.take() else { return next };
        let rank = share.world.rank();
        let trained = || self.slots.iter().enumerate().filter(|(_, slot)| slot.way != Way::Frozen);
        let owners: Vec<usize> = trained().map(|(index, _)| self.owners[index]).collect();
        let forms: Vec<Form> = trained().map(|(_, slot)| Form::wide(slot.var.as_tensor())).collect();
        let own = next.map(|next| {
            let mut next = next.into_iter();
            owners.iter().map(|&owner| if owner == rank { next.next() } else { None }).collect::<Vec<_>>()
        });
        let values = own.as_ref().map_err(Trouble::failed).map(|own| Values {
            values: own.iter().map(|next| next.as_ref().map(|(value, _)| value.clone())).collect(),
            sums: vec![],
        });
        let local = values.as_ref().map_err(Trouble::clone);
        let all = share.values_of_owners((P::NAME, self.steps), (&owners, &forms), local);
        self.shared = Some(share);
        let all = all.map_err(Trouble::error)?;
        let next = |(value, own): (Option<Tensor>, Option<Next>)| match (value, own) {
            (_, Some(own)) => Ok(own),
            (Some(value), None) => Ok((value, vec![])),
            (None, None) => bail!("{}: the owner of a parameter gives no value", P::NAME),
        };
        all.values.into_iter().zip(own?).map(next).collect()
    }

    /// The state that others own, on rank 0, each with the number of its slot. All call it.
    pub(super) fn gather_elsewhere(&self) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut found = vec![];
        let Some(share) = &self.shared else { return Ok(found) };
        for (index, (slot, owner)) in self.slots.iter().zip(&self.owners).enumerate() {
            let message = share.state_of_owner((P::NAME, self.steps), *owner, || {
                let mut message = Writer::default();
                slot.state.iter().try_for_each(|tensor| message.tensor(tensor))?;
                Ok(message.0)
            })?;
            found.extend(message.map(|message| (index, message)));
        }
        Ok(found)
    }

    /// What [`gather_elsewhere`](Self::gather_elsewhere) has brought, with the names that a file has for it.
    pub(super) fn elsewhere(&self, messages: Vec<(usize, Vec<u8>)>) -> Result<Vec<(String, Tensor)>> {
        let mut found = vec![];
        for (slot, message) in messages {
            let (slot, mut reader) = (&self.slots[slot], Reader(&message));
            for key in slot.keys.iter().filter(|_| !message.is_empty()) {
                found.push((format!("{key}.{}", slot.name), reader.tensor(&Device::Cpu)?));
            }
        }
        Ok(found)
    }
}
