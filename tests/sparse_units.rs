//! The unit tests of the example's modules, as in `mnist_units.rs`.

#[allow(dead_code)]
#[path = "../examples/sparse/main.rs"]
mod sparse;
