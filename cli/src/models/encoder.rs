//! What the encoders have in common: attention over heads and the feed-forward part.

use candle_core::{Result, Tensor};
use kronwake::nn::{self, Activation, Linear, Module, VarBuilder, attention::multi_head};

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
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?);
        let scale = 1. / ((q.dim(2)? / self.heads) as f32).sqrt();
        multi_head(&q, &k, &v, self.heads, mask, false, scale)
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
        self.down.forward(&self.up.forward_activated(x, self.activation)?)
    }
}
