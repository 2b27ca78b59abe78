//! `log det(sG + P0) - log det P0`: the complexity that the evidence charges for, and what each parameter tensor has part in it.

use super::posterior::Covariance;
use crate::parallel::{Place, Trouble, World};
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

impl LogDet {
    /// The sum of what the processes of a world have found; what failed on one has failed on all.
    pub fn over(world: &World, own: Result<Self>, precisions: &[Precision]) -> Result<Self> {
        let numbers = own.and_then(|own| own.numbers());
        let place = Place { of: "evidence", call: "evidence", step: 0 };
        let told = world.meet(place, numbers.map_err(|error| Trouble::failed(&error)));
        let mut total = Self::zero(precisions.len());
        for numbers in told.map_err(Trouble::error)? {
            total.add(Self::of_numbers(&numbers, precisions)?, 1.0)?;
        }
        Ok(total)
    }

    /// Value, condition, and of each tensor how many numbers follow, and these.
    fn numbers(&self) -> Result<Vec<f64>> {
        let mut numbers = vec![self.value, self.condition];
        for effective in &self.effective {
            let found = match effective {
                None => vec![],
                Some(Effective::Total(total)) => vec![-1.0, *total],
                Some(Effective::Each(each)) => {
                    let each = each.flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<f64>()?;
                    [vec![each.len() as f64], each].concat()
                }
            };
            if found.is_empty() {
                numbers.push(-2.0);
            }
            numbers.extend(found);
        }
        Ok(numbers)
    }

    fn of_numbers(numbers: &[f64], precisions: &[Precision]) -> Result<Self> {
        let mut rest = numbers.iter().copied();
        let mut next = || match rest.next() {
            Some(number) => Ok(number),
            None => bail!("evidence: a process has found other tensors"),
        };
        let (value, condition) = (next()?, next()?);
        let mut effective = Vec::with_capacity(precisions.len());
        for precision in precisions {
            let kind = next()?;
            effective.push(match precision {
                _ if kind == -2.0 => None,
                _ if kind == -1.0 => Some(Effective::Total(next()?)),
                Precision::Each(deltas) => {
                    let each = (0..kind as usize).map(|_| next()).collect::<Result<Vec<_>>>()?;
                    Some(Effective::Each(
                        Tensor::from_vec(each, deltas.shape(), &Device::Cpu)?.to_device(deltas.device())?,
                    ))
                }
                Precision::Uniform(_) => bail!("evidence: a process has another prior"),
            });
        }
        Ok(Self { value, effective, condition })
    }
}

/// A complexity at fixed parameters, as a function of the hyperparameters.
pub(crate) trait Complexity: std::fmt::Debug {
    /// At `s = 1 / (noise^2 temperature)` and the precisions of the problem's tensors.
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet>;

    /// The covariance of a posterior with this curvature, where there are blocks or a diagonal to make it of.
    fn covariance(&self, _s: f64, _precisions: &[Precision]) -> Result<Option<Covariance>> {
        Ok(None)
    }
}
