//! The models of the command lines from candle_nn's layers and candle's operations, as one writes them who needs gradients: what is fused
//! there has none.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{self as nn, Embedding, LayerNorm, Linear, Module, RmsNorm, VarBuilder};
use kronwake_cli::models::{bert, llama};

/// `[batch, positions, heads * d]` as `[batch, heads, positions, d]`.
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, positions, features) = x.dims3()?;
    x.reshape((batch, positions, heads, features / heads))?.transpose(1, 2)
}

/// The inverse of [`split`].
fn join(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.flatten_from(2)
}

fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let scale = 1. / (q.dim(3)? as f64).sqrt();
    let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?.broadcast_add(mask)?;
    nn::ops::softmax(&scores, D::Minus1)?.matmul(&v.contiguous()?)
}

fn layer_norm(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    // `forward` of a contiguous input cuts the graph.
    let mean = x.mean_keepdim(D::Minus1)?;
    let x = x.broadcast_sub(&mean)?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    let y = x.broadcast_div(&scale)?.broadcast_mul(norm.weight())?;
    match norm.bias() {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

struct EncoderLayer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    after_attention: LayerNorm,
    up: Linear,
    down: Linear,
    after_feed_forward: LayerNorm,
}

pub struct Encoder {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<EncoderLayer>,
    heads: usize,
}

impl Encoder {
    pub fn new(config: &bert::Config, vb: &VarBuilder) -> Result<Self> {
        let &bert::Config { hidden, inner, eps, .. } = config;
        let layer = |i| -> Result<_> {
            let vb = vb.pp("layer").pp(i);
            let linear = |from, to, name| nn::linear(from, to, vb.pp(name));
            let norm = |name| nn::layer_norm(hidden, eps, vb.pp(name));
            Ok(EncoderLayer {
                query: linear(hidden, hidden, "query")?,
                key: linear(hidden, hidden, "key")?,
                value: linear(hidden, hidden, "value")?,
                attended: linear(hidden, hidden, "attended")?,
                after_attention: norm("after_attention")?,
                up: linear(hidden, inner, "up")?,
                down: linear(inner, hidden, "down")?,
                after_feed_forward: norm("after_feed_forward")?,
            })
        };
        let table = |rows, name| nn::embedding(rows, hidden, vb.pp(name));
        Ok(Self {
            words: table(config.vocabulary, "words")?,
            positions: table(config.positions, "positions")?,
            types: table(config.types, "types")?,
            norm: nn::layer_norm(hidden, eps, vb.pp("norm"))?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            heads: config.heads,
        })
    }

    pub fn forward(&self, tokens: &Tensor, types: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, count) = tokens.dims2()?;
        let positions = Tensor::arange(0, count as u32, tokens.device())?.broadcast_as((batch, count))?;
        let x = (self.words.forward(tokens)? + self.positions.forward(&positions.contiguous()?)?)?;
        let mut x = layer_norm(&self.norm, &(x + self.types.forward(types)?)?)?;
        let live = mask.to_dtype(DType::F32)?.unsqueeze(1)?.unsqueeze(1)?;
        let mask = (live.affine(-1., 1.)? * f64::from(f32::MIN))?;
        for layer in &self.layers {
            let part = |of: &Linear| split(&of.forward(&x)?, self.heads);
            let attended = attention(&part(&layer.query)?, &part(&layer.key)?, &part(&layer.value)?, &mask)?;
            let attended = layer.attended.forward(&join(&attended)?)?;
            x = layer_norm(&layer.after_attention, &(attended + &x)?)?;
            let inner = layer.up.forward(&x)?.gelu_erf()?;
            x = layer_norm(&layer.after_feed_forward, &(layer.down.forward(&inner)? + &x)?)?;
        }
        Ok(x)
    }
}

struct DecoderLayer {
    before_attention: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    before_feed_forward: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

pub struct Decoder {
    words: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    output: Linear,
    cos: Tensor,
    sin: Tensor,
    heads: usize,
    key_heads: usize,
}

impl Decoder {
    pub fn new(config: &llama::Config, vb: &VarBuilder) -> Result<Self> {
        let &llama::Config { hidden, inner, heads, key_heads, eps, .. } = config;
        let d = hidden / heads;
        let layer = |i| -> Result<_> {
            let vb = vb.pp("layer").pp(i);
            let linear = |from, to, name| nn::linear_no_bias(from, to, vb.pp(name));
            let norm = |name| nn::rms_norm(hidden, eps, vb.pp(name));
            Ok(DecoderLayer {
                before_attention: norm("before_attention")?,
                query: linear(hidden, hidden, "query")?,
                key: linear(hidden, d * key_heads, "key")?,
                value: linear(hidden, d * key_heads, "value")?,
                attended: linear(hidden, hidden, "attended")?,
                before_feed_forward: norm("before_feed_forward")?,
                gate: linear(hidden, inner, "gate")?,
                up: linear(hidden, inner, "up")?,
                down: linear(inner, hidden, "down")?,
            })
        };
        let rates =
            Tensor::from_iter((0..d / 2).map(|i| 1e4f32.powf(-2. * i as f32 / d as f32)), &Device::Cpu)?;
        let positions = Tensor::arange(0f32, config.positions as f32, &Device::Cpu)?.unsqueeze(1)?;
        let angles = positions.matmul(&rates.unsqueeze(0)?)?;
        Ok(Self {
            words: nn::embedding(config.vocabulary, hidden, vb.pp("words"))?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: nn::rms_norm(hidden, eps, vb.pp("norm"))?,
            output: nn::linear_no_bias(hidden, config.vocabulary, vb.pp("output"))?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            heads,
            key_heads,
        })
    }

    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (_, count) = tokens.dims2()?;
        let hidden = (0..count * count).map(|i| if i % count > i / count { f32::NEG_INFINITY } else { 0. });
        let mask = Tensor::from_iter(hidden, tokens.device())?.reshape((count, count))?;
        let mut x = self.words.forward(tokens)?;
        for layer in &self.layers {
            let normed = layer.before_attention.forward_diff(&x)?;
            let part = |of: &Linear, heads| split(&of.forward(&normed)?, heads)?.contiguous();
            let rope = |x: &Tensor| nn::rotary_emb::rope_slow(x, &self.cos, &self.sin);
            let shared = |x: Tensor| -> Result<Tensor> {
                let (batch, groups, count, d) = x.dims4()?;
                let each = self.heads / groups;
                x.unsqueeze(2)?
                    .expand((batch, groups, each, count, d))?
                    .reshape((batch, self.heads, count, d))
            };
            let q = rope(&part(&layer.query, self.heads)?)?;
            let k = shared(rope(&part(&layer.key, self.key_heads)?)?)?;
            let v = shared(part(&layer.value, self.key_heads)?)?;
            x = (layer.attended.forward(&join(&attention(&q, &k, &v, &mask)?)?)? + x)?;
            let normed = layer.before_feed_forward.forward_diff(&x)?;
            let gated = (layer.gate.forward(&normed)?.silu()? * layer.up.forward(&normed)?)?;
            x = (layer.down.forward(&gated)? + x)?;
        }
        self.output.forward(&self.norm.forward_diff(&x)?)
    }
}
