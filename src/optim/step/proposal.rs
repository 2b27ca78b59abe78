//! What a step would do.

use super::wake_gradient::WakeGradient;
use crate::ops::dense::mix;
use crate::optim::state::block::{BlockState, Factors};
use crate::optim::state::param::{Adam, Param};
use crate::optim::state::pending::PendingInverses;
use crate::optim::state::{Core, Slopes};
use candle_core::{Result, Tensor};

/// What a step would do.
pub(crate) struct Proposal {
    /// The blocks' steps; none of blocks that take no part.
    pub blocks: Vec<Option<BlockStep>>,
    pub states: Vec<Option<BlockState>>,
    /// Adam's state with the value that it leads to.
    pub adam: Vec<Option<(Adam, Tensor)>>,
    /// `1 / lambda`, which multiplied the directions before any clip.
    pub rate: f64,
    /// With the slope where the last step ended.
    pub slopes: Slopes,
    pub damping: f64,
    pub pending: Option<PendingInverses>,
}

/// What a step would do to one block's parameters.
pub(crate) struct BlockStep {
    pub wake: WakeGradient,
    /// A quadratic model's curvature at this step: the factors of this batch where it refreshed them, else the averages.
    pub factors: Factors,
    /// The change of the parameters.
    pub step: Tensor,
}

impl Proposal {
    /// The parameters that it leads to, in the order of [`Core::vars`].
    pub fn values(&self, core: &Core) -> Result<Vec<Tensor>> {
        // A Var cannot be set to an alias of itself.
        let value = |(param, moved): (&Param, Option<Tensor>)| moved.map_or_else(|| param.snapshot(), Ok);
        core.vars.iter().zip(self.moved(core)?).map(value).collect()
    }

    /// The same of the params that take part, none of others.
    pub fn moved(&self, core: &Core) -> Result<Vec<Option<Tensor>>> {
        let mut values = vec![None; core.vars.len()];
        for (block, step) in core.blocks.iter().zip(&self.blocks) {
            let Some(step) = step else { continue };
            for (index, step) in block.split(&step.step, &core.vars)? {
                values[index] = Some(mix(&core.vars[index].value(), 1.0, &step, 1.0)?);
            }
        }
        for (adam, value) in self.adam.iter().flatten() {
            values[adam.param] = Some(value.clone());
        }
        Ok(values)
    }

    /// Which params take part.
    pub fn parts_taken(&self, core: &Core) -> Vec<bool> {
        let mut taken = vec![false; core.vars.len()];
        let blocks = core.blocks.iter().zip(&self.blocks).filter(|(_, step)| step.is_some());
        let adam = self.adam.iter().flatten().map(|(adam, _)| adam.param);
        for index in blocks.flat_map(|(block, _)| block.params.iter().copied()).chain(adam) {
            taken[index] = true;
        }
        taken
    }
}
