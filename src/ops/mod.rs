//! Pure operations, one file each, knowing nothing of layers or optimizers.
pub mod factor;
