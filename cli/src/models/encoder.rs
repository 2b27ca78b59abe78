//! What the encoders have in common: attention over heads and the feed-forward part.

use candle_core::{Result, Tensor};
use kronwake::nn::{self, Activation, Linear, Module, VarBuilder};

/// `[batch, positions, heads * d]` as `[batch, heads, positions, d]`.
pub fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, positions, features) = x.dims3()?;
    x.reshape((batch, positions, heads, features / heads))?.transpose(1, 2)
}

/// The inverse of [`split`].
pub fn join(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.flatten_from(2)
}

/// Attention of every position to every other, from linear layers `query`, `key` and `value`.
#[derive(Debug, Clone)]
pub struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    heads: usize,
}

impl SelfAttention {
    pub fn new(hidden: usize, heads: usize, bias: bool, vb: &VarBuilder) -> Result<Self> {
        let layer = |name| nn::linear_b(hidden, hidden, bias, vb.pp(name));
        Ok(Self { query: layer("query")?, key: layer("key")?, value: layer("value")?, heads })
    }

    /// `mask` is added to the scores `[batch, heads, positions, positions]`.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let part = |layer: &Linear| split(&layer.forward(x)?, self.heads);
        let (q, k, v) = (part(&self.query)?, part(&self.key)?, part(&self.value)?);
        let scale = 1. / (q.dim(3)? as f32).sqrt();
        join(&nn::ops::sdpa(&q, &k, &v, mask, false, scale, 1.)?)
    }
}

/// Two linear layers with an activation between them.
#[derive(Debug, Clone)]
pub struct FeedForward {
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl FeedForward {
    /// From `intermediate.dense` and `output.dense`.
    pub fn new(hidden: usize, inner: usize, activation: Activation, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            up: nn::linear(hidden, inner, vb.pp("intermediate.dense"))?,
            down: nn::linear(inner, hidden, vb.pp("output.dense"))?,
            activation,
        })
    }
}

impl Module for FeedForward {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&self.activation.forward(&self.up.forward(x)?)?)
    }
}
