//! Norms of single weights.

use candle_core::{Result, bail};

use super::Grouping;
use crate::ops::group::Norms;

/// `l1 sum |w| + l2 sum w^2`: L1, L2, or the elastic net of both.
///
/// L2 is the sum of squares, not half of it: with factor `b` it is a Gaussian prior of precision `2 b`. The gradient of `|w|`
/// at 0 is 0. A proximal step softly thresholds the weights at `step l1` and divides them by `1 + 2 step l2`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::penalty::{Lp, Penalty};
///
/// let w = Var::new(&[3f64, -0.5, 0.], &Device::Cpu)?;
/// let loss = Lp::l1().value(&w)?;
/// assert_eq!(loss.to_scalar::<f64>()?, 3.5);
/// let grads = loss.backward()?;
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f64>()?, [1., -1., 0.]);
/// // A proximal step makes small weights exactly zero.
/// assert_eq!(Lp::l1().prox(&w, 1.)?.to_vec1::<f64>()?, [2., 0., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lp {
    l1: f64,
    l2: f64,
}

impl Lp {
    /// `sum |w|`.
    pub fn l1() -> Self {
        Self { l1: 1., l2: 0. }
    }

    /// `sum w^2`.
    pub fn l2() -> Self {
        Self { l1: 0., l2: 1. }
    }

    /// `alpha sum |w| + (1 - alpha) sum w^2`.
    ///
    /// # Errors
    /// If `alpha` is not between 0 and 1.
    pub fn elastic_net(alpha: f64) -> Result<Self> {
        if !(0. ..=1.).contains(&alpha) {
            bail!("elastic net: alpha is {alpha}, expected it between 0 and 1")
        }
        Ok(Self { l1: alpha, l2: 1. - alpha })
    }

    pub(super) fn norms(&self) -> Norms {
        let name = match (self.l1 > 0., self.l2 > 0.) {
            (true, true) => "elastic net",
            (true, false) => "L1",
            (false, true | false) => "L2",
        };
        Norms { name, l1: self.l1, l2: self.l2, group: 0., sized: false }
    }

    pub(super) fn grouping(&self) -> Grouping {
        Grouping::Whole
    }

    pub(super) fn title(&self) -> String {
        let name = self.norms().name;
        if self.l1 > 0. && self.l2 > 0. { format!("{name} (alpha {})", self.l1) } else { name.into() }
    }
}
