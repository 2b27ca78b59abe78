//! Kronecker factors of the Fisher matrix: their sums over a batch, their averages, damping and inverses.

mod collect;
mod damping;
mod ekfac;
mod exact;
mod factor_shape;
mod gradient;
mod inverse;
mod rounding;
mod split;
pub(crate) mod standard;
mod sums;

pub use collect::{Collect, Factors};
pub use damping::{Adaptive, Damping, DampingKind, Relative};
pub use factor_shape::{Beyond, FactorLimit};
pub use inverse::Inverse;
pub use sums::Sharing;

pub(crate) use ekfac::{moments, turned as turned_moments};
pub(crate) use exact::sum_inverse;
pub(crate) use factor_shape::FactorShape;
pub(crate) use gradient::{average_product, gradient_factors};
pub(crate) use inverse::{Preconditioner, Recipe, Task, damped_inverses, damped_product, factor_product};
pub(crate) use rounding::moments_above_rounding;
pub(crate) use sums::{
    Counts, FactorSums, Joint, Kept, LayerFactors, Pass, Want, WantWeight, wide, wide_dtype,
};
