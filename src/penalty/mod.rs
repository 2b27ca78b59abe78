//! Functions of weights that are added to a loss, and the priors they stand for.

mod admissible;
mod factor;
mod fft;
mod norms;
mod prior;
mod variational;
mod verdict;

pub use admissible::{Grid, Posterior, deconvolve};
pub use factor::{Factor, Family, Init};
pub use prior::Prior;
pub use variational::{MeanField, kl, variational_loss};
pub use verdict::{Failure, Report};
