//! The penalties that can be chosen.

use candle_core::Result;
use clap::ValueEnum;
use kronwake::penalty::{GroupLasso, Grouping, Lp, Penalty, Rule, SparseGroupLasso, Spatial};
use std::sync::Arc;

/// What `--penalty` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    None,
    /// The sum of squares
    L2,
    /// The sum of absolute values
    L1,
    /// The group lasso of what leads out of a pixel or unit
    Group,
    /// Half of that and half of l1
    SparseGroup,
    /// The spatial entropy
    Spatial,
    /// Its control, kappa 0: of the sizes alone
    Spatial0,
}

/// A penalty with its factor.
#[derive(Clone, Copy, Debug)]
pub struct Penalized {
    pub choice: Choice,
    pub factor: f64,
}

impl Penalized {
    /// The penalty of masked training: the entropy is weaker then (tried on MNIST's held-out images).
    pub fn tuning(self) -> Self {
        let times = if matches!(self.choice, Choice::Spatial | Choice::Spatial0) { 0.5 } else { 1.0 };
        Self { factor: times * self.factor, ..self }
    }
}

impl Choice {
    pub const ALL: [Self; 7] =
        [Self::None, Self::L2, Self::L1, Self::Group, Self::SparseGroup, Self::Spatial, Self::Spatial0];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::L2 => "l2",
            Self::L1 => "l1",
            Self::Group => "group",
            Self::SparseGroup => "sparse-group",
            Self::Spatial => "spatial",
            Self::Spatial0 => "spatial0",
        }
    }

    /// Factors among which the study chooses; the first is the example's default.
    pub fn factors(self) -> &'static [f64] {
        match self {
            Self::None => &[0.0],
            Self::L2 => &[1e-4, 3e-5, 3e-4],
            Self::L1 | Self::Group | Self::SparseGroup => &[6e-5, 1e-4, 3e-5],
            Self::Spatial | Self::Spatial0 => &[0.06, 0.1, 0.03],
        }
    }

    /// What is added to the loss.
    pub fn rules(self, factor: f64) -> Result<Option<(&'static str, Rule)>> {
        let total = |penalty| Ok(Some(("*.weight", Rule::SpatialTotal { penalty, factor })));
        let penalty: Arc<dyn Penalty> = match self {
            Self::None => return Ok(None),
            Self::Spatial => return total(Spatial::default()),
            Self::Spatial0 => return total(Spatial::new(0.0, 6.0)?),
            Self::L2 => Arc::new(Lp::l2()),
            Self::L1 => Arc::new(Lp::l1()),
            Self::Group => Arc::new(GroupLasso { grouping: Grouping::Columns, size_weighted: true }),
            Self::SparseGroup => Arc::new(SparseGroupLasso::new(0.5, Grouping::Columns, true)?),
        };
        Ok(Some(("*.weight", Rule::Penalize { penalty, factor })))
    }
}
