//! candle_nn under its own names, with gradients and taps.
//!
//! `use kronwake::nn as candle_nn` makes a model file trainable by the optimizers of this crate: everything of candle_nn is
//! here, and what has no gradient there, or holds weights that curvature wants to see, is replaced by a layer of the same
//! name and signature.

pub mod conv;
pub mod dropout;
pub mod embedding;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod ops;
pub mod rotary_emb;

pub use candle_nn::*;
pub use conv::{Conv1d, Conv2d, conv1d, conv1d_no_bias, conv2d, conv2d_no_bias};
pub use dropout::Dropout;
pub use embedding::{Embedding, embedding};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
pub use lora::{Lora, ParamsLora};
// The function and, under candle's name, the module.
pub use norm::{
    self as layer_norm, LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};
