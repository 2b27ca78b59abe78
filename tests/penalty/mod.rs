//! Penalties, constraints with multipliers, priors.

mod kkt;
mod prior;
