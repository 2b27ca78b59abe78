//! The exact solve of the quadratic wake: the inverse of a sum of two Kronecker products.

use super::factor_shape::{Damped, is_diagonal, pi_damped};
use super::inverse::{Preconditioner, joined};
use crate::linalg::eigh::{Eigh, generalized_eigh, generalized_eigh_two};
use crate::linalg::kron::inverse_spectrum;
use crate::linalg::low_rank::{LowRank, low_rank_all};
use crate::linalg::next;
use crate::linalg::sketch::{each, is_sketch};
use candle_core::{Result, Tensor};

/// What makes the factors of two Kronecker products diagonal at once: `root`, where there is one, and the vectors of `basis` turn the average's
/// into the identity and the current one's into `values`. Of a diagonal factor the basis is 1, and what is left of it is `divisor`.
struct Side {
    values: Tensor,
    basis: Tensor,
    divisor: Option<Tensor>,
    root: Option<Tensor>,
}

impl Side {
    fn dense(Eigh { values, vectors }: Eigh, shape: [usize; 3]) -> Result<Self> {
        Ok(Self { values: joined(&values, shape)?, basis: vectors, divisor: None, root: None })
    }

    fn new(bar: &Damped, current: &Tensor, shape: [usize; 3], name: &str) -> Result<Self> {
        let Some(shift) = &bar.shift else {
            if !is_diagonal(&bar.m, shape[0]) {
                return Self::dense(generalized_eigh(&bar.m, current, name)?, shape);
            }
            let values = joined(&(current / &bar.m)?, shape)?;
            let (basis, divisor) = (bar.m.ones_like()?, Some(joined(&bar.m, shape)?));
            return Ok(Self { values, basis, divisor, root: None });
        };
        let (groups, rows, dim) = bar.m.dims3()?;
        let mut found = low_rank_all(&[(&bar.m, name), (current, name)]).into_iter();
        let (bar, current): (LowRank, LowRank) = (next(&mut found)?, next(&mut found)?);
        if joint_vectors(rows - 1, dim) == dim {
            let eye = each(&Tensor::eye(dim, shift.dtype(), shift.device())?, groups)?;
            let (bar, current) = (bar.left(&eye, Some(shift))?, current.left(&eye, None)?);
            return Self::dense(generalized_eigh(&bar, &current, name)?, shape);
        }
        let (root, whitened) = bar.whitened(shift, &current, name)?;
        Ok(Self { values: whitened.spectrum()?, basis: whitened.vectors, divisor: None, root: Some(root) })
    }
}

/// Vectors in the basis of two factors of `dim` rows and a low rank: both one's, or `dim` where these are no fewer.
pub(super) fn joint_vectors(rank: usize, dim: usize) -> usize {
    if 2 * rank + 1 < dim { 2 * rank } else { dim }
}

/// `(A_bar (x) G_bar + lr A (x) G)^-1` with pi-damped averages: the exact solve of the quadratic wake. Two generalized
/// eigenproblems make both terms diagonal at once.
pub(crate) fn sum_inverse(
    bar: (&Tensor, &Tensor),
    current: (&Tensor, &Tensor),
    shape: [usize; 3],
    lr: f64,
    damping: f64,
    name: &str,
) -> Result<Preconditioner> {
    let (bar_a, bar_g) = pi_damped(bar.0, bar.1, shape, damping, name)?;
    let dense = |bar: &Damped| bar.shift.is_none() && !is_diagonal(&bar.m, shape[0]);
    let (a, g) = if dense(&bar_a) && dense(&bar_g) {
        let [a, g] = generalized_eigh_two([(&bar_a.m, current.0), (&bar_g.m, current.1)], name);
        (Side::dense(a?, shape)?, Side::dense(g?, shape)?)
    } else {
        (Side::new(&bar_a, current.0, shape, name)?, Side::new(&bar_g, current.1, shape, name)?)
    };
    let mut scale = inverse_spectrum((&a.values, &g.values), 0.0, lr, 1.0)?;
    if let Some(divisor) = a.divisor {
        scale = scale.broadcast_div(&divisor.unsqueeze(1)?)?;
    }
    if let Some(divisor) = g.divisor {
        scale = scale.broadcast_div(&divisor.unsqueeze(2)?)?;
    }
    let (basis_a, basis_g, root_a, root_g) = (a.basis, g.basis, a.root, g.root);
    Ok(match is_sketch(bar.0) || is_sketch(bar.1) {
        true => Preconditioner::LowRank { basis_a, basis_g, scale, root_a, root_g },
        false => Preconditioner::Basis { basis_a, basis_g, scale },
    })
}
