//! What every stage takes, and why it may give up.

use crate::optim::state::Core;
use crate::optim::state::block::Block;
use candle_core::{Error, Result, Tensor, bail};

/// Gradients in the order of [`Core::vars`]; none of a Var that takes no part in the step.
pub(crate) type Gradients = [Option<Tensor>];

/// Why there is no step.
pub(crate) enum Refusal {
    /// NaN or infinity, and where.
    NonFinite(String),
    Failed(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Failed(error)
    }
}

pub(crate) type Staged<T> = std::result::Result<T, Refusal>;

/// Whether any of a block's Vars takes part in the step.
pub(super) fn takes_part(block: &Block, grads: &Gradients) -> bool {
    block.params.iter().any(|&index| grads[index].is_some())
}

/// The gradient of a param that takes part.
pub(super) fn gradient(core: &Core, grads: &Gradients, index: usize) -> Result<Tensor> {
    match grads.get(index) {
        Some(Some(gradient)) => Ok(gradient.clone()),
        _ => bail!("{}: no gradient for {}", core.name(), core.vars[index].name),
    }
}
