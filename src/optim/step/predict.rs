//! The loss change that the quadratic model predicts, for a damping that adapts to measured losses.

use super::proposal::Proposal;
use crate::curvature::factor_product;
use crate::ops::dense::{dot, mix};
use crate::optim::state::{Core, Predicted};
use candle_core::{Result, bail};

/// `<g, s> + 1/2 s^T (F_bar + la) s`, when it is due to be compared.
pub(crate) fn predict(core: &Core, proposal: &Proposal, loss: Option<f64>) -> Result<Option<Predicted>> {
    let Some(adaptive) = core.adaptive() else { return Ok(None) };
    if !(core.steps + 1).is_multiple_of(adaptive.every) {
        return Ok(None);
    }
    let Some(loss) = loss else {
        bail!(
            "{}: adaptive damping needs the loss; call backward_step(&loss) in place of step(&grads)",
            core.name()
        )
    };
    let mut change = 0.0;
    for ((block, proposed), state) in core.blocks.iter().zip(&proposal.blocks).zip(&proposal.states) {
        let (Some(proposed), Some(state)) = (proposed, state) else { continue };
        let (Some(a), Some(g)) = (&state.factor_a, &state.factor_g) else { continue };
        let curved = factor_product(a, g, &proposed.step, &block.name)?;
        let damping = core.damping_of(block, proposal.damping);
        let quadratic = dot(&proposed.step, &mix(&curved, 1.0, &proposed.step, damping)?)?;
        change += dot(&proposed.wake.gradient, &proposed.step)? + 0.5 * quadratic;
    }
    Ok(Some(Predicted { loss, change }))
}
