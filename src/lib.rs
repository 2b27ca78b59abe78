//! Curvature-aware optimizers for [candle](https://docs.rs/candle-core): K-FAC and the KLD-WRM family, and what else the same curvature is
//! good for.
//!
//! Layers of [`nn`] that are built inside [`Tape::build`](tape::Tape::build) show the optimizer their inputs and gradients. An
//! [`optim::NaturalGradient`] makes Kronecker factors of them and takes steps in their metric; which member of the family it is, its
//! [`Params`](optim::Params) say, at run time:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use kronwake::nn::{self, Module, Optimizer, VarBuilder, VarMap, loss};
//! use kronwake::optim::{NaturalGradient, Params};
//! use kronwake::tape::{Likelihood, Tape};
//!
//! # fn main() -> candle_core::Result<()> {
//! let (vars, tape) = (VarMap::new(), Tape::new());
//! let model = tape.build(|| nn::linear(2, 2, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)))?;
//! let mut opt = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?; // k_fac, so_kld_wrm, q_kld_wrm, qe_kld_wrm
//! let (x, y) = (Tensor::new(&[[0f32, 1.], [1., 0.]], &Device::Cpu)?, Tensor::new(&[0u32, 1], &Device::Cpu)?);
//! for _ in 0..100 {
//!     let logits = model.forward(&x)?;
//!     opt.observe(&logits, Likelihood::Categorical)?; // no work unless curvature is due
//!     opt.backward_step(&loss::cross_entropy(&logits, &y)?)?;
//! }
//! opt.adopt_average()?; // the averaged parameters are the model to keep
//! # assert_eq!(model.forward(&x)?.argmax(1)?.to_vec1::<u32>()?, [0, 1]);
//! # Ok(())
//! # }
//! ```
//!
//! The guide has a page a use: [training](guide::train), [fine-tuning](guide::fine_tune), [tuning by the evidence](guide::tune),
//! [constraints](guide::constrain), [pruning](guide::prune), [GPUs](guide::gpu), and [what was measured](guide::results).
//!
//! Data flows one way: layers -> capture -> curvature -> optimizer -> parameters.
//!
//! | module | what it holds |
//! |---|---|
//! | [`nn`] | candle_nn under its own names, with gradients everywhere, and tapped |
//! | [`tape`] | what a layer reports of a backward pass; likelihoods and Fisher matrices |
//! | [`curvature`] | Kronecker factors, their averages, damping and inverses |
//! | [`optim`] | the optimizer, its options, groups of parameters, schedules |
//! | [`evidence`] | the log marginal likelihood and its bounds, to choose weight decay, temperature and noise |
//! | [`penalty`] | functions of the weights that are added to a loss, proximal steps, bounds with multipliers, priors |
//! | [`prune`] | which weights can go, what that takes of the others, and smaller models and files |
//! | [`stack`] | room for the recursion of long graphs |
//! | [`checkpoint`] | safetensors files, read with checks, written whole or not at all |
//!
//! **Threads**: make the training thread one of rayon's pool before anything else,
//! `rayon::ThreadPoolBuilder::new().use_current_thread().build_global()`, and keep candle's own threads from turning in a loop while they
//! wait, by `CANDLE_BARRIER_POOL_SPIN_LIMIT=1` in the environment. **Feature** `cuda`: tensors on NVIDIA GPUs. **Processor**: no flag is
//! needed, vectors are chosen when the program runs.

#![warn(missing_docs, clippy::missing_errors_doc)]

mod building;
pub mod checkpoint;
pub mod curvature;
pub mod evidence;
mod gpu;
pub mod guide;
#[doc(hidden)] // no user's interface: benches and tests reach it
pub mod linalg;
pub mod nn;
#[doc(hidden)] // as `linalg`
pub mod ops;
pub mod optim;
pub mod parallel;
mod pattern;
pub mod penalty;
pub mod prune;
pub mod stack;
pub mod tape;

/// The README's code, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
