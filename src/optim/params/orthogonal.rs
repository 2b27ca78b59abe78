//! Directions as orthogonal matrices.

use candle_core::{Result, bail};

/// Replaces the direction `V`, the damped inverse curvature times the wake gradient, of every block by the orthogonal matrix that is nearest to
/// it, at a common length:
///
/// ```text
/// V = P S Q^T,   V <- 0.18 sqrt(max(rows, columns)) P Q^T
/// ```
///
/// so that its elements have the root mean square 0.18, near the 0.2 that Adam's steps about have. The step rule then
/// multiplies all blocks by one rate; where that is a divergence, it measures `1/2 s^T (F_bar + la) s` of the orthogonal step.
///
/// *What it minimizes.* Of all steps of a block whose largest singular value is `eta`, `-eta P Q^T` has the largest inner product with the
/// natural step `-V`. So the wake objective chooses the direction, and the length is spectral: no direction of a layer's inputs is moved
/// further than another, whatever its curvature, which averages over few examples know badly. Without curvature (`V` the averaged gradient) it is
/// Muon's step (Jordan et al. 2024, scaled as in Liu et al. 2025). That the order is this one, first the curvature and then the orthogonal
/// matrix, is chosen by experiment: dividing the curvature into halves before and after, the exact step of fixed worst-case divergence, trains a
/// little worse.
///
/// *In which coordinates.* In those of standard inputs, where a layer with a folded bias has others: a mean that is more than about five
/// deviations is taken out, a variance above 10 counts as 10, and where the mean variance of all inputs is below 0.01 it counts as that. Where
/// a mean is taken out, all are small or a variance is beyond 100, damping and measured divergence belong to these coordinates too: with `x' = S x` in them, the layer has the factor `S A S^T` and the gradient
/// `g S^T`, and its step times `S` is that of the layer itself. So an input with a deviation of 300, or inputs of 300 and more that vary by 10, leave
/// the others their share, and a step does not depend on an input's units. Where rounding to f32 leaves nothing of `S A S^T` beside a large mean, the
/// damping is that of the inputs as they are. Ordinary layers have none of this, and a layer without a bias, or whose factor `A` is not full, is taken
/// as it is.
///
/// *Large layers.* A direction whose smaller side is above [`Params::orthogonal_side`](super::Params::orthogonal_side) is made orthogonal in parts. With
/// `p` parts of a layer's outputs, or inputs, `eta` bounds the largest singular value of each, and that of the whole step is up to `sqrt(p) eta`.
///
/// How `P Q^T` is made, this says. Neither way is exact: in units of a bound on the largest of a direction's singular values, both take those from a small
/// number on close to 1, and smaller ones, which are noise sooner than signal, below. Embedding tables, whose rows are seen one by one, are left to
/// [`Params::fallback_adam`](super::Params::fallback_adam), unless a group asks for [`UpdateRule::Kronecker`](crate::optim::UpdateRule::Kronecker).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orthogonal {
    /// What is fastest where the parameters are: on a CPU `Rational { terms: 3 }`, elsewhere `Polynomials { iterations: 4 }`. The two
    /// differ by less than 0.02 where singular values are not small, so training may go on on another device.
    #[default]
    ByDevice,
    /// The best odd rational function with so many terms, 1 to 8, `(m + sum_j a_j (V V^T + c_j)^-1) V` (Zolotarev 1877; Nakatsukasa and Freund 2016). From a
    /// fiftieth of the unit `(sum s^4)^(1/4)` on, one ends within 0.25 of 1, two within 0.04, three within 0.006, four within 0.001. A term costs an
    /// inverse of the smaller side, which is as many operations as half a product, and three halves are needed beside them. Only on a CPU, where inverses are
    /// nearly as fast as products.
    Rational {
        /// Inverses.
        terms: usize,
    },
    /// Newton-Schulz iterations, each with the best polynomial of its degree (Amsel et al. 2025): products alone, two of the smaller side an iteration. From
    /// a hundredth of the unit `1.1 (sum s^8)^(1/8)` on, two end within 0.71 of 1, three within 0.27, four within 0.013, five within 0.00001. Up to 4
    /// cost much less where a layer is large and far from square.
    Polynomials {
        /// Iterations, 1 or more.
        iterations: usize,
    },
}

impl Orthogonal {
    /// The root mean square of a direction's elements.
    pub(crate) const RMS: f64 = 0.18;
    /// The default of [`Params::orthogonal_side`](super::Params::orthogonal_side).
    pub(super) const SIDE: usize = 256;
    /// Of [`Orthogonal::ByDevice`] on a CPU.
    pub(crate) const TERMS: usize = 3;
    /// Of [`Orthogonal::ByDevice`] elsewhere.
    pub(crate) const ITERATIONS: usize = 4;

    pub(super) fn check(&self, optimizer: &str) -> Result<()> {
        match *self {
            Self::Rational { terms } if !(1..=8).contains(&terms) => {
                bail!("{optimizer}: expected orthogonal directions by 1 to 8 terms, got {terms}")
            }
            Self::Polynomials { iterations: 0 } => {
                bail!("{optimizer}: expected at least one iteration of orthogonal directions, got 0")
            }
            _ => Ok(()),
        }
    }
}
