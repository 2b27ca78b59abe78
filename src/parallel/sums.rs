//! Numbers and tensors that all ranks add up, in one message for each element type: everywhere, or where a tensor is owned.

use super::World;
use crate::curvature::wide_dtype;
use crate::ops::element::Host;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What a rank adds, one after the other; read from [`Totals`] in the same order.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    /// For all.
    all: Row,
    /// For each owner, up to the last that has any.
    owned: Vec<Row>,
}

/// Numbers one after the other.
#[derive(Debug, Default)]
struct Row {
    doubles: Vec<f64>,
    singles: Vec<f32>,
}

/// The sums that are for this rank.
#[derive(Debug)]
pub(crate) struct Totals {
    rank: usize,
    all: Read,
    owned: Read,
}

/// Sums of which some have been read.
#[derive(Debug, Default)]
struct Read {
    sums: Row,
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
        self.all.doubles.push(value);
    }

    /// Adds a tensor of this form times a number, or nothing; what has an `owner` is for that rank alone. Whether its elements are finite.
    pub fn tensor(
        &mut self,
        owner: Option<usize>,
        value: Option<&Tensor>,
        form: &Form,
        times: f64,
    ) -> Result<bool> {
        let row = match owner {
            None => &mut self.all,
            Some(owner) => {
                let rows = self.owned.len().max(owner + 1);
                self.owned.resize_with(rows, Row::default);
                &mut self.owned[owner]
            }
        };
        let Some(value) = value else {
            match form.dtype {
                DType::F64 => row.doubles.resize(row.doubles.len() + form.elements(), 0.0),
                _ => row.singles.resize(row.singles.len() + form.elements(), 0.0),
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
            DType::F64 => row.doubles.extend(host.values::<f64>()?.iter().map(|value| {
                finite &= value.is_finite();
                value * times
            })),
            _ => {
                let times = times as f32;
                row.singles.extend(host.values::<f32>()?.iter().map(|value| {
                    finite &= value.is_finite();
                    value * times
                }));
            }
        }
        Ok(finite)
    }

    /// Adds up what all ranks have.
    pub fn over(self, world: &World) -> Result<Totals> {
        let Self { mut all, mut owned } = self;
        owned.resize_with(world.size(), Row::default);
        world.sum_f64(&mut all.doubles)?;
        world.sum_f32(&mut all.singles)?;
        let parts: Vec<usize> = owned.iter().map(|row| row.doubles.len()).collect();
        let doubles = owned.iter_mut().flat_map(|row| std::mem::take(&mut row.doubles)).collect();
        let doubles = world.scatter_sum_f64(doubles, &parts)?;
        let parts: Vec<usize> = owned.iter().map(|row| row.singles.len()).collect();
        let singles = owned.iter_mut().flat_map(|row| std::mem::take(&mut row.singles)).collect();
        let singles = world.scatter_sum_f32(singles, &parts)?;
        let read = |sums| Read { sums, read: (0, 0) };
        Ok(Totals { rank: world.rank(), all: read(all), owned: read(Row { doubles, singles }) })
    }

    /// Bytes that this rank sends: of a sum everywhere twice its share, as an all-reduce does that is made of a reduce-scatter and a gather;
    /// of one where it is owned what others own.
    pub fn bytes(&self, world: &World) -> usize {
        let others = self.owned.iter().enumerate().filter(|(rank, _)| *rank != world.rank());
        2 * self.all.bytes() * (world.size() - 1) / world.size()
            + others.map(|(_, row)| row.bytes()).sum::<usize>()
    }
}

impl Row {
    fn bytes(&self) -> usize {
        8 * self.doubles.len() + 4 * self.singles.len()
    }
}

impl Totals {
    /// The next number.
    pub fn number(&mut self) -> Result<f64> {
        let Read { sums, read } = &mut self.all;
        match sums.doubles.get(read.0) {
            Some(value) => {
                read.0 += 1;
                Ok(*value)
            }
            None => bail!("parallel: fewer numbers were added than are read"),
        }
    }

    /// The next tensor of this owner, divided by a number; none where another rank owns it.
    pub fn tensor(&mut self, owner: Option<usize>, form: &Form, by: f64) -> Result<Option<Tensor>> {
        match owner {
            None => self.all.tensor(form, by).map(Some),
            Some(owner) if owner == self.rank => self.owned.tensor(form, by).map(Some),
            Some(_) => Ok(None),
        }
    }
}

impl Read {
    fn tensor(&mut self, form: &Form, by: f64) -> Result<Tensor> {
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
