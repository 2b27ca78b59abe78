//! Inverses by Newton's iteration: matrix products alone, on the device of the matrix, from an earlier inverse.
//!
//! For devices that multiply fast. On a CPU the Cholesky inverse costs less than three of these updates.
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::device::{Kind, batches, joined, read};
use super::host::square;
use super::newton_run::{Report, Run, State};
use super::symmetric;
use crate::gpu::Gpu;

/// When Newton's iteration stops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NewtonOptions {
    /// Iterations, of two products each, after which it gives up. Default 50: a start from scratch takes about
    /// `log2(condition number) + log2(d) / 2 + 5`.
    pub max_iterations: usize,
    /// The residual [`Newton::residual`] at which the next update is the last. Default 3e-3 in f32 (1e-5 after that
    /// update), 1e-6 in f64 (1e-12).
    pub tolerance: f64,
}

impl NewtonOptions {
    /// The defaults for matrices of `dtype`.
    pub fn new(dtype: DType) -> Self {
        Self { max_iterations: 50, tolerance: if dtype == DType::F64 { 1e-6 } else { 3e-3 } }
    }
}

/// An inverse by Newton's iteration.
#[derive(Clone, Debug)]
pub struct Newton {
    /// `[g, d, d]`, exactly symmetric.
    pub inverse: Tensor,
    /// Updates done.
    pub iterations: usize,
    /// `||I - m X||_F / sqrt(d)` before the last update, the largest of the groups. The update squares `I - m X`, up
    /// to rounding.
    pub residual: f64,
}

/// The inverse of positive definite `m` `[g, d, d]` (f32 or f64) by `X <- X + X (I - m X)`.
///
/// The residual `I - m X` is squared by each update (Schulz, 1933), so a start near the inverse, such as that of the
/// previous refresh, converges in two to four. `start` `[g, d, d]`, symmetric, is used in those groups where it is
/// proven to contract, `||I - m X||_F < 1` or `||(I - m X)^2||_F < 1`; elsewhere, and without a start, the iteration
/// begins at `I / ||m||_inf`, which contracts for each positive definite `m`. In f32 it serves condition numbers up to about
/// 1e5. On a CUDA device all decisions are made there, and the host looks once after the updates that are usually enough;
/// on others each update copies one number a group to the host.
///
/// # Errors
/// If `m` is not square, f32 or f64 and finite, if `start` differs in shape or dtype, or if the residual stays above
/// the tolerance: `m` is not positive definite, or too ill-conditioned for its dtype.
pub fn newton_inverse(
    m: &Tensor,
    start: Option<&Tensor>,
    options: NewtonOptions,
    name: &str,
) -> Result<Newton> {
    newton_with(&[NewtonJob { m, start, name }], |_| options).remove(0)
}

/// A matrix to invert; see [`newton_inverse`] for the fields.
#[derive(Clone, Copy)]
pub(crate) struct NewtonJob<'a> {
    pub m: &'a Tensor,
    pub start: Option<&'a Tensor>,
    pub name: &'a str,
}

/// [`newton_inverse`] of several tensors of one device with the default options. On a CUDA device the host waits for all of them
/// together.
pub(crate) fn newton_all(jobs: &[NewtonJob<'_>]) -> Vec<Result<Newton>> {
    newton_with(jobs, |job| NewtonOptions::new(job.m.dtype()))
}

fn newton_with(
    jobs: &[NewtonJob<'_>],
    options: impl Fn(&NewtonJob<'_>) -> NewtonOptions + Sync,
) -> Vec<Result<Newton>> {
    match jobs.first().and_then(|job| Gpu::of(job.m.device())) {
        Some(gpu) => on_device(&gpu, jobs, options),
        // Of a device without kernels of this crate, one at a time: its streams may belong to threads.
        None if jobs.iter().any(|job| !job.m.device().is_cpu()) => {
            jobs.iter().map(|job| on_host(job, options(job))).collect()
        }
        None => jobs.par_iter().map(|job| on_host(job, options(job))).collect(),
    }
}

fn check(job: &NewtonJob<'_>) -> Result<(usize, usize)> {
    let NewtonJob { m, start, name } = *job;
    let shape = square(m, name)?;
    if let Some(start) = start
        && (start.dims() != m.dims() || start.dtype() != m.dtype())
    {
        bail!(
            "{name}: expected a start like the matrix, {:?} {:?}, got {:?} {:?}",
            m.dtype(),
            m.dims(),
            start.dtype(),
            start.dims()
        )
    }
    Ok(shape)
}

fn on_device(
    gpu: &Gpu,
    jobs: &[NewtonJob<'_>],
    options: impl Fn(&NewtonJob<'_>) -> NewtonOptions,
) -> Vec<Result<Newton>> {
    // A start from the last refresh takes two to four updates.
    const WARM: usize = 5;
    const COLD: usize = 12;
    let mut found: Vec<Option<Result<Newton>>> = jobs.iter().map(|_| None).collect();
    let kinds = jobs.iter().zip(&mut found).map(|(job, found)| match check(job) {
        Ok((groups, dim)) => Some(Kind { groups, dim, dtype: job.m.dtype(), started: job.start.is_some() }),
        Err(error) => {
            *found = Some(Err(error));
            None
        }
    });
    let kinds: Vec<_> = kinds.collect();
    let batches = batches(&kinds);
    let begin = |batch: &Vec<usize>| -> Result<Run> {
        let m = joined(&batch.iter().map(|&index| jobs[index].m).collect::<Vec<_>>())?;
        let starts: Vec<&Tensor> = batch.iter().filter_map(|&index| jobs[index].start).collect();
        let start = if starts.is_empty() { None } else { Some(joined(&starts)?) };
        let mut run = Run::new(gpu, &m, start.as_ref())?;
        let options = options(&jobs[batch[0]]);
        for _ in 0..options.max_iterations.min(if start.is_some() { WARM } else { COLD }) {
            run.advance(options.tolerance)?;
        }
        Ok(run)
    };
    let mut runs: Vec<Result<Run>> = batches.iter().map(begin).collect();
    let reports: Vec<&Tensor> = runs.iter().flatten().map(|run| &run.report).collect();
    let lines = read(&reports);
    let mut at = 0;
    for (batch, run) in batches.iter().zip(&mut runs) {
        let outcome = match (run, &lines) {
            (Ok(run), Ok(lines)) => {
                let count =
                    batch.iter().filter_map(|&index| kinds[index]).map(|kind| kind.groups).sum::<usize>();
                at += count;
                finish(run, &lines[at - count..at], options(&jobs[batch[0]]))
            }
            // What goes wrong on a device may show at the read, whoever caused it.
            (Err(error), _) => Err(candle_core::Error::Msg(error.to_string())),
            (_, Err(error)) => Err(candle_core::Error::Msg(error.to_string())),
        };
        let mut first = 0;
        for &index in batch {
            let (job, groups) = (&jobs[index], kinds[index].map_or(0, |kind| kind.groups));
            found[index] = Some(match &outcome {
                Ok((inverse, reports)) => {
                    let own = &reports[first..first + groups];
                    inverse
                        .narrow(0, first, groups)
                        .and_then(|inverse| judged(job, inverse, own, options(job)))
                }
                Err(error) => Err(candle_core::Error::Msg(format!("{}: {error}", job.name))),
            });
            first += groups;
        }
    }
    let missing = |job: &NewtonJob<'_>| Err(candle_core::Error::Msg(format!("{}: not inverted", job.name)));
    found.into_iter().zip(jobs).map(|(found, job)| found.unwrap_or_else(|| missing(job))).collect()
}

/// Goes on until no group runs or the updates are used up; the inverses and how each group ended.
fn finish(run: &mut Run, lines: &[Vec<f64>], options: NewtonOptions) -> Result<(Tensor, Vec<Report>)> {
    /// Updates between two looks at what still runs.
    const MORE: usize = 6;
    let mut reports = lines.iter().map(|line| Report::of(line)).collect::<Result<Vec<_>>>()?;
    loop {
        let left = options.max_iterations - updates(&reports).min(options.max_iterations);
        if left == 0 || reports.iter().all(|report| report.state != State::Running) {
            return Ok((run.inverse()?, reports));
        }
        for _ in 0..MORE.min(left) {
            run.advance(options.tolerance)?;
        }
        reports = read(&[&run.report])?.iter().map(|line| Report::of(line)).collect::<Result<_>>()?;
    }
}

fn updates(reports: &[Report]) -> usize {
    reports.iter().map(|report| report.updates).max().unwrap_or(0)
}

/// The inverse, if all its groups are done.
fn judged(
    job: &NewtonJob<'_>,
    inverse: Tensor,
    reports: &[Report],
    options: NewtonOptions,
) -> Result<Newton> {
    if reports.iter().any(|report| report.state == State::Unusable) {
        let eye = Tensor::eye(job.m.dim(1)?, job.m.dtype(), job.m.device())?.unsqueeze(0)?;
        // Its error says what is wrong.
        safe_start(job.m, &eye, job.name)?;
        bail!("{}: expected numbers whose reciprocals {:?} can hold", job.name, job.m.dtype())
    }
    if let Some(report) = reports.iter().find(|report| report.state == State::Failed) {
        return Err(broke_off(job, report.updates, report.residual, options));
    }
    let residual = reports.iter().map(|report| report.residual).fold(0.0, max_or_nan);
    let iterations = updates(reports);
    if reports.iter().all(|report| report.state == State::Done) {
        return Ok(Newton { inverse, iterations, residual });
    }
    Err(unconverged(job, residual, options))
}

fn broke_off(job: &NewtonJob<'_>, done: usize, residual: f64, options: NewtonOptions) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{}: Newton's inverse broke off after {done} iterations at residual {residual:.1e}, expected at most \
         {:.1e}; is the matrix positive definite and well-conditioned for {:?}?",
        job.name,
        options.tolerance,
        job.m.dtype()
    ))
}

fn unconverged(job: &NewtonJob<'_>, residual: f64, options: NewtonOptions) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{}: Newton's inverse did not converge in {} iterations: residual {residual:.1e}, expected at most {:.1e}",
        job.name, options.max_iterations, options.tolerance
    ))
}

fn on_host(job: &NewtonJob<'_>, options: NewtonOptions) -> Result<Newton> {
    let NewtonJob { m, start, name } = *job;
    let (groups, dim) = check(job)?;
    let m = m.contiguous()?;
    let eye = Tensor::eye(dim, m.dtype(), m.device())?.unsqueeze(0)?;
    let mut x = safe_start(&m, &eye, name)?;
    if let Some(start) = start {
        let start = start.contiguous()?;
        let contracts = contracts(&eye.broadcast_sub(&m.matmul(&start)?)?)?;
        let mask = Tensor::from_vec(contracts, (groups, 1, 1), m.device())?;
        x = mask.broadcast_as(m.dims())?.where_cond(&start, &x)?;
    }
    let root = (dim as f64).sqrt();
    let mut residual = f64::NAN;
    for done in 0..options.max_iterations {
        let r = eye.broadcast_sub(&m.matmul(&x)?)?;
        let last = std::mem::replace(&mut residual, norms(&r)?.into_iter().fold(0.0, max_or_nan) / root);
        // A small residual is squared: where it stays, only rounding is left. A large one grows only if an eigenvalue
        // is not positive.
        let stalled = last < 0.1 && residual > options.tolerance.max(0.5 * last);
        if stalled || residual.is_nan() || residual > 1e3 {
            return Err(broke_off(job, done, residual, options));
        }
        x = (&x + x.matmul(&r)?)?;
        if residual <= options.tolerance {
            let inverse = symmetric(&x)?;
            return Ok(Newton { inverse, iterations: done + 1, residual });
        }
    }
    Err(unconverged(job, residual, options))
}

/// `I / ||m||_inf` for each group.
fn safe_start(m: &Tensor, eye: &Tensor, name: &str) -> Result<Tensor> {
    let sums = m.abs()?.sum(2)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let scales: Vec<f64> = sums.iter().map(|rows| 1.0 / rows.iter().copied().fold(0.0, max_or_nan)).collect();
    if let Some(scale) = scales.iter().find(|s| !s.is_finite() || **s == 0.0) {
        bail!("{name}: expected finite numbers, not all zero, got a largest row sum of {:e}", 1.0 / scale)
    }
    let scales = Tensor::from_vec(scales, (m.dim(0)?, 1, 1), m.device())?.to_dtype(m.dtype())?;
    eye.broadcast_mul(&scales)?.contiguous()
}

/// For each group, 1 where the spectral radius of `r` is proven below 1.
fn contracts(r: &Tensor) -> Result<Vec<u8>> {
    let first = norms(r)?;
    if first.iter().all(|n| *n < 1.0) {
        return Ok(vec![1; first.len()]);
    }
    let second = norms(&r.matmul(r)?)?;
    Ok(first.iter().zip(second).map(|(one, two)| u8::from(*one < 1.0 || two < 1.0)).collect())
}

/// The Frobenius norm of each group.
fn norms(r: &Tensor) -> Result<Vec<f64>> {
    r.sqr()?.sum((1, 2))?.to_dtype(DType::F64)?.sqrt()?.to_vec1::<f64>()
}

/// The larger number, or NaN if one is.
fn max_or_nan(a: f64, b: f64) -> f64 {
    if a >= b || a.is_nan() { a } else { b }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::cholesky::inverse_spd;
    use crate::linalg::testing::{here_and_on_a_device, max_abs, random_symmetric, spd};

    /// Largest entry of `x - inverse(m)`, relative to the largest of the inverse.
    fn error(x: &Tensor, m: &Tensor) -> Result<f64> {
        let exact = inverse_spd(&m.to_dtype(DType::F64)?, "m")?;
        Ok(max_abs(&(x.to_dtype(DType::F64)? - &exact)?)? / max_abs(&exact)?)
    }

    #[test]
    fn from_scratch() -> Result<()> {
        here_and_on_a_device(|| {
            for (dtype, condition, tolerance) in [
                (DType::F32, 1e2, 1e-4),
                (DType::F32, 1e4, 5e-3),
                (DType::F64, 1e2, 1e-11),
                (DType::F64, 1e8, 1e-7),
            ] {
                for (g, d, scale) in [(1, 1, 1.0), (3, 2, 1e-8), (2, 5, 1e6), (1, 26, 1.0), (2, 126, 1e-3)] {
                    let m = (spd(g, d, condition, 5)? * scale)?.to_dtype(dtype)?;
                    let found = newton_inverse(&m, None, NewtonOptions::new(dtype), "m")?;
                    assert!(error(&found.inverse, &m)? < tolerance, "{dtype:?} {condition} {d} {found:?}");
                    assert_eq!(max_abs(&(&found.inverse - found.inverse.transpose(1, 2)?)?)?, 0.0);
                    assert!((found.iterations as f64) < condition.log2() + 10.0);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn a_near_start_saves_iterations_and_a_far_one_does_no_harm() -> Result<()> {
        here_and_on_a_device(|| {
            let options = NewtonOptions::new(DType::F64);
            let m = spd(3, 40, 1e3, 5)?;
            let scratch = newton_inverse(&m, None, options, "m")?;
            // Relative to m, each changes by at most 5 %: an exponential average of decay 0.95.
            let moved = ((&m * 0.95)? + (spd(3, 40, 1.0, 9)? * 1e-5)?)?;
            let warm = newton_inverse(&moved, Some(&scratch.inverse), options, "m")?;
            assert!(warm.iterations <= 4, "{warm:?}");
            assert!(error(&warm.inverse, &moved)? < 1e-10);
            // Only the second group's start is useless.
            let parts = [
                scratch.inverse.narrow(0, 0, 1)?,
                scratch.inverse.narrow(0, 1, 1)?.neg()?,
                scratch.inverse.narrow(0, 2, 1)?,
            ];
            let far = newton_inverse(&m, Some(&Tensor::cat(&parts, 0)?), options, "m")?;
            assert!(error(&far.inverse, &m)? < 1e-10 && far.iterations <= scratch.iterations);
            let broken = (&scratch.inverse * f64::NAN)?;
            assert!(error(&newton_inverse(&m, Some(&broken), options, "m")?.inverse, &m)? < 1e-10);
            Ok(())
        })
    }

    #[test]
    fn refuses() -> Result<()> {
        here_and_on_a_device(|| {
            let options = NewtonOptions::new(DType::F64);
            let few = NewtonOptions { max_iterations: 3, ..options };
            let good = spd(1, 4, 1e3, 5)?;
            let narrow = good.to_dtype(DType::F32)?;
            let ill = spd(1, 20, 1e9, 5)?.to_dtype(DType::F32)?;
            for (m, start, options, part) in [
                (&random_symmetric(1, 6, 1)?, None, options, "residual"),
                (&good, None, few, "3 iterations"),
                (&ill, None, NewtonOptions::new(DType::F32), "well-conditioned"),
                (&(&good * 0.0)?, None, options, "zero"),
                (&(&good * f64::NAN)?, None, options, "NaN"),
                (&good.narrow(1, 0, 2)?, None, options, "square"),
                (&good, Some(&narrow), options, "start"),
                (&Tensor::zeros((1, 2, 2), DType::BF16, &Device::Cpu)?, None, options, "BF16"),
            ] {
                let message = newton_inverse(m, start, options, "fc2").expect_err("must fail").to_string();
                assert!(message.contains("fc2") && message.contains(part), "{message}");
            }
            Ok(())
        })
    }
}
