//! What each loss term counts: weights, of which 0 is "ignored", and several heads of one model.

use super::Likelihood;
use super::labels::class_numbers;
use candle_core::{DType, Device, Result, Tensor, bail};

/// The weights of a batch's loss terms.
///
/// With `l_n` the negative log likelihood of term `n`, what is trained on, and what the curvature is of, is
///
/// ```text
/// loss = sum_n w_n l_n / total,    total = sum_n w_n unless `over` says otherwise
/// F    = sum_n w_n F_n / total
/// ```
///
/// This is the weighted mean of PyTorch's losses. A term of weight 0 is ignored: its label is not read, and it adds nothing to the
/// curvature. The default gives every term the weight 1.
///
/// In the Kronecker factors a term's weight multiplies its gradients' second moments, and the inputs of a layer count as the terms do that
/// are made of them. For outputs `[n, t, c]` with weights `[n, t]` (or flattened, `[n t, c]` and `[n t]`)
///
/// * a layer that sees as many rows as there are terms weighs each row as its term, unless [`Terms::mixing`] was called;
/// * a layer that sees a batch of `n` examples weighs all positions of an example by the mean weight of its terms;
/// * a layer of other shapes, where rows and terms cannot be told to belong together, weighs every row by the mean weight.
///
/// [`Tape::mask`](super::Tape::mask) is apart from this: it takes rows out of the layers' records, whatever their weights, and leaves the
/// loss's terms alone. So padding has both: the mask for the layers over padded sequences, the weight 0 for the terms of padded
/// positions. A row counts where its position is in the mask and its weight is not 0.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::tape::{Likelihood::Categorical, Terms};
///
/// let outputs = Tensor::zeros((3, 3), DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[2i64, -100, 0], &Device::Cpu)?;
/// let of_classes = Tensor::new(&[1f32, 5., 3.], &Device::Cpu)?;
/// assert_eq!(Terms::ignoring(&labels, -100)?.total(Categorical, &outputs)?, 2.);
/// assert_eq!(Terms::of_classes(&labels, &of_classes, Some(-100), 0.)?.total(Categorical, &outputs)?, 4.);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Terms {
    weights: Option<Weights>,
    over: Option<f64>,
    mixing: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Weights {
    dims: Vec<usize>,
    values: Vec<f64>,
    /// Their sum; with label smoothing that of the classes' weights.
    total: f64,
}

impl Terms {
    /// All terms with the weight 1: their plain mean.
    pub fn equal() -> Self {
        Self::default()
    }

    /// Given weights, zero or more: `[..]` in the shape of the outputs without their last dimension, or `[terms]` in row-major order.
    ///
    /// For Bernoulli and Gaussian likelihoods also in the outputs' own shape, a weight for every output: `pos_weight y + (1 - y)` for the
    /// `pos_weight` of a binary cross-entropy. A term's weight is then the mean over its outputs.
    ///
    /// The weights are read by the host; where `curvature_due` is false there is no need to make them.
    ///
    /// # Errors
    /// When a weight is negative or not finite.
    pub fn weighted(weights: &Tensor) -> Result<Self> {
        let values = weights.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        Self::new(weights.dims(), values.flatten_all()?.to_vec1()?, None)
    }

    /// The weight 0 where `labels` is `ignore_index`, else 1. Labels of an unsigned type cannot hold -100: it becomes another number, which
    /// the check of labels refuses.
    ///
    /// # Errors
    /// When the labels are no integers.
    pub fn ignoring(labels: &Tensor, ignore_index: i64) -> Result<Self> {
        let values = integers(labels)?.into_iter().map(|label| f64::from(u8::from(label != ignore_index)));
        Self::new(labels.dims(), values.collect(), None)
    }

    /// The weight of its class, `class_weights` `[classes]`, for every label; 0 where it is `ignore_index`.
    ///
    /// With `label_smoothing` `e` a term is `sum_c t_c w_c (-log p_c)`, `t` being `1 - e` at the label and `e / classes` everywhere, and the
    /// total stays `sum_n w_{y_n}`, both as in PyTorch: the term then counts `(1 - e) w_y + e mean(w)`. Without class weights
    /// smoothing changes no curvature but the empirical one, which has it from the loss.
    ///
    /// # Errors
    /// When a label is none of the classes, a weight is negative or not finite, or the smoothing is not in `[0, 1)`.
    pub fn of_classes(
        labels: &Tensor,
        class_weights: &Tensor,
        ignore_index: Option<i64>,
        label_smoothing: f64,
    ) -> Result<Self> {
        if class_weights.rank() != 1 || class_weights.elem_count() == 0 {
            bail!("terms: expected class weights of shape [classes], got {:?}", class_weights.dims())
        }
        if !(0.0..1.0).contains(&label_smoothing) {
            bail!("terms: expected a label smoothing in [0, 1), got {label_smoothing}")
        }
        let class_weights: Vec<f64> =
            class_weights.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?;
        check(&class_weights, "class weight")?;
        let mean = class_weights.iter().sum::<f64>() / class_weights.len() as f64;
        let (mut values, mut total) = (vec![], 0.0);
        for (term, label) in integers(labels)?.into_iter().enumerate() {
            if Some(label) == ignore_index {
                values.push(0.0);
                continue;
            }
            let Some(weight) = usize::try_from(label).ok().and_then(|label| class_weights.get(label)) else {
                bail!(
                    "terms: label {label} of loss term {term} is not one of {} classes, 0 to {}, nor the label to ignore, {ignore_index:?}",
                    class_weights.len(),
                    class_weights.len() - 1
                )
            };
            total += weight;
            values.push((1.0 - label_smoothing) * weight + label_smoothing * mean);
        }
        Self::new(labels.dims(), values, Some(total))
    }

    fn new(dims: &[usize], values: Vec<f64>, total: Option<f64>) -> Result<Self> {
        check(&values, "weight")?;
        let total = total.unwrap_or_else(|| match values.len() {
            0 => 0.0,
            _ => values.iter().sum::<f64>(),
        });
        Ok(Self { weights: Some(Weights { dims: dims.to_vec(), values, total }), ..Self::default() })
    }

    /// The same with every weight multiplied by one of `weights`, in the same shape: importance weights beside classes or ignored labels.
    ///
    /// # Errors
    /// When the shapes differ, or a weight is negative or not finite.
    pub fn times(self, weights: &Tensor) -> Result<Self> {
        let other = Self::weighted(weights)?;
        let (Some(own), Some(others)) = (&self.weights, &other.weights) else { return Ok(other) };
        if own.dims != others.dims {
            bail!("terms: expected weights of shape {:?}, got {:?}", own.dims, others.dims)
        }
        let values = own.values.iter().zip(&others.values).map(|(a, b)| a * b).collect();
        Ok(Self { over: self.over, mixing: self.mixing, ..Self::new(&own.dims, values, None)? })
    }

    /// The same over a given total: `loss = sum_n w_n l_n / total`. The number of all terms, say, where the loss divides by that, or one
    /// constant for all micro-batches.
    pub fn over(self, total: f64) -> Self {
        Self { over: Some(total), ..self }
    }

    /// Says that the positions of an example mix on their way to its terms, as by attention or recurrence, so that an ignored term's
    /// position still has a part in the others: in every layer each position then counts with the mean weight of its example's terms,
    /// the outputs' first dimension being the examples.
    pub fn mixing(self) -> Self {
        Self { mixing: true, ..self }
    }

    /// What the sum of the weighted terms of `outputs` is divided by: the weight of a micro-batch among others.
    ///
    /// # Errors
    /// When the weights do not fit the outputs, or none is above 0 and no total is given.
    pub fn total(&self, likelihood: Likelihood, outputs: &Tensor) -> Result<f64> {
        Ok(self.of(likelihood, outputs)?.total)
    }

    /// The weights of the terms of `outputs`.
    ///
    /// # Errors
    /// When they do not fit the outputs, or none is positive and their sum is what they are divided by.
    pub(crate) fn of(&self, likelihood: Likelihood, outputs: &Tensor) -> Result<TermWeights> {
        let terms = likelihood.terms(outputs)?;
        if let Some(total) = self.over
            && !(total.is_finite() && total > 0.0)
        {
            bail!("terms: expected a positive total, got {total}")
        }
        let classes = outputs.elem_count() / terms;
        let examples = if outputs.rank() > 1 { outputs.dim(0)? } else { 1 };
        let Some(Weights { dims, values, total }) = &self.weights else {
            let count = terms as f64;
            let total = self.over.unwrap_or(count);
            return Ok(TermWeights { terms, total, factor: 1.0, sum: count, squares: count, given: None });
        };
        let of_terms = &outputs.dims()[..outputs.rank() - 1];
        let each_output = dims == outputs.dims() && likelihood != Likelihood::Categorical;
        if !(each_output || dims == of_terms || dims == &[terms]) {
            bail!(
                "terms: expected a weight for each of the {terms} loss terms of outputs {:?}, of shape {of_terms:?} or [{terms}], got {dims:?}",
                outputs.dims()
            )
        }
        let share = if each_output { classes } else { 1 };
        let moments = |chunk: &[f64]| {
            let count = chunk.len() as f64;
            [chunk.iter().sum::<f64>() / count, chunk.iter().map(|w| w * w).sum::<f64>() / count]
        };
        let of_terms: Vec<[f64; 2]> = values.chunks(share).map(moments).collect();
        let sums = of_terms.iter().fold([0.0, 0.0], |sum, term| [sum[0] + term[0], sum[1] + term[1]]);
        let total = self.over.unwrap_or(if each_output { sums[0] } else { *total });
        if total <= 0.0 {
            bail!(
                "terms: none of the {terms} loss terms has a weight above 0, so that their weighted mean is 0 / 0; leave this batch out, \
                 or give the total that the loss is divided by (Terms::over)"
            )
        }
        let mut root_dims = outputs.dims().to_vec();
        if let Some(last) = root_dims.last_mut()
            && !each_output
        {
            *last = 1;
        }
        let root = values.iter().map(|w| w.sqrt()).collect::<Vec<_>>();
        let root = Tensor::from_vec(root, root_dims, &Device::Cpu)?;
        let root = root.to_dtype(outputs.dtype())?.to_device(outputs.device())?;
        let given = Given { of_terms, examples, mixing: self.mixing, root };
        Ok(TermWeights { terms, total, factor: 1.0, sum: sums[0], squares: sums[1], given: Some(given) })
    }
}

fn integers(labels: &Tensor) -> Result<Vec<i64>> {
    if !labels.dtype().is_int() {
        bail!("terms: expected integer labels, got {:?} of {:?}", labels.dims(), labels.dtype())
    }
    class_numbers(labels)
}

fn check(weights: &[f64], what: &str) -> Result<()> {
    match weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        Some(at) => bail!("terms: {what} {at} is {}, expected a finite number of zero or more", weights[at]),
        None => Ok(()),
    }
}

/// One of several outputs of a model whose losses are added, with a weight, to the loss that is trained on.
#[derive(Debug, Clone)]
pub struct Head<'a> {
    /// Its outputs, `[.., classes]`, with their graph.
    pub outputs: &'a Tensor,
    /// Their likelihood.
    pub likelihood: Likelihood,
    /// Labels to take the curvature with, in place of drawn or all ones; those of ignored terms may be anything.
    pub labels: Option<&'a Tensor>,
    /// The weights of its terms.
    pub terms: Terms,
    /// The weight of its loss in the sum, zero or more.
    pub weight: f64,
}

impl<'a> Head<'a> {
    /// A head of weight 1 with terms that count the same, without labels.
    pub fn new(outputs: &'a Tensor, likelihood: Likelihood) -> Self {
        Self { outputs, likelihood, labels: None, terms: Terms::equal(), weight: 1.0 }
    }

    /// The weights of its terms, scaled so that sums over terms divided by `share` are the head's part of the loss.
    ///
    /// # Errors
    /// As [`Terms::of`], when the head's weight is negative or not finite, and when its labels do not fit.
    pub(crate) fn weights(&self, share: Option<f64>) -> Result<TermWeights> {
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            bail!("heads: expected a weight of zero or more, got {}", self.weight)
        }
        let mut weights = self.terms.of(self.likelihood, self.outputs)?;
        if let Some(labels) = self.labels {
            let counts = weights.counts();
            self.likelihood.check_labels_of(self.outputs, labels, counts.as_deref(), false)?;
        }
        let share = share.unwrap_or(weights.total);
        weights.factor = self.weight * (share / weights.total);
        Ok(weights)
    }
}

/// The weights of the terms of some outputs.
#[derive(Debug)]
pub(crate) struct TermWeights {
    pub terms: usize,
    /// What sums over terms are divided by.
    pub total: f64,
    /// Multiplies every weight.
    pub factor: f64,
    /// Of the terms' weights, without the factor.
    sum: f64,
    squares: f64,
    /// Weights other than 1.
    given: Option<Given>,
}

#[derive(Debug)]
struct Given {
    /// The mean weight of a term's outputs and the mean of its square.
    of_terms: Vec<[f64; 2]>,
    examples: usize,
    mixing: bool,
    /// Roots of the weights, of the outputs' rank, dtype and device.
    root: Tensor,
}

impl TermWeights {
    /// Terms that all count 1.
    #[cfg(test)]
    pub fn equal(terms: usize) -> Self {
        let count = terms as f64;
        Self { terms, total: count, factor: 1.0, sum: count, squares: count, given: None }
    }

    pub fn sum(&self) -> f64 {
        self.factor * self.sum
    }

    pub fn squares(&self) -> f64 {
        self.factor * self.factor * self.squares
    }

    /// Whether every term has the weight 1.
    pub fn are_ones(&self) -> bool {
        self.given.is_none() && self.factor == 1.0
    }

    /// Which terms have a weight above 0, unless all have.
    pub fn counts(&self) -> Option<Vec<bool>> {
        Some(self.given.as_ref()?.of_terms.iter().map(|term| term[0] > 0.0).collect())
    }

    /// A cotangent with every term times the root of its weight.
    pub fn rooted(&self, cotangent: Tensor) -> Result<Tensor> {
        let scaled = match &self.given {
            Some(given) => cotangent.broadcast_mul(&given.root)?,
            None => cotangent,
        };
        if self.factor == 1.0 { Ok(scaled) } else { scaled * self.factor.sqrt() }
    }

    /// Elements `[.., classes]` of terms, times their weights.
    pub fn times(&self, elements: &Tensor) -> Result<Tensor> {
        let scaled = match &self.given {
            Some(given) => elements.broadcast_mul(&given.root.sqr()?)?,
            None => elements.clone(),
        };
        if self.factor == 1.0 { Ok(scaled) } else { scaled * self.factor }
    }

    /// The weights of a layer's rows, `batch` times `shared` in row-major order, and the weights by whose roots the gradients of the
    /// weighted terms are to be divided to be those that [`TermWeights::rooted`] gives. `None` where all are the factor.
    pub fn of_rows(&self, batch: usize, shared: usize) -> Option<Vec<[f64; 2]>> {
        let Given { of_terms, examples, mixing, .. } = self.given.as_ref()?;
        let terms = of_terms.len();
        let mean = |chunk: &[[f64; 2]]| {
            let sums = chunk.iter().fold([0.0, 0.0], |sum, term| [sum[0] + term[0], sum[1] + term[1]]);
            sums.map(|sum| sum / chunk.len().max(1) as f64)
        };
        // Means over as many consecutive terms, repeated.
        let spread = |size: usize, copies: usize| -> Vec<[f64; 2]> {
            of_terms.chunks(size.max(1)).flat_map(|chunk| std::iter::repeat_n(mean(chunk), copies)).collect()
        };
        let rows = batch * shared;
        let positions = terms / examples.max(&1);
        let moments = if rows == terms {
            if *mixing { spread(positions, positions) } else { of_terms.clone() }
        } else if batch > 0 && terms.is_multiple_of(batch) {
            spread(terms / batch, shared)
        } else if shared == 1 && rows.is_multiple_of(*examples) {
            spread(positions, rows / examples)
        } else {
            vec![mean(of_terms); rows]
        };
        let pair = |[first, second]: [f64; 2]| {
            let divisor = if first > 0.0 { second / first } else { 0.0 };
            [self.factor * first, self.factor * divisor]
        };
        Some(moments.into_iter().map(pair).collect())
    }

    pub fn factor(&self) -> f64 {
        self.factor
    }
}
