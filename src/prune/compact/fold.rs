//! Norms as a part of the layers before them.

use super::shrink::like;
use super::{Norm, Stage, Weights, host};
use candle_core::{Result, bail};

/// The same function with each [`Stage::BatchNorm`] that directly follows a layer inside of it: rows of the weight are scaled, and the rest goes
/// to the bias, which every such layer gets. Norms that follow something else stay.
///
/// For a net that is trained no further; [`compact`](super::compact) shrinks norms as they are. The two may follow each other in any order.
///
/// # Errors
/// When a norm does not have as many channels as the layer has units, or a variance is negative; the message names the norm.
pub fn fold_norms(stages: &[Stage]) -> Result<Vec<Stage>> {
    let mut folded: Vec<Stage> = vec![];
    for stage in stages {
        match (stage, folded.last_mut()) {
            (Stage::BatchNorm(norm), Some(Stage::Linear(weights) | Stage::Conv(weights, _))) => {
                *weights = within(weights, norm)?;
            }
            (Stage::Residual { body, shortcut }, _) => {
                folded.push(Stage::Residual { body: fold_norms(body)?, shortcut: fold_norms(shortcut)? })
            }
            _ => folded.push(stage.clone()),
        }
    }
    Ok(folded)
}

fn within(layer: &Weights, norm: &Norm) -> Result<Weights> {
    let [factors, offsets, mean, var] = norm.parts()?;
    let out = layer.weight.dims().first().copied().unwrap_or(0);
    if out != mean.len() || out == 0 {
        bail!(
            "fold_norms: BatchNorm {} of {} channels follows layer {} of {out} units",
            norm.name,
            mean.len(),
            layer.name
        )
    }
    let scale = |row: usize| factors[row] / (var[row] + norm.eps).sqrt();
    let mut weight = host(&layer.weight)?;
    let width = weight.len() / out;
    for (row, weights) in weight.chunks_mut(width.max(1)).enumerate() {
        weights.iter_mut().for_each(|w| *w *= scale(row));
    }
    let bias = match &layer.bias {
        Some(bias) => host(bias)?,
        None => vec![0.; out],
    };
    let bias = bias.iter().enumerate().map(|(row, b)| (b - mean[row]) * scale(row) + offsets[row]).collect();
    Ok(Weights {
        name: layer.name.clone(),
        weight: like(&layer.weight, weight, layer.weight.dims())?,
        bias: Some(like(&layer.weight, bias, &[out])?),
    })
}
