//! The step on the host, or by tensor operations wherever the tensors are: a proposal, and its commit.

use super::carry::{self, Carried};
use super::gradients::{Gradients, Staged};
use super::length::Length;
use super::precondition::{self, Direction};
use super::proposal::{BlockStep, Proposal};
use super::renew::{BlockCurvature, Refresh};
use super::wake_gradient::{self, WakeGradient};
use super::write;
use super::{Backend, Stepped, adam, average, length, run};
use crate::optim::state::block::BlockState;
use crate::optim::state::param::Adam;
use crate::optim::state::pending::Workplace;
use crate::optim::state::{Core, Slopes};
use candle_core::{Result, Tensor};

struct Host;

impl Backend for Host {
    type WakeGradients = Vec<Option<WakeGradient>>;
    type Directions = Vec<Option<Direction>>;
    type Length = Length;
    type Written = (Vec<Option<BlockStep>>, Vec<Option<(Adam, Tensor)>>, Length);

    fn wake_gradients(&mut self, core: &Core, grads: &Gradients) -> Staged<Self::WakeGradients> {
        Ok(core.blocks.iter().map(|block| wake_gradient::host(core, block, grads)).collect::<Result<_>>()?)
    }

    fn inverses(&mut self, _: &Core, _: &mut [Option<BlockCurvature<'_>>]) -> Result<()> {
        Ok(())
    }

    fn directions(
        &mut self,
        core: &Core,
        curvature: &[Option<BlockCurvature<'_>>],
        wakes: &Self::WakeGradients,
        damping: f64,
    ) -> Staged<Self::Directions> {
        let direction = |((block, curvature), wake): ((_, &Option<_>), &Option<_>)| match (curvature, wake) {
            (Some(curvature), Some(wake)) => {
                precondition::host(core, block, curvature, wake, damping).map(Some)
            }
            _ => Ok(None),
        };
        core.blocks.iter().zip(curvature).zip(wakes).map(direction).collect()
    }

    fn sums(
        &self,
        core: &Core,
        wakes: &Self::WakeGradients,
        directions: &Self::Directions,
    ) -> Staged<Vec<f64>> {
        Ok(length::sums(core, wakes, directions)?)
    }

    fn length(&mut self, core: &Core, sums: &[f64]) -> Staged<Length> {
        Ok(length::host(core, sums))
    }

    fn write(
        &mut self,
        core: &Core,
        curvature: &mut [Option<BlockCurvature<'_>>],
        (wakes, directions, length): (Self::WakeGradients, Self::Directions, Length),
        grads: &Gradients,
    ) -> Staged<Self::Written> {
        let mut blocks = Vec::with_capacity(core.blocks.len());
        let stages = curvature.iter_mut().zip(wakes).zip(directions);
        for (block, ((curvature, wake), direction)) in core.blocks.iter().zip(stages) {
            blocks.push(match (curvature, wake, direction) {
                (Some(curvature), Some(wake), Some(direction)) => {
                    Some(write::host(core, block, curvature, wake, direction, &length)?)
                }
                _ => None,
            });
        }
        Ok((blocks, adam::host(core, grads, length.rest)?, length))
    }
}

/// What the step on `grads` would do. What [`run`] says of refusals goes here too.
pub(crate) fn propose(
    core: &Core,
    workplace: &Workplace,
    refresh: Staged<Option<&Refresh>>,
    grads: &Gradients,
) -> Staged<Staged<Proposal>> {
    let stepped = run(core, &mut Host, workplace, refresh, grads)?;
    Ok(stepped.map(|Stepped { written, states, damping, pending, takes_pending: _ }| {
        let (blocks, adam, Length { rate, slopes, clip: _, rest: _ }) = written;
        Proposal { blocks, states, adam, rate, slopes, damping, pending }
    }))
}

/// Makes a proposal true: `values` into the Vars, state into the blocks. `taken` are the blocks' steps where inner steps changed them.
pub(crate) fn commit(
    proposal: Proposal,
    core: &mut Core,
    values: &[Tensor],
    taken: Option<&[Option<Tensor>]>,
) -> Result<()> {
    let carries = carry::host(core, &proposal, taken)?;
    let (slope, takes_part) = (slope(&carries), proposal.parts_taken(core));
    commit_carried(proposal, core, (values, &takes_part), carries, slope)
}

/// The slope of the loss along the step of these blocks.
pub(crate) fn slope(carries: &[Option<Carried>]) -> f64 {
    carries.iter().flatten().map(|carried| carried.slope).sum()
}

/// [`commit`] with what the next step looks back at, and the slope along the steps of all blocks; `values` with which params took part.
pub(crate) fn commit_carried(
    proposal: Proposal,
    core: &mut Core,
    (values, takes_part): (&[Tensor], &[bool]),
    carries: Vec<Option<Carried>>,
    slope: f64,
) -> Result<()> {
    let averages = average::host(core, values, takes_part)?;
    for (param, value) in core.vars.iter_mut().zip(values) {
        param.write(value)?;
    }
    core.slopes = Slopes { last: slope.abs(), ..proposal.slopes };
    core.averages = averages;
    for ((block, state), carried) in core.blocks.iter_mut().zip(proposal.states).zip(carries) {
        match (state, carried) {
            (Some(state), Some(Carried { carry, mean, step, slope: _ })) => {
                block.state = BlockState { carry, mean, step, ..state };
            }
            // A step that it did not take has no slope.
            _ => block.state.step = None,
        }
    }
    for (adam, next) in core.adam.iter_mut().zip(proposal.adam) {
        if let Some((next, _)) = next {
            *adam = next;
        }
    }
    core.previous_rate = Some(proposal.rate);
    core.damping = proposal.damping;
    core.pending = proposal.pending;
    core.steps += 1;
    Ok(())
}
