//! candle_nn's 1-D transposed convolution, which has no backward there and, on the CPU without paddings and dilation, wrong values for
//! batches of more than one (candle 0.11.1). The 2-D one is right in both and stays candle's.

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::{ConvTranspose1dConfig, Init, VarBuilder};

/// The transpose of a cross-correlation: inputs `[n, in, l]`, weight `[in, out / groups, k]`, outputs
/// `[n, out, (l - 1) stride + dilation (k - 1) + 1 + output_padding - 2 padding]`. Not tapped: its weight gets no Kronecker block.
#[derive(Clone, Debug)]
pub struct ConvTranspose1d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: ConvTranspose1dConfig,
}

impl ConvTranspose1d {
    /// A layer from its weight `[in, out / groups, k]` and bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: ConvTranspose1dConfig) -> Self {
        Self { weight, bias, config }
    }

    /// Padding, output padding, stride, dilation and groups.
    pub fn config(&self) -> &ConvTranspose1dConfig {
        &self.config
    }

    /// The weight, `[in, out / groups, k]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for ConvTranspose1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups } = self.config;
        let (_, channels, _) = x.dims3()?;
        if groups == 0 || channels % groups != 0 || channels != self.weight.dim(0)? {
            bail!(
                "conv-transpose1d: {channels} channels of the input, weight {:?}, {groups} groups",
                self.weight.dims()
            )
        }
        // An image of height 1, whole; the paddings are of one dimension and follow.
        let (x, weight) = (x.unsqueeze(2)?, self.weight.unsqueeze(2)?);
        let each = channels / groups;
        let part = |group: usize| {
            let x = x.narrow(1, group * each, each)?.contiguous()?;
            let weight = weight.narrow(0, group * each, each)?.contiguous()?;
            x.conv_transpose2d(&weight, 0, 0, stride, dilation)?.squeeze(2)
        };
        let parts: Vec<Tensor> = (0..groups).map(part).collect::<Result<_>>()?;
        let whole = Tensor::cat(&parts, 1)?;
        let length = whole.dim(2)?;
        let Some(wanted) = (length + output_padding).checked_sub(2 * padding).filter(|&wanted| wanted > 0)
        else {
            bail!("conv-transpose1d: a padding of {padding} leaves nothing of {length} positions")
        };
        let kept = wanted.min(length.saturating_sub(padding));
        let y = whole.narrow(2, padding.min(length), kept)?.pad_with_zeros(2, 0, wanted - kept)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1))?),
            None => Ok(y),
        }
    }
}

/// A layer with bias from the variables `weight` and `bias` of `vb`, initialized as candle_nn does it.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv_transpose1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    let bias = vb.get_with_hints(out_channels, "bias", init(out_channels, kernel_size))?;
    let layer = conv_transpose1d_no_bias(in_channels, out_channels, kernel_size, cfg, vb)?;
    Ok(ConvTranspose1d { bias: Some(bias), ..layer })
}

/// A layer without bias from the variable `weight` of `vb`.
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn conv_transpose1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    cfg: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    let dims = (in_channels, out_channels / cfg.groups.max(1), kernel_size);
    let weight = vb.get_with_hints(dims, "weight", init(out_channels, kernel_size))?;
    Ok(ConvTranspose1d::new(weight, None, cfg))
}

fn init(out_channels: usize, kernel_size: usize) -> Init {
    let bound = 1. / (out_channels as f64 * kernel_size as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    /// The functions that build a layer: names, shapes, first values and the layer that comes of them.
    #[test]
    fn from_variables() -> Result<()> {
        use candle_core::{DType, Device};
        let config = ConvTranspose1dConfig { stride: 2, groups: 2, ..Default::default() };
        for biased in [true, false] {
            let map = candle_nn::VarMap::new();
            let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
            let layer = match biased {
                true => conv_transpose1d(4, 6, 3, config, vb.pp("up"))?,
                false => conv_transpose1d_no_bias(4, 6, 3, config, vb.pp("up"))?,
            };
            assert_eq!((layer.weight().dims(), layer.config().stride), (&[4, 3, 3][..], 2));
            assert_eq!(layer.bias().map(|b| b.dims().to_vec()), biased.then(|| vec![6]));
            let names: Vec<String> = {
                let data = map.data().lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))?;
                let mut names: Vec<String> = data.keys().cloned().collect();
                names.sort();
                names
            };
            let expected = ["up.bias", "up.weight"];
            assert_eq!(names, expected[usize::from(!biased)..]);
            // Uniform in 1 / sqrt(outputs times taps), and not all the same.
            let bound = 1. / 18f64.sqrt();
            let weight = values(layer.weight())?;
            assert!(weight.iter().all(|w| w.abs() <= bound) && weight.iter().any(|w| w.abs() > bound / 2.));
            let x = random_var(0, &[2, 4, 5])?;
            let same = ConvTranspose1d::new(layer.weight().clone(), layer.bias().cloned(), config);
            assert_close(&layer.forward(&x)?, &values(&same.forward(&x)?)?, 0.);
            let grads = layer.forward(&x)?.sum_all()?.backward()?;
            assert!(map.all_vars().iter().all(|var| grads.get(var).is_some()));
        }
        Ok(())
    }

    #[test]
    fn values_against_loops_and_gradients() -> Result<()> {
        for (k, padding, output_padding, stride, dilation, groups) in [
            (3, 0, 0, 1, 1, 1),
            (4, 1, 1, 2, 1, 1),
            (3, 2, 1, 3, 2, 2),
            (1, 0, 2, 3, 1, 4),
            (2, 0, 0, 2, 1, 4),
        ] {
            let config = ConvTranspose1dConfig { padding, output_padding, stride, dilation, groups };
            let vars =
                [random_var(0, &[2, 4, 5])?, random_var(1, &[4, 8 / groups, k])?, random_var(2, &[8])?];
            let run =
                |a: &[Tensor]| ConvTranspose1d::new(a[1].clone(), Some(a[2].clone()), config).forward(&a[0]);
            let [x, w, b] = vars.each_ref().map(|v| v.as_detached_tensor());
            let length = 4 * stride + dilation * (k - 1) + 1 + output_padding - 2 * padding;
            let (xs, ws) = (values(&x)?, values(&w)?);
            let mut expected = values(&b.reshape((1, 8, 1))?.broadcast_as((2, 8, length))?)?;
            for (n, input, at, out, tap) in (0..2 * 4 * 5 * (8 / groups) * k).map(|i| {
                let (tap, i) = (i % k, i / k);
                let (out, i) = (i % (8 / groups), i / (8 / groups));
                (i / 20, i / 5 % 4, i % 5, out, tap)
            }) {
                let channel = input / (4 / groups) * (8 / groups) + out;
                let place =
                    (at * stride + tap * dilation).checked_sub(padding).filter(|&place| place < length);
                if let Some(place) = place {
                    let product = xs[(n * 4 + input) * 5 + at] * ws[(input * (8 / groups) + out) * k + tap];
                    expected[(n * 8 + channel) * length + place] += product;
                }
            }
            let found = run(&[x, w, b])?;
            assert_eq!(found.dims(), [2, 8, length]);
            assert_close(&found, &expected, 1e-13);
            check_gradients(&vars, run);
        }
        let x = random_var(1, &[1, 4, 2])?;
        let plain = ConvTranspose1dConfig::default();
        for (channels, k, config) in [
            (3, 3, plain),
            (4, 3, ConvTranspose1dConfig { groups: 3, ..plain }),
            (4, 3, ConvTranspose1dConfig { groups: 0, ..plain }),
            (4, 1, ConvTranspose1dConfig { padding: 1, ..plain }),
        ] {
            let weight = random_var(0, &[channels, 2, k])?.as_detached_tensor();
            assert!(ConvTranspose1d::new(weight, None, config).forward(&x).is_err());
        }
        Ok(())
    }
}
