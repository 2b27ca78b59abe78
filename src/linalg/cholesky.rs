//! Cholesky factors and the inverses of symmetric positive definite matrices.
use candle_core::{DType, Result, Tensor, WithDType};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::default;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::device::{self, Job, Queued, Verdict};
use super::host::{
    Factorize, Real, by_group, distance, lower_by_columns, lower_times, probe, square, transposed,
};
use super::kron::diagonal;
use super::solver::Solver;
use super::spd::{Evidence, SMALL, Spd};
use crate::gpu::Gpu;
use crate::ops::symmetric::mirror_lower;

/// The lower triangular `L` with `m = L L^T`, zero above the diagonal, of positive definite `m` `[g, d, d]`.
///
/// Only the lower triangle of `m` is read. What fails in f32 is repeated in f64 and cast back, with a warning that
/// names `name`.
///
/// # Errors
/// If `m` is not square, not f32 or f64, not finite, or not positive definite; the last names the pivot.
pub fn cholesky(m: &Tensor, name: &str) -> Result<Tensor> {
    let (groups, dim) = square(m, name)?;
    let [lower] = by_group(&Cholesky, [m], name)?;
    lower.reshape((groups, dim, dim))
}

/// The inverse of positive definite `m` `[g, d, d]`, exactly symmetric, through its Cholesky factor.
///
/// Only the lower triangle of `m` is read. The result is applied to `m` times one vector: where that is off by more
/// than 1 %, f32 is given up for f64, as for matrices that are indefinite by f32 rounding, with a warning that names
/// `name`.
///
/// # Errors
/// As [`cholesky`], and if the inverse is off by more than 1 % in f64.
pub fn inverse_spd(m: &Tensor, name: &str) -> Result<Tensor> {
    let (groups, dim) = square(m, name)?;
    let [inverse] = by_group(&Inverse, [m], name)?;
    inverse.reshape((groups, dim, dim))
}

/// [`inverse_spd`] of several tensors. On a CUDA device the host waits for all of them once.
pub(crate) fn inverse_spd_all(jobs: &[(&Tensor, &str)]) -> Vec<Result<Tensor>> {
    let gpu = jobs.first().and_then(|(m, _)| Gpu::of(m.device()));
    let Some(gpu) = gpu else { return jobs.par_iter().map(|(m, name)| inverse_spd(m, name)).collect() };
    let queue: Vec<_> = jobs.iter().map(|&(m, name)| Job { inputs: [m], name }).collect();
    let found = device::by_group(&Inverse, &gpu, &queue).into_iter().zip(jobs);
    found.map(|(found, (m, _))| found.and_then(|[inverse]| inverse.reshape(m.shape()))).collect()
}

/// What of a symmetric inverse is wanted; on the CPU the rest costs something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// What is on and below the diagonal; above it are finite numbers that mean nothing.
    Lower,
    /// All of it, exactly symmetric.
    Both,
}

/// `log det m` and a `half` of the inverse of positive definite `m` `[d, d]`, as [`inverse_spd`], through one Cholesky factor.
pub(crate) fn log_det_inverse(m: &Tensor, half: Half, name: &str) -> Result<(f64, Tensor)> {
    let m = m.unsqueeze(0)?;
    square(&m, name)?;
    let [inverse, pivots] = by_group(&LogDetInverse(half), [&m], name)?;
    let pivots = pivots.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    Ok((
        2.0 * pivots.iter().map(|l| l.ln()).sum::<f64>(),
        inverse.reshape(m.dims3().map(|(_, d, _)| (d, d))?)?,
    ))
}

struct Cholesky;

impl Factorize<1, 1> for Cholesky {
    fn factorize<T: Real>(
        &self,
        [m]: [&[T]; 1],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; 1], String> {
        let mut lower = transposed(&lower_factor(m, dim, par)?, dim);
        for (i, row) in lower.chunks_exact_mut(dim).enumerate() {
            row[i + 1..].fill(<T as WithDType>::from_f64(0.0));
        }
        Ok([lower])
    }

    fn queue(&self, gpu: &Gpu, [m]: [&Tensor; 1]) -> Result<Queued<1>> {
        let m = Spd::new(gpu, m)?;
        let (factor, info) = Solver::of(gpu)?.cholesky(m.mirrored(None, false)?)?;
        let lower = Spd::new(gpu, &factor)?.mirrored(None, true)?;
        // Only that it is finite counts.
        let factor = Spd::new(gpu, &lower)?;
        let q = factor.times(Some(&factor.turned(None, None)?), None)?;
        let evidence = Evidence { info: [Some(&info), None], q: Some(&q), ..Evidence::default() };
        let verdict = factor.verdict(&m.scale()?, &evidence)?;
        Ok(Queued { outputs: [lower.flatten_from(1)?], verdict })
    }

    fn reason(&self, verdict: &Verdict, dim: usize, _: DType) -> Option<String> {
        match verdict.code {
            0 if verdict.residual.is_finite() => None,
            0 => Some("the result is not finite".into()),
            code => Some(no_pivot(code - 1, dim)),
        }
    }
}

struct Inverse;

impl Factorize<1, 1> for Inverse {
    fn factorize<T: Real>(
        &self,
        inputs: [&[T]; 1],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; 1], String> {
        LogDetInverse(Half::Both).factorize(inputs, dim, par).map(|[inverse, _]| [inverse])
    }

    fn queue(&self, gpu: &Gpu, [m]: [&Tensor; 1]) -> Result<Queued<1>> {
        if m.dim(1)? > SMALL {
            let Queued { outputs: [inverse, _], verdict } = LogDetInverse(Half::Both).queue(gpu, [m])?;
            return Ok(Queued { outputs: [inverse], verdict });
        }
        let given = Spd::new(gpu, m)?;
        let (inverse, info) = given.small_inverse()?;
        let verdict = inverse_verdict(gpu, &given, &inverse, [Some(&info), None])?;
        Ok(Queued { outputs: [inverse.flatten_from(1)?], verdict })
    }

    fn reason(&self, verdict: &Verdict, dim: usize, dtype: DType) -> Option<String> {
        LogDetInverse(Half::Both).reason(verdict, dim, dtype)
    }
}

/// The inverse, and the diagonal of the Cholesky factor.
struct LogDetInverse(Half);

impl Factorize<1, 2> for LogDetInverse {
    fn factorize<T: Real>(
        &self,
        [m]: [&[T]; 1],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; 2], String> {
        let mut factor = lower_factor(m, dim, par)?;
        let pivots = factor.iter().step_by(dim + 1).copied().collect();
        let mut inverse_factor = vec![<T as WithDType>::from_f64(0.0); dim * dim];
        invert_lower_triangular(
            MatMut::from_column_major_slice_mut(&mut inverse_factor, dim, dim),
            MatRef::from_column_major_slice(&factor, dim, dim),
            par,
        );
        // The factor has served: its place is the result's, by rows, where what it had below the diagonal is above.
        let inverse_factor = MatRef::from_column_major_slice(&inverse_factor, dim, dim);
        triangular_matmul(
            MatMut::from_row_major_slice_mut(&mut factor, dim, dim),
            BlockStructure::TriangularLower,
            Accum::Replace,
            inverse_factor.transpose(),
            BlockStructure::TriangularUpper,
            inverse_factor,
            BlockStructure::TriangularLower,
            <T as WithDType>::from_f64(1.0),
            par,
        );
        let mut result = factor;
        if self.0 == Half::Both {
            mirror_lower(&mut result, dim, dim);
        }
        let z = probe(dim);
        let off = distance(&lower_times(m, &lower_times(&result, &z)), &z, (dim as f64).sqrt());
        if off <= TOLERANCE { Ok([result, pivots]) } else { Err(inexact(off)) }
    }

    fn queue(&self, gpu: &Gpu, [m]: [&Tensor; 1]) -> Result<Queued<2>> {
        let given = Spd::new(gpu, m)?;
        let solver = Solver::of(gpu)?;
        let (factor, info) = solver.cholesky(given.mirrored(None, false)?)?;
        let pivots = diagonal(&factor)?.copy()?;
        let (lower, later) = solver.inverse(factor)?;
        let inverse = Spd::new(gpu, &lower)?.mirrored(None, false)?;
        let verdict = inverse_verdict(gpu, &given, &inverse, [Some(&info), Some(&later)])?;
        Ok(Queued { outputs: [inverse.flatten_from(1)?, pivots], verdict })
    }

    fn reason(&self, verdict: &Verdict, dim: usize, _: DType) -> Option<String> {
        match verdict.code {
            0 if verdict.drift <= TOLERANCE => None,
            0 => Some(inexact(verdict.drift)),
            code => Some(no_pivot(code - 1, dim)),
        }
    }
}

/// How far `inverse` times the matrix is from 1.
fn inverse_verdict(gpu: &Gpu, given: &Spd, inverse: &Tensor, info: [Option<&Tensor>; 2]) -> Result<Tensor> {
    let full = given.mirrored(None, false)?;
    let full = Spd::new(gpu, &full)?;
    let once = Spd::new(gpu, inverse)?.times(None, None)?;
    let p = full.times(Some(&once), None)?;
    full.verdict(&given.scale()?, &Evidence { info, p: Some(&p), ..Evidence::default() })
}

/// How far an inverse times the matrix may be from 1.
const TOLERANCE: f64 = 0.01;

fn inexact(off: f64) -> String {
    format!("the inverse is off by {off:.1e}: ill-conditioned")
}

pub(super) fn no_pivot(index: usize, dim: usize) -> String {
    format!("expected a positive definite matrix, but pivot {index} of {dim} is not positive")
}

/// The Cholesky factor in column-major order, with leftovers of `m` above the diagonal.
pub(crate) fn lower_factor<T: Real>(m: &[T], dim: usize, par: Par) -> std::result::Result<Vec<T>, String> {
    let mut factor = lower_by_columns(m, dim);
    cholesky_in_place(
        MatMut::from_column_major_slice_mut(&mut factor, dim, dim),
        default(),
        par,
        MemStack::new(&mut MemBuffer::new(cholesky_in_place_scratch::<T>(dim, par, default()))),
        default(),
    )
    .map_err(|LltError::NonPositivePivot { index }| no_pivot(index, dim))?;
    Ok(factor)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::linalg::testing::{here_and_on_a_device, max_abs, spd};

    #[test]
    fn factor_and_inverse() -> Result<()> {
        here_and_on_a_device(|| {
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 1e-12)] {
                for (g, d) in [(1, 1), (3, 2), (2, 5), (1, 26), (5, 64), (1, 126), (1, 300)] {
                    let m = spd(g, d, 100.0, 3)?.to_dtype(dtype)?;
                    let l = cholesky(&m, "m")?;
                    assert!(max_abs(&(l.matmul(&l.transpose(1, 2)?.contiguous()?)? - &m)?)? < tolerance);
                    for group in l.to_dtype(DType::F64)?.to_vec3::<f64>()? {
                        for (i, row) in group.iter().enumerate() {
                            assert!(row[i] > 0.0 && row[i + 1..].iter().all(|v| *v == 0.0));
                        }
                    }
                    let x = inverse_spd(&m, "m")?;
                    assert_eq!(max_abs(&(&x - x.transpose(1, 2)?)?)?, 0.0);
                    let eye = Tensor::eye(d, dtype, &Device::Cpu)?.broadcast_as((g, d, d))?;
                    assert!(max_abs(&(m.matmul(&x)? - eye)?)? < 10.0 * tolerance);
                    let (log_det, inverse) = log_det_inverse(&m.get(0)?, Half::Both, "m")?;
                    let logs =
                        diagonal(&l)?.get(0)?.to_dtype(DType::F64)?.log()?.sum_all()?.to_scalar::<f64>()?;
                    assert!((log_det - 2.0 * logs).abs() < tolerance * log_det.abs().max(1.0));
                    assert!(max_abs(&(inverse - x.get(0)?)?.unsqueeze(0)?)? < tolerance);
                    let (_, lower) = log_det_inverse(&m.get(0)?, Half::Lower, "m")?;
                    let tril = Tensor::tril2(d, dtype, &Device::Cpu)?;
                    let off = ((lower - x.get(0)?)? * tril)?.unsqueeze(0)?;
                    assert!(max_abs(&off)? < tolerance);
                }
            }
            Ok(())
        })
    }

    #[test]
    fn only_the_lower_triangle_is_read() -> Result<()> {
        here_and_on_a_device(|| {
            let m = Tensor::new(&[[[4f64, 77.0], [2.0, 3.0]]], &Device::Cpu)?;
            let l = cholesky(&m, "m")?.flatten_all()?.to_vec1::<f64>()?;
            let x = inverse_spd(&m, "m")?.flatten_all()?.to_vec1::<f64>()?;
            for (found, exact) in
                l.iter().chain(&x).zip([2.0, 0.0, 1.0, 2f64.sqrt(), 0.375, -0.25, -0.25, 0.5])
            {
                assert!((found - exact).abs() < 1e-15);
            }
            Ok(())
        })
    }

    #[test]
    fn ill_conditioned_is_inverted_in_f64() -> Result<()> {
        here_and_on_a_device(|| {
            // diag(1, 1e-9) rotated by 45 degrees, as far as f32 entries can say it: far beyond f32's own inverse.
            let m = Tensor::new(
                &[[[1f32, 1.0 - 4.0 * f32::EPSILON], [1.0 - 4.0 * f32::EPSILON, 1.0]]],
                &Device::Cpu,
            )?;
            let x = inverse_spd(&m, "m")?.flatten_all()?.to_vec1::<f32>()?;
            let off = 1.0 - 4.0 * f64::from(f32::EPSILON);
            let exact = 1.0 / (1.0 - off * off);
            assert!((f64::from(x[0]) / exact - 1.0).abs() < 1e-6, "{} {exact}", x[0]);
            Ok(())
        })
    }

    #[test]
    fn refuses() -> Result<()> {
        here_and_on_a_device(|| {
            let cpu = &Device::Cpu;
            let indefinite = Tensor::new(&[[[1f32, 2.0], [2.0, 1.0]]], cpu)?;
            let tiny = (Tensor::eye(2, DType::F32, cpu)? * 1e-39)?.unsqueeze(0)?;
            for (m, part) in [
                (indefinite, "pivot 1 of 2"),
                (tiny, "overflow"),
                (Tensor::zeros((2, 2), DType::F32, cpu)?, "[g, d, d]"),
                (Tensor::zeros((1, 2, 2), DType::I64, cpu)?, "I64"),
                (Tensor::full(f64::INFINITY, (1, 2, 2), cpu)?, "finite"),
            ] {
                for message in [
                    inverse_spd(&m, "fc1").err(),
                    (part != "overflow").then(|| cholesky(&m, "fc1").err()).flatten(),
                ] {
                    let message = message.map(|e| e.to_string()).unwrap_or_else(|| format!("fc1 {part}"));
                    assert!(message.contains("fc1") && message.contains(part), "{message}");
                }
            }
            Ok(())
        })
    }
}
