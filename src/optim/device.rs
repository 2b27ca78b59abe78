//! The step on a GPU: the formulas of `step.rs` and `direction.rs`, in a few launches for all parameters (`launches.rs`) and
//! without waiting for the device.
//!
//! Whether a step is finite, how long it is and how far it is clipped is decided there. A step that is not finite changes
//! nothing: its kernels that write see that it is not to be taken. Where that is an error, the steps after it are not taken either,
//! until the host asks (`settle`), which it does by itself whenever curvature is renewed.

use super::block::{BlockState, Param};
use super::length::{Slopes, StepRule};
use super::natural::Natural;
use super::overlap::Overlapped;
use super::params::NonFinite;
use super::rule::{Carry, Model, WakeRule};
use super::stacks::Stack;
use super::step::Refusal;
use super::turns::room_of;
use crate::curvature::{Damping, wide_dtype};
use crate::gpu::Gpu;
use crate::gpu::table::blocks_of;
use crate::ops::update::{self, BeginArgs};
use crate::ops::wake::Board;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What a step on a GPU works with beside the optimizer's state.
#[derive(Debug)]
pub(super) struct DeviceStep {
    pub gpu: Gpu,
    /// Of the state.
    pub dtype: DType,
    pub needs: Needs,
    /// See `kernels/step.cuh`.
    flags: Tensor,
    numbers: Tensor,
    pub lr_scales: Tensor,
    /// `<V, w>` of every block, `<V, V>` of every block, the two slopes.
    pub totals: Tensor,
    /// Partial sums of each of them.
    pub products: Tensor,
    pub squares: Tensor,
    pub slopes: Tensor,
    pub taken: Tensor,
    pub scratch: Vec<Scratch>,
    /// Blocks of one shape together.
    pub stacks: Vec<Stack>,
    /// What Adam's step counts are ahead of the device's count of steps.
    pub adam_ahead: Vec<f64>,
}

/// A block's matrices within a step.
#[derive(Debug)]
pub(super) struct Scratch {
    pub gradient: Option<Tensor>,
    pub model: Option<Tensor>,
    pub wake: Tensor,
}

/// Which state the options ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Needs {
    pub waked: bool,
    pub averaged_models: bool,
    momentum: bool,
    pub slopes: bool,
    pub rms_clip: bool,
    averages: bool,
}

/// What the host knows of the steps once it has asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub slopes: Slopes,
    pub previous_rate: Option<f64>,
    pub skipped: usize,
    /// Steps taken, as the device counts.
    done: f64,
}

impl<R: WakeRule> Natural<R> {
    /// Brings what the host knows up to date with the steps that a GPU has taken, waiting for them. Elsewhere nothing happens.
    ///
    /// # Errors
    /// When one of those steps had a gradient with NaN or infinite elements, unless such steps are skipped: the message names
    /// step and tensor, and parameters and state are as that step found them.
    pub fn settle(&mut self) -> Result<()> {
        let seen = self.seen();
        let Some(device) = &self.device else { return Ok(()) };
        let flags = device.take_flags()?;
        match seen {
            Ok(Seen { slopes, previous_rate, skipped, done }) => {
                (self.slopes, self.previous_rate, self.skipped) = (slopes, previous_rate, skipped);
                for (adam, ahead) in self.rest.iter_mut().zip(&device.adam_ahead) {
                    adam.steps = (done + ahead) as usize;
                }
                Ok(())
            }
            Err(error) => {
                self.steps = flags[update::FAILED_AT] as usize;
                Err(error)
            }
        }
    }

    /// What [`Natural::settle`] would set.
    pub(super) fn seen(&self) -> Result<Seen> {
        let Some(device) = &self.device else {
            let Self { slopes, previous_rate, skipped, .. } = *self;
            return Ok(Seen { slopes, previous_rate, skipped, done: self.steps as f64 });
        };
        let flags: Vec<u32> = device.flags.to_vec1()?;
        if flags[update::BLAMED] != update::NOBODY && self.params.non_finite == NonFinite::Error {
            bail!(
                "{}: step {}: {}; parameters and state are as that step found them",
                R::NAME,
                flags[update::FAILED_AT],
                self.blame(flags[update::BLAMED])
            )
        }
        let numbers: Vec<f64> = device.numbers.to_vec1()?;
        let previous = numbers[update::PREVIOUS];
        Ok(Seen {
            slopes: Slopes {
                after: numbers[update::AFTER],
                before: numbers[update::BEFORE],
                last: device.taken.to_vec1::<f64>()?.iter().sum::<f64>().abs(),
                length: numbers[update::LENGTH],
            },
            previous_rate: (previous >= 0.0).then_some(previous),
            skipped: self.skipped + flags[update::SKIPPED] as usize,
            done: numbers[update::DONE],
        })
    }

    /// Says who made a step non-finite.
    fn blame(&self, culprit: u32) -> String {
        if culprit >= update::FIRST_BLOCK {
            let name = self.blocks.get((culprit - update::FIRST_BLOCK) as usize).map_or("", |b| &b.name);
            return format!("the direction of block {name} overflows; a larger damping would bound it");
        }
        let name = self.vars.get(culprit as usize).map_or("", |p| &p.name);
        format!("the gradient of {name} has NaN or infinite elements")
    }

    /// The GPU that steps run on, where they run on one. Inner steps, a damping that adapts to measured losses, and the literal carry read
    /// numbers within a step, and take the general path there.
    pub(super) fn gpu(&self) -> Option<Gpu> {
        let first = self.vars.first()?;
        let gpu = Gpu::of(first.var.device())?;
        let dtype = wide_dtype(first.var.dtype());
        let alike = self.vars.iter().all(|p| {
            p.var.device().same_device(first.var.device())
                && wide_dtype(p.var.dtype()) == dtype
                && p.var.is_contiguous()
        });
        // Averages that begin after the first step begin with what is then the newest.
        let no_mean = self.needs().averaged_models && self.blocks.iter().any(|b| b.state.mean.is_none());
        let no_average = self.params.average.is_some() && self.averages.is_empty();
        let late = self.steps > 0 && (no_mean || no_average);
        let general = self.params.wake.inner().is_some()
            || matches!(self.params.damping, Damping::Adaptive(_))
            || self.params.carry == Carry::Literal
            || late;
        (alike && !general).then_some(gpu)
    }

    fn needs(&self) -> Needs {
        Needs {
            waked: self.params.wake.wake_decay(self.params.stat_decay).is_some(),
            averaged_models: self.params.wake.model_decay() > 0.0,
            momentum: self.params.momentum > 0.0,
            slopes: matches!(self.params.step_rule, StepRule::AdaptiveKl(_)),
            rms_clip: self.params.rms_clip.is_some(),
            averages: self.params.average.is_some(),
        }
    }

    /// A whole step on gradients in the order of `vars`.
    pub(super) fn advance_on(&mut self, gpu: Gpu, grads: &[Tensor], loss: Option<f64>) -> Result<()> {
        let _span = tracing::info_span!("step").entered();
        self.check_rate()?;
        if self.device.as_ref().is_some_and(|device| device.needs != self.needs()) {
            self.settle()?;
            self.device = None;
        }
        let by_last_rate =
            matches!(self.params.wake.model(), Model::Quadratic(_)) && self.given_rate().is_none();
        if by_last_rate && self.inverses_due() {
            self.settle()?;
        }
        let mut device = match self.device.take() {
            Some(device) => device,
            None => self.device_step(gpu)?,
        };
        let outcome = match loss {
            Some(loss) if !loss.is_finite() => Err(Refusal::NonFinite(format!("the loss is {loss}"))),
            _ => self.run(&mut device, grads),
        };
        self.device = Some(device);
        self.forget();
        match outcome {
            Ok(true) => self.settle(),
            Ok(false) => Ok(()),
            Err(refused) => self.refuse(refused),
        }
    }

    /// Queues a step; whether it was one that renewed curvature, where the host waits for it anyway.
    fn run(&mut self, device: &mut DeviceStep, grads: &[Tensor]) -> std::result::Result<bool, Refusal> {
        let refresh = self.take_factors()?;
        let renewing = refresh.is_some() || self.inverses_due();
        let board = device.board()?;
        if !self.captured {
            self.begin(device)?;
        }
        self.wake(device, &board, grads)?;

        let mut renewed = self.renew(refresh.as_ref(), grads)?;
        let due = self.damping_due(&renewed)?;
        let Overlapped { ahead, damping, taken } = self.overlapped(&mut renewed, due)?;
        self.prepare(&self.blocks, &mut renewed, damping)?;
        let stacked: Vec<_> = device.stacks.iter().map(|stack| stack.inverse.clone()).collect();
        for stack in &mut device.stacks {
            stack.take_inverses(&self.blocks, &mut renewed)?;
        }
        let directions = self.directions(device, &renewed, damping)?;
        self.decide(device, &board)?;
        self.write(device, &board, &directions, &renewed, grads)?;

        let last_ahead = std::mem::replace(&mut self.ahead, ahead);
        let before = (self.damping, self.blocks.iter().map(|block| block.state.clone()).collect::<Vec<_>>());
        let states: Vec<BlockState> = renewed.into_iter().map(|renewed| renewed.state).collect();
        for (block, state) in self.blocks.iter_mut().zip(states) {
            block.state = state;
        }
        self.damping = damping;
        if !self.captured {
            self.count();
        }
        if !(renewing || taken) {
            return Ok(false);
        }
        if renewing && !device.gone()? {
            // The factors of a step that was not taken do not count either.
            (self.damping, self.ahead) = (before.0, last_ahead);
            for (block, state) in self.blocks.iter_mut().zip(before.1) {
                block.state = state;
            }
        } else if !(self.keep_inverses && self.settle_inverses(&before.1)?) {
            self.moves += 1;
            return Ok(renewing);
        }
        for (stack, inverse) in device.stacks.iter_mut().zip(stacked) {
            stack.inverse = inverse;
        }
        Ok(renewing)
    }

    /// Puts down what the options say of the coming step.
    pub(super) fn begin(&self, device: &DeviceStep) -> Result<()> {
        let board = device.board()?;
        let args = BeginArgs {
            flags: board.flags.address(),
            numbers: board.numbers.address(),
            lr: self.params.lr,
            given: self.given_rate().unwrap_or(-1.0),
            wake_decay: self.params.wake.wake_decay(self.params.stat_decay).unwrap_or(0.0),
            power: self.params.average.map_or(-1.0, |average| average.power),
            rest_lr: self.params.rest.lr,
            step: self.steps as u64,
        };
        update::begin(&device.gpu, &args)
    }

    /// Counts a step that was queued.
    pub(super) fn count(&mut self) {
        self.steps += 1;
        for adam in &mut self.rest {
            adam.steps += 1;
        }
    }

    /// The work space for the options as they are, and state that kernels can write in place: tensors of its own.
    fn device_step(&mut self, gpu: Gpu) -> Result<DeviceStep> {
        let device = self.vars.first().map_or(Device::Cpu, |p| p.var.device().clone());
        let dtype = self.vars.first().map_or(DType::F32, |p| wide_dtype(p.var.dtype()));
        let needs = self.needs();
        let own =
            |tensor: Option<&Tensor>, wanted: bool, shape: (usize, usize, usize)| -> Result<Option<Tensor>> {
                match (tensor, wanted) {
                    (_, false) => Ok(None),
                    (Some(tensor), true) => tensor.contiguous()?.copy().map(Some),
                    (None, true) => Tensor::zeros(shape, dtype, &device).map(Some),
                }
            };
        let stacks = Stack::all(&self.blocks, dtype, &device)?;
        let mut wakes = vec![Tensor::zeros(1, dtype, &device)?; self.blocks.len()];
        for stack in &stacks {
            for (nth, &index) in stack.blocks.iter().enumerate() {
                wakes[index] = stack.part(&stack.wake, nth)?;
            }
        }
        let mut scratch = Vec::with_capacity(self.blocks.len());
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let shape = <(usize, usize, usize)>::from(block.shape());
            let state = &mut block.state;
            let fresh = state.carry.is_none() && state.mean.is_none();
            state.carry = own(state.carry.as_ref(), needs.waked, shape)?;
            state.mean = match &state.carry {
                // Both are the model's gradient, so one array does.
                Some(carry) if fresh && needs.averaged_models => Some(carry.clone()),
                _ => own(state.mean.as_ref(), needs.averaged_models, shape)?,
            };
            state.velocity = own(state.velocity.as_ref(), needs.momentum, shape)?;
            state.step = own(state.step.as_ref(), needs.slopes, shape)?;
            let zeros = || Tensor::zeros(shape, dtype, &device);
            let model = needs.waked || needs.averaged_models;
            // Without averaged models, the model's gradient is the loss's.
            let gradient = needs.slopes && (needs.averaged_models || !model);
            scratch.push(Scratch {
                gradient: gradient.then(zeros).transpose()?,
                model: model.then(zeros).transpose()?,
                wake: wakes[index].clone(),
            });
        }
        for param in &mut self.vars {
            param.master = param.master.as_ref().map(Tensor::copy).transpose()?;
        }
        if needs.averages && self.averages.is_empty() {
            let zeros = |p: &Param| Tensor::zeros(p.var.shape(), dtype, &device);
            self.averages = self.vars.iter().map(zeros).collect::<Result<_>>()?;
        } else if needs.averages {
            self.averages = self.averages.iter().map(Tensor::copy).collect::<Result<_>>()?;
        } else {
            self.averages.clear();
        }
        for adam in &mut self.rest {
            let zeros = || Tensor::zeros(self.vars[adam.param].var.shape(), dtype, &device);
            adam.moments = Some(match &adam.moments {
                Some((first, second)) => (first.copy()?, second.copy()?),
                None => (zeros()?, zeros()?),
            });
        }
        let chunks_of = |params: &mut dyn Iterator<Item = usize>| params.map(blocks_of).sum::<usize>().max(1);
        let param_len = |p: &Param| p.var.elem_count();
        let all = chunks_of(&mut self.vars.iter().map(param_len));
        let tapped = self.blocks.iter().flat_map(|b| &b.params).map(|&i| self.vars[i].var.elem_count());
        let tapped = chunks_of(&mut tapped.collect::<Vec<_>>().into_iter());
        let matrices = self.blocks.iter().map(room_of).sum::<usize>().max(1);
        let zeros = |len: usize| Tensor::zeros(len, DType::F64, &device);
        let mut numbers = [0.0; update::NUMBERS];
        numbers[update::PREVIOUS] = self.previous_rate.unwrap_or(-1.0);
        numbers[update::DONE] = self.steps as f64;
        numbers[update::AFTER] = self.slopes.after;
        numbers[update::BEFORE] = self.slopes.before;
        numbers[update::LENGTH] = self.slopes.length;
        let mut taken = vec![0.0; tapped];
        taken[0] = self.slopes.last;
        let mut flags = [0u32; update::FLAGS];
        flags[update::BLAMED] = update::NOBODY;
        let lr_scales: Vec<f64> = self.blocks.iter().map(|b| b.lr_scale).collect();
        self.moves += 1;
        Ok(DeviceStep {
            gpu,
            dtype,
            needs,
            flags: Tensor::new(&flags, &device)?,
            numbers: Tensor::new(&numbers, &device)?,
            lr_scales: Tensor::new(lr_scales, &device)?,
            totals: zeros(2 * self.blocks.len() + 2)?,
            products: zeros(2 * matrices)?,
            squares: zeros(matrices)?,
            slopes: zeros(all)?,
            taken: Tensor::new(taken, &device)?,
            scratch,
            stacks,
            adam_ahead: self.rest.iter().map(|adam| adam.steps as f64 - self.steps as f64).collect(),
        })
    }
}

impl DeviceStep {
    fn board(&self) -> Result<Board> {
        Ok(Board {
            flags: self.gpu.operand(&self.flags, "flags")?,
            numbers: self.gpu.operand(&self.numbers, "numbers")?,
        })
    }

    /// Whether the step just queued is taken; waits for it.
    fn gone(&self) -> Result<bool> {
        Ok(self.flags.to_vec1::<u32>()?.last() == Some(&1))
    }

    /// The flags, with the culprit and the skipped steps forgotten from here on: in place, since recorded kernels know where the
    /// flags are.
    fn take_flags(&self) -> Result<Vec<u32>> {
        let flags: Vec<u32> = self.flags.to_vec1()?;
        if flags[update::BLAMED] != update::NOBODY || flags[update::SKIPPED] > 0 {
            let mut fresh = [0u32; update::FLAGS];
            fresh[update::BLAMED] = update::NOBODY;
            self.flags.slice_set(&Tensor::new(&fresh, self.flags.device())?, 0, 0)?;
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests;
