//! Linear layers: candle_nn's, tapped.

use super::lora::Lora;
use crate::tape::{Tap, Tape, affine};
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `y = x W^T + b`. Inputs of shape `[.., in]` and rank 2 or more, outputs `[.., out]`.
///
/// Built inside [`Tape::build`] the layer is tapped, inside [`Lora::build`] it may have adapters. Clones are the same layer.
#[derive(Clone, Debug)]
pub struct Linear {
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    tap: Option<Tap>,
    adapters: Option<Box<Adapters>>,
}

/// What a layer adds to its own product: `scale (x A^T) B^T`.
#[derive(Clone, Debug)]
struct Adapters {
    a: Linear,
    b: Linear,
    scale: f64,
}

impl Linear {
    /// A layer from its weight `[out, in]` and bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self::tapped(String::new(), weight, bias)
    }

    fn tapped(name: String, weight: Tensor, bias: Option<Tensor>) -> Self {
        let tap = Tape::tap(&name, &weight, bias.as_ref(), 1);
        Self { name, weight, bias, tap, adapters: None }
    }

    /// A layer with a name, which may get adapters: it is a constant then, and they are tapped.
    pub(super) fn named(name: String, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let Some(adapter) = Lora::adapter(&name, &weight)? else {
            return Ok(Self::tapped(name, weight, bias));
        };
        let part = |part: &str, weight: Tensor| Self::tapped(format!("{name}.{part}"), weight, None);
        let (a, b) = (part("lora_A", adapter.a), part("lora_B", adapter.b));
        let adapters = Some(Box::new(Adapters { a, b, scale: adapter.scale }));
        Ok(Self { name, weight: weight.detach(), bias: bias.map(|bias| bias.detach()), tap: None, adapters })
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = affine(&self.name, x, &self.weight, self.bias.as_ref(), self.tap.clone())?;
        match self.adapters.as_deref() {
            Some(Adapters { a, b, scale }) => y + (b.forward(&a.forward(x)?)? * *scale)?,
            None => Ok(y),
        }
    }
}

/// A linear layer with bias from the variables `weight` and `bias` of `vb`; initialized as candle_nn does it.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bound = 1. / (in_dim as f64).sqrt();
    let bias = vb.get_with_hints(out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Linear::named(vb.prefix(), weight, Some(bias))
}

/// A linear layer without bias from the variable `weight` of `vb`.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Linear::named(vb.prefix(), weight, None)
}

/// [`linear`] or [`linear_no_bias`].
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    if bias { linear(in_dim, out_dim, vb) } else { linear_no_bias(in_dim, out_dim, vb) }
}
