//! Orthonormal bases of the columns of square matrices.
use candle_core::{DType, Result, Tensor, WithDType};
use faer::MatRef;

use super::host::{Real, square, to_host};

/// `Q` of `m = Q R` with `R` upper triangular, by Householder reflections: of each matrix of `m`, `[g, d, d]` in f32 or f64.
///
/// `Q` is orthogonal whatever the rank of `m`. The host does it; of a tensor on a device the result goes back there.
///
/// # Errors
/// If `m` is not such a tensor or not finite; the message begins with `name`.
pub(crate) fn orthonormal(m: &Tensor, name: &str) -> Result<Tensor> {
    match m.dtype() {
        DType::F64 => on_host::<f64>(m, name),
        _ => on_host::<f32>(m, name),
    }
}

fn on_host<T: Real>(m: &Tensor, name: &str) -> Result<Tensor> {
    let (_, dim) = square(m, name)?;
    let mut found = to_host::<T>(m, name)?;
    for one in found.chunks_mut(dim * dim) {
        // Of numbers far from 1 the squares could leave the range; `Q` knows no scale.
        let largest = one.iter().fold(0.0, |largest: f64, &v| largest.max(WithDType::to_f64(v).abs()));
        if largest > 0.0 {
            let scale = <T as WithDType>::from_f64(largest);
            one.iter_mut().for_each(|v| *v /= scale);
        }
        let q = MatRef::from_row_major_slice(&*one, dim, dim).qr().compute_Q();
        for (i, row) in one.chunks_mut(dim).enumerate() {
            row.iter_mut().enumerate().for_each(|(j, v)| *v = q[(i, j)]);
        }
    }
    Tensor::from_vec(found, m.shape(), m.device())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::testing::{max_abs, random_symmetric};

    #[test]
    fn columns_are_orthonormal_and_in_their_order() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
            let full = random_symmetric(2, 6, 3)?;
            // Of rank 2, and none at all.
            let low = full.narrow(2, 0, 2)?.contiguous()?.matmul(&full.narrow(1, 0, 2)?.contiguous()?)?;
            for m in [full.clone(), (&full * 1e-30)?, low, full.zeros_like()?] {
                let q = orthonormal(&m.to_dtype(dtype)?, "m")?;
                assert_eq!(q.dtype(), dtype);
                let q = q.to_dtype(DType::F64)?;
                let qt = q.transpose(1, 2)?.contiguous()?;
                let identity = Tensor::eye(6, DType::F64, &Device::Cpu)?.broadcast_as((2, 6, 6))?;
                assert!(max_abs(&(qt.matmul(&q)? - identity)?)? < tolerance);
                let size = max_abs(&m)?;
                let r = qt.matmul(&m)?.to_vec3::<f64>()?;
                for (i, row) in r.iter().flat_map(|one| one.iter().enumerate()) {
                    assert!(row[..i].iter().all(|v| v.abs() <= tolerance * size), "{r:?}");
                }
            }
        }
        let message =
            orthonormal(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?, "w").expect_err("refused");
        assert!(message.to_string().starts_with("w: expected square f32 or f64 matrices"), "{message}");
        let message = orthonormal(&(Tensor::ones((1, 1, 1), DType::F32, &Device::Cpu)? * f64::NAN)?, "w");
        assert!(message.expect_err("refused").to_string().starts_with("w: expected finite numbers"));
        Ok(())
    }
}
