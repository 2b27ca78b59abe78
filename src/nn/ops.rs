//! candle_nn's `ops`, with the functions replaced that cut the graph or have a wrong derivative in candle.

use candle_core::{Result, Tensor, shape::Dim};

pub use candle_nn::ops::*;

pub use super::attention::sdpa;
pub use super::dropout::Dropout;
pub use crate::ops::{
    pool::{max_pool2d, relu},
    softmax::softmax_last_dim,
};

/// Softmax over `dim`; the fused version if that is the last.
pub fn softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(xs.shape(), "softmax")?;
    if dim + 1 == xs.rank() { softmax_last_dim(xs) } else { candle_nn::ops::softmax(xs, dim) }
}

/// The logarithm of the softmax over `d`; the fused version if that is the last dimension.
pub fn log_softmax<D: Dim>(xs: &Tensor, d: D) -> Result<Tensor> {
    let dim = d.to_index(xs.shape(), "log-softmax")?;
    match dim + 1 == xs.rank() {
        true => crate::ops::softmax::log_softmax_last_dim(xs),
        false => candle_nn::ops::log_softmax(xs, dim),
    }
}

/// [`rms_norm`](crate::ops::norm::rms_norm) with candle's signature: `alpha` is the weight.
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    crate::ops::norm::rms_norm(xs, alpha, eps.into())
}

/// [`layer_norm`](crate::ops::norm::layer_norm) with candle's signature: `alpha` is the weight, `beta` the bias.
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    crate::ops::norm::layer_norm(xs, alpha, Some(beta), eps.into())
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Var};

    use super::*;

    #[test]
    fn candles_values_with_gradients() -> Result<()> {
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (3, 4, 5), &Device::Cpu)?)?;
        let w = Var::from_tensor(&Tensor::randn(0f32, 1f32, 5, &Device::Cpu)?)?;
        let pairs = [
            (softmax(&x, 1)?, candle_nn::ops::softmax(&x, 1)?),
            (softmax(&x, D::Minus1)?, candle_nn::ops::softmax(&x, D::Minus1)?),
            (log_softmax(&x, 0)?, candle_nn::ops::log_softmax(&x, 0)?),
            (log_softmax(&x, 2)?, candle_nn::ops::log_softmax(&x, 2)?),
            (softmax_last_dim(&x)?, candle_nn::ops::softmax_last_dim(&x)?),
            (rms_norm(&x, &w, 1e-5)?, candle_nn::ops::rms_norm(&x, &w, 1e-5)?),
            (layer_norm(&x, &w, &w, 1e-5)?, candle_nn::ops::layer_norm(&x, &w, &w, 1e-5)?),
        ];
        for (ours, candles) in pairs {
            let error = (&ours - candles)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 1e-5, "{error}");
            assert!(ours.sqr()?.sum_all()?.backward()?.get(&x).is_some());
        }
        assert!(softmax(&x, 3).is_err() && log_softmax(&x, 3).is_err());
        Ok(())
    }
}
