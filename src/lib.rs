//! Curvature-aware optimizers for candle: K-FAC and the KLD-WRM family, on one set of Kronecker factors.
pub mod linalg;
pub mod nn;
pub mod ops;
