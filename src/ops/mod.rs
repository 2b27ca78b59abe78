//! Pure operations, one file each, knowing nothing of layers or optimizers.
mod cross;
pub mod factor;
mod record;
