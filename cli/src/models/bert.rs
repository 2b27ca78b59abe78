//! BERT's encoder (Devlin et al. 2018), under the names of Hugging Face's checkpoints.

use candle_core::{DType, Result, Tensor};
use kronwake::nn::{self, Activation, Embedding, LayerNorm, Linear, Module, VarBuilder};
use serde_json::Value;

use super::config::{activation, head_size, number, size};
use super::encoder::{FeedForward, SelfAttention};

/// Sizes, from `config.json`.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocabulary: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub positions: usize,
    pub types: usize,
    pub activation: Activation,
    pub eps: f64,
}

impl Config {
    pub fn parse(config: &Value) -> Result<Self> {
        let (hidden, heads) = (size(config, "hidden_size")?, size(config, "num_attention_heads")?);
        head_size(hidden, heads)?;
        Ok(Self {
            vocabulary: size(config, "vocab_size")?,
            hidden,
            inner: size(config, "intermediate_size")?,
            layers: size(config, "num_hidden_layers")?,
            heads,
            positions: size(config, "max_position_embeddings")?,
            types: size(config, "type_vocab_size")?,
            activation: activation(config, "hidden_act")?,
            eps: number(config, "layer_norm_eps")?,
        })
    }
}

#[derive(Debug, Clone)]
struct Layer {
    attention: SelfAttention,
    attended: Linear,
    after_attention: LayerNorm,
    feed_forward: FeedForward,
    after_feed_forward: LayerNorm,
}

impl Layer {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden;
        let norm = |name| nn::layer_norm(hidden, config.eps, vb.pp(name));
        Ok(Self {
            attention: SelfAttention::new(hidden, config.heads, true, &vb.pp("attention.self"))?,
            attended: nn::linear(hidden, hidden, vb.pp("attention.output.dense"))?,
            after_attention: norm("attention.output.LayerNorm")?,
            feed_forward: FeedForward::new(hidden, config.inner, config.activation, vb)?,
            after_feed_forward: norm("output.LayerNorm")?,
        })
    }

    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let attended = self.attended.forward(&self.attention.forward(x, mask)?)?;
        let x = self.after_attention.forward(&(attended + x)?)?;
        self.after_feed_forward.forward(&(self.feed_forward.forward(&x)? + &x)?)
    }
}

/// The encoder without its pooler.
#[derive(Debug, Clone)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let embeddings = vb.pp("embeddings");
        let table = |rows, name| nn::embedding(rows, config.hidden, embeddings.pp(name));
        Ok(Self {
            words: table(config.vocabulary, "word_embeddings")?,
            positions: table(config.positions, "position_embeddings")?,
            types: table(config.types, "token_type_embeddings")?,
            norm: nn::layer_norm(config.hidden, config.eps, embeddings.pp("LayerNorm"))?,
            layers: (0..config.layers)
                .map(|i| Layer::new(config, &vb.pp("encoder.layer").pp(i)))
                .collect::<Result<_>>()?,
        })
    }

    /// Hidden states `[batch, positions, hidden]` of token and type numbers `[batch, positions]`; `mask`, of that shape, is 1 for tokens and
    /// 0 for padding.
    pub fn forward(&self, tokens: &Tensor, types: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, count) = tokens.dims2()?;
        let positions = Tensor::arange(0, count as u32, tokens.device())?.broadcast_as((batch, count))?;
        let x = (self.words.forward(tokens)? + self.positions.forward(&positions)?)?;
        let mut x = self.norm.forward(&(x + self.types.forward(types)?)?)?;
        let hidden = |mask: &Tensor| -> Result<Tensor> {
            let live = mask.to_dtype(DType::F32)?.unsqueeze(1)?.unsqueeze(1)?;
            (live.affine(-1., 1.)? * f64::from(f32::MIN))?.to_dtype(x.dtype())
        };
        let mask = mask.map(hidden).transpose()?;
        for layer in &self.layers {
            x = layer.forward(&x, mask.as_ref())?;
        }
        Ok(x)
    }
}

/// The mean over the tokens of hidden states `[batch, positions, hidden]`: `[batch, hidden]`.
pub fn mean_over_tokens(hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let live = mask.to_dtype(hidden.dtype())?.unsqueeze(2)?;
    hidden.broadcast_mul(&live)?.sum(1)?.broadcast_div(&live.sum(1)?)
}

/// That mean at length 1.
pub fn sentence_embedding(hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mean = mean_over_tokens(hidden, mask)?;
    mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)
}
