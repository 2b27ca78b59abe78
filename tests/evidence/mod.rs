//! The log marginal likelihood and the posterior.

mod estimates;
mod gaussian;
mod last_layer;
mod parts;
mod posterior;
mod robust;
