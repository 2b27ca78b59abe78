//! The first stage: the gradient of the models of the loss, less what the wake looks back at. On a GPU `kernels/wake.cu`.
//!
//! ```text
//! model_gradient = (1 - rho_m) g + rho_m mean           the averaged models' at the parameters as they are
//! wake_gradient = model_gradient - rho_d (lambda_k / lambda_{k-1}) carry
//! ```
//!
//! with `wd theta` added to `g` ([`Decay::Loss`]) or to the end ([`Decay::AfterWake`]).

use super::gradients::{Gradients, gradient, takes_part};
use super::kept_alive::KeptAlive;
use super::work_space::DeviceStep;
use crate::gpu::table::type_number;
use crate::ops::dense::mix;
use crate::ops::wake::{Place, StepScalars, WakeItem, Wakes, wakes};
use crate::optim::params::Decay;
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState};
use candle_core::{Result, Tensor};

/// The matrices `[groups, rows, columns]` of one block.
pub(crate) struct WakeGradient {
    /// Of the loss.
    pub gradient: Tensor,
    /// Of the models that the wake averages; of the newest alone, `gradient` itself.
    pub model_gradient: Tensor,
    /// The model gradient less what the distances look back at.
    pub wake_gradient: Tensor,
    /// The wake gradient with the weight decay: what the curvature is solved with.
    pub decayed: Tensor,
}

/// A block's; none where its Vars take no part in the step.
pub(crate) fn host(core: &Core, block: &Block, grads: &Gradients) -> Result<Option<WakeGradient>> {
    if !takes_part(block, grads) {
        return Ok(None);
    }
    let gradient = block.matrix(|index| gradient(core, grads, index))?;
    let decay = decayed(core, block)?;
    let gradient = match (&decay, core.params.decay) {
        (Some(decay), Decay::Loss) => (gradient + decay)?,
        (Some(_), Decay::AfterWake | Decay::Decoupled) | (None, _) => gradient,
    };
    let model_gradient = model_gradient(core, &block.state, &gradient)?;
    let wake_gradient = wake_gradient(core, &block.state, &model_gradient)?;
    let decayed = match (&decay, core.params.decay) {
        // A wake that is scaled to the steady state's step takes the decay's share of the scale out again.
        (Some(decay), Decay::AfterWake) => {
            mix(&wake_gradient, 1.0, decay, 1.0 / core.params.wake.rate_scale())?
        }
        (Some(_), Decay::Loss | Decay::Decoupled) | (None, _) => wake_gradient.clone(),
    };
    Ok(Some(WakeGradient { gradient, model_gradient, wake_gradient, decayed }))
}

/// The gradient of the averaged models at the parameters as they are: the newest one's, and what the last step left of the
/// earlier ones'.
fn model_gradient(core: &Core, state: &BlockState, gradient: &Tensor) -> Result<Tensor> {
    let decay = core.params.wake.model_decay();
    match &state.mean {
        Some(mean) if decay > 0.0 => mix(gradient, 1.0 - decay, mean, decay),
        _ => Ok(gradient.clone()),
    }
}

fn wake_gradient(core: &Core, state: &BlockState, model_gradient: &Tensor) -> Result<Tensor> {
    match (core.wake_decay(), &state.carry) {
        (Some(rho), Some(carry)) if rho > 0.0 => mix(model_gradient, 1.0, carry, -rho * rate_ratio(core)),
        _ => Ok(model_gradient.clone()),
    }
}

/// `lambda_k / lambda_{k-1}`.
fn rate_ratio(core: &Core) -> f64 {
    match (core.given_rate(), core.previous_rate) {
        // This step's rate follows from the wake gradient, so it is not known yet.
        (None, _) => 1.0,
        (Some(rate), Some(previous)) if rate > 0.0 => previous / rate,
        (Some(rate), None) if rate > 0.0 => 1.0,
        // At a rate of 0 nothing moves, whatever is looked back at.
        (Some(_), _) => 0.0,
    }
}

/// `wd theta` of a block, where it has any decay.
pub(crate) fn decayed(core: &Core, block: &Block) -> Result<Option<Tensor>> {
    if block.params.iter().all(|&i| core.vars[i].weight_decay == 0.0) {
        return Ok(None);
    }
    block.matrix(|i| core.vars[i].value() * core.vars[i].weight_decay).map(Some)
}

/// All blocks' into the scratch matrices of `device`, in one launch for every 96 params.
pub(crate) fn device(core: &Core, device: &DeviceStep, board: &StepScalars, grads: &Gradients) -> Result<()> {
    let mut kept = KeptAlive::new(&device.gpu);
    let mut items = Vec::with_capacity(core.vars.len());
    for (block, scratch) in core.blocks.iter().zip(&device.scratch) {
        let state = &block.state;
        let common = WakeItem {
            mean: kept.maybe(state.mean.as_ref(), &block.name)?,
            carry: kept.maybe(state.carry.as_ref(), &block.name)?,
            last: kept.maybe(state.step.as_ref(), &block.name)?,
            gradient_out: kept.maybe(scratch.gradient.as_ref(), &block.name)?,
            model: kept.maybe(scratch.model.as_ref(), &block.name)?,
            out: kept.address(&scratch.wake, &block.name)?,
            ..WakeItem::default()
        };
        for (index, place) in device.places(core, block)? {
            let (param, gradient) = (&core.vars[index], gradient(core, grads, index)?);
            let decayed = match core.params.decay {
                Decay::AfterWake | Decay::Loss => param.weight_decay != 0.0,
                Decay::Decoupled => false,
            };
            let value = if decayed { kept.address(&param.value(), &param.name)? } else { 0 };
            items.push(WakeItem {
                gradient: kept.gradient(&gradient, &param.name)?,
                value,
                len: gradient.elem_count() as u64,
                decay: param.weight_decay,
                place,
                dtype: type_number(gradient.dtype(), &param.name)?,
                index: index as u32,
                ..common
            });
        }
    }
    // Adam's gradients are only checked here.
    for adam in &core.adam {
        let (param, gradient) = (&core.vars[adam.param], gradient(core, grads, adam.param)?);
        items.push(WakeItem {
            gradient: kept.gradient(&gradient, &param.name)?,
            len: gradient.elem_count() as u64,
            place: Place { width: 1, columns: 1, offset: 0, pad: 0 },
            dtype: type_number(gradient.dtype(), &param.name)?,
            index: adam.param as u32,
            ..WakeItem::default()
        });
    }
    let how = Wakes {
        model_decay: core.params.wake.model_decay(),
        after_wake: 1.0 / core.params.wake.rate_scale(),
        in_loss: match core.params.decay {
            Decay::Loss => true,
            Decay::AfterWake | Decay::Decoupled => false,
        },
    };
    let slopes = device.gpu.operand(&device.slopes, "slopes")?;
    if items.is_empty() { Ok(()) } else { wakes(&device.gpu, device.dtype, &items, board, &slopes, how) }
}
