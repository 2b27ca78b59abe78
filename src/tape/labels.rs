//! Whether labels fit outputs: shapes that only broadcast, and class numbers that are none, are refused and not guessed at.

use super::Likelihood;
use candle_core::{DType, Device, Result, Tensor, bail};

impl Likelihood {
    /// The number of loss terms in `outputs`: the product of all dimensions but the last.
    ///
    /// # Errors
    /// When `outputs` is a scalar or empty, or has one dimension under a Bernoulli or Gaussian likelihood: `[n]` may stand for `n` terms
    /// of one output or for one term of `n`, and the curvature differs by the factor `n`.
    pub fn terms(&self, outputs: &Tensor) -> Result<usize> {
        let classes = outputs.dims().last().copied().unwrap_or(0);
        if classes == 0 || outputs.elem_count() == 0 {
            bail!(
                "likelihood: expected outputs of shape [.., classes] with at least one example, got {:?}",
                outputs.dims()
            )
        }
        if outputs.rank() == 1 && *self != Likelihood::Categorical {
            bail!(
                "likelihood: outputs of shape [{classes}] are either {classes} loss terms of one output each or one loss term of \
                 {classes} outputs; reshape them to [{classes}, 1] or to [1, {classes}]"
            )
        }
        Ok(outputs.elem_count() / classes)
    }

    /// Checks that `labels` are labels of `outputs` `[.., classes]`, reading them on the host.
    ///
    /// A categorical likelihood takes class numbers from 0 on, of any integer type: one for every loss term, in the shape of the outputs
    /// without their last dimension, the same with a last dimension of 1, or `[terms]` in row-major order. The others take targets of
    /// exactly the outputs' shape: finite ones, and from 0 to 1 for a Bernoulli likelihood. What would only broadcast is refused.
    ///
    /// # Errors
    /// When the outputs have no terms (see [`Likelihood::terms`]), when shape or type of the labels do not fit, and when a label is out of
    /// range; the message has the number of the term.
    pub fn check_labels(&self, outputs: &Tensor, labels: &Tensor) -> Result<()> {
        self.check_labels_of(outputs, labels, None, true)
    }

    /// [`Likelihood::check_labels`] where `counts` says which terms do: labels of the others may be anything. Where targets need not be
    /// `finite`, those that are not are left to the optimizer's own rule for such numbers.
    pub(crate) fn check_labels_of(
        &self,
        outputs: &Tensor,
        labels: &Tensor,
        counts: Option<&[bool]>,
        finite: bool,
    ) -> Result<()> {
        let terms = self.terms(outputs)?;
        let classes = outputs.elem_count() / terms;
        let counts = |term: usize| counts.is_none_or(|counts| counts.get(term).copied().unwrap_or(true));
        if *self == Likelihood::Categorical {
            self.check_class_shape(outputs, labels, terms)?;
            let wrong = class_numbers(labels)?
                .into_iter()
                .enumerate()
                .find(|&(term, label)| counts(term) && !(0..classes as i64).contains(&label));
            if let Some((term, label)) = wrong {
                bail!(
                    "labels: label {label} of loss term {term} is not one of {classes} classes, 0 to {}; give a term that is to be \
                     ignored the weight 0 (see tape::Terms)",
                    classes - 1
                )
            }
            return Ok(());
        }
        if labels.dims() != outputs.dims() {
            bail!(
                "labels: expected targets of shape {:?}, got {:?}; reshape whichever is wrong: what only broadcasts would pair every \
                 target with every output",
                outputs.dims(),
                labels.dims()
            )
        }
        let targets =
            labels.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let fits = |y: f64| match self {
            _ if !y.is_finite() => !finite,
            Likelihood::Bernoulli => (0.0..=1.0).contains(&y),
            _ => true,
        };
        let wrong = targets.iter().enumerate().find(|&(at, &y)| counts(at / classes) && !fits(y));
        if let Some((at, y)) = wrong {
            let expected =
                if *self == Likelihood::Bernoulli { "a number from 0 to 1" } else { "a finite number" };
            bail!("labels: target {y} of loss term {} is not {expected}", at / classes)
        }
        Ok(())
    }

    /// Labels with those of terms that do not count replaced by ones that are valid: they may be anything, and times 0 must be 0.
    pub(super) fn without_ignored(
        &self,
        outputs: &Tensor,
        labels: &Tensor,
        counts: Option<&[bool]>,
    ) -> Result<Tensor> {
        let Some(counts) = counts.filter(|counts| counts.contains(&false)) else { return Ok(labels.clone()) };
        if *self == Likelihood::Categorical {
            let kept = class_numbers(labels)?
                .into_iter()
                .zip(counts)
                .map(|(label, &counts)| if counts { label } else { 0 });
            return Tensor::from_vec(kept.collect::<Vec<_>>(), counts.len(), labels.device());
        }
        let mut dims = outputs.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = 1;
        }
        let live: Vec<u8> = counts.iter().map(|&counts| u8::from(counts)).collect();
        let live = Tensor::from_vec(live, dims, labels.device())?.broadcast_as(labels.shape())?;
        live.where_cond(labels, &labels.zeros_like()?)
    }

    /// That class numbers have a type and a shape that say which term each belongs to.
    pub(super) fn check_class_shape(&self, outputs: &Tensor, labels: &Tensor, terms: usize) -> Result<()> {
        let of_terms = &outputs.dims()[..outputs.rank() - 1];
        let dims = labels.dims();
        let fits = dims == of_terms
            || dims == [terms]
            || (dims.len() == outputs.rank() && dims.starts_with(of_terms) && dims.ends_with(&[1]));
        if !fits || !labels.dtype().is_int() {
            bail!(
                "labels: expected {terms} class numbers for outputs {:?}, integers of shape {of_terms:?} or [{terms}], got {dims:?} of \
                 {:?}",
                outputs.dims(),
                labels.dtype()
            )
        }
        Ok(())
    }
}

/// Class numbers in row-major order.
pub(super) fn class_numbers(labels: &Tensor) -> Result<Vec<i64>> {
    labels.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: &Device = &Device::Cpu;

    fn refused(result: Result<impl std::fmt::Debug>, parts: &[&str]) {
        let message = result.expect_err("must be refused").to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in {message:?}"));
    }

    fn zeros(dims: &[usize]) -> Tensor {
        Tensor::zeros(dims, DType::F64, CPU).expect("zeros")
    }

    #[test]
    fn outputs_without_a_class_dimension_have_two_readings() -> Result<()> {
        for likelihood in [Likelihood::Gaussian, Likelihood::Bernoulli] {
            refused(likelihood.terms(&zeros(&[64])), &["[64, 1]", "[1, 64]"]);
            assert_eq!(likelihood.terms(&zeros(&[64, 1]))?, 64);
            assert_eq!(likelihood.terms(&zeros(&[1, 64]))?, 1);
            assert_eq!(likelihood.terms(&zeros(&[2, 3, 4]))?, 6);
            refused(likelihood.terms(&zeros(&[])), &["at least one example"]);
        }
        assert_eq!(Likelihood::Categorical.terms(&zeros(&[5]))?, 1);
        refused(Likelihood::Categorical.terms(&zeros(&[0, 3])), &["at least one example"]);
        Ok(())
    }

    #[test]
    fn targets_have_the_outputs_shape() -> Result<()> {
        let outputs = zeros(&[4, 1]);
        for likelihood in [Likelihood::Gaussian, Likelihood::Bernoulli] {
            likelihood.check_labels(&outputs, &zeros(&[4, 1]))?;
            for dims in [&[4][..], &[1, 4], &[1, 1], &[4, 4], &[]] {
                refused(likelihood.check_labels(&outputs, &zeros(dims)), &["[4, 1]", &format!("{dims:?}")]);
            }
        }
        let bad = Tensor::new(&[[0.], [1.], [-1.], [0.5f64]], CPU)?;
        Likelihood::Gaussian.check_labels(&outputs, &bad)?;
        refused(Likelihood::Bernoulli.check_labels(&outputs, &bad), &["target -1 of loss term 2", "0 to 1"]);
        let counts = [true, true, false, true];
        Likelihood::Bernoulli.check_labels_of(&outputs, &bad, Some(&counts), true)?;
        let nan = Tensor::new(&[[0.], [f64::NAN], [-1.], [0.5f64]], CPU)?;
        refused(Likelihood::Gaussian.check_labels(&outputs, &nan), &["target NaN of loss term 1"]);
        Likelihood::Gaussian.check_labels_of(&outputs, &nan, None, false)?;
        Ok(())
    }

    #[test]
    fn class_numbers_are_in_range_and_in_order() -> Result<()> {
        let (flat, deep) = (zeros(&[3, 3]), zeros(&[2, 3, 5]));
        let check = |outputs: &Tensor, labels: &Tensor| Likelihood::Categorical.check_labels(outputs, labels);
        for dtype in [DType::U8, DType::U32, DType::I64] {
            check(&flat, &Tensor::new(&[0u32, 2, 1], CPU)?.to_dtype(dtype)?)?;
        }
        refused(check(&flat, &Tensor::new(&[0i64, -100, 1], CPU)?), &["label -100 of loss term 1", "0 to 2"]);
        refused(check(&flat, &Tensor::new(&[0, 1, u32::MAX], CPU)?), &["4294967295", "tape::Terms"]);
        refused(check(&flat, &Tensor::new(&[3u32, 1, 0], CPU)?), &["label 3 of loss term 0 is not one of 3"]);
        refused(check(&flat, &Tensor::new(&[0f32, 1., 2.], CPU)?), &["F32"]);
        for dims in [&[2, 3][..], &[6], &[2, 3, 1]] {
            check(&deep, &Tensor::zeros(dims, DType::U32, CPU)?)?;
        }
        // As many numbers, in another order.
        for dims in [&[3, 2][..], &[1, 6], &[6, 1], &[3, 2, 1], &[2]] {
            refused(check(&deep, &Tensor::zeros(dims, DType::U32, CPU)?), &["[2, 3]", &format!("{dims:?}")]);
        }
        let ignoring = Tensor::new(&[0i64, -100, 1], CPU)?;
        Likelihood::Categorical.check_labels_of(&flat, &ignoring, Some(&[true, false, true]), true)
    }
}
