//! Pure operations, one file each, knowing nothing of layers or optimizers.
pub mod conv;
pub(crate) mod conv_pool;
mod conv_pool_forward;
mod conv_pool_grads;
mod conv_slices;
mod correlate;
mod cross;
pub mod dense;
mod element;
pub mod factor;
mod lanes;
pub(crate) mod memory;
mod moment;
pub mod norm;
pub mod patches;
pub mod pool;
pub(crate) mod precondition;
mod products;
mod record;
pub mod rng;
pub mod sample;
pub mod softmax;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod update;
pub(crate) mod wake;
