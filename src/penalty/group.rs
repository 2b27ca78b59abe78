//! Norms of groups of weights.

use candle_core::{Result, bail};

use super::Grouping;
use crate::ops::group::Norms;

/// `sum_g sqrt(n_g) ||w_g||`: the norm of each group of weights, times the root of the group's size. Makes whole groups zero.
/// (Yuan, Lin, "Model selection and estimation in regression with grouped variables", 2006.)
///
/// The gradient of a group that is zero is zero. A proximal step makes each group shorter by `step sqrt(n_g)`, or zero where it is not
/// that long.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::penalty::{GroupLasso, Grouping, Penalty};
///
/// let w = Tensor::new(&[[3f32, 4.], [0.3, 0.4]], &Device::Cpu)?;
/// let rows = GroupLasso { grouping: Grouping::Rows, size_weighted: false };
/// assert_eq!(rows.value(&w)?.to_scalar::<f32>()?, 5.5);
/// // Rows of norm 5 and 1/2, each shorter by 1.
/// let x = rows.prox(&w, 1.)?.to_vec2::<f32>()?;
/// assert!((x[0][0] - 2.4).abs() < 1e-6 && (x[0][1] - 3.2).abs() < 1e-6);
/// assert_eq!(x[1], [0., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLasso {
    /// What the groups are.
    pub grouping: Grouping,
    /// Whether a group's norm is times the root of its size, so that groups of different sizes are penalized alike.
    pub size_weighted: bool,
}

impl Default for GroupLasso {
    /// Rows, weighted by the root of their size.
    fn default() -> Self {
        Self { grouping: Grouping::Rows, size_weighted: true }
    }
}

impl GroupLasso {
    pub(super) fn norms(&self) -> Norms {
        Norms { name: "group lasso", l1: 0., l2: 0., group: 1., sized: self.size_weighted }
    }

    pub(super) fn grouping(&self) -> Grouping {
        self.grouping
    }

    pub(super) fn title(&self) -> String {
        format!("group lasso ({})", self.grouping)
    }
}

/// `alpha sum |w| + (1 - alpha) sum_g sqrt(n_g) ||w_g||`: zero groups, and zeros within the others.
/// (Simon, Friedman, Hastie, Tibshirani, "A sparse-group lasso", 2013.) A proximal step is that of L1, then that of the group lasso.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::penalty::{Grouping, Penalty, SparseGroupLasso};
///
/// let w = Tensor::new(&[[3f64, 0.1], [0.3, 0.4]], &Device::Cpu)?;
/// let penalty = SparseGroupLasso::new(0.5, Grouping::Rows, true)?;
/// let x = penalty.prox(&w, 0.4)?.to_vec2::<f64>()?;
/// assert!(x[0][0] > 2. && x[0][1] == 0. && x[1] == [0., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseGroupLasso {
    alpha: f64,
    grouping: Grouping,
    size_weighted: bool,
}

impl SparseGroupLasso {
    /// `alpha` is L1's part; 0 is the group lasso, 1 is L1.
    ///
    /// # Errors
    /// If `alpha` is not between 0 and 1.
    pub fn new(alpha: f64, grouping: Grouping, size_weighted: bool) -> Result<Self> {
        if !(0. ..=1.).contains(&alpha) {
            bail!("sparse group lasso: alpha is {alpha}, expected it between 0 and 1")
        }
        Ok(Self { alpha, grouping, size_weighted })
    }

    pub(super) fn grouping(&self) -> Grouping {
        self.grouping
    }

    pub(super) fn norms(&self) -> Norms {
        Norms {
            name: "sparse group lasso",
            l1: self.alpha,
            l2: 0.,
            group: 1. - self.alpha,
            sized: self.size_weighted,
        }
    }

    pub(super) fn title(&self) -> String {
        format!("sparse group lasso (alpha {}, {})", self.alpha, self.grouping)
    }
}
