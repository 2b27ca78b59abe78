//! candle_nn under its own names, with gradients and taps.

pub mod dropout;
pub mod norm;
pub mod ops;

pub use candle_nn::*;

pub use dropout::Dropout;
// The function and, under candle's name, the module.
pub use norm::{
    self as layer_norm, LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};
