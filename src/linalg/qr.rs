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
