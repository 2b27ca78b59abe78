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
use super::rule::WakeRule;
use super::step::sum;
use crate::checkpoint::Checkpoint;
use crate::curvature::{Preconditioner, Runs, wide_dtype};
use crate::linalg::sketch::diagonal_of;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

const FORMAT: u32 = 1;
const KEY: &str = "kronwake";
const SLOPES: [&str; 4] = ["slope_after", "slope_before", "slope_last", "step_length"];

fn slot(owner: &str, slot: &str) -> String {
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
        Checkpoint { tensors, metadata: [(KEY.to_string(), numbers)].into() }.write(path)
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
        let closure_checked = numbers.needed("closure_checked")?;
        let model_count: usize = numbers.needed("models")?;
        let predicted = numbers.optional("predicted_loss")?.zip(numbers.optional("predicted_change")?);
        let optimizer: String = numbers.needed("optimizer")?;
        let mut wanted = Wanted { file: &file, wrong: vec![], used: BTreeSet::new() };
        if optimizer != R::NAME {
            wanted.wrong.push(format!("state of {optimizer}, expected {}", R::NAME));
        }
        // Not every tensor is needed by every optimizer, but none that was written may have been lost.
        let (count, found) = (numbers.needed::<usize>("tensors")?, file.tensors.len());
        if count != found {
            wanted.wrong.push(format!("{found} tensors, expected {count}"));
        }
        for (name, value) in
            [("lr", lr), ("previous_rate", previous_rate.unwrap_or(lr)), ("damping", damping)]
        {
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

/// Reads the numbers of a file's metadata.
struct Numbers<'a> {
    path: &'a Path,
    values: BTreeMap<&'a str, &'a str>,
}

impl Numbers<'_> {
    fn optional<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.values.get(name) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => {
                bail!("{}: metadata {KEY}: {name} is {text:?}, expected a number", self.path.display())
            }
        }
    }

    fn needed<T: FromStr>(&self, name: &str) -> Result<T> {
        match self.optional(name)? {
            Some(value) => Ok(value),
            None => bail!("{}: metadata {KEY}: {name} is missing", self.path.display()),
        }
    }
}

/// What an optimizer cannot go on without, beside the factors.
#[derive(Clone, Copy)]
struct Needs {
    wake: bool,
    step: bool,
}

/// Looks tensors up and notes all that is wrong, to be said at once.
struct Wanted<'a> {
    file: &'a Checkpoint,
    wrong: Vec<String>,
    used: BTreeSet<String>,
}

impl Wanted<'_> {
    fn tensor(&mut self, name: &str, dims: &[usize], dtype: DType, needed: bool) -> Option<Tensor> {
        let Some(tensor) = self.file.tensors.get(name) else {
            if needed {
                self.wrong.push(format!("missing {name} {dims:?}"));
            }
            return None;
        };
        self.used.insert(name.to_string());
        if tensor.dims() != dims || tensor.dtype() != dtype {
            let (found, kind) = (tensor.dims(), tensor.dtype());
            self.wrong.push(format!("{name} is {kind:?} {found:?}, expected {dtype:?} {dims:?}"));
            return None;
        }
        match sum(tensor) {
            Ok(total) if total.is_finite() => Some(tensor.clone()),
            _ => {
                self.wrong.push(format!("{name} has NaN or infinite elements"));
                None
            }
        }
    }

    fn block(&mut self, block: &Block, dtype: DType, started: bool, needs: Needs) -> BlockState {
        let name = |part: &str| slot(&block.name, part);
        let (square_a, square_g) = (block.columns.dims(block.groups), block.rows.dims(block.groups));
        let (matrix, inside) = (block.shape(), block.inside());
        // Of low rank, an exact solve has other vectors, and its next inverse may be of another kind.
        let scale = self.file.tensors.get(&name("scale")).map(Tensor::dims);
        let exact = block.is_low_rank() && scale == Some(&block.scale(true));
        let bases = [block.columns, block.rows].map(|side| side.basis(block.groups, exact));
        let mut get = |part: &str, dims: &[usize], needed| self.tensor(&name(part), dims, dtype, needed);
        let factor_a = get("factor_a", &square_a, started);
        let factor_g = get("factor_g", &square_g, started);
        let inverse = get("inv_a", &square_a, false).zip(get("inv_g", &square_g, false));
        let basis = get("basis_a", &bases[0], false).zip(get("basis_g", &bases[1], false));
        let scale = get("scale", &block.scale(exact), false);
        let mut root = |part, side: Runs| match exact && side.has_root() {
            true => get(part, &side.dims(block.groups), true),
            false => None,
        };
        let (root_a, root_g) = (root("root_a", block.columns), root("root_g", block.rows));
        let preconditioner = match (inverse, basis.zip(scale)) {
            (Some((inv_a, inv_g)), None) => Some(Preconditioner::Factors { inv_a, inv_g }),
            (None, Some(((basis_a, basis_g), scale))) => Some(match block.is_low_rank() {
                true => Preconditioner::Split { basis_a, basis_g, scale, root_a, root_g },
                false => Preconditioner::Basis { basis_a, basis_g, scale },
            }),
            _ => None,
        };
        let state = BlockState {
            moments: get("moments", &inside, false),
            carry: get("carry", &matrix, started && needs.wake),
            mean: get("mean", &matrix, false),
            model_a: get("model_a", &square_a, false),
            model_g: get("model_g", &square_g, false),
            step: get("step", &matrix, started && needs.step),
            velocity: get("velocity", &matrix, false),
            factor_a,
            factor_g,
            preconditioner,
        };
        if started && state.preconditioner.is_none() {
            self.wrong.push(format!("missing the inverse of block {}", block.name));
        }
        for (part, factor) in [("factor_a", &state.factor_a), ("factor_g", &state.factor_g)] {
            if factor.as_ref().is_some_and(|f| !non_negative_diagonal(f)) {
                self.wrong.push(format!("{} has a negative diagonal element", name(part)));
            }
        }
        state
    }

    fn finish(mut self, path: &Path) -> Result<()> {
        let extra = self.file.tensors.keys().filter(|n| !self.used.contains(*n));
        self.wrong.extend(extra.map(|n| format!("unexpected {n}")));
        if self.wrong.is_empty() {
            return Ok(());
        }
        bail!("{}: does not fit this optimizer and model: {}", path.display(), self.wrong.join("; "))
    }
}

/// A sum of outer products has no negative diagonal element.
fn non_negative_diagonal(factor: &Tensor) -> bool {
    let smallest =
        || -> Result<f64> { diagonal_of(factor)?.flatten_all()?.min(0)?.to_dtype(DType::F64)?.to_scalar() };
    smallest().is_ok_and(|smallest| smallest >= 0.0)
}
