//! Pruning: which weights can go, how the others make up for them, and the smaller model that is left.
//!
//! | item | what it does |
//! |---|---|
//! | [`Surgeon`] | the loss that a weight is worth, by a layer's Kronecker factors, and the correction of the others |
//! | [`keep_largest`], [`cubic`] | masks over all layers, and how many weights each of several rounds keeps |
//! | [`compact`] | the same function without dead units, channels and inputs |
//! | [`fold_norms`] | BatchNorm layers as a part of the layers before them |
//! | [`write_sparse`], [`read_sparse`] | safetensors files of indices and values |
//!
//! A mask is a tensor of u8 in the shape of its weights: 0 where a weight is removed, anything else where it is kept. While the rest is
//! trained further, [`Rule::Mask`](crate::penalty::Rule::Mask) keeps removed weights at zero, with any optimizer.

mod compact;
mod file;
mod select;
mod surgeon;

pub use compact::{Compacted, Norm, Stage, Weights, compact, fold_norms};
pub use file::{read_sparse, write_sparse};
pub use select::{cubic, keep_largest};
pub use surgeon::{Operated, Surgeon};
