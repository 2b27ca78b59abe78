//! The damping and the damped inverses of the averages: made at once, or beside the steps and used later.

use super::ekfac;
use super::gradients::{Refusal, Staged};
use super::of_owners::summed;
use super::renew::{BlockCurvature, missing};
use crate::curvature::standard::factor_inside;
use crate::curvature::{Damping, Inverse, Preconditioner, Recipe, Task, damped_inverses, sum_inverse};
use crate::linalg::traces::traces;
use crate::ops::dense::mix;
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState, Factors};
use crate::optim::state::pending::{Others, PendingInverses, Workplace};
use crate::optim::wake::{Model, QSolve};
use crate::parallel::Division;
use candle_core::{Result, Tensor};

/// What [`renew`] has done, beside the inverses in the blocks' states.
pub(super) struct Inverses {
    /// The damping of the inverses that this step uses.
    pub damping: f64,
    /// Inverses still pending after this step.
    pub pending: Option<PendingInverses>,
    /// Whether this step is the first to use inverses that were made beside the steps.
    pub takes_pending: bool,
}

/// Inverses where they are due, with the damping `due`.
pub(super) fn renew(
    core: &Core,
    workplace: &Workplace,
    curvature: &mut [Option<BlockCurvature<'_>>],
    due: f64,
) -> Staged<Inverses> {
    let inverses = overlapped(core, workplace, curvature, due)?;
    prepare(core, workplace, curvature, inverses.damping)?;
    Ok(inverses)
}

/// What was found for a step, with the damping of this step's inverses: the last one's where there are no new ones. A damping that follows from the
/// factors does so from those of all owners, who meet here; what was refused before is then refused by all.
pub(super) fn damped<'a, T>(
    core: &Core,
    owners: Option<&Others>,
    found: Staged<(T, Vec<Option<BlockCurvature<'a>>>)>,
) -> Staged<Staged<Found<'a, T>>> {
    match core.params.damping {
        Damping::Relative(relative) if core.inverses_due() => {
            let sums = |(_, curvature): &(T, Vec<_>)| Ok(sums(core, curvature)?.to_vec());
            let (found, sums) = summed(owners, ("damping", core.steps), found, sums)?;
            let due = match sums.as_slice() {
                [squares, trace, blocks] if *blocks > 0.0 => relative.of(*squares, *trace),
                // Where no block takes part there is nothing to damp.
                _ => core.damping,
            };
            Ok(Ok((found, due)))
        }
        Damping::Relative(_) | Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Adaptive(_) => {
            Ok(found.map(|found| (found, core.damping)))
        }
    }
}

/// What the first stages have found, and a damping.
type Found<'a, T> = ((T, Vec<Option<BlockCurvature<'a>>>), f64);

/// The sum of squares of the curvature, its trace, and how many blocks have a part.
fn sums(core: &Core, curvature: &[Option<BlockCurvature<'_>>]) -> Result<[f64; 3]> {
    let mut factors = Vec::with_capacity(core.blocks.len());
    for (block, found) in core.blocks.iter().zip(curvature) {
        let Some(BlockCurvature { state, average: (a, g), .. }) = found else { continue };
        factors.push((seen(a, state.damping_inputs.as_ref())?, g, block.groups));
    }
    let factors: Vec<_> = factors.iter().map(|(a, g, groups)| (a, *g, *groups)).collect();
    if factors.is_empty() {
        return Ok([0.0; 3]);
    }
    let (squares, trace) = traces(&factors)?;
    Ok([squares, trace, factors.len() as f64])
}

/// Whether inverses that are due are begun and not waited for. The first ones always are.
fn overlaps(core: &Core) -> bool {
    core.params.overlap > 0 && core.blocks.iter().all(|block| block.state.preconditioner.is_some())
}

/// Whether the coming step is the first to use inverses that were made beside the steps.
pub(crate) fn takes_pending(core: &Core) -> bool {
    let time = |pending: &PendingInverses| {
        core.steps >= pending.from.saturating_add(core.params.overlap) || core.inverses_due()
    };
    core.pending.as_ref().is_some_and(time)
}

/// Puts inverses whose time has come into the blocks' states, and begins those that are due, with the damping `due`.
fn overlapped(
    core: &Core,
    workplace: &Workplace,
    curvature: &mut [Option<BlockCurvature<'_>>],
    due: f64,
) -> Result<Inverses> {
    let (mut pending, mut damping) = (core.pending.clone(), due);
    let begins = overlaps(core) && core.inverses_due();
    if begins {
        // What is due is for later.
        damping = core.damping;
    }
    let taken = pending.take_if(|_| takes_pending(core));
    if let Some(taken) = &taken {
        match core.params.damping {
            Damping::Relative(_) => damping = taken.damping,
            Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Adaptive(_) => {}
        }
        for ((block, found), made) in core.blocks.iter().zip(&mut *curvature).zip(taken.wait()?) {
            let Some(found) = found else { continue };
            found.fresh = true;
            match made {
                Ok(made) => found.state.preconditioner = Some(made),
                Err(why) => tracing::warn!("block {}: {why}; the last inverse stays", block.name),
            }
        }
    }
    if begins {
        let task = |(block, found): (_, &Option<BlockCurvature<'_>>)| {
            let found = found.as_ref()?;
            Some(task(core, block, &found.average, &found.state, due))
        };
        let tasks = core.blocks.iter().zip(&*curvature).filter_map(task).collect::<Result<_>>()?;
        let device = core.vars.first().map(|param| param.var.device());
        pending = Some(PendingInverses::begin(workplace.on(device)?, core.steps, due, tasks)?);
    }
    Ok(Inverses { pending, damping, takes_pending: taken.is_some() })
}

/// The inverses, made anew where they are due and not made beside the steps. On a GPU the host waits for all of them at once. `damping`
/// is the one that all blocks share.
fn prepare(
    core: &Core,
    workplace: &Workplace,
    curvature: &mut [Option<BlockCurvature<'_>>],
    damping: f64,
) -> Staged<()> {
    if core.inverses_due() && !overlaps(core) {
        let _span = tracing::info_span!("inverse").entered();
        let pairs = core.blocks.iter().zip(curvature.iter_mut());
        let mut taking_part: Vec<_> = pairs.filter_map(|(b, found)| Some((b, found.as_mut()?))).collect();
        let made = invert(core, workplace.division.as_ref(), &taking_part, damping);
        for ((block, found), made) in taking_part.iter_mut().zip(made) {
            found.fresh = true;
            match made {
                Ok(new) => found.state.preconditioner = Some(new),
                Err(error) if found.state.preconditioner.is_some() => {
                    tracing::warn!("block {}: {error}; the last inverse stays", block.name);
                    // With the coordinates that it was made in.
                    found.state.inputs = block.state.inputs.clone();
                    found.state.damping_inputs = block.state.damping_inputs.clone();
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    let mut moments = match core.params.ekfac {
        true => ekfac::current(core, workplace.with_rows.as_ref(), curvature)?,
        false => vec![],
    }
    .into_iter();
    for (block, found) in core.blocks.iter().zip(curvature) {
        let current = moments.next().flatten();
        let Some(BlockCurvature { state, records, fresh, .. }) = found else { continue };
        // A new inverse has the scaling of one Kronecker product, and new records change the moments.
        if core.params.ekfac && (records.is_some() || *fresh) {
            let damping = core.damping_of(block, damping);
            ekfac::update(block, state, current, core.params.stat_decay, damping)?;
        }
        if state.preconditioner.is_none() {
            return Err(Refusal::Failed(missing(core, block, "inverse")));
        }
    }
    Ok(())
}

fn invert(
    core: &Core,
    division: Option<&Division>,
    blocks: &[(&Block, &mut BlockCurvature<'_>)],
    damping: f64,
) -> Vec<Result<Preconditioner>> {
    let last_rate = core.given_rate().or(core.previous_rate).unwrap_or(core.params.wake.rate_scale());
    let rate = |block: &Block| block.lr_scale * last_rate;
    let all = |tasks: Result<Vec<Task>>| match tasks {
        Ok(tasks) => damped_inverses(&tasks, division),
        Err(error) => vec![Err(error)],
    };
    match core.params.wake.model() {
        Model::Linear => {
            let of = |(block, found): &(&Block, &mut BlockCurvature<'_>)| {
                task(core, block, &found.average, &found.state, damping)
            };
            all(blocks.iter().map(of).collect())
        }
        Model::Quadratic(QSolve::Factor) => {
            let sum = |(block, found): &(&Block, &mut BlockCurvature<'_>)| {
                let (bar, current) = (&found.average, &found.factors);
                let a = mix(&bar.0, 1.0, &current.0, rate(block))?;
                let g = mix(&bar.1, 1.0, &current.1, rate(block))?;
                task(core, block, &(a, g), &found.state, damping)
            };
            all(blocks.iter().map(sum).collect())
        }
        Model::Quadratic(QSolve::Exact) => {
            let solve = |(block, found): &(&Block, &mut BlockCurvature<'_>)| {
                let (bar, current) =
                    ((&found.average.0, &found.average.1), (&found.factors.0, &found.factors.1));
                let damping = core.damping_of(block, damping);
                sum_inverse(bar, current, block.shape(), rate(block), damping, &block.name)
            };
            blocks.iter().map(solve).collect()
        }
    }
}

/// The inverse of factors `A` and `G` of a block with the state `state`.
fn task(core: &Core, block: &Block, (a, g): &Factors, state: &BlockState, damping: f64) -> Result<Task> {
    let recipe = Recipe {
        kind: core.params.damping.kind(),
        damping: core.damping_of(block, damping),
        // A 1 x 1 factor has no use for an iteration.
        inverse: if block.columns.dim * block.rows.dim == 1 { Inverse::Eigen } else { core.params.inverse },
        floor: core.params.eigenvalue_floor,
    };
    // An inverse of other coordinates is no start.
    let last = state.preconditioner.as_ref();
    let last = last.filter(|_| recipe.method() == Inverse::Newton && state.damping_inputs.is_none());
    Ok(Task {
        a: seen(a, state.damping_inputs.as_ref())?,
        g: g.clone(),
        shape: block.shape(),
        last: last.cloned(),
        inputs: state.damping_inputs.clone(),
        recipe,
        name: block.name.clone(),
    })
}

/// The factor `A` in the coordinates of standard inputs, where a block has such.
fn seen(a: &Tensor, inputs: Option<&Tensor>) -> Result<Tensor> {
    inputs.map_or_else(|| Ok(a.clone()), |inputs| factor_inside(inputs, a))
}
