//! `log det(sG + P0) - log det P0`: the complexity that the evidence charges for, and what each parameter tensor has part in it.

use candle_core::{DType, Device, Result, Tensor, bail};

/// The prior precisions of one parameter tensor.
#[derive(Debug, Clone)]
pub(crate) enum Precision {
    /// One for all of it.
    Uniform(f64),
    /// One a weight, in the tensor's shape, f64.
    Each(Tensor),
}

impl Precision {
    /// One a weight of a tensor of `size` weights, flattened, f64.
    pub fn flat(&self, size: usize, device: &Device) -> Result<Tensor> {
        match self {
            Precision::Uniform(delta) => Tensor::full(*delta, size, device),
            Precision::Each(deltas) => deltas.flatten_all()?.to_device(device),
        }
    }

    /// What the data determine of each weight, flattened, as the prior groups them.
    pub fn effective(&self, each: &Tensor) -> Result<Effective> {
        Ok(match self {
            Precision::Uniform(_) => Effective::Total(sum_of(each)?),
            Precision::Each(deltas) => Effective::Each(
                each.to_dtype(DType::F64)?.to_device(deltas.device())?.reshape(deltas.shape())?,
            ),
        })
    }
}

/// The precisions of a tensor of the problem.
pub(crate) fn precision_of(precisions: &[Precision], tensor: usize) -> Result<&Precision> {
    match precisions.get(tensor) {
        Some(precision) => Ok(precision),
        None => bail!("evidence: tensor {tensor} of {} precisions", precisions.len()),
    }
}

/// How many parameters of one tensor the data determine, out of as many as it has.
#[derive(Debug, Clone)]
pub(crate) enum Effective {
    /// All together.
    Total(f64),
    /// Each, in the tensor's shape, f64.
    Each(Tensor),
}

impl Effective {
    /// `weight` times this, added to `sum`.
    pub fn add_to(self, sum: &mut Option<Effective>, weight: f64) -> Result<()> {
        let scaled = match self {
            Effective::Total(total) => Effective::Total(weight * total),
            Effective::Each(each) => Effective::Each((each * weight)?),
        };
        *sum = Some(match (sum.take(), scaled) {
            (None, scaled) => scaled,
            (Some(Effective::Total(a)), Effective::Total(b)) => Effective::Total(a + b),
            (Some(Effective::Each(a)), Effective::Each(b)) => Effective::Each((a + b)?),
            (Some(Effective::Each(a)), Effective::Total(b))
            | (Some(Effective::Total(b)), Effective::Each(a)) => Effective::Total(sum_of(&a)? + b),
        });
        Ok(())
    }

    pub fn total(&self) -> Result<f64> {
        match self {
            Effective::Total(total) => Ok(*total),
            Effective::Each(each) => sum_of(each),
        }
    }
}

pub(crate) fn sum_of(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.sum_all()?.to_scalar()
}

/// Condition numbers of sums in f64 from which rows in f32, and rows in f64, no longer tell the logarithms.
///
/// A singular value of rows is known to a rounding of the largest, hence the eigenvalues of their sums that count to some roundings times the
/// root of the condition number: to 10 % in the worst case at these, and far better for the sum over all.
const TOO_MUCH: [f64; 2] = [1e12, 1e15];

/// Refuses what rows of `dtype` cannot tell.
pub(crate) fn refuse_condition(what: &str, condition: f64, dtype: DType) -> Result<()> {
    let limit = TOO_MUCH[usize::from(dtype == DType::F64)];
    // Written so that NaN is refused.
    if condition <= limit {
        return Ok(());
    }
    bail!(
        "evidence: the condition number of the {what}, up to {condition:.1e}, is beyond what {dtype:?} can tell ({limit:.0e}): {}",
        remedy(dtype)
    )
}

/// What helps against a large condition number.
pub(crate) fn remedy(dtype: DType) -> String {
    let wider = if dtype == DType::F64 { "" } else { " or a model in f64" };
    format!("larger prior precisions, a higher temperature{wider} would do")
}

/// A log-determinant with its derivatives.
#[derive(Debug, Clone)]
pub(crate) struct LogDet {
    pub value: f64,
    /// `-d value / d log precision`, of each of the problem's tensors; `d value / d log s` is their sum.
    pub effective: Vec<Option<Effective>>,
    /// A bound of the condition number of the matrix that was factorized, the largest where there were several.
    pub condition: f64,
}

impl LogDet {
    pub fn zero(tensors: usize) -> Self {
        Self { value: 0.0, effective: vec![None; tensors], condition: 1.0 }
    }

    /// Adds `weight` times another.
    pub fn add(&mut self, other: LogDet, weight: f64) -> Result<()> {
        self.value += weight * other.value;
        self.condition = self.condition.max(other.condition);
        for (sum, effective) in self.effective.iter_mut().zip(other.effective) {
            if let Some(effective) = effective {
                effective.add_to(sum, weight)?;
            }
        }
        Ok(())
    }
}

/// A complexity at fixed parameters, as a function of the hyperparameters.
pub(crate) trait Complexity: std::fmt::Debug {
    /// At `s = 1 / (noise^2 temperature)` and the precisions of the problem's tensors.
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet>;
}
