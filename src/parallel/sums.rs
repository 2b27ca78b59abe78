//! Numbers and tensors that all ranks add up, in one message for each element type.

use super::World;
use crate::curvature::wide_dtype;
use crate::ops::element::Host;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What a rank adds, one after the other; read from [`Totals`] in the same order.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    doubles: Vec<f64>,
    singles: Vec<f32>,
}

/// The sums.
#[derive(Debug)]
pub(crate) struct Totals {
    sums: Sums,
    /// How many have been read.
    read: (usize, usize),
}

/// The form of a tensor that a rank may not have.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub device: Device,
}

impl Form {
    /// That of the state of a tensor like this.
    pub fn wide(like: &Tensor) -> Self {
        Self { dims: like.dims().to_vec(), dtype: wide_dtype(like.dtype()), device: like.device().clone() }
    }

    fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

impl Sums {
    /// Adds a number.
    pub fn number(&mut self, value: f64) {
        self.doubles.push(value);
    }

    /// Adds a tensor of this form times a number, or nothing. Whether its elements are finite.
    pub fn tensor(&mut self, value: Option<&Tensor>, form: &Form, times: f64) -> Result<bool> {
        let Some(value) = value else {
            match form.dtype {
                DType::F64 => self.doubles.resize(self.doubles.len() + form.elements(), 0.0),
                _ => self.singles.resize(self.singles.len() + form.elements(), 0.0),
            }
            return Ok(true);
        };
        if value.dims() != form.dims {
            bail!("parallel: expected a tensor {:?} to add, got {:?}", form.dims, value.dims())
        }
        let value = value.to_device(&Device::Cpu)?.to_dtype(form.dtype)?;
        let host = Host::of(&value);
        let mut finite = true;
        match form.dtype {
            DType::F64 => self.doubles.extend(host.values::<f64>()?.iter().map(|value| {
                finite &= value.is_finite();
                value * times
            })),
            _ => {
                let times = times as f32;
                self.singles.extend(host.values::<f32>()?.iter().map(|value| {
                    finite &= value.is_finite();
                    value * times
                }));
            }
        }
        Ok(finite)
    }

    /// Adds up what all ranks have.
    pub fn over(mut self, world: &World) -> Result<Totals> {
        world.sum_f64(&mut self.doubles)?;
        world.sum_f32(&mut self.singles)?;
        Ok(Totals { sums: self, read: (0, 0) })
    }

    /// Bytes of the messages.
    pub fn bytes(&self) -> usize {
        8 * self.doubles.len() + 4 * self.singles.len()
    }
}

impl Totals {
    /// The next number.
    pub fn number(&mut self) -> Result<f64> {
        match self.sums.doubles.get(self.read.0) {
            Some(value) => {
                self.read.0 += 1;
                Ok(*value)
            }
            None => bail!("parallel: fewer numbers were added than are read"),
        }
    }

    /// The next tensor, divided by a number.
    pub fn tensor(&mut self, form: &Form, by: f64) -> Result<Tensor> {
        let elements = form.elements();
        let too_few = || candle_core::Error::Msg("parallel: fewer elements were added than are read".into());
        let dims = form.dims.as_slice();
        let sum = match form.dtype {
            DType::F64 => {
                let range = self.read.0..self.read.0 + elements;
                self.read.0 = range.end;
                let values = self.sums.doubles.get(range).ok_or_else(too_few)?;
                Tensor::from_vec(
                    values.iter().map(|value| value / by).collect::<Vec<_>>(),
                    dims,
                    &Device::Cpu,
                )?
            }
            _ => {
                let (by, range) = (by as f32, self.read.1..self.read.1 + elements);
                self.read.1 = range.end;
                let values = self.sums.singles.get(range).ok_or_else(too_few)?;
                Tensor::from_vec(
                    values.iter().map(|value| value / by).collect::<Vec<_>>(),
                    dims,
                    &Device::Cpu,
                )?
            }
        };
        sum.to_device(&form.device)
    }
}
