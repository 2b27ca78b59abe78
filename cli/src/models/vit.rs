//! The vision transformer (Dosovitskiy et al. 2020), under the names of Hugging Face's checkpoints.

use candle_core::{Result, Tensor, bail};
use kronwake::nn::{self, Activation, Conv2d, Conv2dConfig, Init, LayerNorm, Linear, Module, VarBuilder};
use serde_json::Value;

use super::config::{activation, head_size, number, size};
use super::encoder::{FeedForward, SelfAttention};

/// Sizes, from `config.json`.
#[derive(Debug, Clone)]
pub struct Config {
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub image: usize,
    pub patch: usize,
    pub channels: usize,
    pub activation: Activation,
    pub eps: f64,
    pub bias: bool,
}

impl Config {
    pub fn parse(config: &Value) -> Result<Self> {
        let (hidden, heads) = (size(config, "hidden_size")?, size(config, "num_attention_heads")?);
        head_size(hidden, heads)?;
        let (image, patch) = (size(config, "image_size")?, size(config, "patch_size")?);
        if !image.is_multiple_of(patch) {
            bail!("config: images of {image} do not divide into patches of {patch}")
        }
        Ok(Self {
            hidden,
            inner: size(config, "intermediate_size")?,
            layers: size(config, "num_hidden_layers")?,
            heads,
            image,
            patch,
            channels: size(config, "num_channels")?,
            activation: activation(config, "hidden_act")?,
            eps: number(config, "layer_norm_eps")?,
            bias: config["qkv_bias"].as_bool().unwrap_or(true),
        })
    }
}

#[derive(Debug, Clone)]
struct Layer {
    before_attention: LayerNorm,
    attention: SelfAttention,
    attended: Linear,
    before_feed_forward: LayerNorm,
    feed_forward: FeedForward,
}

impl Layer {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden;
        let norm = |name| nn::layer_norm(hidden, config.eps, vb.pp(name));
        Ok(Self {
            before_attention: norm("layernorm_before")?,
            attention: SelfAttention::new(hidden, config.heads, config.bias, &vb.pp("attention.attention"))?,
            attended: nn::linear(hidden, hidden, vb.pp("attention.output.dense"))?,
            before_feed_forward: norm("layernorm_after")?,
            feed_forward: FeedForward::new(hidden, config.inner, config.activation, vb)?,
        })
    }
}

impl Module for Layer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let attended = self.attention.forward(&self.before_attention.forward(x)?, None)?;
        let x = (self.attended.forward(&attended)? + x)?;
        self.feed_forward.forward(&self.before_feed_forward.forward(&x)?)? + x
    }
}

/// An image classifier.
#[derive(Debug, Clone)]
pub struct Vit {
    class: Tensor,
    positions: Tensor,
    patches: Conv2d,
    layers: Vec<Layer>,
    norm: LayerNorm,
    classifier: Linear,
}

impl Vit {
    pub fn new(config: &Config, classes: usize, vb: &VarBuilder) -> Result<Self> {
        let (hidden, vit) = (config.hidden, vb.pp("vit"));
        let embeddings = vit.pp("embeddings");
        let small = Init::Randn { mean: 0., stdev: 0.02 };
        let positions = (config.image / config.patch).pow(2) + 1;
        let stride = Conv2dConfig { stride: config.patch, ..Default::default() };
        let projection = embeddings.pp("patch_embeddings.projection");
        Ok(Self {
            class: embeddings.get_with_hints((1, 1, hidden), "cls_token", small)?,
            positions: embeddings.get_with_hints((1, positions, hidden), "position_embeddings", small)?,
            patches: nn::conv2d(config.channels, hidden, config.patch, stride, projection)?,
            layers: (0..config.layers)
                .map(|i| Layer::new(config, &vit.pp("encoder.layer").pp(i)))
                .collect::<Result<_>>()?,
            norm: nn::layer_norm(hidden, config.eps, vit.pp("layernorm"))?,
            classifier: nn::linear(hidden, classes, vb.pp("classifier"))?,
        })
    }
}

impl Module for Vit {
    /// Logits `[batch, classes]` of images `[batch, channels, image, image]`.
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let patches = self.patches.forward(images)?.flatten_from(2)?.transpose(1, 2)?;
        let (batch, _, hidden) = patches.dims3()?;
        let class = self.class.broadcast_as((batch, 1, hidden))?;
        let mut x = Tensor::cat(&[class, patches], 1)?.broadcast_add(&self.positions)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        // The norm is of each position: only the first one's is needed.
        self.classifier.forward(&self.norm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)?)
    }
}
