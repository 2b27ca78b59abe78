//! Resuming: what `save.rs` has written, checked as a whole and then taken.

use super::block::{Block, BlockState};
use super::pending::PendingInverses;
use super::reader::{Needs, Numbers, StateReader};
use super::save::{FORMAT, KEY, PENDING, SLOPES, slot};
use super::{Core, Predicted, Slopes};
use crate::checkpoint::Checkpoint;
use crate::curvature::wide_dtype;
use candle_core::{Device, Result, bail};
use std::path::Path;

impl Core {
    /// Restores everything from a file that [`Core::save`] wrote.
    ///
    /// # Errors
    /// When the file is unreadable, or does not fit: one message lists every difference, and nothing has changed.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let device = self.vars.first().map_or(Device::Cpu, |p| p.var.device().clone());
        let file = Checkpoint::read(path, &device)?;
        let text = file.metadata.get(KEY).map_or("", String::as_str);
        let numbers =
            Numbers { path, values: text.lines().filter_map(|line| line.split_once(" = ")).collect() };
        let format: Option<u32> = numbers.optional("format")?;
        match format {
            Some(FORMAT) => {}
            Some(other) => bail!("{}: state of format {other}, expected {FORMAT}", path.display()),
            None => {
                bail!("{}: holds no optimizer state, only {} tensors", path.display(), file.tensors.len())
            }
        }
        let steps: usize = numbers.needed("steps")?;
        let skipped = numbers.needed("skipped")?;
        let lr: f64 = numbers.needed("lr")?;
        let largest_lr: Option<f64> = numbers.optional("largest_lr")?;
        let previous_rate: Option<f64> = numbers.optional("previous_rate")?;
        let damping: f64 = numbers.needed("damping")?;
        let mut slopes = [0f64; 4];
        for (name, value) in SLOPES.into_iter().zip(&mut slopes) {
            *value = numbers.needed(name)?;
        }
        let [after, before, last, length] = slopes;
        let pending: Option<(usize, f64)> =
            numbers.optional("ahead_from")?.zip(numbers.optional("ahead_damping")?);
        let closure_checked = numbers.needed("closure_checked")?;
        let model_count: usize = numbers.needed("models")?;
        let predicted = numbers.optional("predicted_loss")?.zip(numbers.optional("predicted_change")?);
        let optimizer: String = numbers.needed("optimizer")?;
        let mut reader = StateReader::new(&file);
        if optimizer != self.name() {
            reader.wrong.push(format!("state of {optimizer}, expected {}", self.name()));
        }
        // Not every tensor is needed by every optimizer, but none that was written may have been lost.
        let (count, found) = (numbers.needed::<usize>("tensors")?, file.tensors.len());
        if count != found {
            reader.wrong.push(format!("{found} tensors, expected {count}"));
        }
        let later = pending.map_or(damping, |(_, later)| later);
        let rates = [
            ("lr", lr),
            ("previous_rate", previous_rate.unwrap_or(lr)),
            ("largest_lr", largest_lr.unwrap_or(lr)),
        ];
        for (name, value) in rates.into_iter().chain([("damping", damping), ("ahead_damping", later)]) {
            if !(value.is_finite() && value >= 0.0) {
                reader.wrong.push(format!("{name} is {value}, expected zero or more"));
            }
        }
        if slopes.iter().any(|slope| !slope.is_finite()) || length <= 0.0 {
            reader.wrong.push(format!("slopes are {slopes:?}, expected numbers, the length positive"));
        }
        if model_count > found {
            bail!("{}: {model_count} stored models in {found} tensors", path.display())
        }
        let mut values = vec![];
        for param in &self.vars {
            let (dims, dtype) = (param.var.dims(), param.var.dtype());
            let value = reader.tensor(&param.name, dims, dtype, true);
            let master =
                reader.tensor(&slot(&param.name, "master"), dims, wide_dtype(dtype), param.master.is_some());
            values.push((value, master));
        }
        let frozen: Vec<_> = self
            .frozen
            .iter()
            .map(|(name, var)| reader.tensor(name, var.dims(), var.dtype(), true))
            .collect();
        let started = steps > 0;
        let wake = self.wake_decay().is_some();
        let step = self.measures_slopes();
        let states: Vec<BlockState> = self
            .blocks
            .iter()
            .map(|block| {
                let dtype = wide_dtype(self.vars[block.params[0]].var.dtype());
                reader.block(block, dtype, started, Needs { wake, step })
            })
            .collect();
        if let Some((from, _)) = pending.filter(|(from, _)| *from > steps) {
            reader.wrong.push(format!("inverses of step {from}, expected one up to {steps}"));
        }
        let pending = pending.map(|(from, damping)| {
            let inverse = |block: &Block| {
                let dtype = wide_dtype(self.vars[block.params[0]].var.dtype());
                // One that could not be made was not written.
                reader
                    .inverse(block, dtype, PENDING)
                    .ok_or_else(|| format!("no inverse of step {from} in the file"))
            };
            PendingInverses::made(from, damping, self.blocks.iter().map(inverse).collect())
        });
        let mut adam_states = self.adam.clone();
        for adam in &mut adam_states {
            let Some(param) = self.vars.get(adam.param) else { continue };
            let (dims, dtype) = (param.var.dims(), wide_dtype(param.var.dtype()));
            adam.steps = numbers.optional(&format!("adam_steps.{}", param.name))?.unwrap_or(0);
            let needed = adam.steps > 0;
            let first = reader.tensor(&slot(&param.name, "first_moment"), dims, dtype, needed);
            let second = reader.tensor(&slot(&param.name, "second_moment"), dims, dtype, needed);
            adam.moments = first.zip(second);
        }
        let mut models = vec![];
        for index in 0..model_count {
            let mut model = vec![];
            for param in &self.vars {
                let name = slot(&param.name, &format!("model{index}"));
                model.extend(reader.tensor(&name, param.var.dims(), wide_dtype(param.var.dtype()), true));
            }
            models.push(model);
        }
        let averaged = started && self.params.average.is_some();
        let mut averages = vec![];
        for param in &self.vars {
            let (dims, dtype) = (param.var.dims(), wide_dtype(param.var.dtype()));
            averages.extend(reader.tensor(&slot(&param.name, "average"), dims, dtype, averaged));
        }
        reader.finish(path)?;

        for (param, (value, master)) in self.vars.iter_mut().zip(values) {
            if let Some(value) = value {
                param.var.set(&value)?;
            }
            param.master = master;
        }
        for ((_, var), value) in self.frozen.iter().zip(frozen) {
            if let Some(value) = value {
                var.set(&value)?;
            }
        }
        for (block, state) in self.blocks.iter_mut().zip(states) {
            block.state = state;
        }
        self.pending = pending;
        self.adam = adam_states;
        self.models = models;
        self.averages = averages;
        self.steps = steps;
        self.skipped = skipped;
        self.previous_rate = previous_rate;
        self.damping = damping;
        self.slopes = Slopes { after, before, last, length };
        self.predicted = predicted.map(|(loss, change)| Predicted { loss, change });
        self.closure_checked = closure_checked;
        if self.adam_rate.warming_up {
            self.adam_rate.at = largest_lr.unwrap_or(self.adam_rate.at);
        }
        self.set_learning_rate(lr);
        Ok(())
    }
}
