//! The EKFAC correction of a block's inverse.

use super::gradients::Staged;
use super::renew::BlockCurvature;
use crate::curvature::{Preconditioner, moments, moments_above_rounding, turned_moments};
use crate::ops::factor::ema;
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState, Part};
use crate::optim::state::pending::Others;
use crate::parallel::{Form, Kind, Place, Sums, Trouble};
use candle_core::{Result, Tensor};

/// The second moments of this batch of each block that has records, in its eigenbasis: sums over the rows of all processes, who meet here.
pub(super) fn current(
    core: &Core,
    with_rows: Option<&Others>,
    curvature: &[Option<BlockCurvature<'_>>],
) -> Staged<Vec<Option<Tensor>>> {
    let own = || -> Result<Vec<Option<Tensor>>> {
        let pairs = core.blocks.iter().zip(curvature);
        pairs.map(|(block, found)| of_rows(block, found.as_ref(), with_rows.is_some())).collect()
    };
    let Some(Others { world, of }) = with_rows else { return Ok(own()?) };
    let wanted: Vec<bool> =
        core.blocks.iter().zip(curvature).map(|(b, found)| has_rows(b, found.as_ref())).collect();
    if !wanted.contains(&true) {
        return Ok(vec![]);
    }
    let form = |block: &Block| {
        let like = Form::wide(core.vars[block.params[0]].var.as_tensor());
        Form { dims: block.inside().to_vec(), ..like }
    };
    let pairs = || core.blocks.iter().zip(&wanted);
    let own = own().and_then(|own| {
        let mut sums = Sums::new(world, false);
        for ((block, _), own) in pairs().zip(own).filter(|((_, wanted), _)| **wanted) {
            sums.tensor(Kind::Exact, None, own.as_ref(), &form(block), 1.0, || "moments".into())?;
        }
        Ok(sums)
    });
    // Nobody waits for a sum to which one has nothing to add.
    let own = own.map_err(|error| Trouble::failed(&error));
    let local = own.as_ref().map(|_| vec![]).map_err(Trouble::clone);
    world.meet(Place { of, call: "moments", step: core.steps }, local)?;
    let mut totals = own.map_err(Trouble::error)?.over()?;
    let read = |(block, wanted): (&Block, &bool)| match wanted {
        true => totals.tensor(Kind::Exact, None, &form(block), 1.0),
        false => Ok(None),
    };
    Ok(pairs().map(read).collect::<Result<_>>()?)
}

/// Whether a block's moments are renewed, by rows here or on another process.
fn has_rows(block: &Block, found: Option<&BlockCurvature<'_>>) -> bool {
    let found = found.filter(|_| !matches!(block.part, Part::Table | Part::Bias));
    found.is_some_and(|found| {
        found.records.is_some() && matches!(found.state.preconditioner, Some(Preconditioner::Basis { .. }))
    })
}

/// The part of a block's moments that the rows here make; nothing without such, where others may have `some`.
fn of_rows(block: &Block, found: Option<&BlockCurvature<'_>>, some: bool) -> Result<Option<Tensor>> {
    let Some(found) = found.filter(|found| has_rows(block, Some(found))) else { return Ok(None) };
    let (Some((layer, total)), Some(Preconditioner::Basis { basis_a, basis_g, .. })) =
        (found.records, &found.state.preconditioner)
    else {
        return Ok(None);
    };
    if some && layer.kept.is_empty() {
        return Ok(None);
    }
    let (a, g) = ((basis_a, block.columns), (basis_g, block.rows));
    moments(&layer.kept, a, g, block.groups, block.part == Part::Folded, total).map(Some)
}

/// Replaces the scaling of the eigenbasis by the averaged second moments; `current` are new ones.
pub(super) fn update(
    block: &Block,
    state: &mut BlockState,
    current: Option<Tensor>,
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
        match (current, last) {
            (Some(current), last) => ema(last.as_ref(), &current, stat_decay)?,
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
