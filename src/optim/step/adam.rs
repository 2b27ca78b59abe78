//! Adam for the Vars that have no Kronecker block: gains and offsets of norms, scalars. On a GPU the kernel `adam` of
//! `kernels/update.cu`.

use super::gradients::{Gradients, Refusal, Staged, gradient};
use super::kept_alive::KeptAlive;
use super::work_space::{DeviceStep, Targets};
use crate::gpu::table::type_number;
use crate::ops::update::{self, AdamItem, AdamOptions};
use crate::ops::wake::StepScalars;
use crate::optim::numbers::sum;
use crate::optim::state::Core;
use crate::optim::state::param::{Adam, Param};
use candle_core::{Result, Tensor};
use candle_nn::ParamsAdamW;

/// Adam's states with the values that they lead to at the rate `lr`; none of Vars that take no part in the step.
pub(super) fn host(core: &Core, grads: &Gradients, lr: f64) -> Staged<Vec<Option<(Adam, Tensor)>>> {
    let options = ParamsAdamW { lr, ..core.params.fallback_adam.clone() };
    let mut stepped = Vec::with_capacity(core.adam.len());
    for adam in &core.adam {
        let param = &core.vars[adam.param];
        let Some(gradient) = &grads[adam.param] else {
            stepped.push(None);
            continue;
        };
        let (next, value) = adam.next(param, gradient, &options)?;
        if !sum(&value)?.is_finite() {
            let what = format!("the gradient of {} has NaN or infinite elements", param.name);
            return Err(Refusal::NonFinite(what));
        }
        stepped.push(Some((next, value)));
    }
    Ok(stepped)
}

impl Adam {
    /// The state and the value after a step on `gradient`.
    pub fn next(&self, param: &Param, gradient: &Tensor, options: &ParamsAdamW) -> Result<(Self, Tensor)> {
        let ParamsAdamW { lr, beta1, beta2, eps, .. } = *options;
        let lr = lr * param.lr_scale;
        let (first, second) = match &self.moments {
            Some((first, second)) => (
                ((first * beta1)? + (gradient * (1.0 - beta1))?)?,
                ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?,
            ),
            None => ((gradient * (1.0 - beta1))?, (gradient.sqr()? * (1.0 - beta2))?),
        };
        let steps = self.steps + 1;
        let bias1 = 1.0 - beta1.powi(steps as i32);
        let bias2 = 1.0 - beta2.powi(steps as i32);
        let direction = (&first / bias1)?.div(&((&second / bias2)?.sqrt()? + eps)?)?;
        let value = param.value();
        let decayed = (&value * (1.0 - lr * (options.weight_decay + param.weight_decay)))?;
        let value = (decayed - (direction * lr)?)?;
        Ok((Self { param: self.param, steps, moments: Some((first, second)) }, value))
    }
}

/// All of them in one launch for every 96 params.
pub(super) fn device(core: &Core, device: &DeviceStep, board: &StepScalars, grads: &Gradients) -> Result<()> {
    let mut kept = KeptAlive::new(&device.gpu);
    let mut items = Vec::with_capacity(core.adam.len());
    for (adam, ahead) in core.adam.iter().zip(&device.adam_ahead) {
        let (param, gradient) = (&core.vars[adam.param], gradient(core, grads, adam.param)?);
        let Targets { value, var, average, dtype } = device.targets(core, &mut kept, adam.param)?;
        let moments = adam.moments.as_ref();
        items.push(AdamItem {
            gradient: kept.gradient(&gradient, &param.name)?,
            first_moment: kept.maybe(moments.map(|m| &m.0), &param.name)?,
            second_moment: kept.maybe(moments.map(|m| &m.1), &param.name)?,
            value,
            var,
            average,
            len: param.var.elem_count() as u64,
            lr_scale: param.lr_scale,
            decay: core.params.fallback_adam.weight_decay + param.weight_decay,
            steps_before: *ahead,
            dtype,
            gradient_dtype: type_number(gradient.dtype(), &param.name)?,
            ..AdamItem::default()
        });
    }
    if items.is_empty() {
        return Ok(());
    }
    let ParamsAdamW { beta1, beta2, eps, .. } = core.params.fallback_adam;
    update::adams(&device.gpu, device.dtype, &items, board, AdamOptions { beta1, beta2, eps })
}
