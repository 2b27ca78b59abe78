//! The launches of a step on a GPU: wake gradients, rate, writing; the directions between them are `preconditioned.rs`.

use super::block::{Block, BlockState};
use super::device::{DeviceStep, Scratch};
use super::direction::Renewed;
use super::length::StepRule;
use super::natural::Natural;
use super::params::{Decay, NonFinite};
use super::rule::{Model, WakeRule};
use super::turns::{Curved, factor_products};
use crate::gpu::table::type_number;
use crate::gpu::{Gpu, Operand};
use crate::ops::update::{self, AdamItem, AdamOptions, CarryItem, RateArgs, UpdateItem};
use crate::ops::wake::{Board, Place, WakeItem, Wakes, wakes};
use candle_core::{Result, Tensor, bail};

impl<R: WakeRule> Natural<R> {
    /// The wake gradients into the scratch matrices.
    pub(super) fn wake(&self, device: &DeviceStep, board: &Board, grads: &[Tensor]) -> Result<()> {
        let mut held = Held::new(&device.gpu);
        let mut items = Vec::with_capacity(self.vars.len());
        for (block, scratch) in self.blocks.iter().zip(&device.scratch) {
            let state = &block.state;
            let common = WakeItem {
                mean: held.maybe(state.mean.as_ref(), &block.name)?,
                carry: held.maybe(state.carry.as_ref(), &block.name)?,
                last: held.maybe(state.step.as_ref(), &block.name)?,
                gradient_out: held.maybe(scratch.gradient.as_ref(), &block.name)?,
                model: held.maybe(scratch.model.as_ref(), &block.name)?,
                out: held.address(&scratch.wake, &block.name)?,
                ..WakeItem::default()
            };
            for (index, place) in self.places(block)? {
                let param = &self.vars[index];
                let decayed = param.weight_decay != 0.0 && self.params.decay != Decay::Decoupled;
                let value = if decayed { held.address(&param.value(), &param.name)? } else { 0 };
                items.push(WakeItem {
                    gradient: held.gradient(&grads[index], &param.name)?,
                    value,
                    len: grads[index].elem_count() as u64,
                    decay: param.weight_decay,
                    place,
                    dtype: type_number(grads[index].dtype(), &param.name)?,
                    index: index as u32,
                    ..common
                });
            }
        }
        for adam in &self.rest {
            let (param, gradient) = (&self.vars[adam.param], &grads[adam.param]);
            items.push(WakeItem {
                gradient: held.gradient(gradient, &param.name)?,
                len: gradient.elem_count() as u64,
                place: Place { width: 1, columns: 1, offset: 0, pad: 0 },
                dtype: type_number(gradient.dtype(), &param.name)?,
                index: adam.param as u32,
                ..WakeItem::default()
            });
        }
        let how = Wakes {
            model_decay: self.params.wake.model_decay(),
            after_wake: 1.0 / self.rate_scale(),
            in_loss: self.params.decay == Decay::Loss,
        };
        let slopes = device.gpu.operand(&device.slopes, "slopes")?;
        if items.is_empty() { Ok(()) } else { wakes(&device.gpu, device.dtype, &items, board, &slopes, how) }
    }

    /// The step's rate and clip, and whether it is taken.
    pub(super) fn decide(&self, device: &DeviceStep, board: &Board) -> Result<()> {
        let totals = device.gpu.operand(&device.totals, "totals")?;
        let lr_scales = device.gpu.operand(&device.lr_scales, "lr_scales")?;
        let blocks = self.blocks.len();
        let (slope_aim, pace) = match self.params.step_rule {
            StepRule::AdaptiveKl(rule) => (rule.slope, rule.pace),
            _ => (0.0, -1.0),
        };
        let args = RateArgs {
            flags: board.flags.address(),
            numbers: board.numbers.address(),
            products: totals.address(),
            lr_scales: lr_scales.address(),
            slope: totals.at(2 * blocks),
            last_slope: totals.at(2 * blocks + 1),
            blocks: blocks as u64,
            scale: self.rate_scale(),
            target: self.params.step_rule.target().unwrap_or(-1.0),
            slope_aim,
            pace,
            kl_clip: self.params.kl_clip.unwrap_or(-1.0),
            skips: (self.params.non_finite == NonFinite::Skip).into(),
        };
        update::rate(&device.gpu, &args)
    }

    /// Parameters, averages, and what the next step looks back at.
    pub(super) fn write(
        &self,
        device: &DeviceStep,
        board: &Board,
        directions: &[Tensor],
        renewed: &[Renewed<'_>],
        grads: &[Tensor],
    ) -> Result<()> {
        let gpu = &device.gpu;
        let mut held = Held::new(gpu);
        let linear = self.params.wake.model() == Model::Linear;
        let totals = gpu.operand(&device.totals, "totals")?;
        let steps = self.step_matrices(device, linear)?;
        let mut items = Vec::with_capacity(self.vars.len());
        for (index, block) in self.blocks.iter().enumerate() {
            let (state, scratch, name) = (&block.state, &device.scratch[index], &block.name);
            let (carry, mean) = looked_back_at(&mut held, state, name)?;
            let common = UpdateItem {
                direction: held.address(&directions[index], name)?,
                gradient: match device.needs.slopes {
                    true => held.maybe(scratch.gradient.as_ref().or(scratch.model.as_ref()), name)?,
                    false => 0,
                },
                model: if linear { held.maybe(scratch.model.as_ref(), name)? } else { 0 },
                velocity: held.maybe(state.velocity.as_ref(), name)?,
                step: held.maybe(steps[index].as_ref(), name)?,
                carry: if linear { carry } else { 0 },
                mean: if linear { mean } else { 0 },
                squares: if device.needs.rms_clip { totals.at(self.blocks.len() + index) } else { 0 },
                block_len: directions[index].elem_count() as u64,
                lr_scale: block.lr_scale,
                ..UpdateItem::default()
            };
            for (param, place) in self.places(block)? {
                let [value, var, average, dtype] = self.targets(&mut held, param)?;
                let decoupled = self.params.decay == Decay::Decoupled;
                items.push(UpdateItem {
                    value,
                    var,
                    average,
                    len: self.vars[param].var.elem_count() as u64,
                    decay: if decoupled { self.vars[param].weight_decay } else { 0.0 },
                    place,
                    dtype: dtype as u32,
                    ..common
                });
            }
        }
        if !items.is_empty() {
            let taken = gpu.operand(&device.taken, "slopes")?;
            let slopes = device.needs.slopes.then_some(&taken);
            let rms_clip = self.params.rms_clip.unwrap_or(0.0);
            update::updates(gpu, device.dtype, &items, board, slopes, (self.params.momentum, rms_clip))?;
        }
        if !linear && (device.needs.waked || device.needs.averaged_models) {
            self.carry_on(device, board, renewed, &steps)?;
        }
        let mut items = Vec::with_capacity(self.rest.len());
        for (adam, ahead) in self.rest.iter().zip(&device.adam_ahead) {
            let param = &self.vars[adam.param];
            let [value, var, average, dtype] = self.targets(&mut held, adam.param)?;
            let moments = adam.moments.as_ref();
            items.push(AdamItem {
                gradient: held.gradient(&grads[adam.param], &param.name)?,
                first_moment: held.maybe(moments.map(|m| &m.0), &param.name)?,
                second_moment: held.maybe(moments.map(|m| &m.1), &param.name)?,
                value,
                var,
                average,
                len: param.var.elem_count() as u64,
                lr_scale: param.lr_scale,
                decay: self.params.rest.weight_decay + param.weight_decay,
                steps_before: *ahead,
                dtype: dtype as u32,
                gradient_dtype: type_number(grads[adam.param].dtype(), &param.name)?,
                ..AdamItem::default()
            });
        }
        if !items.is_empty() {
            let candle_nn::ParamsAdamW { beta1, beta2, eps, .. } = self.params.rest;
            update::adams(gpu, device.dtype, &items, board, AdamOptions { beta1, beta2, eps })?;
        }
        Ok(())
    }

    /// Where the blocks' steps are written: where slopes are measured, or a quadratic wake is to look back at them.
    fn step_matrices(&self, device: &DeviceStep, linear: bool) -> Result<Vec<Option<Tensor>>> {
        let wanted = !linear && (device.needs.waked || device.needs.averaged_models);
        let of = |(block, scratch): (&Block, &Scratch)| match &block.state.step {
            Some(step) => Ok(Some(step.clone())),
            // A step that is not taken leaves it as it is.
            None if wanted => scratch.wake.zeros_like().map(Some),
            None => Ok(None),
        };
        self.blocks.iter().zip(&device.scratch).map(of).collect()
    }

    /// `model + B step` for a quadratic wake.
    fn carry_on(
        &self,
        device: &DeviceStep,
        board: &Board,
        renewed: &[Renewed<'_>],
        steps: &[Option<Tensor>],
    ) -> Result<()> {
        let mut held = Held::new(&device.gpu);
        let mut items = Vec::with_capacity(self.blocks.len());
        let (mut moved, mut products) = (Vec::new(), Vec::new());
        for (index, block) in self.blocks.iter().enumerate() {
            if let (Some(step), Some(model)) = (&steps[index], &device.scratch[index].model) {
                let (a, g) = &renewed[index].factors;
                products.push(Curved { a, g, x: step, name: &block.name });
                moved.push((block, model));
            }
        }
        let curved = factor_products(&device.gpu, device.dtype, &products)?;
        for ((block, model), curved) in moved.into_iter().zip(&curved) {
            let (carry, mean) = looked_back_at(&mut held, &block.state, &block.name)?;
            items.push(CarryItem {
                model: held.address(model, &block.name)?,
                curved: held.address(curved, &block.name)?,
                carry,
                mean,
                len: curved.elem_count() as u64,
                ..CarryItem::default()
            });
        }
        if items.is_empty() { Ok(()) } else { update::carries(&device.gpu, device.dtype, &items, board) }
    }

    /// The params of a block with their places in its matrix.
    fn places(&self, block: &Block) -> Result<Vec<(usize, Place)>> {
        let mut offset = 0;
        let mut places = Vec::with_capacity(block.params.len());
        for &index in &block.params {
            let param = &self.vars[index];
            let len = param.var.elem_count();
            if u32::try_from(len).is_err() {
                bail!("{}: {len} elements, more than the 2^32 - 1 that a step on a GPU takes", param.name)
            }
            let width = (len / (block.groups * block.rows.dim).max(1)) as u32;
            places.push((index, Place { width, columns: block.columns.dim as u32, offset, pad: 0 }));
            offset += width;
        }
        Ok(places)
    }

    /// Where a param is written: the value in the state's dtype, the Var where it has another, the average, and the Var's dtype.
    fn targets(&self, held: &mut Held<'_>, index: usize) -> Result<[u64; 4]> {
        let param = &self.vars[index];
        let var = param.var.as_detached_tensor();
        let dtype = type_number(var.dtype(), &param.name)?.into();
        let average = held.maybe(self.averages.get(index), &param.name)?;
        let var = held.address(&var, &param.name)?;
        Ok(match &param.master {
            Some(master) => [held.address(master, &param.name)?, var, average, dtype],
            None => [var, 0, average, dtype],
        })
    }
}

/// Addresses within one stage of a step, with what has to live until its launches.
pub(super) struct Held<'a> {
    gpu: &'a Gpu,
    operands: Vec<(Tensor, Operand)>,
}

impl<'a> Held<'a> {
    pub fn new(gpu: &'a Gpu) -> Self {
        Self { gpu, operands: Vec::new() }
    }

    pub fn address(&mut self, tensor: &Tensor, name: &str) -> Result<u64> {
        let operand = self.gpu.operand(tensor, name)?;
        let address = operand.address();
        self.operands.push((tensor.clone(), operand));
        Ok(address)
    }

    fn maybe(&mut self, tensor: Option<&Tensor>, name: &str) -> Result<u64> {
        tensor.map_or(Ok(0), |tensor| self.address(tensor, name))
    }

    fn gradient(&mut self, gradient: &Tensor, name: &str) -> Result<u64> {
        self.address(&gradient.detach().contiguous()?, name)
    }
}

/// The addresses of a block's carry and mean, the latter absent where both are one array.
fn looked_back_at(held: &mut Held<'_>, state: &BlockState, name: &str) -> Result<(u64, u64)> {
    let carry = held.maybe(state.carry.as_ref(), name)?;
    let mean = held.maybe(state.mean.as_ref(), name)?;
    Ok((carry, if mean == carry { 0 } else { mean }))
}
