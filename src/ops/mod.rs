//! Pure operations, one file each, knowing nothing of layers or optimizers.
pub mod conv;
mod conv_direct;
mod element;
pub mod factor;
mod gemm;
pub mod patches;
pub mod rng;
pub mod sample;
