//! Pure operations, one file each, knowing nothing of layers or optimizers.
