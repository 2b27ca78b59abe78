//! Which channels are needed.

use super::layer::Layer;
use super::plan::{Op, Plan};

/// Of each space, the channels that stay. Weights of outputs that nothing reads become zero.
pub(super) fn keep(plan: &mut Plan) -> Vec<Vec<bool>> {
    let live = live(plan);
    let mut keep: Vec<Vec<bool>> = plan.widths().into_iter().map(|width| vec![false; width]).collect();
    for (signal, live) in live.iter().enumerate() {
        let space = &mut keep[plan.space_of(signal)];
        space.iter_mut().zip(live).for_each(|(keep, live)| *keep |= live);
    }
    // Tensors without elements are of little use.
    for space in &mut keep {
        fill(space, 1);
    }
    while plan.layers.iter().any(|layer| even(layer, plan, &mut keep)) {}
    keep
}

/// Of each signal, the channels that the outputs depend on, from the last to the first.
fn live(plan: &mut Plan) -> Vec<Vec<bool>> {
    let width = |signal: usize| plan.widths()[plan.space_of(signal)];
    let mut live: Vec<Vec<bool>> = (0..plan.signals.len()).map(|s| vec![false; width(s)]).collect();
    live[plan.output].fill(true);
    for op in plan.ops.iter().rev() {
        match *op {
            Op::Layer(layer, read, written) => {
                let layer = &mut plan.layers[layer];
                for row in 0..layer.out {
                    if !live[written][row] {
                        layer.row_mut(row).fill(0.);
                        continue;
                    }
                    let first = layer.group(row) * layer.columns;
                    for (column, weights) in layer.row(row).chunks(layer.run).enumerate() {
                        live[read][first + column] |= weights.iter().any(|&w| w != 0.);
                    }
                }
            }
            Op::Norm(norm, read, written) => {
                let factors = &plan.norms[norm].parts[0];
                for (channel, factor) in factors.iter().enumerate() {
                    live[read][channel] |= live[written][channel] && *factor != 0.;
                }
            }
            Op::Same(read, written) => pass(&mut live, read, written),
            Op::Sum(a, b, written) => {
                pass(&mut live, a, written);
                pass(&mut live, b, written);
            }
        }
    }
    live
}

fn pass(live: &mut [Vec<bool>], read: usize, written: usize) {
    for channel in 0..live[written].len() {
        live[read][channel] |= live[written][channel];
    }
}

/// Gives the groups of a layer that stay equal numbers of inputs and of outputs, by keeping more; whether it had to.
fn even(layer: &Layer, plan: &Plan, keep: &mut [Vec<bool>]) -> bool {
    if layer.groups == 1 {
        return false;
    }
    let sides = [
        (plan.space_of(layer.reads), layer.columns),
        (plan.space_of(layer.writes), layer.out / layer.groups),
    ];
    let counts = sides.map(|(space, size)| -> Vec<usize> {
        keep[space].chunks(size).map(|group| group.iter().filter(|&&keep| keep).count()).collect()
    });
    let mut more = false;
    for ((space, size), sizes) in sides.into_iter().zip(&counts) {
        let largest = sizes.iter().copied().max().unwrap_or(0);
        for (group, keep) in keep[space].chunks_mut(size).enumerate() {
            if counts[0][group] + counts[1][group] > 0 {
                more |= fill(keep, largest);
            }
        }
    }
    more
}

/// Keeps the first ones that are not kept until there are as many; whether there are more than before.
fn fill(keep: &mut [bool], count: usize) -> bool {
    let held = keep.iter().filter(|&&keep| keep).count();
    let others = keep.iter_mut().filter(|keep| !**keep);
    others.take(count.saturating_sub(held)).map(|keep| *keep = true).count() > 0
}
