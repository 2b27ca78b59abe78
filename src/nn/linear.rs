//! Linear layers: candle_nn's, tapped.

use super::Activation;
use super::lora::{AdapterKind, Lora};
use crate::ops::activation::Activation as Fused;
use crate::tape::{Tap, Tape, activated, affine};
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
    /// A layer from its weight `[out, in]` and bias `[out]`. A bias of another shape, such as a single number, is broadcast over the
    /// outputs; it is then in no Kronecker block.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self::tapped(String::new(), weight, bias)
    }

    pub(super) fn tapped(name: String, weight: Tensor, bias: Option<Tensor>) -> Self {
        let tap = Tape::tap(&name, &weight, bias.as_ref(), 1);
        Self { name, weight, bias, tap, adapters: None }
    }

    /// A layer with a name, which may get adapters: it is a constant then, and they are tapped.
    pub(super) fn named(name: String, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let Some(adapter) = Lora::adapter(AdapterKind::Linear, &name, &weight)? else {
            return Ok(Self::tapped(name, weight, bias));
        };
        let [of_a, of_b] = AdapterKind::Linear.parts().map(|part| format!("{name}.{part}"));
        let (a, b) = (Self::tapped(of_a, adapter.a, None), Self::tapped(of_b, adapter.b, None));
        let adapters = Some(Box::new(Adapters { a, b, scale: adapter.scale }));
        Ok(Self { name, weight: weight.detach(), bias: bias.map(|bias| bias.detach()), tap: None, adapters })
    }

    /// `activation` of the layer's outputs. On the CPU, in single or double precision, a layer with a bias and GELU or SiLU behind it are one operation,
    /// which takes less time and memory than two; the layer's record is the same.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kronwake::nn::{Activation, Module, VarBuilder, VarMap, linear};
    ///
    /// let layer = linear(3, 4, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
    /// let x = Tensor::new(&[[1f32, -2., 0.5]], &Device::Cpu)?;
    /// let apart = Activation::Gelu.forward(&layer.forward(&x)?)?;
    /// assert_eq!(layer.forward_activated(&x, Activation::Gelu)?.to_vec2::<f32>()?, apart.to_vec2::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As the layer and the activation alone.
    pub fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let fused = match activation {
            Activation::Gelu => Some(Fused::Gelu),
            Activation::Silu | Activation::Swish => Some(Fused::Silu),
            _ => None,
        };
        if let (Some(fused), Some(bias), None) = (fused, &self.bias, &self.adapters)
            && let Some(y) = activated(&self.name, x, &self.weight, bias, self.tap.clone(), fused)?
        {
            return Ok(y);
        }
        activation.forward(&self.forward(x)?)
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out]` or what is broadcast to it.
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
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bound = 1. / (in_dim as f64).sqrt();
    let bias = vb.get_with_hints(out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Linear::named(vb.prefix(), weight, Some(bias))
}

/// A linear layer without bias from the variable `weight` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Linear::named(vb.prefix(), weight, None)
}

/// [`linear`] or [`linear_no_bias`].
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    if bias { linear(in_dim, out_dim, vb) } else { linear_no_bias(in_dim, out_dim, vb) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
    use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};
    use crate::tape::{Keep, Tape};

    /// One operation and two: values, gradients and records.
    #[test]
    fn activations_behind_a_layer() -> Result<()> {
        use crate::nn::Activation::{Gelu, Mish, Silu, Swish};
        for dims in [&[4, 3][..], &[2, 4, 3]] {
            let vars = [random_var(0, dims)?, random_var(1, &[5, 3])?, random_var(2, &[5])?];
            for f in [Gelu, Silu, Swish, Mish] {
                let layer = |a: &[Tensor]| Linear::new(a[1].clone(), Some(a[2].clone()));
                let tensors = vars.each_ref().map(|v| v.as_tensor().clone());
                let apart = f.forward(&layer(&tensors).forward(&vars[0])?)?;
                assert_close(&layer(&tensors).forward_activated(&vars[0], f)?, &values(&apart)?, 1e-15);
                check_gradients(&vars, |a| layer(a).forward_activated(&a[0], f));
                let tape = Tape::new();
                let tapped = tape.build(|| Ok(layer(&tensors)))?;
                let kept = |y: Tensor| -> Result<_> {
                    let kept = tape.reduce(&y, &random(7, y.dims())?, Keep::default())?;
                    assert_eq!(kept.0.len(), 1);
                    Ok([values(&kept.0[0].1.inputs.rows()?)?, values(&kept.0[0].1.grads)?])
                };
                let fused = kept(tapped.forward_activated(&vars[0], f)?)?;
                for (fused, apart) in fused.iter().zip(kept(f.forward(&tapped.forward(&vars[0])?)?)?) {
                    assert!(fused.len() == apart.len());
                    assert!(fused.iter().zip(&apart).all(|(a, b)| (a - b).abs() < 1e-14));
                }
            }
        }
        let (x, w) = (random_var(0, &[4, 3])?, random_var(1, &[5, 2])?);
        let layer = Linear::new(w.as_tensor().clone(), Some(random_var(2, &[5])?.as_tensor().clone()));
        assert!(layer.forward_activated(&x, Gelu).is_err());
        Ok(())
    }

    #[test]
    fn biases_that_broadcast() -> Result<()> {
        for (dims, bias) in [
            (&[4, 3][..], &[][..]),
            (&[4, 3], &[1]),
            (&[4, 3], &[5]),
            (&[4, 3], &[1, 5]),
            (&[4, 3], &[4, 1]),
            (&[2, 4, 3], &[]),
            (&[2, 4, 3], &[4, 5]),
        ] {
            let vars = [random_var(0, dims)?, random_var(1, &[5, 3])?, random_var(2, bias)?];
            let run = |a: &[Tensor]| Linear::new(a[1].clone(), Some(a[2].clone())).forward(&a[0]);
            let x = vars[0].reshape(((), 3))?;
            let y = x.matmul(&vars[1].t()?)?.reshape([&dims[..dims.len() - 1], &[5]].concat())?;
            let tensors = vars.each_ref().map(|v| v.as_tensor().clone());
            assert_close(&run(&tensors)?, &values(&y.broadcast_add(&vars[2])?)?, 1e-15);
            check_gradients(&vars, run);
            emulate(|| {
                check_gradients(&vars, run);
                Result::Ok(())
            })?;
        }
        let (x, w) = (random_var(0, &[4, 3])?, random_var(1, &[5, 3])?);
        let layer = Linear::new(w.as_tensor().clone(), Some(random_var(2, &[2])?.as_tensor().clone()));
        assert!(layer.forward(&x).is_err());
        Ok(())
    }

    /// One number for all outputs has no place in a block of a layer's own: it is none of the layer's.
    #[test]
    fn a_tapped_layer_leaves_such_a_bias_out() -> Result<()> {
        let (w, b) = (random_var(0, &[5, 3])?, random_var(1, &[1])?);
        let tape = Tape::new();
        let layer = tape.build(|| Ok(Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()))))?;
        assert!(tape.layers().iter().all(|layer| layer.bias.is_none()));
        let y = layer.forward(random_var(2, &[4, 3])?.as_tensor())?;
        let kept = tape.reduce(&y, &y.ones_like()?, Keep::default())?;
        assert_eq!(kept.0[0].1.grads.dims(), [4, 1, 5]);
        Ok(())
    }

    #[test]
    fn biases_of_convolutions() -> Result<()> {
        let vars = [random_var(0, &[2, 3, 6])?, random_var(1, &[4, 3, 2])?, random_var(2, &[1])?];
        let conv1d = |a: &[Tensor]| {
            Conv1d::new(a[1].clone(), Some(a[2].clone()), Conv1dConfig::default()).forward(&a[0])
        };
        let conv2d = |a: &[Tensor], pooled: bool| {
            let layer = Conv2d::new(a[1].unsqueeze(3)?, Some(a[2].clone()), Conv2dConfig::default());
            let x = a[0].unsqueeze(3)?;
            if pooled { layer.forward_pooled(&x, (2, 1), (2, 1), false) } else { layer.forward(&x) }
        };
        let tensors = vars.each_ref().map(|v| v.as_tensor().clone());
        let plain = Conv1d::new(tensors[1].clone(), None, Conv1dConfig::default()).forward(&tensors[0])?;
        let expected = values(&plain.broadcast_add(&vars[2])?)?;
        let check = || -> Result<()> {
            assert_close(&conv1d(&tensors)?, &expected, 1e-15);
            assert_close(&conv2d(&tensors, false)?, &expected, 1e-15);
            check_gradients(&vars, conv1d);
            check_gradients(&vars, |a| conv2d(a, false));
            check_gradients(&vars, |a| conv2d(a, true));
            Ok(())
        };
        check()?;
        emulate(check)?;
        let wrong = Tensor::zeros(3, candle_core::DType::F64, vars[0].device())?;
        let [x, w, _] = tensors;
        let message = conv1d(&[x, w, wrong]).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("expected a bias [4]"), "{message}");
        Ok(())
    }
}
