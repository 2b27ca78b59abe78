//! stub
use candle_core::*;
pub fn softmax_last_dim(x:&Tensor)->Result<Tensor>{ candle_nn::ops::softmax(x, D::Minus1) }
