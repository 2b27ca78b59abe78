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

/// [`super::host::by_group`] on a device for several jobs, whose dtypes and sizes may differ. The host reads once for all of
/// them.
pub(crate) fn by_group<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    gpu: &Gpu,
    jobs: &[Job<'_, I>],
) -> Vec<Result<[Tensor; O]>> {
    let queued: Vec<_> = jobs.iter().map(|job| queue(method, gpu, job)).collect();
    let verdicts: Vec<&Tensor> = queued.iter().flatten().map(|queued| &queued.verdict).collect();
    let read = || if verdicts.is_empty() { Ok(vec![]) } else { Tensor::cat(&verdicts, 0)?.to_vec2::<f64>() };
    let read = match read() {
        Ok(read) => read,
        // What goes wrong on a device shows here, whoever caused it.
        Err(error) => {
            let message = error.to_string();
            let failed = |job: &Job<'_, I>| Err(candle_core::Error::Msg(format!("{}: {message}", job.name)));
            return jobs.iter().map(failed).collect();
        }
    };
    let mut rest = read.as_slice();
    let settled = jobs.iter().zip(queued).map(|(job, queued)| {
        let queued = queued?;
        let (own, others) = rest.split_at(queued.verdict.dim(0)?);
        rest = others;
        settle(method, gpu, job, queued.outputs, own)
    });
    settled.collect()
}

fn queue<const I: usize, const O: usize>(
    method: &impl Factorize<I, O>,
    gpu: &Gpu,
    job: &Job<'_, I>,
) -> Result<Queued<O>> {
    fitting(job.inputs, job.name)?;
    let inputs = job.inputs.iter().map(|m| m.detach().contiguous()).collect::<Result<Vec<_>>>()?;
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
