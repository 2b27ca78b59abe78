//! A decoder like Llama (Touvron et al. 2023): root-mean-square norms, rotary positions, keys shared by groups of heads and a gated
//! feed-forward part, under the names of Hugging Face's checkpoints.

use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::nn::{
    self, Embedding, Linear, Module, RmsNorm, VarBuilder, attention::multi_head, ops::silu_product,
    rotary_emb::rope_thd,
};
use serde_json::Value;

use super::config::{head_size, number, size};

/// Sizes, from `config.json`.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocabulary: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub positions: usize,
    pub eps: f64,
    /// The base of the rotary angles.
    pub theta: f64,
    /// Whether the output layer's weight is that of the embedding.
    pub tied: bool,
}

impl Config {
    pub fn parse(config: &Value) -> Result<Self> {
        let (hidden, heads) = (size(config, "hidden_size")?, size(config, "num_attention_heads")?);
        let missing = |name: &str| config[name].is_null();
        if !missing("rope_scaling") {
            bail!(
                "config: scaled rotary positions are not supported, got rope_scaling {}",
                config["rope_scaling"]
            )
        }
        let key_heads =
            if missing("num_key_value_heads") { heads } else { size(config, "num_key_value_heads")? };
        if head_size(hidden, heads)? % 2 != 0 || !heads.is_multiple_of(key_heads) {
            bail!("config: {hidden} features, {heads} heads and {key_heads} heads of keys do not fit")
        }
        Ok(Self {
            vocabulary: size(config, "vocab_size")?,
            hidden,
            inner: size(config, "intermediate_size")?,
            layers: size(config, "num_hidden_layers")?,
            heads,
            key_heads,
            positions: size(config, "max_position_embeddings")?,
            eps: number(config, "rms_norm_eps")?,
            theta: if missing("rope_theta") { 10_000. } else { number(config, "rope_theta")? },
            tied: config["tie_word_embeddings"].as_bool().unwrap_or(false),
        })
    }
}

/// Cosines and sines of the rotary angles, `[positions, d / 2]` each.
fn angles(config: &Config, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
    let d = config.hidden / config.heads;
    let rates = (0..d / 2).map(|i| config.theta.powf(-2. * i as f64 / d as f64));
    let rates = Tensor::from_iter(rates, device)?.unsqueeze(0)?;
    let positions = Tensor::arange(0., config.positions as f64, device)?.unsqueeze(1)?;
    let angles = positions.matmul(&rates)?;
    Ok((angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?))
}

#[derive(Debug, Clone)]
struct Layer {
    before_attention: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    before_feed_forward: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    heads: usize,
    key_heads: usize,
}

impl Layer {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let &Config { hidden, inner, heads, key_heads, .. } = config;
        let of_keys = hidden / heads * key_heads;
        let layer = |from, to, name| nn::linear_no_bias(from, to, vb.pp(name));
        let norm = |name| nn::rms_norm(hidden, config.eps, vb.pp(name));
        Ok(Self {
            before_attention: norm("input_layernorm")?,
            query: layer(hidden, hidden, "self_attn.q_proj")?,
            key: layer(hidden, of_keys, "self_attn.k_proj")?,
            value: layer(hidden, of_keys, "self_attn.v_proj")?,
            attended: layer(hidden, hidden, "self_attn.o_proj")?,
            before_feed_forward: norm("post_attention_layernorm")?,
            gate: layer(hidden, inner, "mlp.gate_proj")?,
            up: layer(hidden, inner, "mlp.up_proj")?,
            down: layer(inner, hidden, "mlp.down_proj")?,
            heads,
            key_heads,
        })
    }

    fn forward(&self, x: &Tensor, (cos, sin): (&Tensor, &Tensor)) -> Result<Tensor> {
        let normed = self.before_attention.forward(x)?;
        let (batch, positions, hidden) = x.dims3()?;
        let d = hidden / self.heads;
        let turned = |layer: &Linear, heads| {
            let heads = layer.forward(&normed)?.reshape((batch, positions, heads, d))?;
            rope_thd(&heads, cos, sin)?.flatten_from(2)
        };
        let (q, k) = (turned(&self.query, self.heads)?, turned(&self.key, self.key_heads)?);
        let v = self.value.forward(&normed)?;
        let attended = multi_head(&q, &k, &v, self.heads, None, true, 1. / (d as f32).sqrt())?;
        let x = (self.attended.forward(&attended)? + x)?;
        let normed = self.before_feed_forward.forward(&x)?;
        let gated = silu_product(&self.gate.forward(&normed)?, &self.up.forward(&normed)?)?;
        self.down.forward(&gated)? + x
    }
}

/// A language model.
#[derive(Debug, Clone)]
pub struct Llama {
    words: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Linear,
    cos: Tensor,
    sin: Tensor,
}

impl Llama {
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let model = vb.pp("model");
        let words = nn::embedding(config.vocabulary, config.hidden, model.pp("embed_tokens"))?;
        let output = match config.tied {
            true => Linear::new(words.embeddings().clone(), None),
            false => nn::linear_no_bias(config.hidden, config.vocabulary, vb.pp("lm_head"))?,
        };
        let (cos, sin) = angles(config, vb.dtype(), vb.device())?;
        Ok(Self {
            words,
            layers: (0..config.layers)
                .map(|i| Layer::new(config, &model.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            norm: nn::rms_norm(config.hidden, config.eps, model.pp("norm"))?,
            output,
            cos,
            sin,
        })
    }
}

impl Module for Llama {
    /// Logits `[batch, positions, vocabulary]` of the token after each of `tokens` `[batch, positions]`.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut x = self.words.forward(tokens)?;
        for layer in &self.layers {
            x = layer.forward(&x, (&self.cos, &self.sin))?;
        }
        self.output.forward(&self.norm.forward(&x)?)
    }
}
