//! The stages with the channels that stay.

use super::layer::Layer;
use super::plan::{INPUT, NormState, Plan};
use super::{Compacted, Norm, Stage, Weights, places};
use crate::nn::Conv2dConfig;
use candle_core::{Device, Result, Tensor, bail};

pub(super) fn shrunk(stages: &[Stage], plan: &Plan, keep: &[Vec<bool>]) -> Result<Compacted> {
    let mut next = Next { plan, keep, layers: plan.layers.iter(), norms: plan.norms.iter() };
    let stages = next.stages(stages)?;
    let kept = |signal: usize| places(&keep[plan.space_of(signal)]);
    let units = plan.layers.iter().map(|layer| kept(layer.writes)).collect();
    Ok(Compacted { stages, inputs: kept(INPUT), units })
}

/// Layers and norms in the order in which the stages have them.
struct Next<'a> {
    plan: &'a Plan,
    keep: &'a [Vec<bool>],
    layers: std::slice::Iter<'a, Layer>,
    norms: std::slice::Iter<'a, NormState>,
}

impl Next<'_> {
    fn stages(&mut self, stages: &[Stage]) -> Result<Vec<Stage>> {
        let shrunk = stages.iter().map(|stage| {
            Ok(match stage {
                Stage::Linear(weights) => Stage::Linear(self.layer(weights)?.0),
                Stage::Conv(weights, config) => {
                    let (weights, groups) = self.layer(weights)?;
                    Stage::Conv(weights, Conv2dConfig { groups, ..*config })
                }
                Stage::BatchNorm(norm) => Stage::BatchNorm(self.norm(norm)?),
                Stage::Residual { body, shortcut } => {
                    Stage::Residual { body: self.stages(body)?, shortcut: self.stages(shortcut)? }
                }
                other => other.clone(),
            })
        });
        shrunk.collect()
    }

    /// A layer's weights and its groups.
    fn layer(&mut self, old: &Weights) -> Result<(Weights, usize)> {
        let Some(layer) = self.layers.next() else { bail!("compact: fewer layers than stages") };
        let (read, written) =
            (&self.keep[self.plan.space_of(layer.reads)], &self.keep[self.plan.space_of(layer.writes)]);
        let rows = places(written);
        let columns: Vec<Vec<usize>> = read.chunks(layer.columns).map(places).collect();
        let mut weight = vec![];
        for &row in &rows {
            for &column in &columns[layer.group(row)] {
                weight.extend(&layer.row(row)[column * layer.run..(column + 1) * layer.run]);
            }
        }
        let groups = columns.iter().filter(|group| !group.is_empty()).count();
        let mut dims = vec![rows.len(), weight.len() / rows.len()];
        let kernel = &old.weight.dims()[2..];
        if !kernel.is_empty() {
            dims[1] /= kernel.iter().product::<usize>();
            dims.extend(kernel);
        }
        let bias = layer.bias.as_ref().map(|bias| rows.iter().map(|&row| bias[row]).collect());
        let bias = bias.map(|bias: Vec<f64>| like(&old.weight, bias, &[rows.len()])).transpose()?;
        Ok((Weights { name: old.name.clone(), weight: like(&old.weight, weight, &dims)?, bias }, groups))
    }

    fn norm(&mut self, old: &Norm) -> Result<Norm> {
        let Some(norm) = self.norms.next() else { bail!("compact: fewer norms than stages") };
        let kept = places(&self.keep[self.plan.space_of(norm.writes)]);
        let [weight, bias, mean, var] = norm
            .parts
            .each_ref()
            .map(|values| -> Vec<f64> { kept.iter().map(|&channel| values[channel]).collect() });
        let back = |old: &Tensor, values| like(old, values, &[kept.len()]);
        let affine = match &old.affine {
            Some((w, b)) => Some((back(w, weight)?, back(b, bias)?)),
            None => None,
        };
        let (running_mean, running_var) = (back(&old.running_mean, mean)?, back(&old.running_var, var)?);
        Ok(Norm { name: old.name.clone(), affine, running_mean, running_var, eps: old.eps })
    }
}

/// Values in the type and on the device of another tensor.
pub(super) fn like(old: &Tensor, values: Vec<f64>, dims: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(old.dtype())?.to_device(old.device())
}
