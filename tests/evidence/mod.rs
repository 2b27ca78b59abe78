//! The log marginal likelihood and the posterior.

mod estimates;
mod parts;
mod posterior;
mod robust;
