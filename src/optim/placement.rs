//! What a step of several processes costs under each placement, by shapes and options alone: who owns what, and which placement is the cheapest.

use super::state::Core;
use super::summary::Summary;
use crate::curvature::{FactorShape, wide_dtype};
use crate::gpu::Gpu;
use crate::parallel::{Placement, World, owners, spread};

/// What a process does in a second, as far as the choice of a placement goes.
struct Rates {
    /// Multiplications.
    work: f64,
    /// Bytes to another.
    bytes: f64,
    /// Meetings.
    meetings: f64,
}

/// A core or some of a CPU, on one host.
const CPU: Rates = Rates { work: 2e10, bytes: 1e9, meetings: 2e4 };
/// A GPU whose tensors go by way of the host.
const GPU: Rates = Rates { work: 1e13, bytes: 5e9, meetings: 1e4 };
/// A GPU whose tensors go to other GPUs, by a network card of its own.
const LINKED_GPU: Rates = Rates { bytes: 4e10, ..GPU };

/// What makes a step of a unit of [`Core::units`], or of all.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StepCost {
    /// Multiplications of the inverses, at each renewal.
    pub inverting: f64,
    /// Multiplications of each step.
    pub stepping: f64,
    /// Bytes of the parameters as the state has them, which are those of the gradients.
    pub values: usize,
    /// Bytes of the factors that all add up, and of the inverses.
    pub factors: usize,
    pub inverses: usize,
    /// Bytes of state that an owner alone holds.
    pub state: usize,
}

/// Operations on each element of a step beside the products.
const ELEMENTWISE: f64 = 10.0;

impl StepCost {
    pub fn sum<'a>(all: impl Iterator<Item = &'a StepCost>) -> Self {
        all.fold(Self::default(), |sum, other| Self {
            inverting: sum.inverting + other.inverting,
            stepping: sum.stepping + other.stepping,
            values: sum.values + other.values,
            factors: sum.factors + other.factors,
            inverses: sum.inverses + other.inverses,
            state: sum.state + other.state,
        })
    }

    /// Multiplications a step, renewals divided over the steps from one to the next.
    fn work(&self, core: &Core) -> f64 {
        self.inverting / core.params.every.inverses as f64 + self.stepping
    }
}

/// The cost of each of [`Core::units`].
pub(super) fn costs(core: &Core) -> Vec<StepCost> {
    let blocks = Summary::of(core).blocks;
    let unit = |(of_blocks, of_params): &(Vec<usize>, Vec<usize>)| {
        let mut costs = StepCost::default();
        for &index in of_params {
            let var = &core.vars[index].var;
            costs.values += var.elem_count() * wide_dtype(var.dtype()).size_in_bytes();
            costs.stepping += ELEMENTWISE * var.elem_count() as f64;
        }
        for &index in of_blocks {
            let block = &blocks[index];
            costs.inverting += block.inverse_cost as f64;
            costs.stepping += block.step_cost as f64;
            costs.inverses += block.inverse_bytes;
            costs.state += block.factor_bytes + block.inverse_bytes + block.other_bytes;
            if core.blocks[index].layer.is_some() {
                costs.factors += block.factor_bytes;
            }
        }
        if of_blocks.is_empty() {
            // Adam's two averages.
            costs.state += 2 * costs.values;
        }
        costs
    };
    core.units().iter().map(unit).collect()
}

/// Who of `ranks` owns each of [`Core::units`]: the dearest first, each goes to whom has the least to do.
pub(super) fn unit_owners(core: &Core, ranks: usize) -> Vec<usize> {
    spread(&costs(core).iter().map(|costs| costs.work(core)).collect::<Vec<_>>(), ranks)
}

/// The placement that takes the least time by the count; all do all where it makes no difference.
pub(super) fn cheapest(core: &Core, world: &World) -> Placement {
    // Inverses that are made beside the steps are made by all.
    if core.params.overlap > 0 {
        return Placement::Replicated;
    }
    let seconds = [Placement::Replicated, Placement::Gathered, Placement::Owned]
        .map(|placement| (placement, seconds(core, placement, world)))
        // EKFAC's moments need the eigenvectors on all.
        .map(|(placement, seconds)| match core.params.ekfac && placement == Placement::Owned {
            true => (placement, f64::INFINITY),
            false => (placement, seconds),
        });
    let least = |best: (Placement, f64), other: (Placement, f64)| if other.1 < best.1 { other } else { best };
    let [first, rest @ ..] = seconds;
    rest.into_iter().fold(first, least).0
}

/// Seconds of a step beside the passes through the model.
fn seconds(core: &Core, placement: Placement, world: &World) -> f64 {
    let ranks = world.size();
    let rates = match core.vars.first().map(|param| param.var.device()) {
        Some(device) if world.takes(device) => LINKED_GPU,
        Some(device) if Gpu::of(device).is_some() => GPU,
        _ => CPU,
    };
    let each = costs(core);
    let all = StepCost::sum(each.iter());
    let (inverting, refreshing) = (core.params.every.inverses as f64, core.params.every.factors as f64);
    let summed = all.values as f64 + all.factors as f64 / refreshing;
    // What one process sends of something that all have a part of.
    let share = (ranks - 1) as f64 / ranks as f64;
    let (work, bytes, meetings) = match placement {
        Placement::Replicated | Placement::ByCost => (all.work(core), 2.0 * share * summed, 0.0),
        Placement::Gathered => {
            let orders = core.factor_orders();
            let cubes = orders.iter().map(|&order| (order as f64).powi(3));
            let (mut busiest, mut common) = (vec![0.0; ranks], 0.0);
            for (cube, owner) in cubes.clone().zip(owners(&orders, ranks)) {
                match owner {
                    Some(owner) => busiest[owner] += cube,
                    None => common += cube,
                }
            }
            let most = common + busiest.into_iter().fold(0.0, f64::max);
            let part = if all.inverting > 0.0 { most / cubes.sum::<f64>().max(1.0) } else { 0.0 };
            let work = part.min(1.0) * all.inverting / inverting + all.stepping;
            (work, share * (2.0 * summed + all.inverses as f64 / inverting), 1.0 / inverting)
        }
        Placement::Owned => {
            let mut loads = vec![0.0; ranks];
            for (costs, owner) in each.iter().zip(unit_owners(core, ranks)) {
                loads[owner] += costs.work(core);
            }
            // The sum of the scalars is a meeting more than others have.
            (loads.into_iter().fold(0.0, f64::max), share * (summed + all.values as f64), 1.0)
        }
    };
    work / rates.work + bytes / rates.bytes + meetings / rates.meetings
}

impl Core {
    /// The orders of the factors as they are listed where they are decomposed: A and G of each block; what is diagonal or of low rank is not.
    pub fn factor_orders(&self) -> Vec<usize> {
        let sides = self.blocks.iter().flat_map(|block| [block.columns, block.rows]);
        sides.filter(FactorShape::is_decomposed).map(|side| side.run).collect()
    }
}
