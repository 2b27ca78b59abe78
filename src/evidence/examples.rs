//! Examples with their labels, and what of them counts.

use crate::tape::{Mask, Tape};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// Examples of one pass where their rows are summed and not kept.
const PASS: usize = 256;
/// The same of sequences that are cut to the longest of a pass: few, so that the short ones are not padded much.
const PASS_CUT: usize = 32;

/// Examples in two tensors whose first dimensions are the examples.
///
/// A *term* is what has a label of its own: an example where outputs are `[n, classes]`, a position of an example where they are
/// `[n, t, classes]`. All terms count once, unless [`Examples::weighted`], [`Examples::ignoring`] or a mask says otherwise; a term of
/// weight `w` enters the log-likelihood and the curvature `w` times. Whoever trains on the mean loss over terms of weights `w` has
/// `sum w` examples in place of `N` where a decay is made of a precision (`T precision / N`).
#[derive(Debug, Clone)]
pub struct Examples {
    x: Tensor,
    y: Tensor,
    /// Of every term or every example, f64 on the CPU.
    weights: Option<Tensor>,
    ignored: Option<i64>,
    mask: Option<Arc<Mask>>,
    /// The dimension of `x` whose positions the mask is of, where selections are cut to their longest example.
    cut: Option<usize>,
}

impl Examples {
    /// Inputs `x` as the model takes them, and labels `y`: class numbers `[n]` or `[n, t]` of an integer type for a categorical
    /// likelihood, targets in the shape of the outputs for the others.
    ///
    /// # Errors
    /// When there are no examples, or not as many of `y` as of `x`.
    pub fn new(x: Tensor, y: Tensor) -> Result<Self> {
        let (n, labels) = (x.dims().first().copied(), y.dims().first().copied());
        if n != labels || n.is_none_or(|n| n == 0) {
            bail!("evidence: expected examples and as many labels, got {:?} and {:?}", x.dims(), y.dims())
        }
        Ok(Self { x: x.detach(), y: y.detach(), weights: None, ignored: None, mask: None, cut: None })
    }

    /// Gives every term a weight: `weights` in the shape of the outputs without their last dimension (`[n]` or `[n, t]`), or `[n]` for
    /// all terms of an example. A term of weight 0 is left out, whatever its label is. Class weights are the weights of the terms' labels.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kronwake::evidence::Examples;
    /// # let cpu = &Device::Cpu;
    /// let (x, y) = (Tensor::zeros((3, 2), candle_core::DType::F32, cpu)?, Tensor::new(&[0u32, 1, 1], cpu)?);
    /// let examples = Examples::new(x, y)?.weighted(&Tensor::new(&[1f32, 0.5, 0.5], cpu)?)?;
    /// # assert_eq!(examples.len(), 3);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When they are not of as many examples, one is negative or not finite, or all are zero.
    pub fn weighted(mut self, weights: &Tensor) -> Result<Self> {
        if weights.dims().first() != Some(&self.len()) {
            bail!(
                "evidence: weights of shape {:?} for {} examples, expected one an example or one a term",
                weights.dims(),
                self.len()
            )
        }
        let weights = weights.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let values = weights.flatten_all()?.to_vec1::<f64>()?;
        if let Some(at) = values.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            bail!(
                "evidence: the weight of term {at} is {}, expected a finite number, zero or more",
                values[at]
            )
        }
        if values.iter().all(|w| *w == 0.0) {
            bail!("evidence: all {} weights are zero, expected one above 0 or more", values.len())
        }
        self.weights = Some(weights);
        Ok(self)
    }

    /// Leaves out the terms whose label is `label`, as `ignore_index` of other libraries does (there -100 by default).
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kronwake::evidence::Examples;
    /// # let cpu = &Device::Cpu;
    /// let (x, y) = (Tensor::zeros((1, 3, 2), candle_core::DType::F32, cpu)?, Tensor::new(&[[0i64, 1, -100]], cpu)?);
    /// let examples = Examples::new(x, y)?.ignoring(-100);
    /// # assert_eq!(examples.len(), 1);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn ignoring(mut self, label: i64) -> Self {
        self.ignored = Some(label);
        self
    }

    /// Says which positions count, as [`Tape::mask`] does for a batch: `mask` `[n, positions]` is not zero there. What is left out does
    /// not enter the curvature, and where the outputs are `[n, positions, classes]` neither the log-likelihood. Without it the tape's own
    /// mask counts, which has to be of these examples.
    ///
    /// # Errors
    /// When it is not of rank 2 and of as many examples, or an example has no position that counts.
    pub fn masked(mut self, mask: &Tensor) -> Result<Self> {
        if mask.dims().first() != Some(&self.len()) {
            bail!(
                "evidence: a mask {:?} for {} examples, expected [examples, positions]",
                mask.dims(),
                self.len()
            )
        }
        self.mask = Some(Arc::new(Mask::new(mask)?));
        Ok(self)
    }

    /// Cuts what is selected, and every pass over some of the examples, to the positions that its longest example has: dimension `dim` of `x`
    /// and the mask's second are those of the same positions, and padding comes last. For models that take any number of positions; what they
    /// compute has to be the same with less padding. Examples in the order of their lengths are padded least: passes are of 32 of them then, and
    /// of 256 without this.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kronwake::evidence::Examples;
    /// # let cpu = &Device::Cpu;
    /// let tokens = Tensor::new(&[[7u32, 0, 0, 0], [7, 8, 0, 0], [7, 8, 9, 9]], cpu)?;
    /// let mask = Tensor::new(&[[1u32, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], cpu)?;
    /// let examples = Examples::new(tokens, Tensor::new(&[0u32, 1, 1], cpu)?)?.masked(&mask)?.cut(1)?;
    /// assert_eq!(examples.select(&[0, 1])?.x().dims(), [2, 2]);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When there is no mask, `x` has other positions there, or the labels are more than one an example.
    pub fn cut(mut self, dim: usize) -> Result<Self> {
        let positions = self.mask.as_ref().map(|mask| mask.dims()[1]);
        if dim == 0 || positions.is_none() || self.x.dims().get(dim).copied() != positions {
            bail!(
                "evidence: cuts of dimension {dim} of examples {:?}, expected a mask of as many positions, got {positions:?}: call \
                 Examples::masked before",
                self.x.dims()
            )
        }
        if self.y.rank() != 1 {
            bail!(
                "evidence: cuts are of examples with one label each, got labels {:?}; leave them as long as they are",
                self.y.dims()
            )
        }
        self.cut = Some(dim);
        Ok(self)
    }

    /// With the tape's mask, unless they have one of their own.
    pub(crate) fn masked_by(&self, tape: &Tape) -> Result<Self> {
        let mut examples = self.clone();
        if let (None, Some(mask)) = (&self.mask, tape.current_mask()) {
            let [batch, positions] = mask.dims();
            if batch != self.len() {
                bail!(
                    "evidence: the tape's mask is of {batch} examples of {positions} positions, expected {} examples: set the mask of \
                     all of them, give it to Examples::masked, or set none",
                    self.len()
                )
            }
            examples.mask = Some(mask);
        }
        Ok(examples)
    }

    /// How many there are, at least one.
    pub fn len(&self) -> usize {
        self.x.dims().first().copied().unwrap_or(0)
    }

    /// Never: [`Examples::new`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The inputs.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The labels.
    pub fn y(&self) -> &Tensor {
        &self.y
    }

    pub(crate) fn mask(&self) -> Option<&Arc<Mask>> {
        self.mask.as_ref()
    }

    /// Those of the given numbers, in this order, with their weights and masks.
    ///
    /// # Errors
    /// When a number is out of range.
    pub fn select(&self, numbers: &[usize]) -> Result<Self> {
        if let Some(wrong) = numbers.iter().find(|&&i| i >= self.len()) {
            bail!("evidence: example {wrong} of {}", self.len())
        }
        let numbers: Vec<u32> = numbers.iter().map(|&i| i as u32).collect();
        let numbers = Tensor::new(numbers.as_slice(), &Device::Cpu)?;
        let of = |t: &Tensor| t.index_select(&numbers.to_device(t.device())?, 0);
        let (mut x, mut mask) = (of(&self.x)?, None);
        if let Some(all) = &self.mask {
            let mut selected = all.select(&numbers)?;
            if let Some(dim) = self.cut {
                selected = selected.cut()?;
                x = x.narrow(dim, 0, selected.dims()[1])?.contiguous()?;
            }
            mask = Some(Arc::new(selected));
        }
        Ok(Self {
            weights: self.weights.as_ref().map(of).transpose()?,
            ignored: self.ignored,
            mask,
            cut: self.cut,
            ..Self::new(x, of(&self.y)?)?
        })
    }

    /// How many of them a pass takes, where what it leaves behind fits.
    pub(crate) fn in_a_pass(&self) -> usize {
        if self.cut.is_some() { PASS_CUT } else { PASS }
    }

    /// All of them, so many at a time that what a pass leaves behind fits.
    pub(crate) fn passes(&self) -> impl Iterator<Item = Result<Self>> {
        let most = self.in_a_pass();
        (0..self.len()).step_by(most).map(move |from| self.narrow(from, most.min(self.len() - from)))
    }

    /// `len` of them, from number `start` on.
    pub(crate) fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        if len == self.len() {
            return Ok(self.clone());
        }
        if self.mask.is_some() {
            return self.select(&(start..start + len).collect::<Vec<_>>());
        }
        Ok(Self {
            weights: self.weights.as_ref().map(|w| w.narrow(0, start, len)).transpose()?,
            ignored: self.ignored,
            ..Self::new(self.x.narrow(0, start, len)?, self.y.narrow(0, start, len)?)?
        })
    }

    /// All labels as class numbers, those that are ignored included. A negative one that counts is refused.
    pub(crate) fn class_numbers(&self) -> Result<Vec<i64>> {
        if !self.y.dtype().is_int() {
            bail!(
                "evidence: expected {} class numbers, or as many rows of them, of an integer type, got {:?} {:?}",
                self.len(),
                self.y.dtype(),
                self.y.dims()
            )
        }
        let labels = self.y.flatten_all()?;
        let labels = match labels.dtype() {
            // The usual ones, without a tensor more.
            DType::U32 => labels.to_vec1::<u32>()?.into_iter().map(i64::from).collect(),
            _ => labels.to_dtype(DType::I64)?.to_vec1::<i64>()?,
        };
        let counts = self.given_weights(labels.len());
        for (at, label) in labels.iter().enumerate() {
            let counted =
                self.ignored != Some(*label) && counts.as_ref().is_none_or(|counts| counts[at] > 0.0);
            // Where a mask leaves it out is not known without the outputs' shape.
            if *label < 0 && counted && self.mask.is_none() {
                bail!(
                    "evidence: label {label} of term {at} is out of range, expected class numbers from 0; \
                     Examples::ignoring({label}) leaves such terms out"
                )
            }
        }
        Ok(labels)
    }

    /// The weights that were given, of `terms` terms of all examples; none where they are of another number of terms.
    fn given_weights(&self, terms: usize) -> Option<Vec<f64>> {
        let given = self.weights.as_ref()?.flatten_all().and_then(|w| w.to_vec1::<f64>()).ok()?;
        let each = terms / self.len().max(1);
        match given.len() {
            count if count == terms => Some(given),
            count if count == self.len() => {
                Some(given.into_iter().flat_map(|w| std::iter::repeat_n(w, each)).collect())
            }
            _ => None,
        }
    }

    /// The weight of every term for outputs `dims` `[n, .., classes]`, where not all count once.
    ///
    /// # Errors
    /// When the weights are of another number of terms, or labels are ignored that are no class numbers.
    pub(crate) fn term_weights(&self, dims: &[usize], categorical: bool) -> Result<Option<Vec<f64>>> {
        let term_dims = &dims[..dims.len().saturating_sub(1)];
        let terms: usize = term_dims.iter().product();
        let mut weights = None;
        if let Some(given) = &self.weights {
            weights = self.given_weights(terms);
            if weights.is_none() || (given.rank() > 1 && given.dims() != term_dims) {
                bail!(
                    "evidence: weights of shape {:?} for outputs {dims:?}, expected {term_dims:?} or [{}]",
                    given.dims(),
                    self.len()
                )
            }
        }
        if let Some(ignored) = self.ignored {
            if !categorical {
                bail!(
                    "evidence: label {ignored} is ignored, and only class numbers can be; leave terms of other likelihoods out by \
                     Examples::weighted"
                )
            }
            let labels = self.class_numbers()?;
            if labels.len() == terms {
                let weights = weights.get_or_insert_with(|| vec![1.0; terms]);
                for (weight, label) in weights.iter_mut().zip(labels) {
                    if label == ignored {
                        *weight = 0.0;
                    }
                }
            }
        }
        if let Some(live) = self.live_terms(dims)? {
            let weights = weights.get_or_insert_with(|| vec![1.0; terms]);
            for (weight, live) in weights.iter_mut().zip(live) {
                if live == 0 {
                    *weight = 0.0;
                }
            }
        }
        Ok(weights)
    }

    /// 1 for every term that the mask does not leave out, where it is of the terms of outputs `dims`.
    pub(crate) fn live_terms(&self, dims: &[usize]) -> Result<Option<Vec<u8>>> {
        let of_terms = |mask: &&Arc<Mask>| dims.len() == 3 && dims[..2] == mask.dims();
        let Some(mask) = self.mask.as_ref().filter(of_terms) else { return Ok(None) };
        mask.live().flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<u8>().map(Some)
    }

    /// The class of every example, that of one that is ignored included.
    pub(crate) fn classes(&self) -> Result<Vec<i64>> {
        if self.y.rank() != 1 {
            bail!(
                "evidence: groups by label need class numbers [n], got {:?} {:?}",
                self.y.dtype(),
                self.y.dims()
            )
        }
        self.class_numbers()
    }
}
