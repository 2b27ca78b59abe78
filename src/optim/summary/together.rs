//! What processes that share an optimizer do together.

use super::Bytes;
use crate::curvature::{FactorShape, wide_dtype};
use crate::optim::placement::{StepCost, costs};
use crate::optim::share::Share;
use crate::optim::state::Core;
use crate::optim::state::block::Block;
use crate::parallel::{Division, Placement, owners};
use std::fmt;

/// What the processes of a [`Summary`](super::Summary) do together.
#[derive(Debug, Clone, PartialEq)]
pub struct Together {
    /// The number of this process, and how many there are.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Which process computes what; never [`Placement::ByCost`], but what that has led to.
    pub placement: Placement,
    /// Bytes of the gradients that each step adds up.
    pub gradient_bytes: usize,
    /// Bytes of the factors that a step adds up beside them when they are due.
    pub factor_bytes: usize,
    /// Under [`Placement::Gathered`], of each block whose factors are divided, the processes that decompose `G` and `A`; none where all do.
    pub owners: Vec<(String, [Option<usize>; 2])>,
    /// Under [`Placement::Owned`], the owner of each block and of each Var without one, by name.
    pub owned: Vec<(String, usize)>,
    /// Bytes of the state that this process holds in steady operation; of all where all hold all.
    pub held_bytes: usize,
    /// Bytes that this process sends in a step, of what is due every so many steps its part a step. A sum that all need counts as twice the
    /// share of it that others have, which is what an all-reduce by rings sends.
    pub step_bytes: usize,
    /// How many factors this process has decomposed so far, under [`Placement::Gathered`].
    pub decomposed: usize,
    /// Bytes that this process has sent so far, counted in the same way.
    pub sent_bytes: usize,
}

impl Together {
    /// Of an optimizer all of whose state has `bytes`.
    pub(in crate::optim) fn of(core: &Core, share: &Share, bytes: usize) -> Self {
        let (world, size) = (&share.world, share.world.size());
        let units = costs(core);
        let all = StepCost::sum(units.iter());
        let own: Vec<bool> = core.units().iter().map(|(_, params)| core.owns(params)).collect();
        let own = StepCost::sum(units.iter().zip(own).filter(|(_, own)| *own).map(|(costs, _)| costs));
        let (refreshing, inverting) = (core.params.every.factors, core.params.every.inverses);
        let owners = owners_of_factors(core, share);
        let step_bytes = match share.placement {
            Placement::Owned => {
                all.values - own.values + (all.factors - own.factors) / refreshing + own.values * (size - 1)
            }
            Placement::Replicated | Placement::Gathered | Placement::ByCost => {
                let inverses = own_inverses(core, &owners, world.rank()) * (size - 1);
                2 * (all.values + all.factors / refreshing) * (size - 1) / size + inverses / inverting
            }
        };
        let divided = share.division.as_ref();
        Self {
            rank: world.rank(),
            size,
            placement: share.placement,
            gradient_bytes: all.values,
            factor_bytes: all.factors,
            owners: owners.into_iter().filter(|(_, [g, a])| g.is_some() || a.is_some()).collect(),
            owned: owned(core),
            held_bytes: bytes - (all.state - own.state),
            step_bytes,
            decomposed: divided.map_or(0, Division::done),
            sent_bytes: share.sent + divided.map_or(0, Division::sent),
        }
    }
}

/// Of each block the processes that decompose `G` and `A`.
fn owners_of_factors(core: &Core, share: &Share) -> Vec<(String, [Option<usize>; 2])> {
    let orders = core.factor_orders();
    let mut owners = match share.division {
        Some(_) => owners(&orders, share.world.size()),
        None => vec![None; orders.len()],
    }
    .into_iter();
    let mut of_block = |block: &Block| {
        let sides = [block.columns, block.rows];
        let [a, g] = sides.map(|side| side.is_decomposed().then(|| owners.next().flatten()).flatten());
        (block.name.clone(), [g, a])
    };
    core.blocks.iter().map(&mut of_block).collect()
}

/// Bytes of the eigenvectors or inverses that this process gives the others at a renewal.
fn own_inverses(core: &Core, owners: &[(String, [Option<usize>; 2])], rank: usize) -> usize {
    let of = |(block, (_, [g, a])): (&Block, &(String, [Option<usize>; 2]))| {
        let element = wide_dtype(core.vars[block.params[0]].var.dtype()).size_in_bytes();
        let side = |side: &FactorShape, owner: &Option<usize>| match owner {
            Some(owner) if *owner == rank => side.elements(block.groups) * element,
            _ => 0,
        };
        side(&block.rows, g) + side(&block.columns, a)
    };
    core.blocks.iter().zip(owners).map(of).sum()
}

/// The owner of each block and of each Var without one.
fn owned(core: &Core) -> Vec<(String, usize)> {
    let Some(owned) = &core.ownership else { return vec![] };
    let blocks = core.blocks.iter().zip(&owned.blocks).map(|(block, &owner)| (block.name.clone(), owner));
    let rest = core.adam.iter().map(|adam| (core.vars[adam.param].name.clone(), owned.params[adam.param]));
    blocks.chain(rest).collect()
}

impl fmt::Display for Together {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "process {} of {}, {:?}: adds up {} a step, {} more when factors are due; holds {} of state, sends {} a step",
            self.rank,
            self.size,
            self.placement,
            Bytes(self.gradient_bytes),
            Bytes(self.factor_bytes),
            Bytes(self.held_bytes),
            Bytes(self.step_bytes)
        )?;
        for (block, [g, a]) in &self.owners {
            let of = |owner: Option<usize>| owner.map_or("all".to_string(), |rank| rank.to_string());
            write!(f, "\n{block}: G is decomposed by {}, A by {}", of(*g), of(*a))?;
        }
        for (name, owner) in &self.owned {
            write!(f, "\n{name}: owned by {owner}")?;
        }
        Ok(())
    }
}
