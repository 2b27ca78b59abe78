//! The optimizer: its steps against the objective, what it saves, and what it refuses.

mod accumulate;
mod inner_steps;
mod keep;
mod overlap;
mod refuse;
mod resume;
mod scaling;
mod two_rate;
mod wake;
