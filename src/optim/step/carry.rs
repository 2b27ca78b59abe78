//! What a step leaves for the next one to look back at. On a GPU with a linear model the kernel `update` writes it, else the kernel
//! `carry`, both of `kernels/update.cu`.
//!
//! ```text
//! mean = model_gradient (+ B s where the models are quadratic)    the averaged models' gradient where the step has led
//! carry = mean, or literally model_gradient - wake_gradient - lambda F_bar s
//! ```

use super::grouped::{Curved, factor_products};
use super::kept_alive::KeptAlive;
use super::proposal::{BlockStep, Proposal};
use super::renew::BlockCurvature;
use super::wake_gradient::WakeGradient;
use super::work_space::DeviceStep;
use crate::curvature::{damped_product, factor_product};
use crate::ops::dense::{dot, mix};
use crate::ops::update::{self, CarryItem};
use crate::ops::wake::StepScalars;
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState};
use crate::optim::wake::{Carry, Model};
use candle_core::{Result, Tensor};

/// What the next step of a block looks back at.
#[derive(Default)]
pub(crate) struct Carried {
    /// Of the distances.
    pub carry: Option<Tensor>,
    /// Of the models.
    pub mean: Option<Tensor>,
    /// The step itself, and the loss's slope along it, where slopes are measured.
    pub step: Option<Tensor>,
    pub slope: f64,
}

/// From the steps really taken: `taken` where later inner steps changed them.
pub(crate) fn host(
    core: &Core,
    proposal: &Proposal,
    taken: Option<&[Option<Tensor>]>,
) -> Result<Vec<Option<Carried>>> {
    let mut carries = Vec::with_capacity(core.blocks.len());
    for (index, (block, proposed)) in core.blocks.iter().zip(&proposal.blocks).enumerate() {
        let state = &proposal.states[index];
        let (Some(proposed), Some(state)) = (proposed, state) else {
            carries.push(None);
            continue;
        };
        let step = taken.and_then(|taken| taken[index].as_ref()).unwrap_or(&proposed.step);
        let rate = proposal.rate * block.lr_scale;
        let damping = core.damping_of(block, proposal.damping);
        carries.push(Some(carried(core, block, (proposed, state), step, rate, damping)?));
    }
    Ok(carries)
}

fn carried(
    core: &Core,
    block: &Block,
    (proposed, state): (&BlockStep, &BlockState),
    step: &Tensor,
    rate: f64,
    damping: f64,
) -> Result<Carried> {
    let BlockStep { wake: WakeGradient { gradient, model_gradient, wake_gradient, .. }, factors, .. } =
        proposed;
    let averaged = core.params.wake.model_decay() > 0.0;
    let waked = core.wake_decay().is_some();
    let (kept, slope) = match core.measures_slopes() {
        true => (Some(step.clone()), dot(step, gradient)?),
        false => (None, 0.0),
    };
    if !(averaged || waked) {
        return Ok(Carried { step: kept, slope, ..Carried::default() });
    }
    let model = match core.params.wake.model() {
        Model::Linear => model_gradient.clone(),
        Model::Quadratic(_) => {
            let (a, g) = factors;
            mix(model_gradient, 1.0, &factor_product(a, g, step, &block.name)?, 1.0)?
        }
    };
    let distances = match (core.params.carry, &state.factor_a, &state.factor_g) {
        // At a rate of 0 there was no step, and the next one looks back at nothing.
        (Carry::Literal, Some(a), Some(g)) if rate > 0.0 => {
            let curved = damped_product(a, g, core.params.damping.kind(), damping, step, &block.name)?;
            mix(&(model_gradient - wake_gradient)?, 1.0, &curved, -1.0 / rate)?
        }
        (Carry::Literal | Carry::Gradient, _, _) => model.clone(),
    };
    let (carry, mean) = (waked.then_some(distances), averaged.then_some(model));
    Ok(Carried { carry, mean, step: kept, slope })
}

/// `model_gradient + B step` of a quadratic wake, from the steps that `write::device` has left.
pub(super) fn device(
    core: &Core,
    device: &DeviceStep,
    board: &StepScalars,
    curvature: &[Option<BlockCurvature<'_>>],
    steps: &[Option<Tensor>],
) -> Result<()> {
    let mut kept = KeptAlive::new(&device.gpu);
    let mut items = Vec::with_capacity(core.blocks.len());
    let (mut moved, mut products) = (Vec::new(), Vec::new());
    for (index, block) in core.blocks.iter().enumerate() {
        let found = (&steps[index], &device.scratch[index].model, &curvature[index]);
        if let (Some(step), Some(model), Some(curvature)) = found {
            let (a, g) = &curvature.factors;
            products.push(Curved { a, g, x: step, name: &block.name });
            moved.push((block, model));
        }
    }
    let curved = factor_products(&device.gpu, device.dtype, &products)?;
    for ((block, model), curved) in moved.into_iter().zip(&curved) {
        let (carry, mean) = addresses(&mut kept, &block.state, &block.name)?;
        items.push(CarryItem {
            model: kept.address(model, &block.name)?,
            curved: kept.address(curved, &block.name)?,
            carry,
            mean,
            len: curved.elem_count() as u64,
            ..CarryItem::default()
        });
    }
    if items.is_empty() { Ok(()) } else { update::carries(&device.gpu, device.dtype, &items, board) }
}

/// The addresses of a block's carry and mean, the latter absent where both are one array.
pub(super) fn addresses(kept: &mut KeptAlive<'_>, state: &BlockState, name: &str) -> Result<(u64, u64)> {
    let carry = kept.maybe(state.carry.as_ref(), name)?;
    let mean = kept.maybe(state.mean.as_ref(), name)?;
    Ok((carry, if mean == carry { 0 } else { mean }))
}
