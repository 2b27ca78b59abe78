//! The driver of decompositions on a device: matrices stay there, all that was asked for is queued first, and one small read by the
//! host tells whether it went well. What f32 fails at is done again in f64, as on the host.
use candle_core::{D, DType, Result, Tensor, bail};

use super::host::{Factorize, fitting, to_host};
use crate::gpu::Gpu;

/// A factorization that is under way.
pub(crate) struct Queued<const O: usize> {
    /// `[groups, length]` each.
    pub outputs: [Tensor; O],
    /// `[groups, 4]` f64, the numbers of a [`Verdict`].
    pub verdict: Tensor,
}

/// How one group's factorization went.
pub(crate) struct Verdict {
    /// The largest number of the inputs in size; infinite if one is not finite.
    pub scale: f64,
    /// The library's code, 0 if it found nothing wrong.
    pub code: usize,
    /// By how much a product that should return the probe, the decomposition's vectors say, is off.
    pub drift: f64,
    /// By how much the decomposition applied to the probe is off.
    pub residual: f64,
}

impl Verdict {
    /// The library's code counts arguments from -1 downwards, which are never wrong here.
    fn of(numbers: &[f64]) -> Result<Self> {
        match *numbers {
            [scale, code, drift, residual] => Ok(Self { scale, code: code.abs() as usize, drift, residual }),
            _ => bail!("decomposition: expected a verdict of 4 numbers, got {}", numbers.len()),
        }
    }
}

/// Matrices to factorize, with the name that errors give.
pub(crate) struct Job<'a, const I: usize> {
    pub inputs: [&'a Tensor; I],
    pub name: &'a str,
}

/// [`super::host::by_group`] on a device for several jobs, whose dtypes and sizes may differ. Those of one size run together, and
/// the host reads once for all of them.
pub(crate) fn by_group<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    gpu: &Gpu,
    jobs: &[Job<'_, I>],
) -> Vec<Result<[Tensor; O]>> {
    let mut found: Vec<Option<Result<[Tensor; O]>>> = jobs.iter().map(|_| None).collect();
    let kinds = jobs.iter().zip(&mut found).map(|(job, found)| match fitting(job.inputs, job.name) {
        Ok((groups, dim)) => Some(Kind { groups, dim, dtype: job.inputs[0].dtype(), started: false }),
        Err(error) => {
            *found = Some(Err(error));
            None
        }
    });
    let kinds: Vec<_> = kinds.collect();
    let batches = batches(&kinds);
    let queued: Vec<_> = batches.iter().map(|batch| queue(method, gpu, jobs, batch)).collect();
    let verdicts: Vec<&Tensor> = queued.iter().flatten().map(|queued| &queued.verdict).collect();
    let read = read(&verdicts);
    let mut at = 0;
    for (batch, queued) in batches.iter().zip(&queued) {
        let mut first = 0;
        for &index in batch {
            let (job, groups) = (&jobs[index], kinds[index].map_or(0, |kind| kind.groups));
            let settled = match (queued, &read) {
                (Ok(queued), Ok(read)) => {
                    let parts = queued.outputs.iter().map(|all| all.narrow(0, first, groups));
                    let lines = &read[at..at + groups];
                    at += groups;
                    parts.collect::<Result<Vec<_>>>().and_then(|parts| match parts.try_into() {
                        Ok(outputs) => settle(method, gpu, job, outputs, lines),
                        Err(_) => bail!("{}: expected {O} outputs", job.name),
                    })
                }
                // What goes wrong on a device may show at the read, whoever caused it.
                (Err(error), _) | (_, Err(error)) => {
                    Err(candle_core::Error::Msg(format!("{}: {error}", job.name)))
                }
            };
            found[index] = Some(settled);
            first += groups;
        }
    }
    let missing = |job: &Job<'_, I>| Err(candle_core::Error::Msg(format!("{}: not decomposed", job.name)));
    found.into_iter().zip(jobs).map(|(found, job)| found.unwrap_or_else(|| missing(job))).collect()
}

/// Elements of the matrices that are decomposed together at most, unless one has more.
pub(crate) const BATCH: usize = 1 << 24;

/// What decides which matrices run together.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub groups: usize,
    pub dim: usize,
    pub dtype: DType,
    /// Whether there is something to start from.
    pub started: bool,
}

/// The jobs in batches of matrices of one size and type. Large ones, of which one fills a device, stay alone.
pub(super) fn batches(kinds: &[Option<Kind>]) -> Vec<Vec<usize>> {
    const LARGE: usize = 1024;
    let size = |kind: &Kind| kind.groups * kind.dim * kind.dim;
    let mut batches: Vec<(Kind, usize, Vec<usize>)> = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let Some(kind) = kind else { continue };
        let open = batches.iter_mut().find(|(other, elements, _)| {
            (other.dim, other.dtype, other.started) == (kind.dim, kind.dtype, kind.started)
                && kind.dim <= LARGE
                && elements + size(kind) <= BATCH
        });
        match open {
            Some((_, elements, batch)) => {
                *elements += size(kind);
                batch.push(index);
            }
            None => batches.push((*kind, size(kind), vec![index])),
        }
    }
    batches.into_iter().map(|(_, _, batch)| batch).collect()
}

/// The rows of several tensors `[_, columns]`, in one read.
pub(super) fn read(tensors: &[&Tensor]) -> Result<Vec<Vec<f64>>> {
    if tensors.is_empty() { Ok(vec![]) } else { joined(tensors)?.to_vec2() }
}

/// Tensors joined along their first dimension, contiguous.
pub(super) fn joined(tensors: &[&Tensor]) -> Result<Tensor> {
    match tensors {
        [one] => one.detach().contiguous(),
        several => Tensor::cat(several, 0)?.detach().contiguous(),
    }
}

fn queue<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    gpu: &Gpu,
    jobs: &[Job<'_, I>],
    batch: &[usize],
) -> Result<Queued<O>> {
    let input = |i: usize| joined(&batch.iter().map(|&index| jobs[index].inputs[i]).collect::<Vec<_>>());
    let inputs = (0..I).map(input).collect::<Result<Vec<_>>>()?;
    method.queue(gpu, std::array::from_fn(|i| &inputs[i]))
}

/// The outputs, with those groups done again in f64 that failed in f32.
fn settle<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    gpu: &Gpu,
    job: &Job<'_, I>,
    mut outputs: [Tensor; O],
    verdicts: &[Vec<f64>],
) -> Result<[Tensor; O]> {
    let (dim, dtype, name) = (job.inputs[0].dim(D::Minus1)?, job.inputs[0].dtype(), job.name);
    for (group, numbers) in verdicts.iter().enumerate() {
        let verdict = Verdict::of(numbers)?;
        if !verdict.scale.is_finite() {
            for m in job.inputs {
                // Its error says where the first of them is.
                match dtype {
                    DType::F64 => to_host::<f64>(m, name).map(drop)?,
                    _ => to_host::<f32>(m, name).map(drop)?,
                }
            }
            bail!("{name}: expected finite numbers")
        }
        let Some(reason) = method.reason(&verdict, dim, dtype) else { continue };
        if dtype == DType::F64 {
            bail!("{name}: {reason}")
        }
        tracing::warn!("{name}: {reason} in {dtype:?}, trying again in F64");
        let wide = job.inputs.iter().map(|m| m.narrow(0, group, 1)?.to_dtype(DType::F64)?.contiguous());
        let wide = wide.collect::<Result<Vec<_>>>()?;
        let again = method.queue(gpu, std::array::from_fn(|i| &wide[i]))?;
        for numbers in again.verdict.to_vec2::<f64>()? {
            if let Some(reason) = method.reason(&Verdict::of(&numbers)?, dim, DType::F64) {
                bail!("{name}: {reason} (in F64 too)")
            }
        }
        for (all, part) in outputs.iter_mut().zip(again.outputs) {
            let part = part.to_dtype(dtype)?;
            if !part.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?.is_finite() {
                bail!("{name}: the result overflows {dtype:?}")
            }
            *all = all.slice_assign(&[group..group + 1, 0..part.dim(1)?], &part)?;
        }
    }
    Ok(outputs)
}
