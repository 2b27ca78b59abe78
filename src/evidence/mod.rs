//! The evidence of a linearized Laplace approximation, to choose prior precisions (weight decay), temperature and noise by gradient on
//! the training data.
//!
//! With a network `f(x; theta)` linearized at its parameters, a Gaussian prior of precision `P0` and a likelihood with Hessian `Lambda`
//! by the outputs, the log marginal likelihood of the data is
//!
//! ```text
//! log p(D) ~= log p(D | theta) - 1/2 theta^T P0 theta - 1/2 log det(I + s J P0^-1 J^T Lambda),   s = 1 / (noise^2 temperature)
//! ```
//!
//! `J` the derivatives of all outputs of all examples, which is never written out: [`Estimator`] says what stands for the determinant. An
//! estimate has two halves: [`Estimator::fit`] reads the parameters and the examples, [`Fit::evidence`] is then a function of
//! the hyperparameters [`Hyper`] with analytic derivatives by all of them.
//!
//! What counts can be chosen: of the parameters by [`Problem::of_part`] (a last layer, adapters), of the labels and positions by
//! [`Examples::weighted`], [`Examples::ignoring`] and masks. A model must not mix examples.
//!
//! Sources: Immer et al., "Stochastic Marginal Likelihood Gradients using Neural Tangent Kernels" (ICML 2023, arXiv 2306.03968); MacKay,
//! "A Practical Bayesian Framework for Backpropagation Networks" (1992). Parameters are held fixed at what they are; no gradient
//! goes through them.

mod adam;
mod bridge;
mod calibration;
mod compare;
mod data_fit;
mod dense;
mod diagonal;
mod during;
mod eigenbasis;
mod estimator;
mod examples;
mod extrapolate;
mod file;
mod fit;
mod gather;
mod hyper;
mod kernel;
mod kron;
mod last_layer;
mod log_det;
mod marginals;
mod partition;
mod pass;
mod posterior;
mod predictive;
mod problem;
mod rotated;
mod rows;
mod save;
mod tune;

pub use calibration::{Scores, calibration_error};
pub use compare::{Advice, EarlyStopping, model_probabilities};
pub use during::{ParamsTuneDuring, TuneDuring, TuneRule};
pub use estimator::{Curvature, Estimator, Outputs, Split};
pub use examples::Examples;
pub use fit::{Evidence, Fit};
pub use hyper::{Hyper, Structure};
pub use marginals::Marginals;
pub use partition::Parts;
pub use posterior::{HessianStructure, Posterior};
pub use predictive::Predictive;
pub use problem::{Parameter, Problem};
pub use tune::{ParamsTune, tune};
