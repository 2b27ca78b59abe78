//! How much of the time curvature may take.

use candle_core::{Result, bail};

/// How much of the time curvature may take where factors are chosen by what they cost, [`Beyond::ByCost`](crate::curvature::Beyond::ByCost).
///
/// The choice is the same on every machine of a kind, in every process and in every run: it follows from the shapes of the layers and from
/// the rates in the documentation of [`Forecast`](super::super::Forecast), never from a clock. Full are as large factors as
/// possible if renewing them, and preconditioning with them, is to take no more than the `share`. Where all decompositions of full factors together
/// take no more than a twentieth of a second, on one core or on a GPU, all are full whatever their share: those of convolutional nets for small
/// images, and on a GPU those of LeNet-300-100, which take a core a tenth of a second.
/// [`NaturalGradient::summary`](super::super::NaturalGradient::summary) shows what was chosen, and what it is forecast to take.
///
/// Directions that are made orthogonal ([`Orthogonal`](super::Orthogonal)) take time of their own, which does not depend on the factors and is
/// not counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// The share of a training's time, between 0 and 1; 0.2 by default.
    pub share: f64,
    /// The rows of a batch that the forecast assumes, 1 or more; 2,048 by default, as of 16 sequences of 128 tokens. A row is an
    /// example, or a position of one: of a sequence, of a convolution's output. The more rows, the dearer is the model itself, and the larger
    /// factors are affordable.
    pub rows: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { share: 0.2, rows: 2048 }
    }
}

impl Budget {
    pub(super) fn check(&self, optimizer: &str) -> Result<()> {
        if !(self.share > 0.0 && self.share < 1.0) {
            bail!("{optimizer}: expected the budget's share of time between 0 and 1, got {}", self.share)
        }
        if self.rows == 0 {
            bail!("{optimizer}: expected a budget for batches of at least one row, got 0")
        }
        Ok(())
    }
}
