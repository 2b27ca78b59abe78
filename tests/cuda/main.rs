//! The CPU against the first GPU: `cargo test --features cuda --test cuda`. Without a GPU each test says `skipped: no CUDA device`, and with
//! `KRONWAKE_REQUIRE_CUDA=1` it fails. `scripts/host-gpu.sh` runs them on a machine without one.

#[allow(dead_code)] // these tests use a part of it
#[path = "../common/mod.rs"]
mod common;
mod device;
mod evidence;
mod linalg;
mod modules;
mod ops;
mod optim;
mod room;
mod streams;
