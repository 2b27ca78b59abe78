//! The factors of a batch, and their exponential averages, into which they go.

use super::gradients::{Gradients, Refusal, Staged, gradient, takes_part};
use crate::curvature::standard::coordinates;
use crate::curvature::{Counts, LayerFactors, average_product, gradient_factors, wide};
use crate::gpu::Gpu;
use crate::linalg::traces::traces;
use crate::ops::factor::ema;
use crate::optim::numbers::numbers;
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState, Factors, Part};
use crate::optim::wake::Model;
use candle_core::{Error, Result, Tensor};

/// What a refresh has seen of a batch.
pub(crate) struct Refresh {
    /// A set of factors a layer.
    pub layers: Vec<LayerFactors>,
    /// Whether they are the averages with the batch's in them, and not those of the batch alone.
    pub averaged: bool,
    /// What its sums over loss terms were divided by.
    pub counts: Counts,
    /// For each pass with labels of its own, the gradients of the summed loss of the blocks without a layer that are here. Without such
    /// passes these blocks take the step's gradients.
    pub drawn: Vec<Vec<Option<Tensor>>>,
}

/// A block's curvature as a step sees it.
pub(crate) struct BlockCurvature<'a> {
    /// The block's state as the step will leave it, as far as the stages have come.
    pub state: BlockState,
    pub average: Factors,
    /// A quadratic model's: those of this batch where there are any, else the averages.
    pub factors: Factors,
    /// What was recorded for this step, with what sums over loss terms are divided by.
    pub records: Option<(&'a LayerFactors, f64)>,
    /// Whether this step is the first with the inverse.
    pub fresh: bool,
}

/// What a refresh brings a block.
struct Current {
    factors: Factors,
    /// See [`Refresh::averaged`].
    averaged: bool,
}

/// The blocks' curvature with the factors of this step, where there are any, in their averages; none of blocks that take no part.
pub(crate) fn renew<'a>(
    core: &Core,
    refresh: Option<&'a Refresh>,
    grads: &Gradients,
) -> Staged<Vec<Option<BlockCurvature<'a>>>> {
    let mut current: Vec<Option<Current>> = match refresh {
        Some(refresh) => current_factors(core, refresh, grads)?,
        None => core.blocks.iter().map(|_| None).collect(),
    };
    let mut found = Vec::with_capacity(core.blocks.len());
    for (block, current) in core.blocks.iter().zip(&mut current) {
        let records =
            refresh.and_then(|refresh| Some((refresh.layers.get(block.layer?)?, refresh.counts.total)));
        // Called without a row, a layer has a gradient and no factors; it waits for the first.
        let known = current.is_some() || block.state.factor_a.is_some() || !core.is_optional(block);
        found.push(match takes_part(block, grads) && known {
            true => Some(renewed(core, block, records, current.take())?),
            false => None,
        });
    }
    Ok(found)
}

fn renewed<'a>(
    core: &Core,
    block: &Block,
    records: Option<(&'a LayerFactors, f64)>,
    current: Option<Current>,
) -> Staged<BlockCurvature<'a>> {
    let mut state = block.state.clone();
    if let Some(Current { factors, averaged }) = &current {
        let last = (state.factor_a.as_ref(), state.factor_g.as_ref());
        let (a, g) = match averaged {
            true => factors.clone(),
            false => average_of(block, last, factors, core.params.stat_decay)?,
        };
        if core.params.orthogonal.is_some() && block.knows_its_inputs() {
            let found = coordinates(&a)?;
            state.damping_inputs =
                found.as_ref().filter(|(_, known)| *known).map(|(inputs, _)| inputs.clone());
            state.inputs = found.map(|(inputs, _)| inputs);
        }
        (state.factor_a, state.factor_g) = (Some(a), Some(g));
    }
    let (Some(a), Some(g)) = (&state.factor_a, &state.factor_g) else {
        return Err(missing(core, block, "curvature").into());
    };
    let average = (a.clone(), g.clone());
    let current = current.map_or_else(|| average.clone(), |current| current.factors);
    let factors = model_factors(core, block, &mut state, current)?;
    Ok(BlockCurvature { state, average, factors, records, fresh: false })
}

/// The factors of the averaged quadratic models, the newest of which has the factors `current`.
fn model_factors(core: &Core, block: &Block, state: &mut BlockState, current: Factors) -> Result<Factors> {
    let decay = core.params.wake.model_decay();
    match core.params.wake.model() {
        Model::Quadratic(_) if decay > 0.0 => {}
        Model::Linear | Model::Quadratic(_) => return Ok(current),
    }
    let (a, g) = average_of(block, (state.model_a.as_ref(), state.model_g.as_ref()), &current, decay)?;
    (state.model_a, state.model_g) = (Some(a.clone()), Some(g.clone()));
    Ok((a, g))
}

/// The exponential averages of a block's factors.
fn average_of(
    block: &Block,
    (last_a, last_g): (Option<&Tensor>, Option<&Tensor>),
    (a, g): &Factors,
    decay: f64,
) -> Result<Factors> {
    match block.part {
        Part::Gradient => average_product(last_a.zip(last_g), (a, g), decay),
        Part::Folded | Part::Weight | Part::Bias | Part::Table => {
            Ok((ema(last_a, a, decay)?, ema(last_g, g, decay)?))
        }
    }
}

pub(super) fn missing(core: &Core, block: &Block, what: &str) -> Error {
    Error::Msg(format!("{}: block {} has no {what} yet", core.name(), block.name))
}

/// The factors of a batch, a pair a block, or their averages.
fn current_factors(
    core: &Core,
    Refresh { layers, averaged, counts, drawn }: &Refresh,
    grads: &Gradients,
) -> Staged<Vec<Option<Current>>> {
    let mut factors = Vec::with_capacity(core.blocks.len());
    let mut without_layer = 0;
    for block in &core.blocks {
        let pair = match block.layer {
            _ if !takes_part(block, grads) => None,
            Some(layer) => block.refreshed(&layers[layer])?,
            None => {
                let drawn: Vec<_> =
                    drawn.iter().filter_map(|draw| draw.get(without_layer)?.as_ref()).collect();
                // Drawn gradients are of terms times the roots of their weights, the step's of the weighted ones.
                let (gradient, terms) = match drawn.is_empty() {
                    true => {
                        let gradient = block.matrix(|index| wide(&gradient(core, grads, index)?))?;
                        (gradient, counts.effective())
                    }
                    false => ((Tensor::cat(&drawn, 0)? / counts.total)?, counts.total),
                };
                Some(gradient_factors(&gradient, block.rows, block.columns, terms, &block.name)?)
            }
        };
        without_layer += usize::from(block.layer.is_none());
        let averaged = *averaged && block.layer.is_some();
        factors.push(pair.map(|factors| Current { factors, averaged }));
    }
    check_finite(core, &factors)?;
    Ok(factors)
}

/// Decompositions of factors that are not finite would fail in their own ways.
fn check_finite(core: &Core, factors: &[Option<Current>]) -> Staged<()> {
    let all = || {
        let pairs = core.blocks.iter().zip(factors);
        pairs.filter_map(|(block, current)| Some((block, &current.as_ref()?.factors)))
    };
    let full = |block: &Block| block.rows.is_full() && block.columns.is_full();
    // On a GPU, traces and squares of all full ones take a launch or two, and are finite where these are, short of an overflow.
    let on_gpu = all().next().is_some_and(|(_, (a, _))| Gpu::of(a.device()).is_some());
    let blocks: Vec<_> = all().filter(|(block, _)| on_gpu && full(block)).collect();
    let pairs: Vec<_> = blocks.iter().map(|(block, (a, g))| (a, g, block.groups)).collect();
    let passed = matches!(traces(&pairs), Ok((squares, trace)) if squares.is_finite() && trace.is_finite());
    let mut totals = Vec::new();
    let mut names = Vec::new();
    for (block, (a, g)) in all().filter(|(block, _)| !(on_gpu && passed && full(block))) {
        totals.extend([a.sum_all()?, g.sum_all()?]);
        names.extend([("A", &block.name), ("G", &block.name)]);
    }
    for (total, (factor, block)) in numbers(&totals)?.into_iter().zip(names) {
        if !total.is_finite() {
            let what = format!("factor {factor} of block {block} has NaN or infinite elements");
            return Err(Refusal::NonFinite(what));
        }
    }
    Ok(())
}
