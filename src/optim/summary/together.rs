//! What processes that share an optimizer do together.

use super::Bytes;
use crate::curvature::{FactorShape, wide_dtype};
use crate::optim::share::Share;
use crate::optim::state::Core;
use crate::optim::state::block::Block;
use crate::optim::state::param::Param;
use crate::parallel::{Division, owners};
use std::fmt;

/// What the processes of a [`Summary`](super::Summary) do together.
#[derive(Debug, Clone, PartialEq)]
pub struct Together {
    /// The number of this process, and how many there are.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Bytes of the gradients that each step adds up.
    pub gradient_bytes: usize,
    /// Bytes of the factors that a step adds up beside them when they are due.
    pub factor_bytes: usize,
    /// Of each block whose factors are divided, the processes that decompose `G` and `A`; none where all do.
    pub owners: Vec<(String, [Option<usize>; 2])>,
    /// How many factors this process has decomposed so far, under [`Placement::Gathered`](crate::parallel::Placement::Gathered).
    pub decomposed: usize,
    /// Bytes that this process has sent so far: sums, and inverses that it gave the others.
    pub sent_bytes: usize,
}

impl Together {
    pub(in crate::optim) fn of(core: &Core, share: &Share) -> Self {
        let world = &share.world;
        let element = |block: &Block| wide_dtype(core.vars[block.params[0]].var.dtype()).size_in_bytes();
        let gradient = |param: &Param| param.var.elem_count() * wide_dtype(param.var.dtype()).size_in_bytes();
        let layers = || core.blocks.iter().filter(|block| block.layer.is_some());
        let factors = |block: &Block| {
            [block.rows, block.columns].iter().map(|side| side.elements(block.groups)).sum::<usize>()
                * element(block)
        };
        // As they are listed where they are decomposed: A and G of each block; what is diagonal or of low rank is not.
        let order = |side: &FactorShape| match side.rank {
            None if side.run > 1 => Some(side.run),
            _ => None,
        };
        let sides = |block: &Block| [block.columns, block.rows];
        let orders: Vec<usize> = core.blocks.iter().flat_map(sides).filter_map(|side| order(&side)).collect();
        let mut owners = match share.division {
            Some(_) => owners(&orders, world.size()),
            None => vec![None; orders.len()],
        }
        .into_iter();
        let mut of_block = |block: &Block| {
            let [a, g] = sides(block).map(|side| order(&side).and_then(|_| owners.next().flatten()));
            (block.name.clone(), [g, a])
        };
        let owners: Vec<_> = core.blocks.iter().map(&mut of_block).collect();
        let divided = share.division.as_ref();
        Self {
            rank: world.rank(),
            size: world.size(),
            gradient_bytes: core.vars.iter().map(gradient).sum(),
            factor_bytes: layers().map(factors).sum(),
            owners: owners.into_iter().filter(|(_, [g, a])| g.is_some() || a.is_some()).collect(),
            decomposed: divided.map_or(0, Division::done),
            sent_bytes: share.added + divided.map_or(0, Division::sent),
        }
    }
}

impl fmt::Display for Together {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "process {} of {}: adds up {} a step, {} more when factors are due",
            self.rank,
            self.size,
            Bytes(self.gradient_bytes),
            Bytes(self.factor_bytes)
        )?;
        for (block, [g, a]) in &self.owners {
            let of = |owner: Option<usize>| owner.map_or("all".to_string(), |rank| rank.to_string());
            write!(f, "\n{block}: G is decomposed by {}, A by {}", of(*g), of(*a))?;
        }
        Ok(())
    }
}
