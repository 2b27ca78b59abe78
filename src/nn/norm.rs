//! candle_nn's layer normalization under its own names. candle's fused versions have no backward and cut the graph without
//! a word; these give gradients for the input, the weight and the bias.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::ops::norm::Norm;
use crate::tape::{Kind, Tap, Tape, normed};

pub use candle_nn::LayerNormConfig;

/// Normalization over the last dimension, `(x - mean) / sqrt(variance + eps) * weight + bias`; without the mean, and with
/// the mean square for the variance, if `remove_mean` is off. Works on any layout; the weight's dtype must be that of the
/// input. Built inside [`Tape::build`] the layer is tapped; its weight and bias get no Kronecker block, but their share in the evidence.
///
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use kronwake::nn::LayerNorm;
///
/// let weight = Var::ones(3, candle_core::DType::F32, &Device::Cpu)?;
/// let bias = Var::zeros(3, candle_core::DType::F32, &Device::Cpu)?;
/// let layer = LayerNorm::new(weight.as_tensor().clone(), bias.as_tensor().clone(), 1e-5);
/// let grads = layer.forward(&Tensor::new(&[[1f32, 2., 4.]], &Device::Cpu)?)?.sum_all()?.backward()?;
/// assert!(grads.get(&weight).is_some() && grads.get(&bias).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    remove_mean: bool,
    eps: f64,
    tap: Option<Tap>,
}

impl LayerNorm {
    fn named(name: &str, weight: Tensor, bias: Option<Tensor>, remove_mean: bool, eps: f64) -> Self {
        let tap = Tape::tap_as(Kind::Norm, name, &weight, bias.as_ref(), 1);
        Self { weight, bias, remove_mean, eps, tap }
    }

    /// With `weight` and `bias` of `[features]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self::named("", weight, Some(bias), true, eps)
    }

    /// Without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self::named("", weight, None, true, eps)
    }

    /// Without mean and bias.
    ///
    /// # Errors
    /// When the builder has no such variable, or one of another shape.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self::named("", weight, None, false, eps)
    }

    /// The weight, `[features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[features]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Whether the mean is taken off.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let name = if self.remove_mean { "layer_norm" } else { "rms_norm" };
        let norm = Norm { name, center: self.remove_mean, eps: self.eps };
        normed(norm, x, &self.weight, self.bias.as_ref(), self.tap.as_ref())
    }
}

/// A layer over `size` features from `vb`: `weight` (or `gamma`, where the builder holds that) starts at 1, `bias` (or
/// `beta`) at 0 and exists if `config.affine`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
    let config = config.into();
    let get = |name: &'static str, old_name: &'static str, init: f64| {
        let old = !vb.contains_tensor(name) && vb.contains_tensor(old_name);
        vb.get_with_hints(size, if old { old_name } else { name }, Init::Const(init))
    };
    let weight = get("weight", "gamma", 1.)?;
    let bias = if config.affine { Some(get("bias", "beta", 0.)?) } else { None };
    Ok(LayerNorm::named(&vb.prefix(), weight, bias, config.remove_mean, config.eps))
}

/// [`layer_norm`] without a bias.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// With `weight` of `[features]`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The layer as a [`LayerNorm`] without mean and bias.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The weight, `[features]`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The same as `forward`; in candle_nn, the version with gradients.
    ///
    /// # Errors
    /// When `xs` has another last dimension or dtype than the weight.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

/// A layer over `size` features from `vb`; its `weight` starts at 1.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    let config = LayerNormConfig { eps, remove_mean: false, affine: false };
    Ok(RmsNorm(layer_norm(size, config, vb)?))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    use super::*;

    fn values(x: &Tensor) -> Result<Vec<f32>> {
        x.flatten_all()?.to_vec1()
    }

    #[test]
    fn agrees_with_candle_and_gives_gradients() -> Result<()> {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        let x = Tensor::randn(0f32, 2f32, (4, 3, 6), &Device::Cpu)?;
        let rms_with_bias = LayerNormConfig { remove_mean: false, ..Default::default() };
        let pairs: Vec<(Box<dyn Module>, Box<dyn Module>)> = vec![
            (
                Box::new(layer_norm(6, 1e-5, vb.pp("a"))?),
                Box::new(candle_nn::layer_norm(6, 1e-5, vb.pp("a"))?),
            ),
            (
                Box::new(layer_norm(6, rms_with_bias, vb.pp("b"))?),
                Box::new(candle_nn::layer_norm(6, rms_with_bias, vb.pp("b"))?),
            ),
            (
                Box::new(layer_norm_no_bias(6, 1e-5, vb.pp("c"))?),
                Box::new(candle_nn::layer_norm_no_bias(6, 1e-5, vb.pp("c"))?),
            ),
            (Box::new(rms_norm(6, 1e-5, vb.pp("d"))?), Box::new(candle_nn::rms_norm(6, 1e-5, vb.pp("d"))?)),
        ];
        for var in map.all_vars() {
            var.set(&var.rand_like(-1., 1.)?)?;
        }
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (ours, candles) in &pairs {
            for x in [&x, &x.transpose(0, 1)?] {
                let y = ours.forward(x)?;
                for (a, b) in values(&y)?.iter().zip(values(&candles.forward(x)?)?) {
                    assert!((a - b).abs() < 1e-5, "{a} {b}");
                }
                loss = (loss + y.sqr()?.sum_all()?)?;
            }
        }
        let grads = loss.backward()?;
        assert_eq!(map.all_vars().len(), 6);
        assert!(map.all_vars().iter().all(|var| grads.get(var).is_some()));
        Ok(())
    }

    #[test]
    fn old_names_are_read() -> Result<()> {
        let tensor = |v: f32| Tensor::new(&[v, v], &Device::Cpu);
        let tensors = HashMap::from([("gamma".to_string(), tensor(2.)?), ("beta".to_string(), tensor(3.)?)]);
        let layer = layer_norm(2, 1e-5, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))?;
        assert_eq!(values(layer.weight())?, [2., 2.]);
        assert_eq!(layer.bias().map(values).transpose()?, Some(vec![3., 3.]));
        Ok(())
    }

    /// Without a bias, and the root mean square in its version with gradients, against loops and differences.
    #[test]
    fn without_a_bias() -> Result<()> {
        use crate::ops::testing::{assert_close, check_gradients, random_var, values};
        let vars = [random_var(0, &[3, 5])?, random_var(1, &[5])?];
        let expected = |center: bool| -> Result<Vec<f64>> {
            let (x, w) = (values(&vars[0])?, values(&vars[1])?);
            Ok(x.chunks(5)
                .flat_map(|row| {
                    let mean = if center { row.iter().sum::<f64>() / 5. } else { 0. };
                    let scale = (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 5. + 1e-3).sqrt();
                    row.iter().zip(&w).map(|(v, w)| (v - mean) / scale * w).collect::<Vec<_>>()
                })
                .collect())
        };
        let no_bias = |a: &[Tensor]| {
            let layer = LayerNorm::new_no_bias(a[1].clone(), 1e-3);
            assert!(layer.bias().is_none() && layer.remove_mean() && layer.eps() == 1e-3);
            layer.forward(&a[0])
        };
        let diff = |a: &[Tensor]| RmsNorm::new(a[1].clone(), 1e-3).forward_diff(&a[0]);
        let tensors = vars.each_ref().map(|v| v.as_tensor().clone());
        assert_close(&no_bias(&tensors)?, &expected(true)?, 1e-14);
        assert_close(&diff(&tensors)?, &expected(false)?, 1e-14);
        check_gradients(&vars, no_bias);
        check_gradients(&vars, diff);
        let candles = candle_nn::RmsNorm::new(tensors[1].clone(), 1e-3).forward_diff(&tensors[0])?;
        assert_close(&diff(&tensors)?, &values(&candles)?, 1e-14);
        Ok(())
    }
}
