//! candle_nn's batch normalization, which refuses to train on what has no variance.

use candle_core::{ModuleT, Result, Tensor, bail};
use candle_nn::{VarBuilder, batch_norm as candles};

pub use candle_nn::BatchNormConfig;

/// `(x - mean) / sqrt(variance + eps) * weight + bias` for each channel, the second dimension of `x` `[batch, channels, ..]`.
///
/// In training the mean and the variance are those of the batch, and the running ones move towards them by `momentum`; otherwise
/// they are the running ones.
///
/// A batch that gives a channel a single value has no variance: candle_nn makes the running one NaN then, for good. Here training
/// refuses such a batch, as PyTorch does, and leaves the running statistics as they were.
///
/// ```
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use kronwake::nn::{BatchNorm, BatchNormConfig, VarBuilder, VarMap, batch_norm};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let layer: BatchNorm = batch_norm(3, BatchNormConfig::default(), vb)?;
/// let one = Tensor::ones((1, 3), DType::F32, &Device::Cpu)?;
/// assert!(layer.forward_t(&one, true).is_err() && layer.forward_t(&one, false).is_ok());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchNorm(candles::BatchNorm);

impl BatchNorm {
    /// With running statistics, weight and bias of `[num_features]` each, and a momentum of 0.1. Running statistics that are variables
    /// are updated in place.
    ///
    /// # Errors
    /// When a shape differs or `eps` is negative.
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        candles::BatchNorm::new(num_features, running_mean, running_var, weight, bias, eps).map(Self)
    }

    /// [`BatchNorm::new`] without weight and bias.
    ///
    /// # Errors
    /// When a shape differs or `eps` is negative.
    pub fn new_no_bias(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
    ) -> Result<Self> {
        candles::BatchNorm::new_no_bias(num_features, running_mean, running_var, eps).map(Self)
    }

    /// [`BatchNorm::new`] with a momentum: the running statistics become `(1 - momentum) running + momentum batch`.
    ///
    /// # Errors
    /// When a shape differs, `eps` is negative, or the momentum is not in 0..=1.
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        candles::BatchNorm::new_with_momentum(
            num_features,
            running_mean,
            running_var,
            weight,
            bias,
            eps,
            momentum,
        )
        .map(Self)
    }

    /// [`BatchNorm::new_with_momentum`] without weight and bias.
    ///
    /// # Errors
    /// When a shape differs, `eps` is negative, or the momentum is not in 0..=1.
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        candles::BatchNorm::new_no_bias_with_momentum(num_features, running_mean, running_var, eps, momentum)
            .map(Self)
    }

    /// The running mean, `[num_features]`.
    pub fn running_mean(&self) -> &Tensor {
        self.0.running_mean()
    }

    /// The running variance, `[num_features]`.
    pub fn running_var(&self) -> &Tensor {
        self.0.running_var()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// Weight and bias, `[num_features]` each.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.0.weight_and_bias()
    }

    /// The share of a batch's statistics in the running ones.
    pub fn momentum(&self) -> f64 {
        self.0.momentum()
    }

    /// Normalizes `x` `[batch, num_features, ..]` by its own statistics, and moves the running ones.
    ///
    /// # Errors
    /// When a channel has fewer than two values or the shape or dtype of `x` does not fit; the running statistics are as they were then.
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        let features = self.running_mean().dim(0)?;
        if x.rank() < 2 || x.dim(1)? != features {
            bail!("batch norm: expected an input [batch, {features}, ..], got {:?}", x.dims())
        }
        let values = x.elem_count() / features.max(1);
        if values < 2 {
            bail!(
                "batch norm: training needs two values a channel or more, whose variance it takes, got {values} in an input {:?}; \
                 take larger batches (leave out a last one of a single example), or call it with train off",
                x.dims()
            )
        }
        // candle finds this when the running statistics have moved.
        if let Some((weight, bias)) = self.weight_and_bias()
            && [weight.dtype(), bias.dtype()] != [x.dtype(); 2]
        {
            bail!(
                "batch norm: expected an input of the dtype of weight and bias, {:?} and {:?}, got {:?}",
                weight.dtype(),
                bias.dtype(),
                x.dtype()
            )
        }
        self.0.forward_train(x)
    }

    pub(super) fn as_candles(&self) -> &candles::BatchNorm {
        &self.0
    }
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        if train { self.forward_train(x) } else { self.0.forward_t(x, false) }
    }
}

/// A layer over `num_features` channels from the variables `running_mean`, `running_var` and, if `config.affine`, `weight` and `bias`
/// of `vb`. Freeze the first two: the layer itself updates them.
///
/// # Errors
/// When `vb` has no such variable of that shape, or `eps` is negative.
pub fn batch_norm<C: Into<BatchNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    candles::batch_norm(num_features, config, vb).map(BatchNorm)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Module, Var};

    use super::*;
    use crate::nn::{GroupNorm, LayerNorm};
    use crate::ops::testing::{assert_close, random, random_var, values};

    /// Two channels with running statistics of their own.
    fn layer(momentum: f64) -> Result<BatchNorm> {
        let of = |values: [f64; 2]| Tensor::new(&values, &Device::Cpu);
        let (mean, var) = (of([0.5, -1.])?, of([2., 0.25])?);
        BatchNorm::new_with_momentum(2, mean, var, of([2., 3.])?, of([1., -1.])?, 0., momentum)
    }

    #[test]
    fn statistics_of_a_batch() -> Result<()> {
        let layer = layer(0.25)?;
        // By hand: means 2 and 3, variances 1 and 4, unbiased 2 and 8.
        let x = Tensor::new(&[[1f64, 1.], [3., 5.]], &Device::Cpu)?;
        assert_close(&layer.forward_t(&x, true)?, &[-1., -4., 3., 2.], 1e-15);
        assert_close(layer.running_mean(), &[0.375 + 0.5, -0.75 + 0.75], 1e-15);
        assert_close(layer.running_var(), &[1.5 + 0.5, 0.1875 + 2.], 1e-15);
        Ok(())
    }

    #[test]
    fn a_channel_of_one_value_is_refused() -> Result<()> {
        let layer = layer(0.1)?;
        let before = (values(layer.running_mean())?, values(layer.running_var())?);
        for dims in [&[1, 2][..], &[1, 2, 1], &[1, 2, 1, 1], &[0, 2], &[0, 2, 3, 3]] {
            let x = Tensor::ones(dims, DType::F64, &Device::Cpu)?;
            let message = layer.forward_t(&x, true).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains("two values a channel or more"), "{message}");
            assert!(layer.forward_t(&x, false).is_ok());
        }
        // The running mean would have moved before candle finds these.
        for x in [Tensor::ones((3, 2), DType::F32, &Device::Cpu)?, random(0, &[3, 3])?, random(0, &[2])?] {
            assert!(layer.forward_t(&x, true).is_err());
        }
        assert_eq!(before, (values(layer.running_mean())?, values(layer.running_var())?));
        // Two values are enough, of two examples or of two positions.
        for dims in [&[2, 2][..], &[1, 2, 2]] {
            let x = random(1, dims)?;
            assert!(values(&layer.forward_t(&x, true)?)?.iter().all(|v| v.is_finite()));
        }
        assert!(values(layer.running_var())?.iter().all(|v| v.is_finite()));
        Ok(())
    }

    /// Norms without running statistics have a value for a single element, the bias, and no gradient but the bias's: as PyTorch's
    /// layer norm.
    #[test]
    fn other_norms_of_one_value() -> Result<()> {
        let x = random_var(0, &[3, 1])?;
        let (w, b) = (random_var(1, &[1])?, random_var(2, &[1])?);
        let check = |y: Tensor, w: &Var, b: &Var| -> Result<()> {
            let bias = values(b)?[0];
            assert_close(&y, &[bias; 3], 1e-15);
            let grads = y.sum_all()?.backward()?;
            let grad = |var: &Var| grads.get(var).map(values).transpose();
            assert_eq!(grad(&x)?, Some(vec![0.; 3]));
            assert_eq!((grad(w)?, grad(b)?), (Some(vec![0.]), Some(vec![3.])));
            Ok(())
        };
        let layer = LayerNorm::new(w.as_tensor().clone(), b.as_tensor().clone(), 1e-5);
        check(layer.forward(&x)?, &w, &b)?;
        let group = GroupNorm::new(w.as_tensor().clone(), b.as_tensor().clone(), 1, 1, 1e-5)?;
        check(group.forward(&x.reshape((3, 1, 1))?)?, &w, &b)
    }
}
