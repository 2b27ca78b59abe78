//! Regularizers and constraints on weights.

mod ball;
mod cells;
mod constraints;
mod groups;
mod multiplier;
mod simplex;

pub use ball::Set;
pub use constraints::{Constraints, Rule};
pub use groups::Grouping;
pub use multiplier::{Dual, Kkt, Multiplier, Omega, Report};

use candle_core::{Result, Tensor};

/// A function of one tensor of weights that is added to a loss, times a factor.
pub trait Penalty: std::fmt::Debug + Send + Sync {
    /// In messages and tables.
    fn name(&self) -> String;
    /// The penalty as a scalar in f32 (f64 for f64), differentiable: a custom op whose backward is `gradient`.
    fn value(&self, w: &Tensor) -> Result<Tensor>;
    /// A (sub)gradient in w's shape and dtype; zero at exact zeros.
    fn gradient(&self, w: &Tensor) -> Result<Tensor>;
    /// `argmin_x 1/2 ||x - w||^2 + step penalty(x)`; an error where there is no closed form.
    fn prox(&self, w: &Tensor, step: f64) -> Result<Tensor>;
}
