//! The examples from end to end, as a user starts them, and the models that they bring.
//!
//! `cargo test` builds the examples before; where this program alone is tested, `cargo build --examples` does.

mod cuda;
mod finetune;
mod folder;
mod kill;
mod mnist;
mod models;
#[cfg(unix)]
mod pipe;
mod sparse;
mod tune;
mod tuned;
