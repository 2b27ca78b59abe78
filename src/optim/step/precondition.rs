//! Directions: wake gradients times the damped inverses, with the inner products that a step's length and clips depend on. On a GPU
//! small blocks share launches (`grouped.rs`, `kernels/grouped.cu`), and `kernels/precondition.cu` sums.

use super::gradients::{Refusal, Staged};
use super::grouped::{Job, grouped, single};
use super::kept_alive::KeptAlive;
use super::orthogonal::{in_basis, orthogonal_in_basis, shaped};
use super::partial_sums::{Parts, Sums};
use super::renew::{BlockCurvature, missing};
use super::wake_gradient::WakeGradient;
use super::work_space::DeviceStep;
use crate::curvature::{Preconditioner, damped_product, standard};
use crate::ops::dense::{dot, with_tf32};
use crate::ops::precondition::{DotItem, TotalItem, dots, totals};
use crate::optim::numbers::sum;
use crate::optim::params::{Products, StepRule};
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState};
use crate::optim::wake::Model;
use candle_core::{Result, Tensor};

/// A block's direction before the scaling that all blocks share.
pub(crate) struct Direction {
    /// `V`
    pub direction: Tensor,
    /// The squared length of `V` in the damped metric: `<V, w>` with the wake gradient `w`, where that is what was solved with.
    pub length: f64,
}

/// Turns a block's wake gradient into a direction.
pub(super) fn host(
    core: &Core,
    block: &Block,
    curvature: &BlockCurvature<'_>,
    wake: &WakeGradient,
    damping: f64,
) -> Staged<Direction> {
    let Some(preconditioner) = &curvature.state.preconditioner else {
        return Err(missing(core, block, "inverse").into());
    };
    let (direction, length) = match in_basis(core, block, &curvature.state) {
        Some((orthogonal, basis)) => {
            with_tf32(tf32(core), || orthogonal_in_basis(orthogonal, basis, &wake.decayed))?
        }
        None => {
            let inputs = curvature.state.inputs.as_ref();
            let apply = || shaped(&core.params, inputs, preconditioner.apply(&wake.decayed)?);
            let direction = with_tf32(tf32(core), apply)?;
            let length = match measured_by_metric(core) {
                true => length_in_metric(core, block, curvature, &direction, damping)?,
                false => dot(&direction, &wake.decayed)?,
            };
            (direction, length)
        }
    };
    if !length.is_finite() {
        return Err(Refusal::NonFinite(culprit(core, block, &wake.gradient)?));
    }
    Ok(Direction { direction, length })
}

/// Whether products may round to TF32.
fn tf32(core: &Core) -> bool {
    match core.params.products {
        Some(products) => products == Products::Tf32,
        None => core.vars.first().is_some_and(|param| param.var.dtype().size_in_bytes() < 4),
    }
}

/// Whether a direction's length is not `<V, w>`: a quadratic wake solves with more than the divergence's curvature, and an orthogonal
/// direction solves nothing.
fn measured_by_metric(core: &Core) -> bool {
    if core.params.orthogonal.is_some() {
        return true;
    }
    match (core.params.step_rule, core.params.wake.model()) {
        (StepRule::LearningRate, _) | (_, Model::Linear) => false,
        (StepRule::FixedKl { .. } | StepRule::AdaptiveKl(_), Model::Quadratic(_)) => true,
    }
}

/// What of low rank measures a direction: the average that the inverse was made of, which has been decomposed for it.
fn of_low_rank<'a>(core: &Core, state: &'a BlockState) -> Option<&'a Preconditioner> {
    match (core.params.wake.model(), &state.damping_inputs) {
        (Model::Linear, None) => state.preconditioner.as_ref(),
        (Model::Linear, Some(_)) | (Model::Quadratic(_), _) => None,
    }
}

/// A direction's squared length in the damped metric, which measures its divergence.
fn length_in_metric(
    core: &Core,
    block: &Block,
    curvature: &BlockCurvature<'_>,
    direction: &Tensor,
    damping: f64,
) -> Result<f64> {
    if let Some(inverse) = of_low_rank(core, &curvature.state)
        && let Some(length) = inverse.length_undone(direction)?
    {
        return Ok(length);
    }
    let (inside, curved) = in_metric(core, block, curvature, direction, damping)?;
    dot(&inside, &curved)
}

/// A direction in the coordinates that its block's damping belongs to, and there times the damped average: their inner product is
/// [`length_in_metric`].
fn in_metric(
    core: &Core,
    block: &Block,
    curvature: &BlockCurvature<'_>,
    direction: &Tensor,
    damping: f64,
) -> Result<(Tensor, Tensor)> {
    if let Some(inverse) = of_low_rank(core, &curvature.state)
        && let Some(curved) = inverse.undone(direction)?
    {
        return Ok((direction.clone(), curved));
    }
    let (a, g) = &curvature.average;
    let (a, direction) = match &curvature.state.damping_inputs {
        None => (a.clone(), direction.clone()),
        Some(inputs) => (standard::factor_inside(inputs, a)?, standard::inside(inputs, direction)?),
    };
    let damping = core.damping_of(block, damping);
    let curved = damped_product(&a, g, core.params.damping.kind(), damping, &direction, &block.name)?;
    Ok((direction, curved))
}

/// Names the tensor that made a direction NaN or infinite.
fn culprit(core: &Core, block: &Block, gradient: &Tensor) -> Result<String> {
    for (index, gradient) in block.split(gradient, &core.vars)? {
        if !sum(&gradient)?.is_finite() {
            return Ok(format!("the gradient of {} has NaN or infinite elements", core.vars[index].name));
        }
    }
    Ok(format!("the direction of block {} overflows; a larger damping would bound it", block.name))
}

/// The directions `V` of all blocks; among the totals of `device` `<V, w>`, `<V, V>` where it is asked for, and the slopes.
pub(super) fn device(
    core: &Core,
    device: &DeviceStep,
    curvature: &[Option<BlockCurvature<'_>>],
    damping: f64,
) -> Result<Vec<Tensor>> {
    let by_metric = measured_by_metric(core);
    let gpu = &device.gpu;
    let mut kept = KeptAlive::new(gpu);
    let total = gpu.operand(&device.totals, "totals")?;
    let products = gpu.operand(&device.products, "products")?;
    let squares = gpu.operand(&device.squares, "squares")?;
    let mut sums = Vec::new();

    let mut scaled = Parts::of(&products, 0);
    let (directions, dots_of) = with_tf32(tf32(core), || precondition(core, device, curvature, &mut scaled))?;
    let mut dotted = Parts::of(&products, scaled.next);
    let mut items = Vec::new();
    for (index, direction) in directions.iter().enumerate() {
        let name = &core.blocks[index].name;
        let (parts, len) = match dots_of[index].filter(|_| !by_metric) {
            Some(known) => known,
            None => {
                let (direction, with) = match by_metric {
                    true => {
                        let block = &core.blocks[index];
                        in_metric(core, block, of(core, curvature, index)?, direction, damping)?
                    }
                    false => (direction.clone(), device.scratch[index].wake.clone()),
                };
                items.push(DotItem {
                    a: kept.address(&direction.contiguous()?, name)?,
                    b: kept.address(&with.contiguous()?, name)?,
                    len: direction.elem_count() as u64,
                    ..DotItem::default()
                });
                dotted.take(direction.elem_count())
            }
        };
        sums.push(TotalItem { parts, total: total.at(index), len });
    }
    if !items.is_empty() {
        dots(gpu, device.dtype, &items, dotted.first())?;
    }
    if core.params.rms_clip.is_some() && !directions.is_empty() {
        let (mut items, mut dotted) = (Vec::new(), Parts::of(&squares, 0));
        for (index, direction) in directions.iter().enumerate() {
            let address = kept.address(direction, &core.blocks[index].name)?;
            let len = direction.elem_count();
            items.push(DotItem { a: address, b: address, len: len as u64, ..DotItem::default() });
            let (parts, len) = dotted.take(len);
            sums.push(TotalItem { parts, total: total.at(directions.len() + index), len });
        }
        dots(gpu, device.dtype, &items, dotted.first())?;
    }
    let slopes = [gpu.operand(&device.slopes, "slopes")?, gpu.operand(&device.last_slopes, "slopes")?];
    for (nth, parts) in slopes.iter().enumerate() {
        let total = total.at(2 * directions.len() + nth);
        sums.push(TotalItem { parts: parts.address(), total, len: parts.len as u64 });
    }
    totals(gpu, &sums)?;
    Ok(directions)
}

/// The blocks' directions from their wake gradients, and the partial sums of `<V, w>` where they have been made on the way.
fn precondition(
    core: &Core,
    device: &DeviceStep,
    curvature: &[Option<BlockCurvature<'_>>],
    sums: &mut Parts<'_>,
) -> Result<(Vec<Tensor>, Vec<Option<Sums>>)> {
    let mut jobs = Vec::with_capacity(device.stacks.len());
    for stack in &device.stacks {
        if let Some(inverse) = &stack.inverse {
            jobs.push(Job { inverse, wake: &stack.wake, blocks: &stack.blocks });
            continue;
        }
        for index in &stack.blocks {
            let Some(inverse) = &of(core, curvature, *index)?.state.preconditioner else {
                return Err(missing(core, &core.blocks[*index], "inverse"));
            };
            let wake = &device.scratch[*index].wake;
            jobs.push(Job { inverse, wake, blocks: std::slice::from_ref(index) });
        }
    }
    let (small, large): (Vec<_>, Vec<_>) = jobs.into_iter().partition(Job::is_small);
    let mut outputs = grouped(&device.gpu, device.dtype, &small, sums)?;
    outputs.extend(single(&device.gpu, device.dtype, &large, sums)?);
    let mut directions: Vec<Tensor> = device.scratch.iter().map(|scratch| scratch.wake.clone()).collect();
    let mut dots_of = vec![None; core.blocks.len()];
    for (job, output) in small.iter().chain(&large).zip(outputs) {
        let inputs = job.blocks.iter().map(|&index| Ok(of(core, curvature, index)?.state.inputs.as_ref()));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        // Blocks of one shape lie together, and are made orthogonal together.
        let together = match inputs.iter().all(Option::is_none) {
            true => Some(shaped(&core.params, None, output.directions.clone())?),
            false => None,
        };
        for (nth, (&index, inputs)) in job.blocks.iter().zip(inputs).enumerate() {
            directions[index] = match &together {
                Some(all) => job.part(all, nth)?,
                None => shaped(&core.params, inputs, job.part(&output.directions, nth)?)?,
            };
            dots_of[index] = output.dots.get(nth).copied();
        }
    }
    Ok((directions, dots_of))
}

/// A block's curvature; on a GPU all blocks take part.
fn of<'a, 'b>(
    core: &Core,
    curvature: &'a [Option<BlockCurvature<'b>>],
    index: usize,
) -> Result<&'a BlockCurvature<'b>> {
    curvature[index].as_ref().ok_or_else(|| missing(core, &core.blocks[index], "curvature"))
}
