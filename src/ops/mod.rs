//! Pure operations, one file each, knowing nothing of layers or optimizers.
pub mod conv;
mod conv_slices;
mod correlate;
mod cross;
mod element;
pub mod factor;
mod lanes;
pub mod norm;
pub mod patches;
pub mod pool;
pub mod product;
mod record;
pub mod rng;
pub mod sample;
pub mod softmax;
#[cfg(test)]
mod testing;
