//! How good probabilities are: their negative log-likelihood, accuracy and calibration error.

use super::log_det::sum_of;
use candle_core::{D, DType, Device, Result, Tensor, bail};

/// Bins of [`Scores::of`].
const BINS: usize = 15;

/// How well probabilities `[n, classes]` fit labels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// The mean of `-log p(label)`, in nats. Infinite where a label has probability 0.
    pub nll: f64,
    /// [`calibration_error`] in 15 bins.
    pub calibration_error: f64,
    /// The share of examples whose most probable class is the label.
    pub accuracy: f64,
}

impl Scores {
    /// Of probabilities `[n, classes]`, such as those of [`Predictive::probit`](super::Predictive::probit), and class numbers `[n]`.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kronwake::evidence::Scores;
    /// let p = Tensor::new(&[[0.9f64, 0.1], [0.6, 0.4]], &Device::Cpu)?;
    /// let scores = Scores::of(&p, &Tensor::new(&[0u32, 1], &Device::Cpu)?)?;
    /// assert!((scores.nll + (0.9f64.ln() + 0.4f64.ln()) / 2.0).abs() < 1e-15 && scores.accuracy == 0.5);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When the shapes do not fit, a label is no class, or the probabilities are not finite, negative, or do not add up to 1.
    pub fn of(probabilities: &Tensor, labels: &Tensor) -> Result<Self> {
        let rows = Rows::of(probabilities, labels)?;
        let (mut nll, mut right) = (0.0, 0usize);
        for (row, &label) in rows.probabilities.iter().zip(&rows.labels) {
            nll -= row[label].ln();
            right += usize::from(most_probable(row).0 == label);
        }
        let count = rows.labels.len() as f64;
        let calibration_error = rows.calibration_error(BINS)?;
        Ok(Self { nll: nll / count, calibration_error, accuracy: right as f64 / count })
    }
}

/// The expected calibration error (Guo et al. 2017) of probabilities `[n, classes]` with class numbers `[n]`: examples go into `bins`
/// bins of equal width by the probability of their most probable class, `(i / bins, (i + 1) / bins]`; the error is the mean over examples of the
/// distance, in a bin, from the mean of that probability to the share of examples whose most probable class is the label.
///
/// # Errors
/// As [`Scores::of`], and when there are no bins.
pub fn calibration_error(probabilities: &Tensor, labels: &Tensor, bins: usize) -> Result<f64> {
    Rows::of(probabilities, labels)?.calibration_error(bins)
}

struct Rows {
    probabilities: Vec<Vec<f64>>,
    labels: Vec<usize>,
}

/// The class, the first of several, and its probability.
fn most_probable(row: &[f64]) -> (usize, f64) {
    let better = |best: (usize, f64), (class, &p): (usize, &f64)| if p > best.1 { (class, p) } else { best };
    row.iter().enumerate().fold((0, f64::NEG_INFINITY), better)
}

impl Rows {
    fn of(probabilities: &Tensor, labels: &Tensor) -> Result<Self> {
        let fits = probabilities.rank() == 2 && labels.dims() == &probabilities.dims()[..1];
        if !fits || probabilities.elem_count() == 0 || !labels.dtype().is_int() {
            bail!(
                "evidence: expected probabilities [n, classes] and as many class numbers of an integer type, got {:?} and {:?} {:?}",
                probabilities.dims(),
                labels.dtype(),
                labels.dims()
            )
        }
        let classes = probabilities.dim(D::Minus1)?;
        let probabilities = probabilities.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let off = (probabilities.sum(1)? - 1.0)?.abs()?;
        // Written so that NaN is refused; the tolerance is that of probabilities in half types.
        let least = probabilities.min_all()?.to_scalar::<f64>()?;
        if !(least >= 0.0 && sum_of(&off)?.is_finite() && off.max_all()?.to_scalar::<f64>()? <= 0.02) {
            bail!(
                "evidence: rows of probabilities have to be finite, zero or more, and to add up to 1; these are outputs, it seems: take \
                 their softmax"
            )
        }
        let numbers = labels.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let mut labels = Vec::with_capacity(numbers.len());
        for (at, number) in numbers.into_iter().enumerate() {
            match usize::try_from(number) {
                Ok(label) if label < classes => labels.push(label),
                _ => bail!("evidence: label {number} of example {at} is out of range for {classes} classes"),
            }
        }
        Ok(Self { probabilities: probabilities.to_vec2()?, labels })
    }

    fn calibration_error(&self, bins: usize) -> Result<f64> {
        if bins == 0 {
            bail!("evidence: a calibration error in 0 bins, expected 1 or more")
        }
        // Sums over each bin of what is right, less the probabilities.
        let mut gaps = vec![0.0; bins];
        for (row, &label) in self.probabilities.iter().zip(&self.labels) {
            let (class, p) = most_probable(row);
            let bin = ((p * bins as f64).ceil() as usize).clamp(1, bins) - 1;
            gaps[bin] += f64::from(u8::from(class == label)) - p;
        }
        Ok(gaps.iter().map(|gap| gap.abs()).sum::<f64>() / self.labels.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: of five examples two are in the bin (0.5, 0.6] of ten, both right at 0.55 and 0.6; one is right at 0.9 and one wrong at 0.85,
    /// which share (0.8, 0.9]; one is wrong at 1.
    #[test]
    fn scores_by_hand() -> Result<()> {
        let of = |p: f64| [p, 1.0 - p];
        let p = Tensor::new(&[of(0.55), of(0.6), of(0.9), of(0.85), of(1.0)], &Device::Cpu)?;
        let labels = Tensor::new(&[0u32, 0, 0, 1, 1], &Device::Cpu)?;
        let expected = (0.45f64 + 0.4 + (0.1f64 - 0.85).abs() + 1.0) / 5.0;
        assert!((calibration_error(&p, &labels, 10)? - expected).abs() < 1e-12);
        let scores = Scores::of(&p.narrow(0, 0, 4)?, &labels.narrow(0, 0, 4)?)?;
        assert_eq!(scores.accuracy, 0.75);
        let nll = -(0.55f64.ln() + 0.6f64.ln() + 0.9f64.ln() + 0.15f64.ln()) / 4.0;
        assert!((scores.nll - nll).abs() < 1e-12);
        // Fifteen bins: 0.55 and 0.6 in (8/15, 9/15], 0.9 and 0.85 apart.
        assert!((scores.calibration_error - (0.45 + 0.4 + 0.1 + 0.85) / 4.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn refusals_are_sentences() -> Result<()> {
        let p = Tensor::new(&[[0.5f64, 0.5], [0.2, 0.8]], &Device::Cpu)?;
        let says = |p: &Tensor, labels: &[u32], bins, what: &str| {
            let labels = Tensor::new(labels, &Device::Cpu).expect("labels");
            let message =
                calibration_error(p, &labels, bins).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(what), "{message}");
        };
        says(&p, &[0, 2], 15, "label 2 of example 1 is out of range for 2 classes");
        says(&p, &[0, 1], 0, "0 bins");
        says(&p, &[0], 15, "as many class numbers");
        says(&(&p * 3.0)?, &[0, 1], 15, "take their softmax");
        says(&(&p * f64::NAN)?, &[0, 1], 15, "take their softmax");
        Ok(())
    }
}
