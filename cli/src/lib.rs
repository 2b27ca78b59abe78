//! The command lines of kronwake's examples, and what they share.
//!
//! Each program has a module of its name; `examples/NAME.rs` starts it.

pub mod constrained;
pub mod finetune;
pub mod mnist;
pub mod prior;
pub mod sparse;
pub mod study;
pub mod tune;

mod chart;
mod curves;
pub mod data;
mod feed;
pub mod idx;
mod jsonl;
mod measure;
mod model;
pub mod models;
mod optimizer;
mod processes;
pub mod program;
pub mod sentence;
mod stats;
mod trace;
pub mod values;
