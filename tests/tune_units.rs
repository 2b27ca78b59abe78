//! The unit tests of the example `tune`, as in `mnist_units.rs`.

#[allow(dead_code)]
#[path = "../examples/tune/main.rs"]
mod tune;
