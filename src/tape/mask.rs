//! Which positions of a batch count: padding of sequences must not enter the factors.

use super::{Inputs, Record};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::borrow::Cow;

/// The live positions of a batch `[batch, shared]`.
#[derive(Debug)]
pub(crate) struct Mask {
    dims: [usize; 2],
    /// Whether a position counts, in row-major order.
    counts: Vec<bool>,
    /// Numbers of the live positions among all, `[live]`, u32.
    rows: Tensor,
    /// 1 where a position counts, else 0, `[batch, shared, 1]`.
    live: Tensor,
}

impl Mask {
    /// From a tensor `[batch, shared]` that is not zero where a position counts.
    pub fn new(mask: &Tensor) -> Result<Self> {
        let Ok((batch, shared)) = mask.dims2() else {
            bail!("tape: expected a mask [batch, positions], got {:?}", mask.dims())
        };
        let live = mask.to_dtype(DType::F32)?.ne(0f32)?;
        let counts = live.to_device(&Device::Cpu)?.to_vec2::<u8>()?;
        if let Some(example) = counts.iter().position(|row| row.iter().all(|&live| live == 0)) {
            bail!("tape: the mask {:?} leaves no position of example {example}", mask.dims())
        }
        let rows = counts.iter().flatten().enumerate().filter(|(_, live)| **live != 0).map(|(i, _)| i as u32);
        let rows = Tensor::from_iter(rows, mask.device())?;
        let counts = counts.iter().flatten().map(|live| *live != 0).collect();
        Ok(Self { dims: [batch, shared], counts, rows, live: live.unsqueeze(2)? })
    }

    /// Whether it is of these examples and positions, or of all positions as examples.
    pub fn fits(&self, grads: &Tensor) -> bool {
        let [batch, shared] = self.dims;
        grads.dims().starts_with(&self.dims) || grads.dims().starts_with(&[batch * shared, 1])
    }

    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// 1 where a position counts, else 0, `[batch, shared, 1]`, u8.
    pub fn live(&self) -> &Tensor {
        &self.live
    }

    /// That of some of the examples, in this order.
    pub fn select(&self, examples: &Tensor) -> Result<Self> {
        let live = self.live.squeeze(2)?;
        Self::new(&live.index_select(&examples.to_device(live.device())?, 0)?)
    }

    /// Without the last positions, if they count for no example.
    pub fn cut(&self) -> Result<Self> {
        let [_, shared] = self.dims;
        let longest = self.counts.chunks(shared.max(1)).filter_map(|row| row.iter().rposition(|live| *live));
        let longest = longest.max().map_or(0, |last| last + 1);
        Self::new(&self.live.squeeze(2)?.narrow(1, 0, longest)?)
    }

    /// Whether a position counts, in row-major order.
    pub fn counts(&self) -> &[bool] {
        &self.counts
    }

    /// The live rows of `[batch, shared, features]` as examples of one position, `[live, 1, features]`.
    fn rows(&self, t: &Tensor) -> Result<Tensor> {
        let rows = self.rows.to_device(t.device())?;
        t.flatten(0, 1)?.contiguous()?.index_select(&rows, 0)?.unsqueeze(1)
    }

    /// `[batch, shared, features]` with zeros where a position does not count.
    pub fn zeroed(&self, t: &Tensor) -> Result<Tensor> {
        let live = self.live.to_device(t.device())?.broadcast_as(t.shape())?;
        // Not a product: what is left out may be infinite.
        live.where_cond(t, &t.zeros_like()?)
    }
}

impl Record {
    /// What enters the factors where the layer saw all positions as examples, `[batch * shared, 1, ..]`: those that count, without a mask.
    pub(crate) fn of_live_examples(&self) -> Result<Cow<'_, Record>> {
        match &self.mask {
            Some(mask) if !self.grads.dims().starts_with(&mask.dims) => self.of_live_rows(),
            _ => Ok(Cow::Borrowed(self)),
        }
    }

    /// The record with every position that counts an example of its own, `[live, 1, ..]`; itself without a mask.
    pub(crate) fn of_live_rows(&self) -> Result<Cow<'_, Record>> {
        let Some(mask) = &self.mask else { return Ok(Cow::Borrowed(self)) };
        let inputs = match &self.inputs {
            Inputs::Indices(numbers) => Inputs::Indices(mask.rows(&numbers.unsqueeze(2)?)?.squeeze(2)?),
            inputs => Inputs::Rows(mask.rows(&inputs.rows()?)?),
        };
        Ok(Cow::Owned(Record { inputs, grads: mask.rows(&self.grads)?, mask: None }))
    }

    /// Its gradients, zero where positions do not count.
    pub(crate) fn live_grads(&self) -> Result<Cow<'_, Tensor>> {
        match &self.mask {
            Some(mask) => Ok(Cow::Owned(mask.zeroed(&self.grads)?)),
            None => Ok(Cow::Borrowed(&self.grads)),
        }
    }

    /// Its inputs summed over the positions that count, `[batch, 1, features]`, with the number of these, `[batch, 1, 1]`, unless all count.
    pub(crate) fn input_sums(&self) -> Result<(Tensor, Option<Tensor>)> {
        let rows = self.inputs.rows()?;
        match &self.mask {
            Some(mask) => {
                let counts = mask.live.to_device(rows.device())?.to_dtype(DType::F64)?.sum_keepdim(1)?;
                Ok((mask.zeroed(&rows)?.sum_keepdim(1)?, Some(counts)))
            }
            None => Ok((rows.sum_keepdim(1)?, None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::values;
    use std::sync::Arc;

    #[test]
    fn what_does_not_count_is_not_read() -> Result<()> {
        let (cpu, nan) = (Device::Cpu, f64::NAN);
        let mask = Mask::new(&Tensor::new(&[[1u8, 0, 7], [0, 1, 0]], &cpu)?)?;
        let inputs =
            Tensor::new(&[[[1., 2.], [nan, nan], [3., 4.]], [[nan, nan], [5., 6.], [nan, nan]]], &cpu)?;
        let numbers = Tensor::new(&[[1u32, 9, 2], [9, 3, 9]], &cpu)?;
        let grads = Tensor::new(&[[[1f64], [nan], [2.]], [[nan], [3.], [nan]]], &cpu)?;
        let record = Record { inputs: Inputs::Rows(inputs), grads, mask: Some(Arc::new(mask)) };
        let rows = record.of_live_rows()?;
        assert_eq!(
            (rows.inputs.rows()?.dims(), values(&rows.inputs.rows()?)?),
            (&[3, 1, 2][..], vec![1., 2., 3., 4., 5., 6.])
        );
        assert_eq!((rows.grads.dims(), values(&rows.grads)?), (&[3, 1, 1][..], vec![1., 2., 3.]));
        assert_eq!(values(&*record.live_grads()?)?, [1., 0., 2., 0., 3., 0.]);
        let (sums, counts) = record.input_sums()?;
        assert_eq!(
            (values(&sums)?, counts.as_ref().map(values).transpose()?),
            (vec![4., 6., 5., 6.], Some(vec![2., 1.]))
        );
        let picked = Record { inputs: Inputs::Indices(numbers), ..record };
        match &picked.of_live_rows()?.inputs {
            Inputs::Indices(numbers) => assert_eq!(numbers.to_vec2::<u32>()?, [[1], [2], [3]]),
            other => panic!("{other:?}"),
        }
        Ok(())
    }
}
