//! kronwake
#![warn(missing_docs)]
pub mod checkpoint;
pub mod curvature;
pub mod linalg;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod tape;
