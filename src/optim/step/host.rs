//! The step on the host, or by tensor operations wherever the tensors are: a proposal, and its commit.

use super::carry::{self, Carried};
use super::length::Length;
use super::precondition::{self, Direction};
use super::renew::{BlockCurvature, Refresh};
use super::wake_gradient::{self, WakeGradient};
use super::write::{self, BlockStep};
use super::{Backend, Gradients, Staged, Stepped, adam, average, length, run};
use crate::optim::state::block::BlockState;
use crate::optim::state::param::{Adam, Param};
use crate::optim::state::pending::{PendingInverses, Workplace};
use crate::optim::state::{Core, Slopes};
use candle_core::{Result, Tensor};

/// What a step would do.
pub(crate) struct Proposal {
    /// The blocks' steps; none of blocks that take no part.
    pub blocks: Vec<Option<BlockStep>>,
    pub states: Vec<Option<BlockState>>,
    /// Adam's state with the value that it leads to.
    pub adam: Vec<Option<(Adam, Tensor)>>,
    /// `1 / lambda`, which multiplied the directions before any clip.
    pub rate: f64,
    /// With the slope where the last step ended.
    pub slopes: Slopes,
    pub damping: f64,
    pub pending: Option<PendingInverses>,
}

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

    fn length(
        &mut self,
        core: &Core,
        wakes: &Self::WakeGradients,
        directions: &Self::Directions,
    ) -> Staged<Length> {
        Ok(length::host(core, wakes, directions)?)
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
        Ok((blocks, adam::host(core, grads)?, length))
    }
}

impl Proposal {
    /// What the step on `grads` would do.
    pub fn of(
        core: &Core,
        workplace: &Workplace,
        refresh: Option<&Refresh>,
        grads: &Gradients,
    ) -> Staged<Self> {
        let Stepped { written, states, damping, pending, takes_pending: _ } =
            run(core, &mut Host, workplace, refresh, grads)?;
        let (blocks, adam, Length { rate, slopes, clip: _ }) = written;
        Ok(Self { blocks, states, adam, rate, slopes, damping, pending })
    }

    /// The parameters that it leads to, in the order of [`Core::vars`].
    pub fn values(&self, core: &Core) -> Result<Vec<Tensor>> {
        let taken = self.parts_taken(core);
        // A Var cannot be set to an alias of itself.
        let value = |(param, taken): (&Param, bool)| if taken { Ok(param.value()) } else { param.snapshot() };
        let mut values: Vec<Tensor> = core.vars.iter().zip(taken).map(value).collect::<Result<_>>()?;
        for (block, step) in core.blocks.iter().zip(&self.blocks) {
            let Some(step) = step else { continue };
            for (index, step) in block.split(&step.step, &core.vars)? {
                values[index] = (&values[index] + step)?;
            }
        }
        for (adam, value) in self.adam.iter().flatten() {
            values[adam.param] = value.clone();
        }
        Ok(values)
    }

    /// Makes it true: `values` into the Vars, state into the blocks. `taken` are the blocks' steps where inner steps changed them.
    pub fn commit(self, core: &mut Core, values: &[Tensor], taken: Option<&[Option<Tensor>]>) -> Result<()> {
        let carries = carry::host(core, &self, taken)?;
        let averages = average::host(core, values, &self.parts_taken(core))?;
        let last = carries.iter().flatten().map(|carried| carried.slope).sum::<f64>().abs();
        for (param, value) in core.vars.iter_mut().zip(values) {
            param.write(value)?;
        }
        core.slopes = Slopes { last, ..self.slopes };
        core.averages = averages;
        for ((block, state), carried) in core.blocks.iter_mut().zip(self.states).zip(carries) {
            match (state, carried) {
                (Some(state), Some(Carried { carry, mean, step, slope: _ })) => {
                    block.state = BlockState { carry, mean, step, ..state };
                }
                // A step that it did not take has no slope.
                _ => block.state.step = None,
            }
        }
        for (adam, next) in core.adam.iter_mut().zip(self.adam) {
            if let Some((next, _)) = next {
                *adam = next;
            }
        }
        core.previous_rate = Some(self.rate);
        core.damping = self.damping;
        core.pending = self.pending;
        core.steps += 1;
        Ok(())
    }

    /// Which params take part.
    fn parts_taken(&self, core: &Core) -> Vec<bool> {
        let mut taken = vec![false; core.vars.len()];
        let blocks = core.blocks.iter().zip(&self.blocks).filter(|(_, step)| step.is_some());
        let adam = self.adam.iter().flatten().map(|(adam, _)| adam.param);
        for index in blocks.flat_map(|(block, _)| block.params.iter().copied()).chain(adam) {
            taken[index] = true;
        }
        taken
    }
}
