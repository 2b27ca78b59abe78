//! Likelihoods, and the cotangents whose backward passes make a Fisher matrix.
//!
//! For one example with outputs `z` the Fisher of the outputs is `H = E[r r^T]`, `r` the gradient of the negative log
//! likelihood at a label drawn from the *model*. A cotangent per column of a square root of `H` gives the exact Fisher
//! (type 2), one drawn `r` an unbiased sample of it. With the training labels instead (the empirical Fisher) `r` is the
//! ordinary gradient: no pass of its own, and a different matrix.

use super::TermWeights;
use crate::gpu::Gpu;
use crate::ops::cross_entropy::gpu_residual;
use crate::ops::sample::{self, DrawKey};
use candle_core::{D, DType, Result, Tensor, bail};

/// How the model's outputs (the last dimension) make a distribution over labels.
///
/// Every other dimension counts loss terms: outputs `[n, c]` are `n` terms, `[n, t, c]` are `n t`. So `n` terms of one output are
/// `[n, 1]`; under a Bernoulli or Gaussian likelihood `[n]` is refused. The loss to train on is the *mean* over terms of the
/// negative log likelihood, or a weighted mean: see [`Terms`](super::Terms).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Likelihood {
    /// Softmax over the last dimension; the loss is the mean cross-entropy.
    Categorical,
    /// An independent sigmoid for every output; the loss sums over the last dimension.
    Bernoulli,
    /// Unit-variance normal around every output; the loss is `1/2 |y - z|^2`, summed over the last dimension.
    /// (candle's `loss::mse` also divides by the number of outputs and lacks the half: scale it by `c / 2`.)
    Gaussian,
}

/// Which labels the Fisher is taken with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fisher {
    /// The training labels: free, since the records come from the ordinary backward pass.
    Empirical,
    /// `draws` labels a term from the model, one backward pass each, keyed by `(seed, step, term)`.
    Sampled {
        /// Backward passes at each refresh; 1 is the usual choice.
        draws: usize,
        /// Seed of the labels.
        seed: u64,
    },
    /// Every column of the square root of the outputs' Hessian: as many backward passes as an example has outputs, which
    /// for `[n, t, c]` are `t c`.
    Exact,
}

impl Fisher {
    /// Whether labels are drawn.
    pub(crate) fn draws(self) -> bool {
        match self {
            Fisher::Sampled { .. } => true,
            Fisher::Empirical | Fisher::Exact => false,
        }
    }

    /// Whether the labels are those of the data.
    pub(crate) fn reads_labels(self) -> bool {
        match self {
            Fisher::Empirical => true,
            Fisher::Sampled { .. } | Fisher::Exact => false,
        }
    }
}

/// Which square root of the outputs' Hessian `H` is taken, a term at a time: vectors `b` with `sum b b^T = H`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Root {
    /// A column for every output: `sqrt(p_c) (e_c - p)` for a categorical likelihood.
    PerOutput,
    /// The same times an orthogonal matrix (a Householder reflection) that turns one column of a categorical likelihood, whose
    /// Hessian has rank `classes - 1`, to zero; it is left out.
    Reduced,
    /// A root of the diagonal of `H` alone: `sqrt(H_cc) e_c`.
    Diagonal,
}

/// What passes start from, one after the other.
pub(crate) type Cotangents<'a> = Box<dyn Iterator<Item = Result<Tensor>> + 'a>;

impl Likelihood {
    /// The mean of the distribution, in the outputs' shape; carries gradients.
    pub(crate) fn mean(&self, outputs: &Tensor) -> Result<Tensor> {
        match self {
            Likelihood::Categorical => crate::ops::softmax::softmax_last_dim(outputs),
            // 1 / (1 + e^-z) by way of tanh, which cannot overflow.
            Likelihood::Bernoulli => ((outputs * 0.5)?.tanh()? * 0.5)? + 0.5,
            Likelihood::Gaussian => Ok(outputs.clone()),
        }
    }

    /// Cotangents `s` of the *summed* loss, the columns of a square root of an example's Hessian: `classes` (or one less) times
    /// the loss terms of one example (`t` for outputs `[n, t, c]`). The terms of an example have passes of their own because
    /// their gradients meet in a layer that mixes or sums positions, where one pass would add their products too. Terms in
    /// the first dimension share a pass: nothing there mixes.
    pub(crate) fn cotangents(
        &self,
        outputs: &Tensor,
        root: Root,
    ) -> Result<impl ExactSizeIterator<Item = Result<Tensor>>> {
        let likelihood = *self;
        let outputs = outputs.detach();
        let classes = outputs.dim(D::Minus1)?;
        let terms = self.terms(&outputs)?;
        let examples = if outputs.rank() > 1 { outputs.dim(0)? } else { 1 };
        let positions = terms / examples;
        let mean = self.mean(&outputs)?;
        let reduced = likelihood == Likelihood::Categorical && root == Root::Reduced && classes > 1;
        // 1 at `at`, 0 elsewhere, `[of]`.
        let unit = move |at: usize, of: usize, like: &Tensor| -> Result<Tensor> {
            Tensor::arange(0u32, of as u32, like.device())?.eq(at as u32)?.to_dtype(like.dtype())
        };
        // What the reflection takes off every column: (p + sqrt(p_last) e_last) / (1 + sqrt(p_last)).
        let removed = match reduced {
            false => mean.clone(),
            true => {
                let root = mean.narrow(D::Minus1, classes - 1, 1)?.sqrt()?;
                let last = unit(classes - 1, classes, &mean)?.broadcast_as(mean.shape())?;
                (&mean + last.broadcast_mul(&root)?)?.broadcast_div(&(root + 1.0)?)?
            }
        };
        let column = move |position: usize, c: usize| -> Result<Tensor> {
            let at_c = mean.narrow(D::Minus1, c, 1)?;
            let unit_c = unit(c, classes, &mean)?.broadcast_as(mean.shape())?;
            let column = match (likelihood, root) {
                (Likelihood::Categorical, Root::Diagonal) | (Likelihood::Bernoulli, _) => {
                    unit_c.broadcast_mul(&(&at_c * (1.0 - &at_c)?)?.sqrt()?)?
                }
                // diag(p) - p p^T = sum_c p_c (e_c - p) (e_c - p)^T
                (Likelihood::Categorical, _) => (unit_c - &removed)?.broadcast_mul(&at_c.sqrt()?)?,
                (Likelihood::Gaussian, _) => unit_c.contiguous()?,
            };
            if positions == 1 {
                return Ok(column);
            }
            let here = unit(position, positions, &mean)?.reshape((1, positions, 1))?;
            column.reshape((examples, positions, classes))?.broadcast_mul(&here)?.reshape(mean.shape())
        };
        let columns = classes - usize::from(reduced);
        Ok((0..positions * columns).map(move |index| column(index / columns, index % columns)))
    }

    /// The cotangents whose passes make the Fisher matrix of a batch, each term's times the root of its weight, and what their records'
    /// gradients are to be multiplied by: the one of `labels` where there are such, else those of `fisher`, drawn by `key`, whose own draw
    /// is 0. The empirical matrix needs labels, which are checked; those of terms of weight 0 are not read.
    pub(crate) fn passes<'a>(
        &'a self,
        fisher: Fisher,
        outputs: &'a Tensor,
        labels: Option<&Tensor>,
        weights: &'a TermWeights,
        key: DrawKey,
    ) -> Result<(Cotangents<'a>, f64)> {
        let (cotangents, scale): (Cotangents<'a>, f64) = match (labels, fisher) {
            (Some(labels), _) => {
                let counts = weights.counts();
                let labels = self.without_ignored(outputs, labels, counts.as_deref())?;
                (Box::new(std::iter::once(self.label_cotangent(outputs, &labels))), 1.0)
            }
            (None, Fisher::Empirical) => {
                bail!("factors: the empirical Fisher matrix needs labels, got none")
            }
            // Draws are averaged, the columns of an exact square root add up.
            (None, Fisher::Sampled { draws, seed }) => {
                let key = move |draw| DrawKey { seed, draw, ..key };
                let draw = move |draw| self.sampled_cotangent(outputs, key(draw));
                (Box::new((0..draws as u64).map(draw)), 1.0 / (draws as f64).sqrt())
            }
            (None, Fisher::Exact) => (Box::new(self.cotangents(outputs, Root::PerOutput)?), 1.0),
        };
        match weights.are_ones() {
            true => Ok((cotangents, scale)),
            false => Ok((Box::new(cotangents.map(|cotangent| weights.rooted(cotangent?))), scale)),
        }
    }

    /// The summed loss's gradient `r` at labels drawn from the model.
    pub(crate) fn sampled_cotangent(&self, outputs: &Tensor, key: DrawKey) -> Result<Tensor> {
        let outputs = outputs.detach();
        let classes = outputs.dim(D::Minus1)?;
        let rows = outputs.reshape(((), classes))?;
        let labels = match self {
            Likelihood::Categorical => {
                if let Some(gpu) = Gpu::of(rows.device()) {
                    let labels = sample::gpu_labels(&gpu, &rows, key)?;
                    return gpu_residual(&gpu, &rows, &labels)?.reshape(outputs.shape());
                }
                let labels = sample::categorical(&rows, key)?;
                return self
                    .label_cotangent(&outputs, &Tensor::from_vec(labels, rows.dim(0)?, rows.device())?);
            }
            Likelihood::Bernoulli => sample::bernoulli(&rows, key)?,
            Likelihood::Gaussian => (&rows + sample::normal(&rows, key)?)?,
        };
        (self.mean(&outputs)? - labels.reshape(outputs.shape())?)?.contiguous()
    }

    /// The summed loss's gradient at given labels: class numbers `[..]` for a categorical likelihood (any integer
    /// dtype), targets in the outputs' shape for the others. A class number that is none makes its row NaN on a GPU, and counts
    /// for no class elsewhere.
    pub(crate) fn label_cotangent(&self, outputs: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let outputs = outputs.detach();
        let targets = match self {
            Likelihood::Categorical => {
                let classes = outputs.dim(D::Minus1)?;
                let terms = self.terms(&outputs)?;
                self.check_class_shape(&outputs, labels, terms)?;
                let labels = labels.to_device(outputs.device())?.flatten_all()?.to_dtype(DType::U32)?;
                if let Some(gpu) = Gpu::of(outputs.device()) {
                    let rows = outputs.reshape((terms, classes))?;
                    return gpu_residual(&gpu, &rows, &labels)?.reshape(outputs.shape());
                }
                let ids = Tensor::arange(0u32, classes as u32, outputs.device())?;
                let hot = labels.unsqueeze(1)?.broadcast_eq(&ids.unsqueeze(0)?)?;
                hot.to_dtype(outputs.dtype())?.reshape(outputs.shape())?
            }
            _ if labels.dims() == outputs.dims() => labels.to_dtype(outputs.dtype())?,
            _ => bail!("labels: expected targets of shape {:?}, got {:?}", outputs.dims(), labels.dims()),
        };
        (self.mean(&outputs)? - targets)?.contiguous()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};

    #[test]
    fn roots_make_the_hessian() -> Result<()> {
        for (likelihood, dims) in [
            (Likelihood::Categorical, vec![3, 5]),
            (Likelihood::Categorical, vec![3, 2]),
            (Likelihood::Categorical, vec![3, 1]),
            (Likelihood::Bernoulli, vec![3, 5]),
            (Likelihood::Gaussian, vec![3, 5]),
        ] {
            let classes = dims[1];
            let outputs = (random(0, &dims)? * 3.0)?;
            let p = likelihood.mean(&outputs)?.to_vec2::<f64>()?;
            for root in [Root::PerOutput, Root::Reduced, Root::Diagonal] {
                let columns: Result<Vec<_>> = likelihood.cotangents(&outputs, root)?.collect();
                let columns = columns?;
                let full = likelihood != Likelihood::Categorical || root != Root::Reduced || classes == 1;
                assert_eq!(columns.len(), classes - usize::from(!full));
                for (n, p) in p.iter().enumerate() {
                    for i in 0..classes {
                        for j in 0..classes {
                            let own = if i == j { 1.0 } else { 0.0 };
                            let hessian = match likelihood {
                                Likelihood::Categorical if root == Root::Diagonal => {
                                    own * p[i] * (1.0 - p[i])
                                }
                                Likelihood::Categorical => own * p[i] - p[i] * p[j],
                                Likelihood::Bernoulli => own * p[i] * (1.0 - p[i]),
                                Likelihood::Gaussian => own,
                            };
                            let made = columns.iter().map(|b| {
                                let row = values(&b.get(n).expect("a row")).expect("readable");
                                row[i] * row[j]
                            });
                            assert!((made.sum::<f64>() - hessian).abs() < 1e-15, "{likelihood:?} {root:?}");
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn cotangents_on_a_gpu_are_those_on_the_cpu() -> Result<()> {
        let outputs = random(0, &[3, 4, 5])?;
        let key = DrawKey { seed: 1, step: 2, draw: 0, first_row: 7 };
        for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian] {
            let sampled = || likelihood.sampled_cotangent(&outputs, key);
            assert_close(&emulate(sampled)?, &values(&sampled()?)?, 1e-14);
        }
        let labels: Vec<i64> = (0..12).map(|i| i % 5).collect();
        let labels = Tensor::from_vec(labels, (3, 4), outputs.device())?;
        let given = || Likelihood::Categorical.label_cotangent(&outputs, &labels);
        assert_close(&emulate(given)?, &values(&given()?)?, 1e-14);
        Ok(())
    }
}
