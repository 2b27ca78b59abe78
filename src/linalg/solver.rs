//! The LAPACK functions of a device: cuSOLVER's, or in tests a plain stand-in with the same contract, which keeps to it
//! strictly: what LAPACK leaves undefined is NaN.
#![cfg_attr(not(any(test, feature = "cuda")), allow(unused_variables))]

use candle_core::{Result, Tensor};

use crate::gpu::Gpu;

/// Where decompositions run. See `cusolver.rs` for what each function gives.
pub(super) enum Solver {
    #[cfg(feature = "cuda")]
    Cuda(super::cusolver::Solver),
    #[cfg(test)]
    Emulated,
}

impl Solver {
    pub fn of(gpu: &Gpu) -> Result<Self> {
        match *gpu {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref device) => super::cusolver::Solver::new(device).map(Self::Cuda),
            #[cfg(test)]
            Gpu::Emulated => Ok(Self::Emulated),
        }
    }

    pub fn eigen(&self, m: Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref solver) => solver.eigen(m),
            #[cfg(test)]
            Self::Emulated => stand_in::eigen(&m),
        }
    }

    pub fn generalized(&self, bar: Tensor, current: Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref solver) => solver.generalized(bar, current),
            #[cfg(test)]
            Self::Emulated => stand_in::generalized(&bar, &current),
        }
    }

    pub fn cholesky(&self, m: Tensor) -> Result<(Tensor, Tensor)> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref solver) => solver.cholesky(m),
            #[cfg(test)]
            Self::Emulated => stand_in::cholesky(&m),
        }
    }

    pub fn inverse(&self, factor: Tensor) -> Result<(Tensor, Tensor)> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref solver) => solver.inverse(factor),
            #[cfg(test)]
            Self::Emulated => stand_in::inverse(&factor),
        }
    }
}

#[cfg(test)]
mod stand_in {
    use candle_core::{DType, Device, Result, Tensor};
    use faer::{MatRef, Side};

    /// The groups of `m` in f64.
    fn groups(m: &Tensor) -> Result<(usize, Vec<Vec<f64>>)> {
        let (groups, dim, _) = m.dims3()?;
        let rows = m.to_dtype(DType::F64)?.reshape((groups, dim * dim))?;
        Ok((dim, rows.to_vec2::<f64>()?))
    }

    fn tensor(parts: Vec<Vec<f64>>, like: &Tensor, vectors: bool) -> Result<Tensor> {
        let (groups, dim, _) = like.dims3()?;
        let data: Vec<f64> = parts.into_iter().flatten().collect();
        let flat = Tensor::from_vec(data, (groups, ()), &Device::Cpu)?.to_dtype(like.dtype())?;
        if vectors { flat.reshape((groups, dim, dim)) } else { Ok(flat) }
    }

    fn codes(info: Vec<usize>) -> Result<Tensor> {
        Tensor::new(info.into_iter().map(|code| code as u32).collect::<Vec<_>>(), &Device::Cpu)
    }

    /// Rounds as the matrices' type does.
    fn rounded(value: f64, dtype: DType) -> f64 {
        if dtype == DType::F32 { f64::from(value as f32) } else { value }
    }

    /// Values and rows of vectors of the matrix in a lower triangle.
    fn decompose(m: &[f64], dim: usize) -> Option<(Vec<f64>, Vec<f64>)> {
        let found = MatRef::from_row_major_slice(m, dim, dim).self_adjoint_eigen(Side::Lower).ok()?;
        let values = (0..dim).map(|i| found.S()[i]).collect();
        let rows = (0..dim * dim).map(|at| found.U()[(at % dim, at / dim)]).collect();
        Some((values, rows))
    }

    /// The factor with NaN above the diagonal, and the code.
    fn factor(m: &[f64], dim: usize, dtype: DType) -> (Vec<f64>, usize) {
        let mut l = vec![f64::NAN; dim * dim];
        for j in 0..dim {
            let below = |i: usize, l: &[f64]| {
                (0..j).fold(m[i * dim + j], |sum, k| rounded(sum - l[i * dim + k] * l[j * dim + k], dtype))
            };
            let pivot = below(j, &l);
            if pivot.is_nan() || pivot <= 0.0 {
                return (l, j + 1);
            }
            l[j * dim + j] = rounded(pivot.sqrt(), dtype);
            for i in j + 1..dim {
                l[i * dim + j] = rounded(below(i, &l) / l[j * dim + j], dtype);
            }
        }
        (l, 0)
    }

    /// `L^-1 x` in place, or `L^-T x`.
    fn solve(l: &[f64], dim: usize, x: &mut [f64], turned: bool) {
        let at = |i: usize, j: usize| if turned { l[j * dim + i] } else { l[i * dim + j] };
        for step in 0..dim {
            let i = if turned { dim - 1 - step } else { step };
            let others = if turned { i + 1..dim } else { 0..i };
            x[i] = (x[i] - others.map(|j| at(i, j) * x[j]).sum::<f64>()) / at(i, i);
        }
    }

    pub fn eigen(m: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (dim, parts) = groups(m)?;
        let nothing = || (vec![f64::NAN; dim], vec![f64::NAN; dim * dim]);
        let found: Vec<_> = parts.iter().map(|m| decompose(m, dim)).collect();
        let info = codes(found.iter().map(|found| usize::from(found.is_none())).collect())?;
        let (values, rows) = found.into_iter().map(|found| found.unwrap_or_else(nothing)).unzip();
        Ok((tensor(values, m, false)?, tensor(rows, m, true)?, info))
    }

    pub fn generalized(bar: &Tensor, current: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let ((dim, bars), (_, parts)) = (groups(bar)?, groups(current)?);
        let (mut values, mut vectors, mut info) = (vec![], vec![], vec![]);
        for (bar, m) in bars.iter().zip(parts) {
            let (l, code) = factor(bar, dim, current.dtype());
            let mut full: Vec<f64> = (0..dim * dim)
                .map(|at| m[(at / dim).max(at % dim) * dim + (at / dim).min(at % dim)])
                .collect();
            for _ in 0..2 {
                full.chunks_exact_mut(dim).for_each(|row| solve(&l, dim, row, false));
                full = (0..dim * dim).map(|at| full[at % dim * dim + at / dim]).collect();
            }
            let (value, mut rows) = match (code, decompose(&full, dim)) {
                (0, Some(found)) => found,
                _ => (vec![f64::NAN; dim], vec![f64::NAN; dim * dim]),
            };
            rows.chunks_exact_mut(dim).for_each(|row| solve(&l, dim, row, true));
            values.push(value);
            vectors.push(rows);
            info.push(if code > 0 { dim + code } else { 0 });
        }
        Ok((tensor(values, current, false)?, tensor(vectors, current, true)?, codes(info)?))
    }

    pub fn cholesky(m: &Tensor) -> Result<(Tensor, Tensor)> {
        let (dim, parts) = groups(m)?;
        let found = parts.iter().map(|part| factor(part, dim, m.dtype()));
        let (factors, info): (Vec<_>, Vec<_>) = found.unzip();
        Ok((tensor(factors, m, true)?, codes(info)?))
    }

    pub fn inverse(l: &Tensor) -> Result<(Tensor, Tensor)> {
        let (dim, parts) = groups(l)?;
        let mut inverses = vec![];
        for l in &parts {
            let mut m = vec![0.0; dim * dim];
            for (i, row) in m.chunks_exact_mut(dim).enumerate() {
                row[i] = 1.0;
                solve(l, dim, row, false);
                solve(l, dim, row, true);
                row[i + 1..].fill(f64::NAN);
            }
            inverses.push(m);
        }
        Ok((tensor(inverses, l, true)?, codes(vec![0; parts.len()])?))
    }
}
