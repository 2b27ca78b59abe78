//! The Laplace bridge: the Dirichlet distribution over classes that stands for Gaussian outputs.
//!
//! Hobbhahn, Kristiadi & Hennig, "Fast predictive uncertainty for classification with Bayesian deep networks" (UAI 2022), after MacKay
//! (1998). A softmax does not see a number that is added to all outputs, so the Gaussian is first conditioned on outputs that add up to zero,
//! `mean - S1 (1^T mean) / (1^T S 1)` and `S - S 1 1^T S / (1^T S 1)`. Then, with `K` classes,
//!
//! ```text
//! alpha_k = (1 - 2/K + exp(mean_k) / K^2 sum_l exp(-mean_l)) / variance_k
//! ```

use super::predictive::Predictive;
use crate::ops::softmax::softmax_last_dim;
use crate::tape::Likelihood;
use candle_core::{D, Result, Tensor, bail};

/// The logarithms of `alpha`, `[n, classes]`, of outputs with these means, variances and rows of the covariance summed, all `[n, classes]` in f64.
pub(super) fn log_dirichlet(
    likelihood: Likelihood,
    mean: &Tensor,
    variance: &Tensor,
    row_sums: &Tensor,
) -> Result<Tensor> {
    let (n, classes) = mean.dims2()?;
    if likelihood != Likelihood::Categorical || classes < 2 {
        bail!(
            "posterior: the Laplace bridge is for a categorical likelihood of two classes or more, and this one is {likelihood:?} with \
             outputs [{n}, {classes}]; take probit or sampled"
        )
    }
    let total = row_sums.sum_keepdim(1)?;
    // Outputs whose sum is certain need no conditioning but a shift of the mean.
    let certain = total.broadcast_le(&(variance.sum_keepdim(1)? * 1e-14)?)?;
    let shared = row_sums.ones_like()?;
    let (along, by) = (
        certain.broadcast_as(row_sums.shape())?.where_cond(&shared, row_sums)?,
        certain.where_cond(&(total.ones_like()? * classes as f64)?, &total)?,
    );
    let mean = (mean - along.broadcast_mul(&mean.sum_keepdim(1)?.broadcast_div(&by)?)?)?;
    let off = row_sums.sqr()?.broadcast_div(&by)?;
    let off = certain.broadcast_as(off.shape())?.where_cond(&off.zeros_like()?, &off)?;
    let left = (variance - off)?;
    for (input, (left, all)) in left.to_vec2::<f64>()?.iter().zip(variance.to_vec2::<f64>()?).enumerate() {
        let none = |c: &usize| left[*c].is_nan() || left[*c] <= 1e-12 * all[*c].max(f64::MIN_POSITIVE);
        if let Some(class) = (0..classes).find(none) {
            bail!(
                "posterior: output {class} for input {input} has no variance against the others ({:e} of {:e}), and the Laplace bridge needs \
                 some: take probit or sampled",
                left[class],
                all[class]
            )
        }
    }
    let k = classes as f64;
    // In logarithms, since outputs may be far apart: log(1 - 2/K + exp(e)).
    let exponent = mean.broadcast_add(&mean.neg()?.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
    let exponent = (exponent - 2.0 * k.ln())?;
    let high = exponent.relu()?;
    let sum = ((&exponent - &high)?.exp()? + (high.neg()?.exp()? * (1.0 - 2.0 / k))?)?;
    (high + sum.log()?)? - left.log()?
}

impl Predictive {
    /// The parameters `alpha` of the Laplace bridge's Dirichlet distribution over classes, `[n, classes]`: means are `alpha / sum alpha`, and the
    /// larger the sum, the surer is the model. For a categorical likelihood.
    ///
    /// # Errors
    /// When the likelihood is another one, there is one class, or an output has no variance.
    pub fn dirichlet(&self) -> Result<Tensor> {
        self.log_dirichlet()?.exp()
    }

    /// The prediction by the Laplace bridge, `[n, classes]`: the mean of the Dirichlet distribution of [`Predictive::dirichlet`], without draws.
    /// It uses covariances, as [`Predictive::probit`] does not. With small variances and many classes it is too flat: it does not approach
    /// the softmax of the means.
    ///
    /// # Errors
    /// As [`Predictive::dirichlet`].
    pub fn bridge(&self) -> Result<Tensor> {
        softmax_last_dim(&self.log_dirichlet()?)
    }

    fn log_dirichlet(&self) -> Result<Tensor> {
        let variance = crate::linalg::kron::diagonal(&self.covariance)?;
        log_dirichlet(self.likelihood, &self.mean, &variance, &self.covariance.sum(D::Minus1)?)
    }
}
