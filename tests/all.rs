//! All tests that need no GPU, in folders by subject: `cargo test --test all optim::resume` runs those of a file.

mod common;

mod curvature;
mod evidence;
mod files;
mod nn;
mod optim;
mod parallel;
mod penalty;
