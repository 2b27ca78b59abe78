//! Saving and resuming: parameters and all state in one safetensors file, bit for bit.
//!
//! Parameters stand under their own names, so that the file is a model checkpoint too; state stands under
//! `kronwake/{block or param}/{slot}`, and what are numbers in the metadata entry `kronwake`, a line `name = value` each, such
//! that they are read back exactly. (One entry, since the format's writer does not keep the order of several: equal states
//! are equal files.)

use super::block::{Block, BlockState};
use super::device::Seen;
use super::length::{Slopes, StepRule};
use super::natural::{Natural, Predicted};
use super::overlap::Ahead;
use super::rule::WakeRule;
use super::wanted::{Needs, Numbers, Wanted};
use crate::checkpoint::Checkpoint;
use crate::curvature::{Preconditioner, wide_dtype};
use candle_core::{Device, Result, Tensor, bail};
use std::collections::BTreeMap;
use std::path::Path;

const FORMAT: u32 = 1;
pub(super) const KEY: &str = "kronwake";
/// What the names of inverses begin with that no step has used yet.
const AHEAD: &str = "ahead_";
const SLOPES: [&str; 4] = ["slope_after", "slope_before", "slope_last", "step_length"];

pub(super) fn slot(owner: &str, slot: &str) -> String {
    format!("{KEY}/{owner}/{slot}")
}

impl BlockState {
    fn slots(&self) -> Vec<(&'static str, &Tensor)> {
        let optional = [
            ("factor_a", &self.factor_a),
            ("factor_g", &self.factor_g),
            ("moments", &self.moments),
            ("carry", &self.carry),
            ("mean", &self.mean),
            ("model_a", &self.model_a),
            ("model_g", &self.model_g),
            ("step", &self.step),
            ("velocity", &self.velocity),
        ];
        let mut slots: Vec<_> =
            optional.into_iter().filter_map(|(n, t)| t.as_ref().map(|t| (n, t))).collect();
        slots.extend(self.preconditioner.iter().flat_map(|p| p.parts()));
        slots
    }
}

impl<R: WakeRule> Natural<R> {
    /// Writes parameters and state to a safetensors file; a file that is already there is replaced at once or not at all.
    ///
    /// # Errors
    /// When a Var has no name (build with [`Natural::from_varmap`]), when micro-batches or an observation wait for their
    /// step, or when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        if let Some(param) = self.vars.iter().find(|p| !p.named) {
            bail!(
                "{}: a Var of shape {:?} has no name to save it under; build the optimizer with from_varmap",
                R::NAME,
                param.var.dims()
            )
        }
        if self.accumulated.is_some() || self.observed.is_some() {
            bail!("{}: save between two steps; one is under way", R::NAME)
        }
        let Seen { slopes, previous_rate, skipped, .. } = self.seen()?;
        let mut tensors = BTreeMap::new();
        for param in &self.vars {
            tensors.insert(param.name.clone(), param.var.as_detached_tensor());
            if let Some(master) = &param.master {
                tensors.insert(slot(&param.name, "master"), master.clone());
            }
        }
        for (name, var) in &self.frozen {
            tensors.insert(name.clone(), var.as_detached_tensor());
        }
        for block in &self.blocks {
            for (name, tensor) in block.state.slots() {
                tensors.insert(slot(&block.name, name), tensor.contiguous()?);
            }
        }
        if let Some(ahead) = &self.ahead {
            for (block, made) in self.blocks.iter().zip(ahead.wait()?) {
                for (name, tensor) in made.iter().flat_map(Preconditioner::parts) {
                    tensors.insert(slot(&block.name, &format!("{AHEAD}{name}")), tensor.contiguous()?);
                }
            }
        }
        for adam in &self.rest {
            let name = &self.vars[adam.param].name;
            if let Some((first, second)) = &adam.moments {
                tensors.insert(slot(name, "first_moment"), first.clone());
                tensors.insert(slot(name, "second_moment"), second.clone());
            }
        }
        for (index, model) in self.models.iter().enumerate() {
            for (param, value) in self.vars.iter().zip(model) {
                tensors.insert(slot(&param.name, &format!("model{index}")), value.clone());
            }
        }
        for (param, average) in self.vars.iter().zip(&self.averages) {
            tensors.insert(slot(&param.name, "average"), average.clone());
        }
        let mut numbers = String::new();
        let mut note = |name: &str, value: String| numbers.extend([name, " = ", &value, "\n"]);
        note("format", FORMAT.to_string());
        note("optimizer", R::NAME.to_string());
        note("steps", self.steps.to_string());
        note("skipped", skipped.to_string());
        note("lr", self.params.lr.to_string());
        note("damping", self.damping.to_string());
        note("models", self.models.len().to_string());
        note("closure_checked", self.closure_checked.to_string());
        note("tensors", tensors.len().to_string());
        if let Some(Ahead { from, damping, .. }) = &self.ahead {
            note("ahead_from", from.to_string());
            note("ahead_damping", damping.to_string());
        }
        if let Some(previous_rate) = previous_rate {
            note("previous_rate", previous_rate.to_string());
        }
        let Slopes { after, before, last, length } = slopes;
        for (name, value) in SLOPES.into_iter().zip([after, before, last, length]) {
            note(name, value.to_string());
        }
        if let Some(Predicted { loss, change }) = self.predicted {
            note("predicted_loss", loss.to_string());
            note("predicted_change", change.to_string());
        }
        for adam in &self.rest {
            note(&format!("adam_steps.{}", self.vars[adam.param].name), adam.steps.to_string());
        }
        Checkpoint { tensors, metadata: [(KEY.to_string(), numbers)].into(), ..Default::default() }
            .write(path)
    }

    /// Restores parameters and state, the learning rate included, from a file that [`Natural::save`] wrote with the same
    /// optimizer on the same model: the steps that follow are the ones that would have followed there.
    ///
    /// # Errors
    /// When the file is unreadable, or does not fit: one message lists every difference, and nothing has changed.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
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
        let previous_rate: Option<f64> = numbers.optional("previous_rate")?;
        let damping: f64 = numbers.needed("damping")?;
        let mut slopes = [0f64; 4];
        for (name, value) in SLOPES.into_iter().zip(&mut slopes) {
            *value = numbers.needed(name)?;
        }
        let [after, before, last, length] = slopes;
        let ahead: Option<(usize, f64)> =
            numbers.optional("ahead_from")?.zip(numbers.optional("ahead_damping")?);
        let closure_checked = numbers.needed("closure_checked")?;
        let model_count: usize = numbers.needed("models")?;
        let predicted = numbers.optional("predicted_loss")?.zip(numbers.optional("predicted_change")?);
        let optimizer: String = numbers.needed("optimizer")?;
        let mut wanted = Wanted::new(&file);
        if optimizer != R::NAME {
            wanted.wrong.push(format!("state of {optimizer}, expected {}", R::NAME));
        }
        // Not every tensor is needed by every optimizer, but none that was written may have been lost.
        let (count, found) = (numbers.needed::<usize>("tensors")?, file.tensors.len());
        if count != found {
            wanted.wrong.push(format!("{found} tensors, expected {count}"));
        }
        let later = ahead.map_or(damping, |(_, later)| later);
        let rates = [("lr", lr), ("previous_rate", previous_rate.unwrap_or(lr))];
        for (name, value) in rates.into_iter().chain([("damping", damping), ("ahead_damping", later)]) {
            if !(value.is_finite() && value >= 0.0) {
                wanted.wrong.push(format!("{name} is {value}, expected zero or more"));
            }
        }
        if slopes.iter().any(|slope| !slope.is_finite()) || length <= 0.0 {
            wanted.wrong.push(format!("slopes are {slopes:?}, expected numbers, the length positive"));
        }
        if model_count > found {
            bail!("{}: {model_count} stored models in {found} tensors", path.display())
        }
        let mut values = vec![];
        for param in &self.vars {
            let (dims, dtype) = (param.var.dims(), param.var.dtype());
            let value = wanted.tensor(&param.name, dims, dtype, true);
            let master =
                wanted.tensor(&slot(&param.name, "master"), dims, wide_dtype(dtype), param.master.is_some());
            values.push((value, master));
        }
        let frozen: Vec<_> = self
            .frozen
            .iter()
            .map(|(name, var)| wanted.tensor(name, var.dims(), var.dtype(), true))
            .collect();
        let started = steps > 0;
        let wake = self.params.wake.wake_decay(self.params.stat_decay).is_some();
        let step = matches!(self.params.step_rule, StepRule::AdaptiveKl(_));
        let states: Vec<BlockState> = self
            .blocks
            .iter()
            .map(|block| {
                let dtype = wide_dtype(self.vars[block.params[0]].var.dtype());
                wanted.block(block, dtype, started, Needs { wake, step })
            })
            .collect();
        if let Some((from, _)) = ahead.filter(|(from, _)| *from > steps) {
            wanted.wrong.push(format!("inverses of step {from}, expected one up to {steps}"));
        }
        let ahead = ahead.map(|(from, damping)| {
            let inverse = |block: &Block| {
                let dtype = wide_dtype(self.vars[block.params[0]].var.dtype());
                // One that could not be made was not written.
                wanted
                    .inverse(block, dtype, AHEAD)
                    .ok_or_else(|| format!("no inverse of step {from} in the file"))
            };
            Ahead::made(from, damping, self.blocks.iter().map(inverse).collect())
        });
        let mut rest = self.rest.clone();
        for adam in &mut rest {
            let Some(param) = self.vars.get(adam.param) else { continue };
            let (dims, dtype) = (param.var.dims(), wide_dtype(param.var.dtype()));
            adam.steps = numbers.optional(&format!("adam_steps.{}", param.name))?.unwrap_or(0);
            let needed = adam.steps > 0;
            let first = wanted.tensor(&slot(&param.name, "first_moment"), dims, dtype, needed);
            let second = wanted.tensor(&slot(&param.name, "second_moment"), dims, dtype, needed);
            adam.moments = first.zip(second);
        }
        let mut models = vec![];
        for index in 0..model_count {
            let mut model = vec![];
            for param in &self.vars {
                let name = slot(&param.name, &format!("model{index}"));
                model.extend(wanted.tensor(&name, param.var.dims(), wide_dtype(param.var.dtype()), true));
            }
            models.push(model);
        }
        let averaged = started && self.params.average.is_some();
        let mut averages = vec![];
        for param in &self.vars {
            let (dims, dtype) = (param.var.dims(), wide_dtype(param.var.dtype()));
            averages.extend(wanted.tensor(&slot(&param.name, "average"), dims, dtype, averaged));
        }
        wanted.finish(path)?;

        self.forget();
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
        self.ahead = ahead;
        self.rest = rest;
        self.models = models;
        self.averages = averages;
        self.steps = steps;
        self.device = None;
        self.skipped = skipped;
        self.previous_rate = previous_rate;
        self.damping = damping;
        self.slopes = Slopes { after, before, last, length };
        self.predicted = predicted.map(|(loss, change)| Predicted { loss, change });
        self.closure_checked = closure_checked;
        self.params.lr = lr;
        self.params.rest.lr = self.rest_ratio * lr;
        Ok(())
    }
}
