//! Muon: momentum, orthogonalized.

use super::update::{
    At, FallbackAdam, LEAST, State, Update, as_matrix, at_least_one, decay, in_range, mix, moved,
};
use crate::linalg::polar::{Iterations, orthogonalized};
use crate::optim::ParamsAdamW;
use candle_core::{Result, Tensor};

/// How long Muon's step of a matrix `[rows, columns]` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MuonScale {
    /// `lr 0.2 sqrt(max(rows, columns))`: the root of the mean square of the step's elements is then near AdamW's, whose rates and weight
    /// decays can be taken over (Liu et al. 2025, equation 4). The default.
    #[default]
    MatchRms,
    /// `lr sqrt(max(1, rows / columns))`, as Jordan et al. 2024 have it; rates are then near 0.02.
    Original,
}

impl MuonScale {
    fn of(self, rows: usize, columns: usize) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        match self {
            Self::MatchRms => 0.2 * rows.max(columns).sqrt(),
            Self::Original => (rows / columns).max(1.0).sqrt(),
        }
    }
}

/// Options of [`Muon`](super::Muon).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsMuon {
    /// Learning rate; 0.001.
    pub lr: f64,
    /// How much of the last momentum stays in the next, in [0, 1); 0.95.
    pub momentum: f64,
    /// Whether the gradient is added to the momentum once more, as Nesterov's; yes.
    pub nesterov: bool,
    /// Newton-Schulz steps; 5.
    pub steps: usize,
    /// How long a step is.
    pub scale: MuonScale,
    /// Decoupled weight decay, times the learning rate; 0.01.
    pub weight_decay: f64,
    /// For what is no matrix; betas of 0.9 and 0.95.
    pub fallback_adam: FallbackAdam,
}

impl Default for ParamsMuon {
    fn default() -> Self {
        Self {
            lr: 0.001,
            momentum: 0.95,
            nesterov: true,
            steps: 5,
            scale: MuonScale::default(),
            weight_decay: 0.01,
            fallback_adam: FallbackAdam::of(0.9, 0.95),
        }
    }
}

impl Update for ParamsMuon {
    const NAME: &'static str = "muon";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, momentum, steps, weight_decay, .. } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("momentum", momentum)?;
        at_least_one("steps", steps)?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")?;
        self.fallback_adam.check()
    }

    fn adam(&self) -> Option<ParamsAdamW> {
        self.fallback_adam.options()
    }

    fn adam_lr(&self) -> Option<f64> {
        self.fallback_adam.lr
    }

    fn for_matrices(&self) -> bool {
        true
    }

    fn state(&self, value: &Tensor) -> Result<State> {
        Ok(vec![("average0", value.zeros_like()?)])
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let momentum = mix(&state[0], self.momentum, grad, 1.0, LEAST)?;
        let ahead =
            if self.nesterov { mix(&momentum, self.momentum, grad, 1.0, LEAST)? } else { momentum.clone() };
        let matrix = as_matrix(&ahead)?;
        let (rows, columns) = matrix.dims2()?;
        let direction = orthogonalized(&matrix, Iterations::Alike(self.steps))?;
        let moved = moved(at, value, &direction, at.lr * self.scale.of(rows, columns))?;
        Ok((moved, vec![momentum]))
    }
}
