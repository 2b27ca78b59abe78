//! Curvature-aware optimizers for [candle](https://docs.rs/candle-core): K-FAC and the KLD-WRM family, on one set of Kronecker
//! factors.
//!
//! Data flows one way: layers -> capture -> curvature -> optimizer -> parameters.
//!
//! | module | what it holds |
//! |---|---|
//! | [`nn`] | candle_nn under its own names, with gradients everywhere, and tapped |
//! | [`tape`] | what a layer reports of a backward pass; likelihoods and Fisher matrices |
//! | [`curvature`] | Kronecker factors, their averages, damping and inverses |
//! | [`optim`] | the optimizer [`NaturalGradient`](optim::NaturalGradient): K-FAC, SO-, Q-, QE-KLD-WRM and KLD-WRM, by its [`Params`](optim::Params) |
//! | [`evidence`] | the log marginal likelihood and its bounds, to choose weight decay, temperature and noise |
//! | [`penalty`] | functions of the weights that are added to a loss, proximal steps, bounds with multipliers, priors |
//! | [`prune`] | which weights can go, what that takes of the others, and smaller models and files |
//! | [`stack`] | room for the recursion of long graphs |
//! | [`checkpoint`] | safetensors files, read with checks, written whole or not at all |
//! | [`ops`], [`linalg`] | the pure functions below: convolution, second moments, softmax, decompositions |
//!
//! The README, with its example, follows.
//!
#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

mod building;
pub mod checkpoint;
pub mod curvature;
pub mod evidence;
mod gpu;
pub mod linalg;
pub mod nn;
pub mod ops;
pub mod optim;
mod pattern;
pub mod penalty;
pub mod prune;
pub mod stack;
pub mod tape;
