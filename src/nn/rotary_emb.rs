//! candle_nn's rotary position embeddings with gradients, for the inputs and, where they are variables, for the angles.
//!
//! `cos` and `sin` are `[positions, d / 2]`, or `[batch, positions, d / 2]` with angles for each example; tables may hold more
//! positions than `xs`. Any layout is read, where candle wants contiguous ones.

use candle_core::{Result, Tensor};

use crate::ops::rope::Rope;

pub use candle_nn::rotary_emb::{rope_i_slow, rope_slow};

/// Turns the pairs `(i, i + d / 2)` of `xs` `[batch, heads, positions, d]`.
///
/// # Errors
/// When shapes or dtypes do not fit.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { interleaved: false, heads_last: false }.apply(xs, cos, sin)
}

/// Turns the pairs `(2 i, 2 i + 1)` of `xs` `[batch, heads, positions, d]`.
///
/// # Errors
/// When shapes or dtypes do not fit.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { interleaved: true, heads_last: false }.apply(xs, cos, sin)
}

/// Turns the pairs `(i, i + d / 2)` of `xs` `[batch, positions, heads, d]`.
///
/// # Errors
/// When shapes or dtypes do not fit.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rope { interleaved: false, heads_last: true }.apply(xs, cos, sin)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use candle_nn::rotary_emb as candles;

    #[test]
    fn agrees_with_candle() -> Result<()> {
        let x = Tensor::randn(0f32, 1f32, (2, 3, 5, 8), &Device::Cpu)?;
        let angles = Tensor::randn(0f32, 1f32, (7, 4), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        // candle reads longer tables of several examples at the wrong places.
        let per_example = |t: &Tensor| Tensor::stack(&[t, &t.sqr()?], 0)?.narrow(1, 0, 5)?.contiguous();
        let (cos2, sin2) = (per_example(&cos)?, per_example(&sin)?);
        let pairs = [
            (rope(&x, &cos, &sin)?, candles::rope(&x, &cos, &sin)?),
            (rope_i(&x, &cos, &sin)?, candles::rope_i(&x, &cos, &sin)?),
            (rope_thd(&x, &cos, &sin)?, candles::rope_thd(&x, &cos, &sin)?),
            (rope(&x, &cos, &sin)?, rope_slow(&x, &cos, &sin)?),
            (rope_i(&x, &cos, &sin)?, rope_i_slow(&x, &cos, &sin)?),
            (rope(&x, &cos2, &sin2)?, candles::rope(&x, &cos2, &sin2)?),
        ];
        for (ours, theirs) in pairs {
            let error = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 1e-6, "{error}");
        }
        Ok(())
    }
}
