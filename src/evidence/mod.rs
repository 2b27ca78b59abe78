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
//! Sources: Immer et al., "Stochastic Marginal Likelihood Gradients using Neural Tangent Kernels" (ICML 2023, arXiv 2306.03968); MacKay,
//! "A Practical Bayesian Framework for Backpropagation Networks" (1992). Parameters are held fixed at what they are; no gradient
//! goes through them.

mod compare;
mod dense;
mod diagonal;
mod during;
mod estimator;
mod extrapolate;
mod fit;
mod hyper;
mod kernel;
mod kron;
mod log_det;
mod partition;
mod posterior;
mod problem;
mod rows;
mod tune;

pub use compare::{Advice, EarlyStopping, model_probabilities};
pub use during::{ParamsTuneDuring, TuneDuring};
pub use estimator::{Curvature, Estimator, Outputs, Split};
pub use fit::{Evidence, Fit};
pub use hyper::{Hyper, Structure};
pub use partition::Parts;
pub use posterior::{HessianStructure, Posterior, Predictive};
pub use problem::{Examples, Parameter, Problem};
pub use tune::{ParamsTune, tune};
