//! The four networks, as lists of layers.

use candle_core::{Result, Tensor};
use kronwake::nn::init::Stream;
use kronwake::nn::{Conv2d, Conv2dConfig, Linear, Module, VarBuilder, conv2d, linear};
use kronwake::ops::pool::relu;

/// Which network: what `--model` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// The CNN of the KLD-WRM paper, 4,712 parameters.
    Cnn,
    /// LeNet-300-100: three linear layers.
    Lenet300,
    /// LeNet-5 with ReLU and max pooling.
    Lenet5,
    /// Linear layers of the given widths, 784 first and 10 last.
    Mlp { widths: Vec<usize>, tanh: bool },
}

impl Spec {
    /// Linear layers, the last one included.
    pub fn linear_layers(&self) -> usize {
        match self {
            Self::Cnn => 2,
            Self::Lenet300 | Self::Lenet5 => 3,
            Self::Mlp { widths, .. } => widths.len() - 1,
        }
    }

    /// What the names of the last layer's parameters begin with.
    pub fn head(&self) -> String {
        format!("fc{}.", self.linear_layers())
    }
}

impl std::str::FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let known = "expected cnn, lenet300, lenet5 or mlp:784-..-10 with an optional :relu or :tanh";
        let mut parts = text.split(':');
        let spec = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("cnn"), None, ..) => Self::Cnn,
            (Some("lenet300"), None, ..) => Self::Lenet300,
            (Some("lenet5"), None, ..) => Self::Lenet5,
            (Some("mlp"), Some(widths), activation @ (None | Some("relu" | "tanh")), None) => {
                let parsed: std::result::Result<Vec<usize>, _> = widths.split('-').map(str::parse).collect();
                let widths = parsed.map_err(|e| format!("width in {widths:?}: {e}; {known}"))?;
                if widths.len() < 2 || widths.first() != Some(&784) || widths.last() != Some(&10) {
                    return Err(
                        "the widths of an mlp start with 784 (pixels) and end with 10 (classes)".into()
                    );
                }
                if widths.contains(&0) {
                    return Err("a layer of width 0".into());
                }
                Self::Mlp { widths, tanh: activation == Some("tanh") }
            }
            _ => return Err(known.into()),
        };
        Ok(spec)
    }
}

enum Layer {
    /// A convolution with ReLU and 2 x 2 max pooling, in either order.
    Conv(Conv2d),
    Linear(Linear),
    Relu,
    Tanh,
    /// `[n, c, h, w] -> [n, c h w]`.
    Flatten,
    /// Where `--dropout` acts.
    Dropout,
}

/// A network built from a [`Spec`].
pub struct Model {
    layers: Vec<Layer>,
}

/// Which units one training step drops: each with probability `p`, the others are scaled by `1/(1-p)`.
#[derive(Clone, Copy)]
pub struct Dropout {
    pub p: f64,
    pub seed: u64,
    pub step: usize,
    /// The row of the whole batch that the first row is.
    pub first_row: usize,
}

impl Model {
    /// Makes the layers; their parameters are named `conv1.weight` .. `fc2.bias` below the prefix of `vb`.
    pub fn new(spec: &Spec, vb: VarBuilder) -> Result<Self> {
        use Layer::{Conv, Dropout, Flatten, Relu, Tanh};
        let conv = |name: &str, channels: (usize, usize), padding| {
            let config = Conv2dConfig { padding, ..Default::default() };
            conv2d(channels.0, channels.1, 5, config, vb.pp(name)).map(Conv)
        };
        let fc = |i: usize, from, to| linear(from, to, vb.pp(format!("fc{i}"))).map(Layer::Linear);
        let layers = match spec {
            Spec::Cnn => {
                let mut layers = vec![conv("conv1", (1, 5), 0)?, conv("conv2", (5, 7), 0)?];
                layers.extend([Flatten, fc(1, 112, 30)?, Relu, Dropout, fc(2, 30, 10)?]);
                layers
            }
            Spec::Lenet300 => {
                vec![Flatten, fc(1, 784, 300)?, Relu, fc(2, 300, 100)?, Relu, Dropout, fc(3, 100, 10)?]
            }
            Spec::Lenet5 => {
                let mut layers = vec![conv("conv1", (1, 6), 2)?, conv("conv2", (6, 16), 0)?];
                layers.extend([
                    Flatten,
                    fc(1, 400, 120)?,
                    Relu,
                    fc(2, 120, 84)?,
                    Relu,
                    Dropout,
                    fc(3, 84, 10)?,
                ]);
                layers
            }
            Spec::Mlp { widths, tanh } => {
                let mut layers = vec![Flatten];
                for (i, pair) in widths.windows(2).enumerate() {
                    let last = i + 2 == widths.len();
                    if i > 0 {
                        layers.push(if *tanh { Tanh } else { Relu });
                    }
                    if last {
                        layers.push(Dropout);
                    }
                    layers.push(fc(i + 1, pair[0], pair[1])?);
                }
                layers
            }
        };
        Ok(Self { layers })
    }

    /// The logits `[n, 10]` of the images `[n, 1, 28, 28]`, without dropout unless one is given.
    pub fn forward(&self, images: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let mut x = images.clone();
        for layer in &self.layers {
            x = match layer {
                Layer::Conv(layer) => layer.forward_pooled(&x, (2, 2), (2, 2), true)?,
                Layer::Linear(layer) => layer.forward(&x)?,
                Layer::Relu => relu(&x)?,
                Layer::Tanh => x.tanh()?,
                Layer::Flatten => x.flatten_from(1)?,
                Layer::Dropout => match dropout {
                    Some(dropout) if dropout.p > 0.0 => x.mul(&dropout.mask(&x)?)?,
                    _ => x,
                },
            };
        }
        Ok(x)
    }
}

impl Dropout {
    /// Factors of the shape of `x`: 0 or `1/(1-p)`, a function of the seed and the step.
    fn mask(&self, x: &Tensor) -> Result<Tensor> {
        let stream = Stream::new(self.seed, "dropout", self.step);
        let keep = 1.0 / (1.0 - self.p);
        let first = self.first_row * (x.elem_count() / x.dim(0)?.max(1));
        let draw = |i| if stream.uniform(first + i) < self.p { 0.0 } else { keep };
        let mask: Vec<f64> = (0..x.elem_count()).map(draw).collect();
        Tensor::from_vec(mask, x.shape(), &candle_core::Device::Cpu)?
            .to_dtype(x.dtype())?
            .to_device(x.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    #[test]
    fn the_networks_have_their_names_and_sizes() {
        let mlp = "fc1.bias fc1.weight fc2.bias fc2.weight";
        let three = "fc1.bias fc1.weight fc2.bias fc2.weight fc3.bias fc3.weight";
        let two_convs = "conv1.bias conv1.weight conv2.bias conv2.weight";
        for (text, names, parameters) in [
            ("cnn", format!("{two_convs} {mlp}"), 4_712),
            ("lenet300", three.into(), 266_610),
            ("lenet5", format!("{two_convs} {three}"), 61_706),
            ("mlp:784-32-10:tanh", mlp.into(), 25_450),
            ("mlp:784-10", "fc1.bias fc1.weight".into(), 7_850),
        ] {
            let vars = VarMap::new();
            let model =
                Model::new(&text.parse().unwrap(), VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu));
            let x = Tensor::ones((3, 1, 28, 28), DType::F32, &Device::Cpu).unwrap();
            assert_eq!(model.unwrap().forward(&x, None).unwrap().dims(), [3, 10], "{text}");
            let all = vars.data().lock().unwrap();
            let mut found: Vec<_> = all.keys().cloned().collect();
            found.sort();
            assert_eq!(found.join(" "), names);
            assert_eq!(all.values().map(|v| v.elem_count()).sum::<usize>(), parameters, "{text}");
        }
    }

    #[test]
    fn wrong_names_are_refused() {
        for (text, message) in [
            ("vgg", "expected cnn, lenet300"),
            ("cnn:tanh", "expected cnn, lenet300"),
            ("mlp", "expected cnn, lenet300"),
            ("mlp:784-10:gelu", "expected cnn, lenet300"),
            ("mlp:784-x-10", "width in \"784-x-10\": invalid digit"),
            ("mlp:100-10", "the widths of an mlp start with 784"),
            ("mlp:784", "the widths of an mlp start with 784"),
            ("mlp:784-0-10", "a layer of width 0"),
        ] {
            let error = text.parse::<Spec>().unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
    }

    #[test]
    fn dropout_keeps_the_mean_and_depends_on_the_step_alone() {
        let x = Tensor::ones((1000, 100), DType::F64, &Device::Cpu).unwrap();
        let mask = |p, step| Dropout { p, seed: 1, step, first_row: 0 }.mask(&x).unwrap();
        for p in [0.2, 0.5] {
            let mean = mask(p, 0).mean_all().unwrap().to_scalar::<f64>().unwrap();
            // Five standard errors: 5 * sqrt(p / (1 - p) / 1e5).
            assert!((mean - 1.0).abs() < 0.016, "{p}: {mean}");
        }
        let differ =
            |a: Tensor, b: Tensor| (a - b).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f64>();
        assert_eq!(differ(mask(0.5, 3), mask(0.5, 3)).unwrap(), 0.0);
        assert!(differ(mask(0.5, 3), mask(0.5, 4)).unwrap() > 0.0);
    }
}
