//! candle_nn's activations by name, with values and gradients that stay finite for large inputs.

use candle_core::{Module, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::ops;

pub use candle_nn::activation::{PReLU, prelu};

/// An activation that a configuration names; the names are those of candle_nn and of Hugging Face's files.
///
/// As candle_nn's type, but for [`Activation::Gelu`], whose derivative is exact where candle's has six digits, for [`Activation::Mish`], whose gradient is NaN in candle above 88 in f32, and, in half precision, for
/// [`Activation::Silu`] and its kin ([`ops::silu`]) and the tanh approximations of [`Activation::NewGelu`] and
/// [`Activation::GeluPytorchTanh`], whose gradient is NaN in candle above 40 in f16. They are computed in f32. (A model that calls
/// `silu` or `gelu` of a tensor has candle's.)
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x Phi(x)`, with the error function.
    #[default]
    #[serde(alias = "gelu")]
    Gelu,
    /// `x Phi(x)` by its approximation with tanh.
    #[serde(alias = "gelu_new")]
    NewGelu,
    /// `max(x, 0)`, with derivative 1 at 0, as candle's.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
    /// `x` clamped to 0..=6.
    Relu6,
    /// `x sigmoid(x)`.
    Silu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `(x + 3) / 6` clamped to 0..=1.
    HardSigmoid,
    /// `silu(a) b` of the halves `a` and `b` of the last dimension.
    Swiglu,
    /// The same as [`Activation::Silu`].
    Swish,
    /// [`ops::mish`].
    Mish,
    /// `x` times [`Activation::HardSigmoid`].
    HardSwish,
    /// `x` above 0, `alpha (e^x - 1)` below.
    Elu(f64),
    /// `x` above 0, a multiple of `x` below.
    LeakyRelu(f64),
    /// The same as [`Activation::NewGelu`].
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluPytorchTanh,
}

impl Module for Activation {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        use candle_nn::Activation as Candles;
        let candles = match *self {
            // candle's derivative takes the cube of `x`.
            Self::NewGelu | Self::GeluPytorchTanh => return ops::in_f32(x, |x| x.gelu()),
            Self::Gelu => return crate::ops::activation::gelu(x),
            Self::Silu | Self::Swish => return ops::silu(x),
            Self::Swiglu => return ops::swiglu(x),
            Self::Mish => return ops::mish(x),
            Self::Relu => Candles::Relu,
            Self::Relu2 => Candles::Relu2,
            Self::Relu6 => Candles::Relu6,
            Self::Sigmoid => Candles::Sigmoid,
            Self::HardSigmoid => Candles::HardSigmoid,
            Self::HardSwish => Candles::HardSwish,
            Self::Elu(alpha) => Candles::Elu(alpha),
            Self::LeakyRelu(slope) => Candles::LeakyRelu(slope),
        };
        candles.forward(x)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::values;

    /// Large inputs of either sign: finite values, and the derivatives of the two asymptotes.
    #[test]
    fn large_inputs() -> Result<()> {
        use Activation::*;
        for (dtype, large) in [(DType::F16, 300.), (DType::BF16, 1e4), (DType::F32, 1e4), (DType::F64, 1e4)] {
            let x = Var::from_tensor(&Tensor::new(&[-large, large], &Device::Cpu)?.to_dtype(dtype)?)?;
            let is = |f: Activation, ends: [f64; 2]| -> Result<()> {
                let y = f.forward(&x)?;
                assert!(values(&y)?.iter().all(|y| y.is_finite()), "{f:?} {dtype:?}");
                let grads = y.sum_all()?.backward()?;
                let grad = grads.get(&x).map(values).transpose()?;
                assert_eq!(grad, Some(ends.to_vec()), "{f:?} {dtype:?}");
                Ok(())
            };
            for f in
                [Gelu, NewGelu, GeluPytorchTanh, Relu, Silu, Swish, Mish, HardSwish, Elu(1.5), LeakyRelu(0.)]
            {
                is(f, [0., 1.])?;
            }
            for f in [Sigmoid, HardSigmoid, Relu6] {
                is(f, [0., 0.])?;
            }
        }
        Ok(())
    }

    #[test]
    fn names_are_candles() -> Result<()> {
        for name in ["gelu", "gelu_new", "newgelu", "relu", "silu", "mish", "gelu_pytorch_tanh", "hardswish"]
        {
            let text = format!("{name:?}");
            let parse = |text: &str| serde_json::from_str::<Activation>(text).map(|f| format!("{f:?}"));
            let candles = serde_json::from_str::<candle_nn::Activation>(&text).map(|f| format!("{f:?}"));
            assert_eq!(parse(&text).ok(), candles.ok(), "{name}");
        }
        let elu = serde_json::to_string(&Activation::Elu(0.5)).map_err(candle_core::Error::wrap)?;
        let candles =
            serde_json::to_string(&candle_nn::Activation::Elu(0.5)).map_err(candle_core::Error::wrap)?;
        assert_eq!(elu, candles);
        Ok(())
    }
}
