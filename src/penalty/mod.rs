//! Functions of weights that are added to a loss, and the priors they stand for.

mod factor;
mod prior;

pub use factor::{Factor, Family, Init};
pub use prior::Prior;
