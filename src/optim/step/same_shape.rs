//! Blocks of one shape as one: on a GPU their products with the inverses are a batch.

use super::renew::BlockCurvature;
use crate::curvature::Preconditioner;
use crate::optim::state::block::Block;
use candle_core::{DType, Device, Result, Tensor};

/// Blocks of one shape, whose wake gradients and inverses lie one behind the other.
#[derive(Debug)]
pub(crate) struct SameShape {
    /// Indices of the blocks.
    pub blocks: Vec<usize>,
    /// `[blocks groups, rows, columns]`
    pub wake: Tensor,
    /// The inverses of all; none where they differ in kind, or before the first.
    pub inverse: Option<Preconditioner>,
}

impl SameShape {
    /// A model's blocks by their shapes.
    pub fn all(blocks: &[Block], dtype: DType, device: &Device) -> Result<Vec<Self>> {
        let shape = |block: &Block| (block.groups, block.rows, block.columns);
        let full = |block: &Block| block.rows.is_full() && block.columns.is_full();
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for (index, block) in blocks.iter().enumerate() {
            // The runs of several blocks would not lie behind one another as their groups do.
            let alike = |kind: &&mut Vec<usize>| full(block) && shape(&blocks[kind[0]]) == shape(block);
            match kinds.iter_mut().find(alike) {
                Some(kind) => kind.push(index),
                None => kinds.push(vec![index]),
            }
        }
        let stack = |kind: Vec<usize>| {
            let [groups, rows, columns] = blocks[kind[0]].shape();
            let wake = Tensor::zeros((kind.len() * groups, rows, columns), dtype, device)?;
            Ok(Self { blocks: kind, wake, inverse: None })
        };
        kinds.into_iter().map(stack).collect()
    }

    /// The part of a stacked tensor that belongs to the `nth` of the blocks.
    pub fn part(&self, of: &Tensor, nth: usize) -> Result<Tensor> {
        part(of, nth, self.blocks.len())
    }

    /// Stacks the inverses of the blocks, where they are not those that are stacked already, and leaves each block its part.
    pub fn take_inverses(
        &mut self,
        blocks: &[Block],
        curvature: &mut [Option<BlockCurvature<'_>>],
    ) -> Result<()> {
        let ids = |inverse: Option<&Preconditioner>| -> Vec<_> {
            inverse.into_iter().flat_map(Preconditioner::parts).map(|(_, part)| part.id()).collect()
        };
        let of = |index: usize| curvature[index].as_ref()?.state.preconditioner.as_ref();
        let same = |&i: &usize| ids(of(i)) == ids(blocks[i].state.preconditioner.as_ref());
        if self.inverse.is_some() && self.blocks.iter().all(same) {
            return Ok(());
        }
        if let [only] = self.blocks[..] {
            self.inverse = of(only).cloned();
            return Ok(());
        }
        let found: Vec<&Preconditioner> = self.blocks.iter().filter_map(|&i| of(i)).collect();
        self.inverse = if found.len() == self.blocks.len() { stacked(&found)? } else { None };
        if let Some(inverse) = &self.inverse {
            for (nth, &index) in self.blocks.iter().enumerate() {
                let part = inverse.map(|part| self.part(part, nth))?;
                if let Some(found) = &mut curvature[index] {
                    found.state.preconditioner = Some(part);
                }
            }
        }
        Ok(())
    }
}

/// The part of a stacked tensor that belongs to the `nth` of `count` blocks.
pub(super) fn part(of: &Tensor, nth: usize, count: usize) -> Result<Tensor> {
    let groups = of.dim(0)? / count.max(1);
    if count == 1 { Ok(of.clone()) } else { of.narrow(0, nth * groups, groups) }
}

/// Inverses of one kind, one behind the other.
fn stacked(all: &[&Preconditioner]) -> Result<Option<Preconditioner>> {
    let parts: Vec<_> = all.iter().map(|inverse| inverse.parts()).collect();
    let alike = |other: &Vec<(&str, &Tensor)>| {
        other.len() == parts[0].len()
            && other.iter().zip(&parts[0]).all(|(a, b)| a.0 == b.0 && a.1.dims() == b.1.dims())
    };
    if !parts.iter().all(alike) {
        return Ok(None);
    }
    let mut index = 0;
    let joined = all[0].map(|_| {
        let same: Vec<&Tensor> = parts.iter().map(|parts| parts[index].1).collect();
        index += 1;
        Tensor::cat(&same, 0)
    })?;
    Ok(Some(joined))
}
