//! Adam for the Vars that have no Kronecker block: gains and offsets of norms, scalars. On a GPU the kernel `adam` of
//! `kernels/update.cu`.

use super::gradients::{Gradients, Refusal, Staged, gradient};
use super::kept_alive::KeptAlive;
use super::work_space::{DeviceStep, Targets};
use crate::gpu::table::type_number;
use crate::ops::adam::{AdamStep, Stepped};
use crate::ops::update::{self, AdamItem, AdamOptions};
use crate::ops::wake::StepScalars;
use crate::optim::numbers::sum;
use crate::optim::state::Core;
use crate::optim::state::param::{Adam, Param};
use candle_core::{DType, Result, Tensor};
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
        let (next, value, finite) = adam.next(param, gradient, &options)?;
        if !finite {
            let what = format!("the gradient of {} has NaN or infinite elements", param.name);
            return Err(Refusal::NonFinite(what));
        }
        stepped.push(Some((next, value)));
    }
    Ok(stepped)
}

/// The elements from which on tables are worth a pass of their own; in each of a dozen operations they would go through memory.
const LARGE: usize = 1 << 20;

impl Adam {
    /// The state and the value after a step on `gradient`, and whether the value is finite.
    pub fn next(
        &self,
        param: &Param,
        gradient: &Tensor,
        options: &ParamsAdamW,
    ) -> Result<(Self, Tensor, bool)> {
        let ParamsAdamW { lr, beta1, beta2, eps, .. } = *options;
        let lr = lr * param.lr_scale;
        let kept = 1.0 - lr * (options.weight_decay + param.weight_decay);
        let steps = self.steps + 1;
        let bias = [beta1, beta2].map(|beta| 1.0 - beta.powi(steps as i32));
        let value = param.value();
        let in_f32 = value.dtype() == DType::F32 && gradient.dtype() == DType::F32 && value.device().is_cpu();
        if let (true, Some((first, second))) = (in_f32 && value.elem_count() >= LARGE, &self.moments) {
            let step = AdamStep { beta1, beta2, eps, lr, kept, bias };
            let Stepped { value, mean, square, finite } = step.one_pass([&value, gradient, first, second])?;
            return Ok((Self { param: self.param, steps, moments: Some((mean, square)) }, value, finite));
        }
        let (first, second) = match &self.moments {
            Some((first, second)) => (
                ((first * beta1)? + (gradient * (1.0 - beta1))?)?,
                ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?,
            ),
            None => ((gradient * (1.0 - beta1))?, (gradient.sqr()? * (1.0 - beta2))?),
        };
        let [bias1, bias2] = bias;
        let direction = (&first / bias1)?.div(&((&second / bias2)?.sqrt()? + eps)?)?;
        let decayed = (&value * kept)?;
        let value = (decayed - (direction * lr)?)?;
        let finite = sum(&value)?.is_finite();
        Ok((Self { param: self.param, steps, moments: Some((first, second)) }, value, finite))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::testing::max_abs;
    use crate::ops::testing::random;
    use crate::optim::state::param::master;
    use candle_core::{Device, Var};

    /// A table that is large enough for the one pass steps as its rows do, which are not.
    #[test]
    fn large_tables_step_as_small_ones() -> Result<()> {
        let options = ParamsAdamW { lr: 0.01, weight_decay: 0.1, ..Default::default() };
        let param = |value: &Tensor| -> Result<Param> {
            let var = Var::from_tensor(value)?;
            Ok(Param {
                name: "table".into(),
                named: true,
                master: master(&var)?,
                var,
                lr_scale: 0.5,
                weight_decay: 0.3,
                optional: false,
            })
        };
        let rows = LARGE / 1024 + 1;
        let of = |seed| random(seed, &[rows, 1024])?.to_dtype(DType::F32);
        let (table, few) = (param(&of(1)?)?, param(&of(1)?.narrow(0, 0, 2)?.contiguous()?)?);
        let new = || Adam { param: 0, steps: 0, moments: None };
        let (mut whole, mut part) = (new(), new());
        for seed in 2..6 {
            let gradient = of(seed)?;
            let (next, value, finite) = whole.next(&table, &gradient, &options)?;
            assert!(finite);
            let (of_part, value_of_part, _) =
                part.next(&few, &gradient.narrow(0, 0, 2)?.contiguous()?, &options)?;
            table.var.set(&value)?;
            few.var.set(&value_of_part)?;
            assert_eq!((next.steps, next.param), (of_part.steps, of_part.param));
            let pair =
                |adam: &Adam| adam.moments.clone().ok_or_else(|| candle_core::Error::msg("no moments"));
            let ((first, second), (some, others)) = (pair(&next)?, pair(&of_part)?);
            for (all, expected) in [(&value, &value_of_part), (&first, &some), (&second, &others)] {
                let off = max_abs(&(all.narrow(0, 0, 2)? - expected)?.to_dtype(DType::F64)?)?;
                assert!(off < 1e-6, "{off}");
            }
            (whole, part) = (next, of_part);
        }
        let nan = (of(7)? * f64::NAN)?.to_device(&Device::Cpu)?;
        let (_, _, finite) = whole.next(&table, &nan, &options)?;
        assert!(!finite);
        Ok(())
    }
}
