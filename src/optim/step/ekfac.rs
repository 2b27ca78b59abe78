//! The EKFAC correction of a block's inverse.

use crate::curvature::{LayerFactors, Preconditioner, moments, moments_above_rounding, turned_moments};
use crate::ops::factor::ema;
use crate::optim::state::block::{Block, BlockState, Part};
use candle_core::{Result, Tensor};

/// Replaces the scaling of the eigenbasis by the averaged second moments; `refresh` holds new records.
pub(super) fn update(
    block: &Block,
    state: &mut BlockState,
    refresh: Option<(&LayerFactors, f64)>,
    stat_decay: f64,
    damping: f64,
) -> Result<()> {
    let Some(Preconditioner::Basis { basis_a, basis_g, .. }) = &state.preconditioner else {
        return Ok(());
    };
    if block.part == Part::Table {
        return Ok(());
    }
    let (basis_a, basis_g) = (basis_a.clone(), basis_g.clone());
    let scaled = if block.part == Part::Bias {
        // One input, the constant 1: the factor G is the second moment itself.
        let Some(g) = &state.factor_g else { return Ok(()) };
        let rotated = basis_g.t()?.matmul(g)?.matmul(&basis_g)?;
        let eye = Tensor::eye(rotated.dim(1)?, rotated.dtype(), rotated.device())?;
        rotated.broadcast_mul(&eye)?.sum(2)?.reshape(&block.inside())?
    } else {
        let last = match (&block.state.moments, &block.state.preconditioner) {
            (Some(moments), Some(Preconditioner::Basis { basis_a: last_a, basis_g: last_g, .. })) => {
                Some(turned_moments(moments, (last_a, last_g), (&basis_a, &basis_g))?)
            }
            _ => None,
        };
        match (refresh, last) {
            (Some((layer, total)), last) => {
                let folded = block.part == Part::Folded;
                let (a, g) = ((&basis_a, block.columns), (&basis_g, block.rows));
                let current = moments(&layer.kept, a, g, block.groups, folded, total)?;
                ema(last.as_ref(), &current, stat_decay)?
            }
            (None, Some(last)) => last,
            (None, None) => return Ok(()),
        }
    };
    let known = match (&state.factor_a, &state.factor_g) {
        (Some(a), Some(g)) if block.part != Part::Bias => {
            moments_above_rounding(&scaled, (a, &basis_a), (g, &basis_g))?
        }
        _ => scaled.clone(),
    };
    let scale = (known + damping)?.recip()?;
    state.moments = Some(scaled);
    state.preconditioner = Some(Preconditioner::Basis { basis_a, basis_g, scale });
    Ok(())
}
