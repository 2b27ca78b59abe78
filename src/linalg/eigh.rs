//! Eigendecompositions of symmetric matrices.
use candle_core::{DType, Result, Tensor, WithDType};
use faer::diag::DiagMut;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{
    ComputeEigenvectors, SelfAdjointEvdParams, self_adjoint_evd, self_adjoint_evd_scratch,
};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::prelude::{ReborrowMut, default};
use faer::{MatMut, MatRef, Par, Spec};
use rayon::prelude::*;

use super::cholesky::{lower_factor, no_pivot};
use super::device::{self, Job, Queued, Verdict};
use super::host::{Factorize, Real, by_group, distance, probe, square, times, transpose_times, transposed};
use super::next;
use super::solver::Solver;
use super::spd::{Evidence, Spd};
use crate::gpu::Gpu;

/// Eigenvalues and eigenvectors of a batch of symmetric matrices, with the dtype and device of the input.
#[derive(Clone, Debug)]
pub struct Eigh {
    /// `[g, d]`, ascending. Of a positive semi-definite matrix the smallest may be negative by rounding.
    pub values: Tensor,
    /// `[g, d, d]`, an eigenvector a column, in the order of the values.
    pub vectors: Tensor,
}

/// `m = V diag(values) V^T` with orthogonal `V`, for symmetric matrices `m` `[g, d, d]` in f32 or f64.
///
/// The result is checked by applying both sides to one vector. A decomposition that fails in f32 is repeated in f64
/// and cast back, with a warning that names `name`.
///
/// # Errors
/// If `m` is not square, of another dtype or not finite, or if the decomposition fails in f64: most likely because
/// `m` is not symmetric.
pub fn eigh(m: &Tensor, name: &str) -> Result<Eigh> {
    let (groups, dim) = square(m, name)?;
    let [values, vectors] = by_group(&Ordinary, [m], name)?;
    Ok(Eigh { values, vectors: vectors.reshape((groups, dim, dim))? })
}

/// [`eigh`] of several tensors. On a CUDA device the host waits for all of them once.
pub(crate) fn eigh_all(jobs: &[(&Tensor, &str)]) -> Vec<Result<Eigh>> {
    let gpu = jobs.first().and_then(|(m, _)| Gpu::of(m.device()));
    let Some(gpu) = gpu else { return jobs.par_iter().map(|(m, name)| eigh(m, name)).collect() };
    let queue: Vec<_> = jobs.iter().map(|&(m, name)| Job { inputs: [m], name }).collect();
    let found = device::by_group(&Ordinary, &gpu, &queue).into_iter().zip(jobs);
    let shaped = found.map(|(found, (m, _))| {
        let [values, vectors] = found?;
        Ok(Eigh { values, vectors: vectors.reshape(m.shape())? })
    });
    shaped.collect()
}

/// Matrices `K` (in `vectors`) with `K^T bar K = I` and `K^T current K = diag(values)`.
///
/// Both are `[g, d, d]` in f32 or f64, `bar` positive definite, `current` symmetric. With `bar = L L^T` and
/// `L^-1 current L^-T = Q diag(values) Q^T`, `K = L^-T Q`. Then
/// `(bar + c current)^-1 = K diag(1 / (1 + c values)) K^T` for every `c`. Retries in f64 as [`eigh`] does.
///
/// # Errors
/// As [`eigh`], and if the shapes or dtypes differ or `bar` is not positive definite.
pub fn generalized_eigh(bar: &Tensor, current: &Tensor, name: &str) -> Result<Eigh> {
    let (groups, dim) = square(bar, name)?;
    let [values, vectors] = by_group(&Generalized, [bar, current], name)?;
    Ok(Eigh { values, vectors: vectors.reshape((groups, dim, dim))? })
}

/// [`generalized_eigh`] of two pairs. On a CUDA device the host waits for both at once.
pub(crate) fn generalized_eigh_two(pairs: [(&Tensor, &Tensor); 2], name: &str) -> [Result<Eigh>; 2] {
    let Some(gpu) = Gpu::of(pairs[0].0.device()) else {
        return pairs.map(|(bar, current)| generalized_eigh(bar, current, name));
    };
    let jobs = pairs.map(|(bar, current)| Job { inputs: [bar, current], name });
    let mut found = device::by_group(&Generalized, &gpu, &jobs).into_iter();
    pairs.map(|(bar, _)| {
        let [values, vectors] = next(&mut found)?;
        Ok(Eigh { values, vectors: vectors.reshape(bar.shape())? })
    })
}

struct Ordinary;

impl Factorize<1, 2> for Ordinary {
    fn factorize<T: Real>(
        &self,
        [m]: [&[T]; 1],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; 2], String> {
        let (values, rows) = decompose(m, dim, par)?;
        Ok([values, transposed(&rows, dim)])
    }

    fn queue(&self, gpu: &Gpu, [m]: [&Tensor; 1]) -> Result<Queued<2>> {
        let (groups, dim, _) = m.dims3()?;
        let given = Spd::new(gpu, m)?;
        let scale = given.scale()?;
        if dim == 1 {
            let outputs = [m.reshape((groups, 1))?.copy()?, m.ones_like()?.reshape((groups, 1))?];
            return Ok(Queued { outputs, verdict: given.verdict(&scale, &Evidence::default())? });
        }
        let (values, rows, info) = Solver::of(gpu)?.eigen(given.mirrored(Some(&scale), false)?)?;
        let vectors = Spd::new(gpu, &rows)?;
        let coordinates = vectors.times(None, None)?;
        let p = vectors.turned(Some(&coordinates), None)?;
        let q = vectors.turned(Some(&coordinates), Some(&values))?;
        let r = given.times(None, None)?;
        let evidence = Evidence {
            info: [Some(&info), None],
            p: Some(&p),
            q: Some(&q),
            r: Some(&r),
            values: Some(&values),
        };
        let verdict = vectors.verdict(&scale, &evidence)?;
        let values = values.broadcast_mul(&scale.to_dtype(m.dtype())?.unsqueeze(1)?)?;
        Ok(Queued { outputs: [values, columns(&rows)?], verdict })
    }

    fn reason(&self, verdict: &Verdict, dim: usize, dtype: DType) -> Option<String> {
        let Verdict { code, drift, residual, .. } = *verdict;
        if code != 0 {
            return Some(UNCONVERGED.into());
        }
        let epsilon = if dtype == DType::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
        let tolerance = tolerance(epsilon, dim);
        (!(drift <= tolerance && residual <= tolerance)).then(|| inexact(residual, drift))
    }
}

/// The transposed matrices, flattened.
fn columns(rows: &Tensor) -> Result<Tensor> {
    rows.transpose(1, 2)?.contiguous()?.flatten_from(1)
}

const UNCONVERGED: &str = "the eigenvalue iteration did not converge";

/// Rounding alone stays below 10 epsilon sqrt(d) in either dtype up to d = 800.
fn tolerance(epsilon: f64, dim: usize) -> f64 {
    100.0 * epsilon * (dim as f64).sqrt()
}

fn inexact(residual: f64, drift: f64) -> String {
    format!("the eigendecomposition is off by {residual:.1e} (orthogonality {drift:.1e}); is it symmetric?")
}

struct Generalized;

impl Factorize<2, 2> for Generalized {
    fn factorize<T: Real>(
        &self,
        [bar, current]: [&[T]; 2],
        dim: usize,
        par: Par,
    ) -> std::result::Result<[Vec<T>; 2], String> {
        let factor = lower_factor(bar, dim, par)?;
        let lower = MatRef::from_column_major_slice(&factor, dim, dim);
        // C <- L^-1 C L^-T, one side at a time.
        let mut whitened = current.to_vec();
        let mut c = MatMut::from_column_major_slice_mut(&mut whitened, dim, dim);
        solve_lower_triangular_in_place(lower, c.rb_mut(), par);
        solve_lower_triangular_in_place(lower, c.transpose_mut(), par);
        symmetrize(&mut whitened, dim);
        let (values, mut rows) = decompose(&whitened, dim, par)?;
        let q = MatMut::from_column_major_slice_mut(&mut rows, dim, dim);
        solve_upper_triangular_in_place(lower.transpose(), q, par);
        Ok([values, transposed(&rows, dim)])
    }

    fn queue(&self, gpu: &Gpu, [bar, current]: [&Tensor; 2]) -> Result<Queued<2>> {
        let dtype = bar.dtype();
        let given = [Spd::new(gpu, bar)?, Spd::new(gpu, current)?];
        let scales = [given[0].scale()?, given[1].scale()?];
        let scaled = |i: usize| given[i].mirrored(Some(&scales[i]), false);
        let (values, rows, info) = Solver::of(gpu)?.generalized(scaled(0)?, scaled(1)?)?;
        // K^T bar K z = z and K^T current K z = values z, with K^T in the rows.
        let vectors = Spd::new(gpu, &rows)?;
        let turned = vectors.turned(None, None)?;
        let [bar, current] = [scaled(0)?, scaled(1)?];
        let seen = |m: &Tensor| vectors.times(Some(&Spd::new(gpu, m)?.times(Some(&turned), None)?), None);
        let [p, q] = [seen(&bar)?, seen(&current)?];
        let evidence =
            Evidence { info: [Some(&info), None], p: Some(&p), q: Some(&q), r: None, values: Some(&values) };
        let verdict = vectors.verdict(&(&scales[0] + &scales[1])?, &evidence)?;
        let values = values.broadcast_mul(&(&scales[1] / &scales[0])?.to_dtype(dtype)?.unsqueeze(1)?)?;
        let lengths = scales[0].sqrt()?.recip()?.to_dtype(dtype)?.reshape(((), 1, 1))?;
        Ok(Queued { outputs: [values, columns(&rows.broadcast_mul(&lengths)?)?], verdict })
    }

    fn reason(&self, verdict: &Verdict, dim: usize, _: DType) -> Option<String> {
        /// Beyond this the rounding of an ill-conditioned `bar` shows.
        const TOLERANCE: f64 = 0.01;
        let Verdict { code, drift, residual, .. } = *verdict;
        match code {
            0 if drift <= TOLERANCE && residual <= TOLERANCE => None,
            0 => Some(inexact(residual, drift)),
            code if code > dim => Some(no_pivot(code - dim - 1, dim)),
            _ => Some(UNCONVERGED.into()),
        }
    }
}

fn symmetrize<T: Real>(m: &mut [T], dim: usize) {
    let half = <T as WithDType>::from_f64(0.5);
    for i in 1..dim {
        for j in 0..i {
            let mean = (m[i * dim + j] + m[j * dim + i]) * half;
            m[i * dim + j] = mean;
            m[j * dim + i] = mean;
        }
    }
}

/// Ascending eigenvalues of a symmetric matrix and its eigenvectors, one a row.
fn decompose<T: Real>(m: &[T], dim: usize, par: Par) -> std::result::Result<(Vec<T>, Vec<T>), String> {
    let zero = <T as WithDType>::from_f64(0.0);
    let (mut values, mut rows) = (vec![zero; dim], vec![zero; dim * dim]);
    // faer's divide and conquer (0.24.4) loses all digits of matrices far from 1 in size.
    let largest = m.iter().fold(0.0, |largest: f64, &v| largest.max(WithDType::to_f64(v).abs()));
    let scale = <T as WithDType>::from_f64(if largest > 0.0 { largest } else { 1.0 });
    let m: Vec<T> = m.iter().map(|&v| v / scale).collect();
    // From 64 rows on faer's divide and conquer is faster than its QR iteration, and more exact.
    let mut params: Spec<SelfAdjointEvdParams, T> = default();
    params.config.recursion_threshold = 64;
    let scratch = self_adjoint_evd_scratch::<T>(dim, ComputeEigenvectors::Yes, par, params);
    self_adjoint_evd(
        MatRef::from_row_major_slice(&m, dim, dim),
        DiagMut::from_slice_mut(&mut values),
        Some(MatMut::from_column_major_slice_mut(&mut rows, dim, dim)),
        par,
        MemStack::new(&mut MemBuffer::new(scratch)),
        params,
    )
    .map_err(|_| UNCONVERGED.to_string())?;
    verify(&m, &values, &rows, dim)?;
    values.iter_mut().for_each(|v| *v *= scale);
    Ok((values, rows))
}

/// Checks `V^T V z = z` and `V^T diag(values) V z = m z` for one vector `z`, with the eigenvectors in the rows of `V`.
fn verify<T: Real>(m: &[T], values: &[T], rows: &[T], dim: usize) -> std::result::Result<(), String> {
    let tolerance = tolerance(T::EPSILON, dim);
    let z = probe(dim);
    let length = (dim as f64).sqrt();
    let coordinates = times(rows, &z);
    let drift = distance(&transpose_times(rows, &coordinates), &z, length);
    let scaled: Vec<f64> = coordinates.iter().zip(values).map(|(c, &v)| c * WithDType::to_f64(v)).collect();
    let largest = values.iter().map(|&v| WithDType::to_f64(v).abs()).fold(f64::MIN_POSITIVE, f64::max);
    let residual = distance(&transpose_times(rows, &scaled), &times(m, &z), length * largest);
    // Written so that NaN fails.
    if drift <= tolerance && residual <= tolerance {
        return Ok(());
    }
    Err(inexact(residual, drift))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::linalg::testing::{here_and_on_a_device, max_abs, random_symmetric, spd};

    /// `V^T m V` should be diagonal with the values, `V^T n V` the identity.
    fn assert_diagonalizes(m: &Tensor, n: Option<&Tensor>, e: &Eigh, tolerance: f64) -> Result<()> {
        let (g, d) = e.values.dims2()?;
        let v = e.vectors.to_dtype(DType::F64)?;
        let vt = v.transpose(1, 2)?.contiguous()?;
        let eye = Tensor::eye(d, DType::F64, &Device::Cpu)?.broadcast_as((g, d, d))?;
        let diagonal = eye.broadcast_mul(&e.values.to_dtype(DType::F64)?.unsqueeze(1)?)?;
        let scale = max_abs(m)?.max(f64::MIN_POSITIVE);
        let rotated = vt.matmul(&m.to_dtype(DType::F64)?.matmul(&v)?)?;
        assert!(max_abs(&(rotated - diagonal)?)? <= tolerance * scale, "values, d = {d}");
        let gram = match n {
            Some(n) => vt.matmul(&n.to_dtype(DType::F64)?.matmul(&v)?)?,
            None => vt.matmul(&v)?,
        };
        assert!(max_abs(&(gram - eye)?)? <= tolerance, "orthogonality, d = {d}");
        for row in e.values.to_dtype(DType::F64)?.to_vec2::<f64>()? {
            assert!(row.is_sorted());
        }
        Ok(())
    }

    #[test]
    fn diagonalizes() -> Result<()> {
        here_and_on_a_device(|| {
            for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F64, 1e-13)] {
                let shapes =
                    [(1, 1), (3, 2), (2, 5), (1, 26), (4, 33), (1, 127), (1, 128), (1, 200), (1, 270)];
                for (g, d) in shapes.into_iter().take(if Gpu::emulated().is_some() { 5 } else { 9 }) {
                    for scale in [1.0, 1e-30, 1e15] {
                        let m = (random_symmetric(g, d, 7)? * scale)?.to_dtype(dtype)?;
                        let e = eigh(&m, "m")?;
                        assert_eq!((e.values.dtype(), e.vectors.dtype()), (dtype, dtype));
                        assert_diagonalizes(&m, None, &e, tolerance)?;
                        let bar = spd(g, d, 1e3, 8)?.to_dtype(dtype)?;
                        let e = generalized_eigh(&bar, &m, "m")?;
                        assert_diagonalizes(
                            &(m / scale)?,
                            Some(&bar),
                            &Eigh { values: (&e.values / scale)?, ..e },
                            2e3 * tolerance,
                        )?;
                    }
                }
            }
            Ok(())
        })
    }

    #[test]
    fn known_spectra() -> Result<()> {
        here_and_on_a_device(|| {
            // The second difference matrix has eigenvalues 2 - 2 cos(pi k / (d + 1)).
            let d = 40;
            let entry = |i: usize| match (i / d).abs_diff(i % d) {
                0 => 2f32,
                1 => -1.0,
                _ => 0.0,
            };
            let m = Tensor::from_vec((0..d * d).map(entry).collect(), (1, d, d), &Device::Cpu)?;
            let found = eigh(&m, "m")?.values.flatten_all()?.to_vec1::<f32>()?;
            for (k, value) in found.iter().enumerate() {
                let exact = 2.0 - 2.0 * (std::f64::consts::PI * (k + 1) as f64 / (d + 1) as f64).cos();
                assert!((f64::from(*value) - exact).abs() < 1e-5);
            }
            // Spectra of the curvature: condition numbers near 1 / epsilon, and fewer examples than features.
            for d in [26, 150, 301] {
                let wide = spd(1, d, 1e7, 1)?.to_dtype(DType::F32)?;
                assert_diagonalizes(&wide, None, &eigh(&wide, "m")?, 2e-5)?;
                let rows = random_symmetric(1, d, 2)?.narrow(1, 0, 12)?.to_dtype(DType::F32)?;
                let low_rank = rows.transpose(1, 2)?.contiguous()?.matmul(&rows.contiguous()?)?;
                assert_diagonalizes(&low_rank, None, &eigh(&low_rank, "m")?, 2e-5)?;
            }
            // Repeated eigenvalues: a multiple of the identity, zero, and rank one.
            for (m, top) in [
                ((Tensor::eye(30, DType::F32, &Device::Cpu)? * 3.0)?, 3.0),
                (Tensor::zeros((30, 30), DType::F32, &Device::Cpu)?, 0.0),
                (Tensor::ones((30, 30), DType::F32, &Device::Cpu)?, 30.0),
            ] {
                let m = m.unsqueeze(0)?;
                let e = eigh(&m, "m")?;
                assert_diagonalizes(&m, None, &e, 1e-5)?;
                assert!((e.values.flatten_all()?.to_vec1::<f32>()?[29] - top).abs() < 1e-4);
            }
            Ok(())
        })
    }

    #[test]
    fn what_f32_cannot_do_is_done_in_f64() -> Result<()> {
        here_and_on_a_device(|| {
            // Positive definite in exact arithmetic, but the second pivot rounds to zero in f32.
            let bar = Tensor::new(&[[[1f32, 1.0], [1.0, 1.0 + f32::EPSILON]]], &Device::Cpu)?;
            let bar = (bar * 3.0)?;
            let current = Tensor::eye(2, DType::F32, &Device::Cpu)?.unsqueeze(0)?;
            let e = generalized_eigh(&bar, &current, "m")?;
            assert!(e.values.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| *v > 0.0));
            Ok(())
        })
    }

    #[test]
    fn refuses() -> Result<()> {
        here_and_on_a_device(|| {
            let cpu = &Device::Cpu;
            let lopsided = Tensor::new(&[[[1f32, 0.0], [5.0, 1.0]]], cpu)?;
            let eye = Tensor::eye(2, DType::F32, cpu)?.unsqueeze(0)?;
            let indefinite = Tensor::new(&[[[1f32, 2.0], [2.0, 1.0]]], cpu)?;
            for (result, part) in [
                (eigh(&Tensor::zeros((2, 3, 4), DType::F32, cpu)?, "conv1"), "square"),
                (eigh(&Tensor::zeros((3, 3), DType::F32, cpu)?, "conv1"), "[g, d, d]"),
                (eigh(&Tensor::zeros((1, 3, 3), DType::F16, cpu)?, "conv1"), "F16"),
                (eigh(&(&eye * f64::NAN)?, "conv1"), "finite"),
                (eigh(&lopsided, "conv1"), "symmetric"),
                (generalized_eigh(&indefinite, &eye, "conv1"), "pivot 1"),
                (generalized_eigh(&eye, &eye.to_dtype(DType::F64)?, "conv1"), "one shape and dtype"),
            ] {
                let message = result.expect_err("must fail").to_string();
                assert!(message.contains("conv1") && message.contains(part), "{message}");
            }
            Ok(())
        })
    }
}
