//! Cross-entropies with weights of classes and terms.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::loss::cross_entropy;
use crate::ops::softmax::log_softmax_last_dim;
use crate::ops::softplus::softplus;

/// What becomes of the losses of the terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean, a scalar. What it divides by stands with each loss.
    #[default]
    Mean,
    /// Their sum, a scalar.
    Sum,
    /// Nothing: one loss a term.
    None,
}

/// The cross-entropy of class numbers under the softmax of logits, with weights of the classes, smoothed labels and ignored terms; the
/// values are PyTorch's.
///
/// A term of label `y` has loss `-(1 - e) w_y ln p_y - e / c sum_k w_k ln p_k`, with `p` the softmax, `w` the weights and `e` the smoothing.
/// The mean divides the sum of these by the sum of `w_y` over the terms that count.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::nn::loss::CrossEntropy;
///
/// let logits = Tensor::new(&[[0f32, 0.], [3., -2.]], &Device::Cpu)?;
/// let labels = Tensor::new(&[1i64, -100], &Device::Cpu)?; // the second term is padding
/// let loss = CrossEntropy { label_smoothing: 0.1, ..Default::default() }.loss(&logits, &labels)?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// Of the classes, `[c]`, 0 or more; 1 each. They get no gradient.
    pub weights: Option<Tensor>,
    /// The share of a label that is spread evenly over all classes, 0..=1; 0.
    pub label_smoothing: f64,
    /// The label of terms that do not count; -100, which only i64 labels can have.
    pub ignore_index: Option<i64>,
    /// [`Reduction::Mean`].
    pub reduction: Reduction,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { weights: None, label_smoothing: 0., ignore_index: Some(-100), reduction: Reduction::Mean }
    }
}

/// The terms that have a part in a loss.
struct Terms {
    /// Of all terms.
    count: usize,
    /// Their places and labels.
    places: Vec<u32>,
    labels: Vec<u32>,
    /// The weights of their labels, and the sum of those.
    weights: Vec<f64>,
    total: f64,
}

impl CrossEntropy {
    /// The loss of `logits` `[.., c]` at `targets` `[..]` of an integer dtype (u8, u32 or i64), in the dtype of the logits: a scalar, or one
    /// a term, in the shape of the targets, with [`Reduction::None`].
    ///
    /// A term that is ignored, or whose label has weight 0 without smoothing, takes no part: its loss and gradient are 0 whatever its
    /// logits, NaN too. The host reads the targets, which on a GPU waits for it.
    ///
    /// # Errors
    /// When shapes do not fit; for a label that is neither one of `0..c` nor `ignore_index`; for weights that are not `c` finite numbers of 0 or
    /// more, and a smoothing outside 0..=1; and where the mean is asked for and no term counts.
    pub fn loss(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let Some((&classes @ 1.., dims)) = logits.dims().split_last() else {
            bail!("cross entropy: expected logits [.., classes], got {:?}", logits.dims())
        };
        if targets.dims() != dims {
            bail!(
                "cross entropy: expected targets of shape {dims:?} for logits {:?}, with the classes last, got {:?}",
                logits.dims(),
                targets.dims()
            )
        }
        let weights = self.class_weights(classes)?;
        let terms = self.terms(targets, weights.as_deref(), classes)?;
        let dtype = logits.dtype();
        let device = logits.device();
        let rows = logits.reshape((terms.count, classes))?;
        if terms.places.is_empty() {
            // A constant 0 of the logits, of which even NaN has gradient 0.
            let no = Tensor::zeros(rows.shape(), DType::U8, device)?;
            let zeros = no.where_cond(&rows, &rows.zeros_like()?)?.sum(1)?;
            return if self.reduction == Reduction::None { zeros.reshape(dims) } else { zeros.sum_all() };
        }
        let labels = Tensor::new(&terms.labels[..], device)?;
        let all = terms.places.len() == terms.count;
        if all && weights.is_none() && self.label_smoothing == 0. && self.reduction == Reduction::Mean {
            return cross_entropy(&rows, &labels);
        }
        let places = Tensor::new(&terms.places[..], device)?;
        let rows = if all { rows } else { rows.index_select(&places, 0)? };
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let log_p = log_softmax_last_dim(&rows.to_dtype(wide)?)?;
        let of_labels = log_p.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
        let mut losses = match weights {
            None => of_labels,
            Some(_) => (of_labels * Tensor::new(&terms.weights[..], device)?.to_dtype(wide)?)?,
        };
        if self.label_smoothing > 0. {
            let spread = match &weights {
                None => log_p.sum(D::Minus1)?,
                Some(weights) => {
                    // A class of weight 0 is left out, whose probability may be 0.
                    let heavy = (0..classes as u32).filter(|&k| weights[k as usize] > 0.);
                    let heavy = Tensor::from_iter(heavy, device)?;
                    let weights =
                        Tensor::new(&weights[..], device)?.index_select(&heavy, 0)?.to_dtype(wide)?;
                    log_p.index_select(&heavy, 1)?.broadcast_mul(&weights)?.sum(D::Minus1)?
                }
            };
            let share = self.label_smoothing;
            losses = ((losses * (1. - share))? + (spread * (share / classes as f64))?)?;
        }
        match self.reduction {
            Reduction::Mean => (losses.sum_all()? * (-1. / terms.total))?.to_dtype(dtype),
            Reduction::Sum => losses.sum_all()?.neg()?.to_dtype(dtype),
            Reduction::None => {
                let zeros = Tensor::zeros(terms.count, wide, device)?;
                zeros.index_add(&places, &losses.neg()?, 0)?.reshape(dims)?.to_dtype(dtype)
            }
        }
    }

    /// What each term's Hessian in its logits, `diag(p) - p p^T`, is multiplied by in the loss: in the shape of `targets`, f64, on the CPU; 0 for
    /// a term that is ignored. It is `(1 - e) w_y + e / c sum_k w_k`, for the mean over the sum of the `w_y`.
    ///
    /// # Errors
    /// As [`CrossEntropy::loss`].
    pub fn term_weights(&self, targets: &Tensor, classes: usize) -> Result<Tensor> {
        let weights = self.class_weights(classes)?;
        let terms = self.terms(targets, weights.as_deref(), classes)?;
        let spread = weights.map_or(1., |weights| weights.iter().sum::<f64>() / classes as f64);
        let divisor = if self.reduction == Reduction::Mean { terms.total } else { 1. };
        let mut of_terms = vec![0.; terms.count];
        for (&place, weight) in terms.places.iter().zip(&terms.weights) {
            let weight = (1. - self.label_smoothing) * weight + self.label_smoothing * spread;
            of_terms[place as usize] = weight / divisor;
        }
        Tensor::from_vec(of_terms, targets.dims(), &Device::Cpu)
    }

    fn class_weights(&self, classes: usize) -> Result<Option<Vec<f64>>> {
        let Some(weights) = &self.weights else { return Ok(None) };
        if weights.dims() != [classes] {
            bail!("cross entropy: expected class weights [{classes}], got {:?}", weights.dims())
        }
        let weights = weights.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        match weights.iter().position(|weight| !(0. ..f64::INFINITY).contains(weight)) {
            Some(class) => bail!(
                "cross entropy: the weight of class {class} is {}, expected a finite number of 0 or more",
                weights[class]
            ),
            None => Ok(Some(weights)),
        }
    }

    fn terms(&self, targets: &Tensor, weights: Option<&[f64]>, classes: usize) -> Result<Terms> {
        if !(0. ..=1.).contains(&self.label_smoothing) {
            bail!("cross entropy: expected a label smoothing in 0..=1, got {}", self.label_smoothing)
        }
        if !targets.dtype().is_int() {
            bail!("cross entropy: expected targets of u8, u32 or i64, got {:?}", targets.dtype())
        }
        let all = targets.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let mut terms =
            Terms { count: all.len(), places: vec![], labels: vec![], weights: vec![], total: 0. };
        for (place, &label) in all.iter().enumerate() {
            if Some(label) == self.ignore_index {
                continue;
            }
            if !(0..classes as i64).contains(&label) {
                let ignored = self.ignore_index.map_or("none".to_string(), |index| index.to_string());
                bail!(
                    "cross entropy: label {label} of term {place} is not one of {classes} classes, and ignore_index is {ignored}"
                )
            }
            let weight = weights.map_or(1., |weights| weights[label as usize]);
            if weight > 0. || self.label_smoothing > 0. {
                terms.places.push(place as u32);
                terms.labels.push(label as u32);
                terms.weights.push(weight);
                terms.total += weight;
            }
        }
        if self.reduction == Reduction::Mean && terms.total == 0. {
            bail!(
                "cross entropy: none of {} terms counts, all being ignored or of weight 0, and the mean of none is no number; leave the batch out, or \
                 take the sum",
                terms.count
            )
        }
        Ok(terms)
    }
}

/// The binary cross-entropy of sigmoids of logits, with weights; the values are PyTorch's.
///
/// An element of logit `z` and target `y` has loss `-w (v y ln s + (1 - y) ln(1 - s))`, with `s = sigmoid(z)`, `w` its weight and `v` the weight
/// of positive targets. The mean divides by the number of elements, whatever their weights. Exact for all finite logits.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::nn::loss::BinaryCrossEntropy;
///
/// let logits = Tensor::new(&[[0f32, 0.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let pos_weight = Some(Tensor::new(&[3f32, 1.], &Device::Cpu)?);
/// let loss = BinaryCrossEntropy { pos_weight, ..Default::default() }.loss(&logits, &targets)?;
/// assert!((loss.to_scalar::<f32>()? - 2. * 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct BinaryCrossEntropy {
    /// Of the elements, of a shape that broadcasts to that of the logits; 1 each. They get no gradient.
    pub weights: Option<Tensor>,
    /// Of positive targets, of a shape that broadcasts to that of the logits, such as `[outputs]`; 1 each. They get no gradient.
    pub pos_weight: Option<Tensor>,
    /// [`Reduction::Mean`].
    pub reduction: Reduction,
}

impl BinaryCrossEntropy {
    /// The loss of `logits` at `targets` of the same shape, in 0..=1 and of any dtype; in the dtype of the logits.
    ///
    /// # Errors
    /// When the shapes differ or weights do not broadcast to them, and for the mean of no elements.
    pub fn loss(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        if targets.dims() != logits.dims() {
            bail!(
                "binary cross entropy: expected targets of shape {:?}, as the logits have it, got {:?}",
                logits.dims(),
                targets.dims()
            )
        }
        if self.reduction == Reduction::Mean && logits.elem_count() == 0 {
            bail!("binary cross entropy: the batch is empty, and the mean of none is no number")
        }
        let dtype = logits.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let factor = |what: &str, weights: &Option<Tensor>| -> Result<Option<Tensor>> {
            let Some(weights) = weights else { return Ok(None) };
            match weights.broadcast_as(logits.shape()) {
                Ok(weights) => Ok(Some(weights.detach().to_device(logits.device())?.to_dtype(wide)?)),
                Err(_) => bail!(
                    "binary cross entropy: expected {what} that broadcast to the logits {:?}, got {:?}",
                    logits.dims(),
                    weights.dims()
                ),
            }
        };
        let (z, y) = (logits.to_dtype(wide)?, targets.to_dtype(wide)?);
        let mut positive = (&y * softplus(&z.neg()?)?)?;
        if let Some(weights) = factor("weights of positive targets", &self.pos_weight)? {
            positive = (positive * weights)?;
        }
        let mut losses = (positive + ((1. - &y)? * softplus(&z)?)?)?;
        if let Some(weights) = factor("weights", &self.weights)? {
            losses = (losses * weights)?;
        }
        match self.reduction {
            Reduction::Mean => losses.mean_all()?.to_dtype(dtype),
            Reduction::Sum => losses.sum_all()?.to_dtype(dtype),
            Reduction::None => losses.to_dtype(dtype),
        }
    }
}

#[cfg(test)]
mod tests;
