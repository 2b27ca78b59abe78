//! What owners of parts give the others: the values that a step has led to, and their state for a file.

use super::Share;
use crate::parallel::{Form, Parcel, Place, Reader, Trouble, Writer};
use candle_core::{Device, Result, Tensor, bail};

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
        let parcel = own.map(|own| written(own, owners, rank));
        self.sent += parcel.as_ref().map_or(0, Parcel::size) * (self.world.size() - 1);
        let device = forms.first().map_or(Device::Cpu, |form| form.device.clone());
        let parcels = self.world.exchange_parcels(Place { of, call: "values", step }, &device, parcel)?;
        read(parcels, owners, forms).map_err(|error| Trouble::failed(&error))
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

fn written(own: &Values, owners: &[usize], rank: usize) -> Parcel {
    let (mut message, mut tensors) = (Writer::default(), vec![]);
    message.number(own.sums.len());
    own.sums.iter().for_each(|number| message.bytes(&number.to_le_bytes()));
    for (value, _) in own.values.iter().zip(owners).filter(|(_, owner)| **owner == rank) {
        message.number(value.is_some().into());
        tensors.extend(value.clone());
    }
    Parcel { bytes: message.0, tensors }
}

fn read(parcels: Vec<Parcel>, owners: &[usize], forms: &[Form]) -> Result<Values> {
    let (bytes, mut tensors): (Vec<_>, Vec<_>) =
        parcels.into_iter().map(|parcel| (parcel.bytes, parcel.tensors.into_iter())).unzip();
    let mut readers: Vec<Reader> = bytes.iter().map(|bytes| Reader(bytes)).collect();
    let mut sums: Vec<f64> = vec![];
    for reader in &mut readers {
        for index in 0..reader.number()? {
            let number = reader.double()?;
            match sums.get_mut(index) {
                Some(sum) => *sum += number,
                None => sums.push(number),
            }
        }
    }
    let mut values = Vec::with_capacity(forms.len());
    for (form, &owner) in forms.iter().zip(owners) {
        if readers[owner].number()? == 0 {
            values.push(None);
            continue;
        }
        let value = tensors[owner].next().filter(|value| value.dims() == form.dims);
        let Some(value) = value else { bail!("parallel: rank {owner} gives too few values") };
        values.push(Some(value.to_dtype(form.dtype)?.to_device(&form.device)?));
    }
    Ok(Values { values, sums })
}
