//! The unit tests of the study's modules, as in `mnist_units.rs`.

#[allow(dead_code)]
#[path = "../examples/study/main.rs"]
mod study;
