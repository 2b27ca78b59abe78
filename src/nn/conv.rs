//! Convolutions: candle_nn's names and configurations, tapped, with gradients for every stride, dilation and group.

pub use super::conv_transpose::{ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias};
pub use candle_nn::conv::*;

use super::BatchNorm;
use crate::gpu::Gpu;
use crate::ops::{
    conv_pool::PooledShape,
    patches::ConvShape,
    pool::{max_pool2d, relu as rectified},
};
use crate::tape::{Tap, Tape, conv as tapped_conv, conv_pool};
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder, init::DEFAULT_KAIMING_NORMAL};

/// Cross-correlation of `[n, c, l]` with kernels `[out, c / groups, k]`: `[n, out, l']`.
///
/// Built inside [`Tape::build`] the layer is tapped. Clones are the same layer. The configuration's
/// `cudnn_fwd_algo` concerns cuDNN alone, which this crate does not call.
#[derive(Clone, Debug)]
pub struct Conv1d {
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv1dConfig,
    tap: Option<Tap>,
}

impl Conv1d {
    /// A layer from its weight `[out, c / groups, k]` and bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv1dConfig) -> Self {
        Self::named(String::new(), weight, bias, config)
    }

    fn named(name: String, weight: Tensor, bias: Option<Tensor>, config: Conv1dConfig) -> Self {
        let tap = Tape::tap(&name, &weight, bias.as_ref(), config.groups);
        Self { name, weight, bias, config, tap }
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv1dConfig {
        &self.config
    }

    /// The weight, `[out, c / groups, k]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // A row image of height 1.
        let Conv1dConfig { padding, stride, dilation, groups, .. } = self.config;
        let x = if x.rank() == 3 { x.unsqueeze(2)? } else { x.clone() };
        let weight = self.weight.unsqueeze(2)?;
        let shape = ConvShape::new(
            &self.name,
            x.dims(),
            weight.dims(),
            (1, stride),
            (0, padding),
            (1, dilation),
            groups,
        )?;
        tapped_conv(&self.name, shape, &x, &weight, self.bias.as_ref(), self.tap.clone())?.squeeze(2)
    }
}

/// Cross-correlation of `[n, c, h, w]` with kernels `[out, c / groups, kh, kw]`: `[n, out, h', w']`.
///
/// Built inside [`Tape::build`] the layer is tapped. Clones are the same layer. The configuration's
/// `cudnn_fwd_algo` concerns cuDNN alone, which this crate does not call.
#[derive(Clone, Debug)]
pub struct Conv2d {
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
    tap: Option<Tap>,
}

impl Conv2d {
    /// A layer from its weight `[out, c / groups, kh, kw]` and bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self::named(String::new(), weight, bias, config)
    }

    fn named(name: String, weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        let tap = Tape::tap(&name, &weight, bias.as_ref(), config.groups);
        Self { name, weight, bias, config, tap }
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv2dConfig {
        &self.config
    }

    /// The weight, `[out, c / groups, kh, kw]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// [`max_pool2d`] of this layer's outputs with windows of `kernel` (height, width), `stride` apart, and with `relu` its
    /// [`relu`](crate::ops::pool::relu): `[n, out, (h' - kh) / stride + 1, (w' - kw) / stride + 1]`.
    ///
    /// Values, gradients, records, ties and NaN are those of `relu(max_pool2d(forward(x)))`, which is also
    /// `max_pool2d(relu(forward(x)))`. On the CPU and on an NVIDIA GPU, and unless windows overlap or have more than 254
    /// elements, it is one operation that keeps none of the layer's own outputs; on the CPU several times faster than the three.
    ///
    /// # Errors
    /// Those of `forward`, and a zero kernel or stride, and windows larger than the layer's output.
    pub fn forward_pooled(
        &self,
        x: &Tensor,
        kernel: (usize, usize),
        stride: (usize, usize),
        relu: bool,
    ) -> Result<Tensor> {
        let shape = PooledShape::new(self.shape(x)?, kernel, stride)?;
        if (x.device().is_cpu() || Gpu::of(x.device()).is_some()) && shape.fused() {
            return conv_pool(&self.name, shape, x, &self.weight, self.bias.as_ref(), relu, self.tap.clone());
        }
        let y = max_pool2d(&self.forward(x)?, kernel, stride)?;
        if relu { rectified(&y) } else { Ok(y) }
    }

    fn shape(&self, x: &Tensor) -> Result<ConvShape> {
        let Conv2dConfig { padding, stride, dilation, groups, .. } = self.config;
        let pair = |v| (v, v);
        let (x, w) = (x.dims(), self.weight.dims());
        ConvShape::new(&self.name, x, w, pair(stride), pair(padding), pair(dilation), groups)
    }

    /// The layer that does this convolution and then `bn` in evaluation mode; its weights are no variables.
    ///
    /// # Errors
    /// When `bn` has no weight and bias, or is of another number of channels.
    pub fn absorb_bn(&self, bn: &BatchNorm) -> Result<Self> {
        let plain = candle_nn::Conv2d::new(self.weight.clone(), self.bias.clone(), self.config)
            .absorb_bn(bn.as_candles())?;
        Ok(Self {
            name: self.name.clone(),
            weight: plain.weight().clone(),
            bias: plain.bias().cloned(),
            config: self.config,
            tap: None,
        })
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let shape = self.shape(x)?;
        tapped_conv(&self.name, shape, x, &self.weight, self.bias.as_ref(), self.tap.clone())
    }
}

/// The bias's range as candle_nn has it.
fn bias_init(in_channels: usize) -> Init {
    let bound = 1. / (in_channels as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// A 1-D convolution with bias from the variables `weight` and `bias` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let dims = (out_channels, in_channels / cfg.groups.max(1), kernel_size);
    let weight = vb.get_with_hints(dims, "weight", DEFAULT_KAIMING_NORMAL)?;
    let bias = vb.get_with_hints(out_channels, "bias", bias_init(in_channels))?;
    Ok(Conv1d::named(vb.prefix(), weight, Some(bias), cfg))
}

/// A 1-D convolution without bias from the variable `weight` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let dims = (out_channels, in_channels / cfg.groups.max(1), kernel_size);
    let weight = vb.get_with_hints(dims, "weight", DEFAULT_KAIMING_NORMAL)?;
    Ok(Conv1d::named(vb.prefix(), weight, None, cfg))
}

/// A 2-D convolution with bias from the variables `weight` and `bias` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let dims = (out_channels, in_channels / cfg.groups.max(1), kernel_size, kernel_size);
    let weight = vb.get_with_hints(dims, "weight", DEFAULT_KAIMING_NORMAL)?;
    let bias = vb.get_with_hints(out_channels, "bias", bias_init(in_channels))?;
    Ok(Conv2d::named(vb.prefix(), weight, Some(bias), cfg))
}

/// A 2-D convolution without bias from the variable `weight` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv2d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let dims = (out_channels, in_channels / cfg.groups.max(1), kernel_size, kernel_size);
    let weight = vb.get_with_hints(dims, "weight", DEFAULT_KAIMING_NORMAL)?;
    Ok(Conv2d::named(vb.prefix(), weight, None, cfg))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, ModuleT};

    use super::*;
    use crate::ops::testing::{assert_close, random, random_var, values};

    /// The layer that has absorbed a batch norm is the two in evaluation mode.
    #[test]
    fn a_batch_norm_that_is_absorbed() -> Result<()> {
        let x = random_var(0, &[2, 4, 5, 6])?;
        for (groups, biased) in [(1, true), (1, false), (2, true), (2, false)] {
            let config = Conv2dConfig { padding: 1, stride: 2, dilation: 1, groups, ..Default::default() };
            let weight = random_var(1, &[6, 4 / groups, 3, 3])?.as_tensor().clone();
            let bias = biased.then(|| random(2, &[6])).transpose()?;
            let conv = Conv2d::new(weight, bias, config);
            let variance = (random(3, &[6])?.abs()? + 0.1)?;
            let bn = BatchNorm::new(6, random(4, &[6])?, variance, random(5, &[6])?, random(6, &[6])?, 1e-3)?;
            let absorbed = conv.absorb_bn(&bn)?;
            let expected = bn.forward_t(&conv.forward(&x)?, false)?;
            assert_close(&absorbed.forward(&x)?, &values(&expected)?, 1e-13);
            assert_eq!((absorbed.config().stride, absorbed.config().groups), (2, groups));
        }
        let conv = Conv2d::new(random(1, &[6, 4, 3, 3])?, None, Conv2dConfig::default());
        let ones = Tensor::ones(6, candle_core::DType::F64, &Device::Cpu)?;
        // candle absorbs those with weights alone.
        assert!(conv.absorb_bn(&BatchNorm::new_no_bias(6, ones.zeros_like()?, ones, 1e-3)?).is_err());
        Ok(())
    }
}
