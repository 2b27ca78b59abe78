//! Several processes, here threads, against one on the whole batch.

mod equal;
mod errors;
mod evidence;
mod first_order;
mod harness;
mod owned;
