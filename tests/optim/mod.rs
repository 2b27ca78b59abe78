//! The optimizer: its steps against the objective, what it saves, and what it refuses.

mod accumulate;
mod averages;
mod deep;
mod divergence;
mod first_order;
mod former_states;
mod inner_steps;
mod keep;
mod orthogonal;
mod overlap;
mod refuse;
mod resume;
mod scaling;
mod set_params;
mod sitting_out;
mod two_rate;
mod wake;
