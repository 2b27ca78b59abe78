//! Kronecker factors, dampings and inverses against dense matrices.

mod by_cost;
mod ekfac;
mod empirical;
mod exact;
mod golden;
mod gradient_only;
mod large;
mod mask;
mod shared_weight;
mod sketch;
mod weights;
