//! Numbers and tensors that all ranks add up, in one message for each element type: everywhere, or where a tensor is owned. Tensors of a GPU
//! stay there where the engine takes them.

use super::World;
use super::communicator::Transfer;
use crate::curvature::wide_dtype;
use crate::ops::element::Host;
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;
use std::collections::VecDeque;

/// What a rank adds, one after the other; read from [`Totals`] in the same order.
#[derive(Debug)]
pub(crate) struct Sums {
    world: World,
    /// Whether gradients are added up in bfloat16.
    bf16: bool,
    /// For all.
    all: Row,
    /// For each owner, up to the last that has any.
    owned: Vec<Row>,
    /// What stays on its GPU.
    on_gpu: Vec<(Transfer, Tensor)>,
    /// The first tensor that has an element that is not finite.
    not_finite: Option<String>,
    /// Of tensors on a GPU: 0, or NaN where an element is not finite; and whose it is.
    unread: Vec<(Tensor, String)>,
}

/// Numbers one after the other.
#[derive(Debug, Default)]
struct Row {
    doubles: Vec<f64>,
    singles: Vec<f32>,
    halves: Vec<bf16>,
}

/// The sums that are for this rank.
#[derive(Debug)]
pub(crate) struct Totals {
    world: World,
    bf16: bool,
    all: Read,
    owned: Read,
    on_gpu: VecDeque<Tensor>,
}

/// Sums of which some have been read.
#[derive(Debug, Default)]
struct Read {
    sums: Row,
    doubles: usize,
    singles: usize,
    halves: usize,
}

/// How exactly a tensor is added up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// In f32 or f64.
    Exact,
    /// In bfloat16, where gradients are.
    Gradient,
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

    /// In which element type it is added up.
    fn sent(&self, what: Kind, bf16: bool) -> DType {
        match (what, self.dtype) {
            (Kind::Gradient, _) if bf16 => DType::BF16,
            (Kind::Gradient | Kind::Exact, DType::F64) => DType::F64,
            (Kind::Gradient | Kind::Exact, _) => DType::F32,
        }
    }
}

impl Sums {
    /// Of the ranks of `world`; `bf16`: gradients in bfloat16.
    pub fn new(world: &World, bf16: bool) -> Self {
        Self {
            world: world.clone(),
            bf16,
            all: Row::default(),
            owned: vec![],
            on_gpu: vec![],
            not_finite: None,
            unread: vec![],
        }
    }

    /// Adds a number.
    pub fn number(&mut self, value: f64) {
        self.all.doubles.push(value);
    }

    /// Adds a tensor of this form times a number, or nothing; what has an `owner` is for that rank alone. `name` says whose it is, where an
    /// element is not finite.
    pub fn tensor(
        &mut self,
        what: Kind,
        owner: Option<usize>,
        value: Option<&Tensor>,
        form: &Form,
        times: f64,
        name: impl FnOnce() -> String,
    ) -> Result<()> {
        let dtype = form.sent(what, self.bf16);
        if let Some(value) = value
            && value.dims() != form.dims
        {
            bail!("parallel: expected a tensor {:?} to add, got {:?}", form.dims, value.dims())
        }
        if self.world.takes(&form.device) {
            let transfer = owner.map_or(Transfer::Sum, Transfer::SumAt);
            let Some(value) = value else {
                let zeros = Tensor::zeros(form.dims.as_slice(), dtype, &form.device)?;
                self.on_gpu.push((transfer, zeros));
                return Ok(());
            };
            let value = value.to_device(&form.device)?.to_dtype(form.dtype)?;
            // In memory of its own.
            let value = value.affine(times, 0.0)?.to_dtype(dtype)?;
            self.unread.push((value.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F32)?, name()));
            self.on_gpu.push((transfer, value));
            return Ok(());
        }
        let row = match owner {
            None => &mut self.all,
            Some(owner) => {
                let rows = self.owned.len().max(owner + 1);
                self.owned.resize_with(rows, Row::default);
                &mut self.owned[owner]
            }
        };
        if !row.add(dtype, value, form, times)? && self.not_finite.is_none() {
            self.not_finite = Some(name());
        }
        Ok(())
    }

    /// The first of the tensors added so far that has an element that is not finite. One wait for a GPU.
    pub fn not_finite(&mut self) -> Result<Option<String>> {
        let (flags, names): (Vec<Tensor>, Vec<String>) = std::mem::take(&mut self.unread).into_iter().unzip();
        if !flags.is_empty() && self.not_finite.is_none() {
            let flags = Tensor::stack(&flags, 0)?.to_vec1::<f32>()?;
            let wrong = flags.iter().zip(names).find(|(flag, _)| !flag.is_finite());
            self.not_finite = wrong.map(|(_, name)| name);
        }
        Ok(self.not_finite.clone())
    }

    /// Adds up what all ranks have.
    pub fn over(self) -> Result<Totals> {
        let Self { world, bf16, mut all, mut owned, on_gpu, .. } = self;
        owned.resize_with(world.size(), Row::default);
        world.sum_f64(&mut all.doubles)?;
        world.sum_f32(&mut all.singles)?;
        world.sum_bf16(&mut all.halves)?;
        let (values, parts) = joined(&mut owned, |row| std::mem::take(&mut row.doubles));
        let doubles = world.scatter_sum_f64(values, &parts)?;
        let (values, parts) = joined(&mut owned, |row| std::mem::take(&mut row.singles));
        let singles = world.scatter_sum_f32(values, &parts)?;
        let (values, parts) = joined(&mut owned, |row| std::mem::take(&mut row.halves));
        let halves = world.scatter_sum_bf16(values, &parts)?;
        let on_gpu = world.transfer(on_gpu)?.into();
        let read = |sums| Read { sums, ..Read::default() };
        Ok(Totals { world, bf16, all: read(all), owned: read(Row { doubles, singles, halves }), on_gpu })
    }

    /// Bytes that this rank sends: of a sum everywhere twice its share, as an all-reduce does that is made of a reduce-scatter and a gather;
    /// of one where it is owned what others own.
    pub fn bytes(&self) -> usize {
        let (rank, size) = (self.world.rank(), self.world.size());
        let others = self.owned.iter().enumerate().filter(|(owner, _)| *owner != rank);
        let (mut all, mut owned) = (self.all.bytes(), others.map(|(_, row)| row.bytes()).sum::<usize>());
        for (what, tensor) in &self.on_gpu {
            let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
            match what {
                Transfer::Sum => all += bytes,
                Transfer::SumAt(owner) if *owner != rank => owned += bytes,
                Transfer::SumAt(_) | Transfer::From(_) => {}
            }
        }
        2 * all * (size - 1) / size + owned
    }
}

/// What each row has, one after the other, and how much of each that is.
fn joined<T>(rows: &mut [Row], take: impl Fn(&mut Row) -> Vec<T>) -> (Vec<T>, Vec<usize>) {
    let taken: Vec<Vec<T>> = rows.iter_mut().map(take).collect();
    let parts = taken.iter().map(Vec::len).collect();
    (taken.into_iter().flatten().collect(), parts)
}

impl Row {
    fn bytes(&self) -> usize {
        8 * self.doubles.len() + 4 * self.singles.len() + 2 * self.halves.len()
    }

    /// Adds a tensor times a number, or nothing, in this element type. Whether the elements are finite.
    fn add(&mut self, dtype: DType, value: Option<&Tensor>, form: &Form, times: f64) -> Result<bool> {
        let elements = form.elements();
        let Some(value) = value else {
            match dtype {
                DType::F64 => self.doubles.resize(self.doubles.len() + elements, 0.0),
                DType::BF16 => self.halves.resize(self.halves.len() + elements, bf16::ZERO),
                _ => self.singles.resize(self.singles.len() + elements, 0.0),
            }
            return Ok(true);
        };
        let value = value.to_device(&Device::Cpu)?;
        let mut finite = true;
        if dtype == DType::F64 {
            let value = value.to_dtype(DType::F64)?;
            self.doubles.extend(Host::of(&value).values::<f64>()?.iter().map(|value| {
                finite &= value.is_finite();
                value * times
            }));
            return Ok(finite);
        }
        let (value, times) = (value.to_dtype(DType::F32)?, times as f32);
        let host = Host::of(&value);
        let values = host.values::<f32>()?;
        match dtype {
            DType::BF16 => self.halves.extend(values.iter().map(|value| {
                finite &= value.is_finite();
                bf16::from_f32(value * times)
            })),
            _ => self.singles.extend(values.iter().map(|value| {
                finite &= value.is_finite();
                value * times
            })),
        }
        Ok(finite)
    }
}

impl Totals {
    /// The next number.
    pub fn number(&mut self) -> Result<f64> {
        let Read { sums, doubles, .. } = &mut self.all;
        match sums.doubles.get(*doubles) {
            Some(value) => {
                *doubles += 1;
                Ok(*value)
            }
            None => bail!("parallel: fewer numbers were added than are read"),
        }
    }

    /// The next tensor of this owner, divided by a number; none where another rank owns it.
    pub fn tensor(
        &mut self,
        what: Kind,
        owner: Option<usize>,
        form: &Form,
        by: f64,
    ) -> Result<Option<Tensor>> {
        let dtype = form.sent(what, self.bf16);
        let own = owner.is_none_or(|owner| owner == self.world.rank());
        if self.world.takes(&form.device) {
            let Some(sum) = self.on_gpu.pop_front() else { return Err(too_few()) };
            return match own {
                true => sum.to_dtype(form.dtype)?.affine(1.0 / by, 0.0).map(Some),
                false => Ok(None),
            };
        }
        match (own, owner) {
            (false, _) => Ok(None),
            (true, None) => self.all.next(dtype, form, by).map(Some),
            (true, Some(_)) => self.owned.next(dtype, form, by).map(Some),
        }
    }
}

fn too_few() -> candle_core::Error {
    candle_core::Error::Msg("parallel: fewer elements were added than are read".into())
}

impl Read {
    fn next(&mut self, dtype: DType, form: &Form, by: f64) -> Result<Tensor> {
        let (elements, dims) = (form.elements(), form.dims.as_slice());
        let sum = match dtype {
            DType::F64 => {
                let values = part(&self.sums.doubles, &mut self.doubles, elements)?;
                Tensor::from_vec(values.iter().map(|value| value / by).collect(), dims, &Device::Cpu)?
            }
            DType::BF16 => {
                let values = part(&self.sums.halves, &mut self.halves, elements)?;
                let wide: Vec<f64> = values.iter().map(|value| value.to_f64() / by).collect();
                Tensor::from_vec(wide, dims, &Device::Cpu)?.to_dtype(form.dtype)?
            }
            _ => {
                let (values, by) = (part(&self.sums.singles, &mut self.singles, elements)?, by as f32);
                Tensor::from_vec(values.iter().map(|value| value / by).collect(), dims, &Device::Cpu)?
            }
        };
        sum.to_device(&form.device)
    }
}

/// The next elements of a row of sums.
fn part<'a, T>(values: &'a [T], read: &mut usize, elements: usize) -> Result<&'a [T]> {
    let range = *read..*read + elements;
    *read = range.end;
    values.get(range).ok_or_else(too_few)
}
