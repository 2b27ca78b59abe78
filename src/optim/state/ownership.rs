//! Which process owns which part of the state, where they divide it.

use super::Core;
use super::block::BlockState;
use super::param::Adam;

/// Which process owns which part of the state.
#[derive(Debug, Clone)]
pub(in crate::optim) struct Ownership {
    /// This process.
    pub rank: usize,
    /// Who owns each param, as it owns its block.
    pub params: Vec<usize>,
    pub blocks: Vec<usize>,
    /// Whether a block has curvature where it is owned.
    pub known: Vec<bool>,
}

impl Core {
    /// The parts that cannot be divided further: blocks of one layer, whose records are taken together, and Vars without a block, as lists of
    /// blocks and of params.
    pub fn units(&self) -> Vec<(Vec<usize>, Vec<usize>)> {
        let mut units: Vec<(Vec<usize>, Vec<usize>)> = vec![];
        for (index, block) in self.blocks.iter().enumerate() {
            let same = |unit: &&mut (Vec<usize>, Vec<usize>)| {
                unit.0.first().is_some_and(|&first| self.blocks[first].layer == block.layer)
            };
            match units.last_mut().filter(|_| block.layer.is_some()).filter(same) {
                Some(unit) => {
                    unit.0.push(index);
                    unit.1.extend(&block.params);
                }
                None => units.push((vec![index], block.params.clone())),
            }
        }
        units.extend(self.adam.iter().map(|adam| (vec![], vec![adam.param])));
        units
    }

    /// The owners of blocks and params, of the owners of [`units`](Self::units).
    pub fn ownership(&self, rank: usize, owners: &[usize]) -> Ownership {
        let (mut params, mut blocks) = (vec![0; self.vars.len()], vec![0; self.blocks.len()]);
        for ((of_blocks, of_params), &owner) in self.units().iter().zip(owners) {
            of_blocks.iter().for_each(|&index| blocks[index] = owner);
            of_params.iter().for_each(|&index| params[index] = owner);
        }
        Ownership { rank, params, blocks, known: vec![false; self.blocks.len()] }
    }

    /// Whether this process has the state of these params' unit.
    pub fn owns(&self, params: &[usize]) -> bool {
        self.ownership
            .as_ref()
            .is_none_or(|owned| params.iter().all(|&index| owned.params[index] == owned.rank))
    }

    /// Who alone needs a param's gradient; none where all do.
    pub fn owner_of_param(&self, index: usize) -> Option<usize> {
        self.ownership.as_ref().map(|owned| owned.params[index])
    }

    /// Who alone holds a block's state; none where all do.
    pub fn owner_of_block(&self, index: usize) -> Option<usize> {
        self.ownership.as_ref().map(|owned| owned.blocks[index])
    }

    /// Whether a block has factors and an inverse, here or where it is owned.
    pub fn has_curvature(&self, index: usize) -> bool {
        match &self.ownership {
            Some(owned) if owned.blocks[index] != owned.rank => owned.known[index],
            _ => {
                let BlockState { factor_a, preconditioner, .. } = &self.blocks[index].state;
                factor_a.is_some() && preconditioner.is_some()
            }
        }
    }

    /// Takes note that params have taken part in a step, which gives their blocks curvature.
    pub fn took_part(&mut self, params: &[bool]) {
        let Some(owned) = &mut self.ownership else { return };
        for (known, block) in owned.known.iter_mut().zip(&self.blocks) {
            *known |= block.params.iter().any(|&index| params[index]);
        }
    }

    /// Drops the state that others own.
    pub fn keep_own(&mut self) {
        let Some(mut owned) = self.ownership.take() else { return };
        for (index, block) in self.blocks.iter_mut().enumerate() {
            owned.known[index] = block.state.factor_a.is_some() && block.state.preconditioner.is_some();
            if owned.blocks[index] != owned.rank {
                block.state = BlockState::default();
            }
        }
        for adam in self.adam.iter_mut().filter(|adam| owned.params[adam.param] != owned.rank) {
            *adam = Adam { param: adam.param, steps: 0, moments: None };
        }
        self.ownership = Some(owned);
    }
}
