//! What a step on a GPU works with beside the optimizer's state, and where it writes.

use super::grouped;
use super::kept_alive::KeptAlive;
use super::same_shape::SameShape;
use crate::curvature::wide_dtype;
use crate::gpu::Gpu;
use crate::gpu::table::{blocks_of, type_number};
use crate::ops::update::{self, BeginArgs};
use crate::ops::wake::{Place, StepScalars};
use crate::optim::state::Core;
use crate::optim::state::block::Block;
use crate::optim::state::param::Param;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What a step on a GPU works with beside the optimizer's state.
#[derive(Debug)]
pub(crate) struct DeviceStep {
    pub gpu: Gpu,
    /// Of the state.
    pub dtype: DType,
    pub needs: Needs,
    /// See `kernels/step.cuh`.
    pub flags: Tensor,
    pub numbers: Tensor,
    pub lr_scales: Tensor,
    /// `<V, w>` of every block, `<V, V>` of every block, the two slopes.
    pub totals: Tensor,
    /// Partial sums of each of them.
    pub products: Tensor,
    pub squares: Tensor,
    pub slopes: Tensor,
    pub last_slopes: Tensor,
    pub scratch: Vec<Scratch>,
    /// Blocks of one shape together.
    pub stacks: Vec<SameShape>,
    /// What Adam's step counts are ahead of the device's count of steps.
    pub adam_ahead: Vec<f64>,
}

/// A block's matrices within a step.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub gradient: Option<Tensor>,
    pub model: Option<Tensor>,
    pub wake: Tensor,
}

/// Which state the options ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Needs {
    pub waked: bool,
    pub averaged_models: bool,
    pub momentum: bool,
    pub slopes: bool,
    pub rms_clip: bool,
    pub averages: bool,
}

/// Where a param is written; addresses of what is absent are 0.
pub(super) struct Targets {
    /// Its value in the state's dtype.
    pub value: u64,
    /// The Var, where it has another dtype.
    pub var: u64,
    pub average: u64,
    /// The Var's.
    pub dtype: u32,
}

impl Needs {
    /// What the options of `core` ask for.
    pub fn of(core: &Core) -> Self {
        Self {
            waked: core.wake_decay().is_some(),
            averaged_models: core.params.wake.model_decay() > 0.0,
            momentum: core.params.momentum > 0.0,
            slopes: core.measures_slopes(),
            rms_clip: core.params.rms_clip.is_some(),
            averages: core.params.average.is_some(),
        }
    }

    /// Whether the next step looks back at the gradient of models.
    pub fn looks_back(&self) -> bool {
        self.waked || self.averaged_models
    }
}

impl DeviceStep {
    /// The work space for the options as they are, and state that kernels can write in place: tensors of its own.
    pub fn new(core: &mut Core, gpu: Gpu) -> Result<Self> {
        let device = core.vars.first().map_or(Device::Cpu, |p| p.var.device().clone());
        let dtype = core.vars.first().map_or(DType::F32, |p| wide_dtype(p.var.dtype()));
        let needs = Needs::of(core);
        let own =
            |tensor: Option<&Tensor>, wanted: bool, shape: (usize, usize, usize)| -> Result<Option<Tensor>> {
                match (tensor, wanted) {
                    (_, false) => Ok(None),
                    (Some(tensor), true) => tensor.contiguous()?.copy().map(Some),
                    (None, true) => Tensor::zeros(shape, dtype, &device).map(Some),
                }
            };
        let stacks = SameShape::all(&core.blocks, dtype, &device)?;
        let mut wakes = vec![Tensor::zeros(1, dtype, &device)?; core.blocks.len()];
        for stack in &stacks {
            for (nth, &index) in stack.blocks.iter().enumerate() {
                wakes[index] = stack.part(&stack.wake, nth)?;
            }
        }
        let mut scratch = Vec::with_capacity(core.blocks.len());
        for (index, block) in core.blocks.iter_mut().enumerate() {
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
        for param in &mut core.vars {
            param.master = param.master.as_ref().map(Tensor::copy).transpose()?;
        }
        if needs.averages && core.averages.is_empty() {
            let zeros = |p: &Param| Tensor::zeros(p.var.shape(), dtype, &device);
            core.averages = core.vars.iter().map(zeros).collect::<Result<_>>()?;
        } else if needs.averages {
            core.averages = core.averages.iter().map(Tensor::copy).collect::<Result<_>>()?;
        } else {
            core.averages.clear();
        }
        for adam in &mut core.adam {
            let zeros = || Tensor::zeros(core.vars[adam.param].var.shape(), dtype, &device);
            adam.moments = Some(match &adam.moments {
                Some((first, second)) => (first.copy()?, second.copy()?),
                None => (zeros()?, zeros()?),
            });
        }
        let chunks_of = |params: &mut dyn Iterator<Item = usize>| params.map(blocks_of).sum::<usize>().max(1);
        let param_len = |p: &Param| p.var.elem_count();
        let all = chunks_of(&mut core.vars.iter().map(param_len));
        let tapped = core.blocks.iter().flat_map(|b| &b.params).map(|&i| core.vars[i].var.elem_count());
        let tapped = chunks_of(&mut tapped.collect::<Vec<_>>().into_iter());
        let matrices = core.blocks.iter().map(grouped::room_of).sum::<usize>().max(1);
        let zeros = |len: usize| Tensor::zeros(len, DType::F64, &device);
        let mut numbers = [0.0; update::NUMBERS];
        numbers[update::PREVIOUS] = core.previous_rate.unwrap_or(-1.0);
        numbers[update::DONE] = core.steps as f64;
        numbers[update::AFTER] = core.slopes.after;
        numbers[update::BEFORE] = core.slopes.before;
        numbers[update::LENGTH] = core.slopes.length;
        let mut taken = vec![0.0; tapped];
        taken[0] = core.slopes.last;
        let mut flags = [0u32; update::FLAGS];
        flags[update::BLAMED] = update::NOBODY;
        let lr_scales: Vec<f64> = core.blocks.iter().map(|b| b.lr_scale).collect();
        Ok(Self {
            gpu,
            dtype,
            needs,
            flags: Tensor::new(&flags, &device)?,
            numbers: Tensor::new(&numbers, &device)?,
            lr_scales: Tensor::new(lr_scales, &device)?,
            totals: zeros(2 * core.blocks.len() + 2)?,
            products: zeros(2 * matrices)?,
            squares: zeros(matrices)?,
            slopes: zeros(all)?,
            last_slopes: Tensor::new(taken, &device)?,
            scratch,
            stacks,
            adam_ahead: core.adam.iter().map(|adam| adam.steps as f64 - core.steps as f64).collect(),
        })
    }

    /// Puts down what the options say of the coming step.
    pub fn begin(&self, core: &Core) -> Result<()> {
        let board = self.board()?;
        let args = BeginArgs {
            flags: board.flags.address(),
            numbers: board.numbers.address(),
            lr: core.params.lr,
            given: core.given_rate().unwrap_or(-1.0),
            wake_decay: core.wake_decay().unwrap_or(0.0),
            power: core.params.average.map_or(-1.0, |average| average.power),
            rest_lr: core.fallback_adam().lr,
            step: core.steps as u64,
        };
        update::begin(&self.gpu, &args)
    }

    /// Sets what multiplies the length of the first step.
    pub fn set_length(&self, length: f64) -> Result<()> {
        let numbers = &self.numbers;
        numbers.slice_set(&Tensor::new(&[length], numbers.device())?, 0, update::LENGTH)
    }

    /// The params of a block with their places in its matrix.
    pub(super) fn places(&self, core: &Core, block: &Block) -> Result<Vec<(usize, Place)>> {
        let mut offset = 0;
        let mut places = Vec::with_capacity(block.params.len());
        for &index in &block.params {
            let param = &core.vars[index];
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

    /// Where a param is written.
    pub(super) fn targets(&self, core: &Core, kept: &mut KeptAlive<'_>, index: usize) -> Result<Targets> {
        let param = &core.vars[index];
        let var = param.var.as_detached_tensor();
        let dtype = type_number(var.dtype(), &param.name)?;
        let average = kept.maybe(core.averages.get(index), &param.name)?;
        let var = kept.address(&var, &param.name)?;
        Ok(match &param.master {
            Some(master) => Targets { value: kept.address(master, &param.name)?, var, average, dtype },
            None => Targets { value: var, var: 0, average, dtype },
        })
    }

    /// What the kernels of a step share.
    pub fn board(&self) -> Result<StepScalars> {
        Ok(StepScalars {
            flags: self.gpu.operand(&self.flags, "flags")?,
            numbers: self.gpu.operand(&self.numbers, "numbers")?,
        })
    }

    /// Whether the step just queued is taken; waits for it.
    pub fn gone(&self) -> Result<bool> {
        Ok(self.flags.to_vec1::<u32>()?.last() == Some(&1))
    }

    /// The flags, with the culprit and the skipped steps forgotten from here on: in place, since recorded kernels know where the
    /// flags are.
    pub fn take_flags(&self) -> Result<Vec<u32>> {
        let flags: Vec<u32> = self.flags.to_vec1()?;
        if flags[update::BLAMED] != update::NOBODY || flags[update::SKIPPED] > 0 {
            let mut fresh = [0u32; update::FLAGS];
            fresh[update::BLAMED] = update::NOBODY;
            self.flags.slice_set(&Tensor::new(&fresh, self.flags.device())?, 0, 0)?;
        }
        Ok(flags)
    }
}
