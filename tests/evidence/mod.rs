//! The log marginal likelihood and the posterior.

mod cut;
mod estimates;
mod gaussian;
mod last_layer;
mod parts;
mod posterior;
mod robust;
