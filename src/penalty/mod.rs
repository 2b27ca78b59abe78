//! Functions of weights that are added to a loss, and the priors they stand for.

mod factor;
mod norms;
mod prior;
mod variational;

pub use factor::{Factor, Family, Init};
pub use prior::Prior;
pub use variational::{MeanField, kl, variational_loss};
