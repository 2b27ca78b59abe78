//! Checkpoints.

mod checkpoint;
