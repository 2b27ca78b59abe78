//! Averaged parameters: the center of the wake. On a GPU within the kernels `update` and `adam` of `kernels/update.cu`.

use crate::ops::dense::mix;
use crate::optim::params::Average;
use crate::optim::state::Core;
use candle_core::{Result, Tensor};

/// The averages after a step that led to `values`; those of params that took no part stay.
pub(super) fn host(core: &Core, values: &[Tensor], takes_part: &[bool]) -> Result<Vec<Tensor>> {
    let Some(Average { power }) = core.params.average else { return Ok(vec![]) };
    if core.averages.is_empty() {
        // The Vars are written in place, so what is kept has to be a copy.
        return values.iter().map(Tensor::copy).collect();
    }
    let weight = weight(power, core.steps + 1);
    let pairs = core.averages.iter().zip(values).zip(takes_part);
    let mixed = |((old, new), takes_part): ((&Tensor, &Tensor), &bool)| match takes_part {
        true => mix(old, 1.0 - weight, new, weight),
        false => Ok(old.clone()),
    };
    pairs.map(mixed).collect()
}

/// The weight of the newest parameters after `steps` steps.
fn weight(power: f64, steps: usize) -> f64 {
    (power + 1.0) / (steps as f64 + power)
}

/// The weight in the averages of the parameters that the last step led to.
pub(crate) fn newest_weight(core: &Core) -> f64 {
    core.params.average.map_or(0.0, |Average { power }| weight(power, core.steps.max(1)))
}
