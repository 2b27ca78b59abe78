//! The unit tests of the example's modules. `cargo test` builds examples, but runs the tests inside them only where it
//! does not build them as the program that `tests/mnist_cli.rs` starts.

#[allow(dead_code)]
#[path = "../examples/mnist/main.rs"]
mod mnist;
