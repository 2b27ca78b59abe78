//! From directions to steps: clips, momentum and decoupled decay. On a GPU `kernels/update.cu` also writes the parameters, their averages,
//! and of linear models what the next step looks back at.

use super::carry;
use super::kept_alive::KeptAlive;
use super::length::Length;
use super::precondition::Direction;
use super::proposal::BlockStep;
use super::renew::BlockCurvature;
use super::wake_gradient::{WakeGradient, decayed};
use super::work_space::{DeviceStep, Scratch, Targets};
use crate::ops::dense::{dot, mix};
use crate::ops::update::{self, UpdateItem};
use crate::ops::wake::StepScalars;
use crate::optim::params::Decay;
use crate::optim::state::Core;
use crate::optim::state::block::Block;
use crate::optim::wake::Model;
use candle_core::{Result, Tensor};

/// A block's step; its velocity goes into the state of `curvature`.
pub(super) fn host(
    core: &Core,
    block: &Block,
    curvature: &mut BlockCurvature<'_>,
    wake: WakeGradient,
    direction: Direction,
    length: &Length,
) -> Result<BlockStep> {
    let (rate, clip) = (length.rate * block.lr_scale, length.clip);
    // Both clips measure the direction as it was solved for.
    let direction = rms_clipped(core, direction.direction)?;
    let state = &mut curvature.state;
    let mut step = match (core.params.momentum > 0.0, &state.velocity) {
        (false, _) => (direction * (-rate * clip))?,
        (true, velocity) => {
            let moved = match velocity {
                Some(velocity) => mix(velocity, core.params.momentum, &direction, clip)?,
                None => (direction * clip)?,
            };
            let step = (&moved * -rate)?;
            state.velocity = Some(moved);
            step
        }
    };
    match core.params.decay {
        Decay::Decoupled => {
            if let Some(decay) = decayed(core, block)? {
                step = mix(&step, 1.0, &decay, -rate)?;
            }
        }
        Decay::AfterWake | Decay::Loss => {}
    }
    Ok(BlockStep { wake, factors: curvature.factors.clone(), step })
}

/// `V min(1, rms_clip / rms(V))`.
pub(crate) fn rms_clipped(core: &Core, direction: Tensor) -> Result<Tensor> {
    let Some(limit) = core.params.rms_clip else { return Ok(direction) };
    let rms = (dot(&direction, &direction)? / direction.elem_count().max(1) as f64).sqrt();
    if rms > limit { direction * (limit / rms) } else { Ok(direction) }
}

/// Parameters, averages, and what the next step looks back at, of all blocks.
pub(super) fn device(
    core: &Core,
    device: &DeviceStep,
    board: &StepScalars,
    directions: &[Tensor],
    curvature: &[Option<BlockCurvature<'_>>],
) -> Result<()> {
    let gpu = &device.gpu;
    let mut kept = KeptAlive::new(gpu);
    let linear = match core.params.wake.model() {
        Model::Linear => true,
        Model::Quadratic(_) => false,
    };
    let totals = gpu.operand(&device.totals, "totals")?;
    let steps = step_matrices(core, device, linear)?;
    let mut items = Vec::with_capacity(core.vars.len());
    for (index, block) in core.blocks.iter().enumerate() {
        let (state, scratch, name) = (&block.state, &device.scratch[index], &block.name);
        let (carry, mean) = carry::addresses(&mut kept, state, name)?;
        let common = UpdateItem {
            direction: kept.address(&directions[index], name)?,
            gradient: match device.needs.slopes {
                true => kept.maybe(scratch.gradient.as_ref().or(scratch.model.as_ref()), name)?,
                false => 0,
            },
            model: if linear { kept.maybe(scratch.model.as_ref(), name)? } else { 0 },
            velocity: kept.maybe(state.velocity.as_ref(), name)?,
            step: kept.maybe(steps[index].as_ref(), name)?,
            carry: if linear { carry } else { 0 },
            mean: if linear { mean } else { 0 },
            squares: if device.needs.rms_clip { totals.at(core.blocks.len() + index) } else { 0 },
            block_len: directions[index].elem_count() as u64,
            lr_scale: block.lr_scale,
            ..UpdateItem::default()
        };
        for (param, place) in device.places(core, block)? {
            let Targets { value, var, average, dtype } = device.targets(core, &mut kept, param)?;
            let decay = match core.params.decay {
                Decay::Decoupled => core.vars[param].weight_decay,
                Decay::AfterWake | Decay::Loss => 0.0,
            };
            let len = core.vars[param].var.elem_count() as u64;
            items.push(UpdateItem { value, var, average, len, decay, place, dtype, ..common });
        }
    }
    if !items.is_empty() {
        let taken = gpu.operand(&device.last_slopes, "slopes")?;
        let slopes = device.needs.slopes.then_some(&taken);
        let rms_clip = core.params.rms_clip.unwrap_or(0.0);
        update::updates(gpu, device.dtype, &items, board, slopes, (core.params.momentum, rms_clip))?;
    }
    match linear || !device.needs.looks_back() {
        true => Ok(()),
        false => carry::device(core, device, board, curvature, &steps),
    }
}

/// Where the blocks' steps are written: where slopes are measured, or a quadratic wake is to look back at them.
fn step_matrices(core: &Core, device: &DeviceStep, linear: bool) -> Result<Vec<Option<Tensor>>> {
    let wanted = !linear && device.needs.looks_back();
    let of = |(block, scratch): (&Block, &Scratch)| match &block.state.step {
        Some(step) => Ok(Some(step.clone())),
        // A step that is not taken leaves it as it is.
        None if wanted => scratch.wake.zeros_like().map(Some),
        None => Ok(None),
    };
    core.blocks.iter().zip(&device.scratch).map(of).collect()
}
