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
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    const LOGITS: [[f64; 3]; 4] = [[0.3, -1.2, 2.0], [1.5, 0.25, -0.75], [-2.0, 0.5, 1.0], [0.1, 0.2, -0.3]];

    fn tensor<T: candle_core::NdArray>(values: T) -> Result<Tensor> {
        Tensor::new(values, &Device::Cpu)
    }

    /// Values and gradients of the sum of the losses against PyTorch's, natively and by the kernels, and against differences.
    fn check(f: impl Fn(&Tensor) -> Result<Tensor>, losses: &[f64], gradient: &[f64]) -> Result<()> {
        let x = Var::from_tensor(&tensor(&LOGITS)?)?;
        let run = || -> Result<()> {
            let found = f(&x)?;
            assert_close(&found, losses, 1e-13);
            let grads = found.sum_all()?.backward()?;
            assert_close(grads.get(&x).unwrap_or(&found), gradient, 1e-13);
            Ok(())
        };
        run()?;
        emulate(run)?;
        check_gradients(std::slice::from_ref(&x), |a| f(&a[0]));
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
            let found = f(&x.to_dtype(dtype)?)?;
            assert_eq!(found.dtype(), dtype);
            assert_close(&found, losses, tolerance);
        }
        Ok(())
    }

    #[test]
    fn cross_entropy_is_pytorchs() -> Result<()> {
        let weights = Some(tensor(&[0.5f64, 2., 1.25])?);
        let of = |weights: &Option<Tensor>, label_smoothing: f64, reduction| CrossEntropy {
            weights: weights.clone(),
            label_smoothing,
            reduction,
            ..Default::default()
        };
        use Reduction::{Mean, None as Each, Sum};
        let (whole, ignored) = ([2i64, 0, 1, 1], [2i64, -100, 1, 0]);
        check(
            |x| of(&weights, 0., Mean).loss(x, &tensor(&whole)?),
            &[0.742308604640989],
            &[
                0.0324606222137807,
                0.00724294383307856,
                -0.0397035660468593,
                -0.0244834485955596,
                0.0178988351302306,
                0.006584613465329,
                0.010455265241591,
                -0.220454881293287,
                0.209999616051696,
                0.125320561822797,
                -0.209325446593066,
                0.0840048847702692,
            ],
        )?;
        check(
            |x| of(&weights, 0., Sum).loss(x, &tensor(&[2i64, -100, 1, 1])?),
            &[4.10293817198207],
            &[
                0.186648577729239,
                0.0416469270402017,
                -0.228295504769441,
                0.,
                0.,
                0.,
                0.060117775139148,
                -1.2676155674364,
                1.20749779229725,
                0.72059323048108,
                -1.20362131791013,
                0.483028087429048,
            ],
        )?;
        check(
            |x| of(&None, 0.1, Mean).loss(x, &tensor(&whole)?),
            &[0.706108769730556],
            &[
                0.0289963822125145,
                -3.94792529298527e-06,
                -0.0289924342872215,
                -0.0537232480455671,
                0.0431258176660796,
                0.0105974303794875,
                -0.000818611440939828,
                -0.141785279262883,
                0.142603890703823,
                0.0817408204768017,
                -0.133785998072099,
                0.0520451775952976,
            ],
        )?;
        check(
            |x| of(&weights, 0.2, Mean).loss(x, &tensor(&ignored)?),
            &[0.885101680435688],
            &[
                0.0408840651722415,
                -0.0244497083448351,
                -0.0164343568274064,
                0.,
                0.,
                0.,
                0.00594016231210096,
                -0.281567395523201,
                0.2756272332111,
                -0.0531041422471953,
                0.0334639302255667,
                0.0196402120216286,
            ],
        )?;
        check(
            |x| of(&weights, 0.2, Each).loss(x, &tensor(&ignored)?),
            &[0.735422389524321, 0., 1.90017093599989, 0.683537976109619],
            &[
                0.153315244395906,
                -0.0916864062931316,
                -0.061628838102774,
                0.,
                0.,
                0.,
                0.0222756086703786,
                -1.055877733212,
                1.03360212454162,
                -0.199140533426982,
                0.125489738345875,
                0.0736507950811072,
            ],
        )
    }

    /// More dimensions, other integers, another number to ignore.
    #[test]
    fn shapes_and_dtypes() -> Result<()> {
        let x = tensor(&LOGITS)?;
        let loss = CrossEntropy { ignore_index: Some(7), label_smoothing: 0.1, ..Default::default() };
        let labels = tensor(&[2u32, 7, 1, 0])?;
        let expected = values(&loss.loss(&x, &labels)?)?;
        for dtype in [DType::U8, DType::U32, DType::I64] {
            let labels = labels.to_dtype(dtype)?;
            assert_close(&loss.loss(&x, &labels)?, &expected, 0.);
            assert_close(&loss.loss(&x.reshape((2, 2, 3))?, &labels.reshape((2, 2))?)?, &expected, 0.);
        }
        let each = CrossEntropy { reduction: Reduction::None, ..loss };
        assert_eq!(each.loss(&x.reshape((2, 2, 3))?, &labels.reshape((2, 2))?)?.dims(), [2, 2]);
        assert_eq!(each.loss(&x.get(0)?, &labels.get(0)?)?.rank(), 0);
        // Without options it is the loss of this name.
        let (plain, labels) = (CrossEntropy::default(), tensor(&[2u8, 0, 1, 0])?);
        assert_close(&plain.loss(&x, &labels)?, &values(&cross_entropy(&x, &labels)?)?, 0.);
        Ok(())
    }

    /// Rows that do not count take no part, whatever is in them; classes of probability and weight 0 neither.
    #[test]
    fn what_does_not_count() -> Result<()> {
        let (inf, nan) = (f64::INFINITY, f64::NAN);
        let x = Var::from_tensor(&tensor(&[[0.3, -1.2, -inf], [nan, inf, 0.], [-inf, -inf, -inf]])?)?;
        let weights = Some(tensor(&[1f64, 2., 0.])?);
        for label_smoothing in [0., 0.3] {
            let alone = CrossEntropy { weights: weights.clone(), label_smoothing, ..Default::default() };
            let row = Var::from_tensor(&x.narrow(0, 0, 1)?.copy()?)?;
            let expected = alone.loss(&row, &tensor(&[1i64])?)?;
            let of_row = expected.backward()?;
            let of_row = of_row.get(&row).map(values).transpose()?.unwrap_or_default();
            assert!(values(&expected)?[0].is_finite() && of_row.iter().all(|g| g.is_finite()));
            let check = || -> Result<()> {
                let found = alone.loss(&x, &tensor(&[1i64, -100, -100])?)?;
                assert_close(&found, &values(&expected)?, 1e-15);
                let grads = found.backward()?;
                let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
                assert_close(&tensor(&grad[..3])?, &of_row, 1e-15);
                assert_eq!(grad[3..], [0.; 6]);
                Ok(())
            };
            check()?;
            emulate(check)?;
        }
        // A sum of nothing is 0, with a gradient of 0; a mean of nothing is an error.
        for reduction in [Reduction::Sum, Reduction::None] {
            let none = CrossEntropy { reduction, ..Default::default() }.loss(&x, &tensor(&[-100i64; 3])?)?;
            assert!(values(&none)?.iter().all(|&v| v == 0.));
            let grads = none.sum_all()?.backward()?;
            assert_eq!(grads.get(&x).map(values).transpose()?, Some(vec![0.; 9]));
        }
        let message = |loss: CrossEntropy, labels: [i64; 3]| -> Result<String> {
            Ok(loss.loss(&x, &tensor(&labels)?).err().map(|e| e.to_string()).unwrap_or_default())
        };
        let of = |weights: Option<Tensor>| CrossEntropy { weights, ..Default::default() };
        assert!(message(of(None), [-100; 3])?.contains("none of 3 terms counts"));
        assert!(message(of(weights), [2; 3])?.contains("none of 3 terms counts"));
        for (label, shown) in [(3, "label 3 of term 1"), (-1, "label -1 of term 1")] {
            let message = message(of(None), [0, label, 0])?;
            assert!(message.contains(shown) && message.contains("3 classes"), "{message}");
        }
        let unignored = CrossEntropy { ignore_index: None, ..Default::default() };
        assert!(message(unignored, [0, -100, 0])?.contains("label -100 of term 1"));
        for wrong in [&[1f64, 2.][..], &[1., -1., 2.], &[1., nan, 2.], &[1., inf, 2.]] {
            assert!(message(of(Some(tensor(wrong)?)), [0; 3])?.contains("weight"));
        }
        for label_smoothing in [-0.1, 1.1, nan] {
            let loss = CrossEntropy { label_smoothing, ..Default::default() };
            assert!(message(loss, [0; 3])?.contains("label smoothing in 0..=1"));
        }
        let plain = CrossEntropy::default();
        assert!(
            plain.loss(&x, &tensor(&[0f64; 3])?).is_err() && plain.loss(&x, &tensor(&[0u32; 2])?).is_err()
        );
        Ok(())
    }

    /// The Hessian of the loss, by differences of its gradient, is each term's times its weight.
    #[test]
    fn weights_of_terms_are_those_of_the_hessian() -> Result<()> {
        let labels = tensor(&[2i64, -100, 1, 0])?;
        for (reduction, label_smoothing) in
            [(Reduction::Mean, 0.), (Reduction::Sum, 0.), (Reduction::Mean, 0.2), (Reduction::Sum, 0.2)]
        {
            let weights = Some(tensor(&[0.5f64, 2., 1.25])?);
            let loss = CrossEntropy { weights, label_smoothing, reduction, ..Default::default() };
            let of_terms = values(&loss.term_weights(&labels, 3)?)?;
            for row in 0..4 {
                let gradient = |h: f64| -> Result<f64> {
                    let mut moved = LOGITS;
                    moved[row][0] += h;
                    let x = Var::from_tensor(&tensor(&moved)?)?;
                    let grads = loss.loss(&x, &labels)?.backward()?;
                    Ok(grads.get(&x).map(values).transpose()?.unwrap_or_default()[3 * row])
                };
                let exps = LOGITS[row].map(f64::exp);
                let p = exps[0] / exps.iter().sum::<f64>();
                let second = (gradient(1e-5)? - gradient(-1e-5)?) / 2e-5;
                assert!((second - of_terms[row] * p * (1. - p)).abs() < 1e-9, "{reduction:?} {row}");
            }
        }
        Ok(())
    }

    #[test]
    fn binary_cross_entropy_is_pytorchs() -> Result<()> {
        let targets = || tensor(&[[1f64, 0., 0.25], [0., 1., 1.], [0.5, 0., 0.], [1., 1., 0.]]);
        let weights = || Ok::<_, candle_core::Error>(Some(tensor(&[0.5f64, 2., 1.25])?));
        check(
            |x| BinaryCrossEntropy { pos_weight: weights()?, ..Default::default() }.loss(x, &targets()?),
            &[0.950422330828214],
            &[
                -0.0177315617995142,
                0.0192896013750819,
                0.051945574612625,
                0.0681312063494703,
                -0.0729705831857003,
                -0.0707477811641034,
                -0.013383150706951,
                0.0518716109334879,
                0.0609215482191671,
                -0.0197925338550442,
                -0.075027667114587,
                0.0354631235990284,
            ],
        )?;
        let of_rows = || Ok::<_, candle_core::Error>(Some(tensor(&[[1f64], [0.], [2.], [0.5]])?));
        check(
            |x| {
                let loss = BinaryCrossEntropy {
                    weights: of_rows()?,
                    pos_weight: weights()?,
                    reduction: Reduction::Sum,
                };
                loss.loss(x, &targets()?)
            },
            &[8.97680611790082],
            &[
                -0.21277874159417,
                0.231475216500982,
                0.6233468953515,
                0.,
                0.,
                0.,
                -0.321195616966824,
                1.24491866240371,
                1.46211715726001,
                -0.118755203130265,
                -0.450166002687522,
                0.212778741594171,
            ],
        )?;
        let pos_weight = || Ok::<_, candle_core::Error>(Some(tensor(3f64)?));
        check(
            |x| {
                let loss = BinaryCrossEntropy {
                    weights: weights()?,
                    pos_weight: pos_weight()?,
                    reduction: Reduction::None,
                };
                loss.loss(x, &targets()?)
            },
            &[
                0.831532866702791,
                0.526564934676062,
                2.11299002070557,
                0.850706638991376,
                3.45563651927306,
                4.26326627293087,
                1.62692801104297,
                1.94815396836021,
                1.64157710939778,
                0.966594990110356,
                3.58883321628955,
                0.692944055585659,
            ],
            &[
                -0.638336224782512,
                0.462950433001965,
                0.713994521208529,
                0.408787238096822,
                -2.62694099468521,
                -2.54692012190772,
                -0.630797077977882,
                1.24491866240371,
                0.913823223287506,
                -0.71253121878159,
                -2.70099601612513,
                0.531946853985426,
            ],
        )?;
        let x = random_var(0, &[4, 3])?;
        let wrong = BinaryCrossEntropy { weights: Some(tensor(&[1f64; 4])?), ..Default::default() };
        let message = wrong.loss(&x, &targets()?).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("weights that broadcast to the logits [4, 3], got [4]"), "{message}");
        let empty = x.narrow(0, 0, 0)?;
        assert!(BinaryCrossEntropy::default().loss(&empty, &empty).is_err());
        Ok(())
    }
}
