//! The unit tests of the example `prior`, as in `mnist_units.rs`.

#[allow(dead_code)]
#[path = "../examples/prior/main.rs"]
mod prior;
