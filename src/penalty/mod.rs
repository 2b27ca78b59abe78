//! Penalties of weights, added to a loss or applied as a proximal step after the optimizer's, and constraints on them.
//!
//! | type | value |
//! |---|---|
//! | [`Lp`] | `sum abs w`, `sum w^2`, or a mixture of both |
//! | [`GroupLasso`] | the norms of groups of weights: whole rows, columns, channels or blocks become zero |
//! | [`SparseGroupLasso`] | a mixture of the group lasso and L1 |
//! | [`UnitLasso`] | the group lasso of hidden units, whose weights are in two layers |
//! | [`Spatial`] | an entropy of where in the matrix the weights lie |
//!
//! A penalty says nothing of its factor: the loss is `loss + factor * penalty.value(w)`, and the proximal step with learning
//! rate `lr` is `penalty.prox(w, lr * factor)`; [`ScaledProx`] is the same in the metric of a diagonal. Beside a loss's gradients, value
//! and gradient of one evaluation cost less than a term of the loss: [`Penalty::value_and_gradient`], [`Constraints::add_gradients`].
//!
//! A penalty that is the divergence of a variational posterior from a prior stands for that prior: [`Prior`] has its density and samples,
//! [`kl`] the divergences, [`MeanField`] a posterior to train with them, [`deconvolve`] finds the prior of a penalty or why there is
//! none, and [`Factor`] is the factor that the prior predicts.
//!
//! `J + alpha Omega` and `min J` subject to `Omega <= k` have the same optima (Goodfellow, Bengio, Courville, *Deep Learning*, section
//! 7.2): a [`FeasibleSet`] is projected on after the step, a [`Multiplier`] finds the `alpha` that belongs to a `k`, and [`Constraints`] says
//! which of all this holds for which Vars of a model, beside any optimizer.

mod admissibility;
mod ball;
mod by_norms;
mod constraints;
mod factor;
mod fft;
mod group;
mod group_layout;
mod groups;
mod lp;
mod multiplier;
mod norms;
mod prior;
mod prior_of_penalty;
mod scaled;
mod simplex;
mod spatial;
#[cfg(test)]
mod tests;
mod unit;
mod variational;

pub use admissibility::{Admissibility, Failure};
pub use ball::FeasibleSet;
pub use constraints::{Constraints, Rule};
pub use factor::{Factor, Family, Init};
pub use group::{GroupLasso, SparseGroupLasso};
pub use groups::Grouping;
pub use lp::Lp;
pub use multiplier::{AugmentedLagrangian, Bound, Dual, Kkt, Multiplier, Omega, Report};
pub use prior::Prior;
pub use prior_of_penalty::{Grid, PosteriorFamily, deconvolve};
pub use scaled::ScaledProx;
pub use spatial::Spatial;
pub use unit::UnitLasso;
pub use variational::{MeanField, kl, variational_loss};

use candle_core::{Result, Tensor};

/// A function of one tensor of weights that is added to a loss, times a factor.
///
/// On the CPU a weight that is NaN or infinite is an error; on a GPU, where nothing waits for the device, the result is NaN.
pub trait Penalty: std::fmt::Debug + Send + Sync {
    /// In messages and tables.
    fn name(&self) -> String;
    /// The penalty as a scalar in f32 (f64 for f64), differentiable: a custom op whose backward is `gradient`.
    ///
    /// # Errors
    /// If `w` is not a floating point tensor, of a shape that the penalty is not for, or, on the CPU, holds NaN or an infinity.
    fn value(&self, w: &Tensor) -> Result<Tensor>;
    /// A (sub)gradient in w's shape and dtype; zero at exact zeros.
    ///
    /// # Errors
    /// As for `value`.
    fn gradient(&self, w: &Tensor) -> Result<Tensor>;
    /// Both times `factor`, outside of candle's graph. The penalties here make them of one evaluation, which costs little more than the
    /// gradient.
    ///
    /// # Errors
    /// As for `value`; the penalties here also refuse a factor that is negative or not finite.
    fn value_and_gradient(&self, w: &Tensor, factor: f64) -> Result<(Tensor, Tensor)> {
        Ok(((self.value(w)?.detach() * factor)?, (self.gradient(w)? * factor)?))
    }
    /// `argmin_x 1/2 ||x - w||^2 + step penalty(x)`. A step of zero changes nothing, but for the indicator of a set.
    ///
    /// # Errors
    /// As for `value`, where there is no closed form, and for a step that is negative or not finite.
    fn prox(&self, w: &Tensor, step: f64) -> Result<Tensor>;
}
