//! What owners of parts give the others: the values that a step has led to, and their state for a file.

use super::Share;
use crate::parallel::{Form, Place, Reader, Trouble, Writer, bytes_of, tensor_of};
use candle_core::{Result, Tensor};

/// What the owner of some params, or all of them, have computed of a step.
pub(in crate::optim) struct Values {
    /// In the order of the params; none of those that take no part, or that others own.
    pub values: Vec<Option<Tensor>>,
    /// Numbers of which all need the sums.
    pub sums: Vec<f64>,
}

impl Share {
    /// Gives the values of this process's params to all, who have all of them then, with the sums of the numbers; or brings what it refuses.
    /// `owners` and `forms` are those of all params.
    pub fn values_of_owners(
        &mut self,
        (of, step): (&'static str, usize),
        (owners, forms): (&[usize], &[Form]),
        own: std::result::Result<&Values, Trouble>,
    ) -> std::result::Result<Values, Trouble> {
        let rank = self.world.rank();
        let message = match &own {
            Ok(own) => written(own, owners, rank).map_err(|error| Trouble::failed(&error)),
            Err(trouble) => Err(trouble.clone()),
        };
        self.sent += message.as_ref().map_or(0, Vec::len) * (self.world.size() - 1);
        let messages = self.world.exchange(Place { of, call: "values", step }, message)?;
        read(&messages, own?, owners, forms).map_err(|error| Trouble::failed(&error))
    }

    /// What the owner of a part says of it, on rank 0, who writes files; nothing where that is the owner. All others forget it at once.
    pub fn state_of_owner(
        &self,
        (of, step): (&'static str, usize),
        owner: usize,
        own: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Option<Vec<u8>>> {
        if owner == 0 {
            return Ok(None);
        }
        let local = if owner == self.world.rank() { own() } else { Ok(vec![]) };
        let local = local.map_err(|error| Trouble::failed(&error));
        let place = Place { of, call: "save", step };
        let mut messages = self.world.exchange(place, local).map_err(Trouble::error)?;
        Ok(self.world.is_first().then(|| messages.swap_remove(owner)))
    }
}

fn written(own: &Values, owners: &[usize], rank: usize) -> Result<Vec<u8>> {
    let mut message = Writer::default();
    message.number(own.sums.len());
    own.sums.iter().for_each(|number| message.bytes(&number.to_le_bytes()));
    for (value, _) in own.values.iter().zip(owners).filter(|(_, owner)| **owner == rank) {
        message.number(value.is_some().into());
        if let Some(value) = value {
            message.bytes(&bytes_of(value)?);
        }
    }
    Ok(message.0)
}

fn read(messages: &[Vec<u8>], own: &Values, owners: &[usize], forms: &[Form]) -> Result<Values> {
    let mut readers: Vec<Reader> = messages.iter().map(|message| Reader(message)).collect();
    let mut sums = vec![0.0; own.sums.len()];
    for reader in &mut readers {
        for index in 0..reader.number()? {
            let number = reader.double()?;
            if let Some(sum) = sums.get_mut(index) {
                *sum += number;
            }
        }
    }
    let mut values = Vec::with_capacity(forms.len());
    for ((form, owner), own) in forms.iter().zip(owners).zip(&own.values) {
        let reader = &mut readers[*owner];
        values.push(match (reader.number()?, own) {
            (0, _) => None,
            (_, Some(own)) => {
                reader.bytes()?;
                Some(own.clone())
            }
            (_, None) => Some(tensor_of(reader.bytes()?, &form.dims, form.dtype, &form.device)?),
        });
    }
    Ok(Values { values, sums })
}
