//! Decompositions of the small symmetric matrices that the curvature needs.
//!
//! Matrices are tensors `[g, d, d]` of f32 or f64, `g` blocks of a grouped convolution (1 for other layers). Functions
//! take the name of the layer or factor that errors and warnings should give. On a CUDA device they run there, by cuSOLVER
//! and kernels of this crate, and the host reads a few numbers that tell whether all went well. A tensor on any other
//! device is decomposed on the host.
pub(crate) mod block_inverse;
pub mod cholesky;
#[cfg(feature = "cuda")]
mod cusolver;
pub(crate) mod device;
pub mod eigh;
mod host;
pub mod kron;
pub(crate) mod low_rank;
pub mod newton;
mod newton_run;
pub(crate) mod polar;
pub(crate) mod qr;
pub(crate) mod rational;
pub mod sketch;
mod solver;
mod spd;
pub(crate) mod traces;

use candle_core::{Result, Tensor, bail};

/// The next of results that were asked for in the same order.
pub(crate) fn next<T>(results: &mut impl Iterator<Item = Result<T>>) -> Result<T> {
    results.next().unwrap_or_else(|| bail!("linalg: a result is missing"))
}

/// `(m + m^T) / 2` of each matrix: what rounding made of a symmetric one.
fn symmetric(m: &Tensor) -> Result<Tensor> {
    (m + m.transpose(1, 2)?)? * 0.5
}

#[cfg(test)]
pub(crate) mod testing {
    //! Random matrices for the tests of this folder.
    use candle_core::{DType, Device, Result, Tensor};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::eigh::eigh;
    use crate::gpu::emulate::emulate;

    /// Runs a test on the host, and as if the host were a device.
    pub(crate) fn here_and_on_a_device(test: fn() -> Result<()>) -> Result<()> {
        test()?;
        emulate(test)
    }

    /// `[g, d, d]` f64, entries below 1 in size.
    pub(crate) fn random_symmetric(g: usize, d: usize, seed: u64) -> Result<Tensor> {
        let mut rng = StdRng::seed_from_u64(seed);
        let entries: Vec<f64> = (0..g * d * d).map(|_| rng.random_range(-1.0..1.0)).collect();
        let m = Tensor::from_vec(entries, (g, d, d), &Device::Cpu)?;
        (&m + m.transpose(1, 2)?)? * 0.5
    }

    /// `[g, d, d]` f64 with eigenvalues spread evenly in the logarithm over `[1 / condition, 1]`.
    pub(crate) fn spd(g: usize, d: usize, condition: f64, seed: u64) -> Result<Tensor> {
        let q = eigh(&random_symmetric(g, d, seed)?, "random")?.vectors;
        let power = |i: usize| condition.powf(-(i as f64) / (d.max(2) - 1) as f64);
        let values = Tensor::from_vec((0..d).map(power).collect::<Vec<_>>(), (1, 1, d), &Device::Cpu)?;
        let m = q.broadcast_mul(&values)?.matmul(&q.transpose(1, 2)?.contiguous()?)?;
        (&m + m.transpose(1, 2)?)? * 0.5
    }

    pub(crate) fn max_abs(m: &Tensor) -> Result<f64> {
        m.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()
    }
}
