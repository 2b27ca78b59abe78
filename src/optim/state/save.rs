//! Saving: parameters and all state in one safetensors file, bit for bit.
//!
//! Parameters stand under their own names, so that the file is a model checkpoint too; state stands under
//! `kronwake/{block or param}/{slot}`, and what are numbers in the metadata entry `kronwake`, a line `name = value` each, such
//! that they are read back exactly. (One entry, since the format's writer does not keep the order of several: equal states
//! are equal files.)

use super::block::{Block, BlockState};
use super::param::{Adam, Param};
use super::pending::PendingInverses;
use super::{AdamRate, Core, Predicted, Slopes};
use crate::checkpoint::Checkpoint;
use crate::curvature::Preconditioner;
use candle_core::{Result, Tensor, bail};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) const FORMAT: u32 = 1;
pub(super) const KEY: &str = "kronwake";
/// What the names of inverses begin with that no step has used yet.
pub(super) const PENDING: &str = "ahead_";
pub(super) const SLOPES: [&str; 4] = ["slope_after", "slope_before", "slope_last", "step_length"];

/// The name of a state tensor.
pub(super) fn slot(owner: &str, slot: &str) -> String {
    format!("{KEY}/{owner}/{slot}")
}

impl BlockState {
    /// All tensors with their names in a file.
    pub fn slots(&self) -> Vec<(&'static str, &Tensor)> {
        // A slot that is forgotten here does not compile.
        let Self {
            factor_a,
            factor_g,
            preconditioner,
            inputs,
            damping_inputs,
            moments,
            carry,
            mean,
            model_a,
            model_g,
            step,
            velocity,
        } = self;
        let optional = [
            ("factor_a", factor_a),
            ("factor_g", factor_g),
            ("inputs", inputs),
            ("damping_inputs", damping_inputs),
            ("moments", moments),
            ("carry", carry),
            ("mean", mean),
            ("model_a", model_a),
            ("model_g", model_g),
            ("step", step),
            ("velocity", velocity),
        ];
        let mut slots: Vec<_> =
            optional.into_iter().filter_map(|(n, t)| t.as_ref().map(|t| (n, t))).collect();
        slots.extend(preconditioner.iter().flat_map(|p| p.parts()));
        slots
    }
}

/// State that other processes own.
#[derive(Debug, Default)]
pub(in crate::optim) struct Elsewhere {
    tensors: Vec<(String, Tensor)>,
    /// Adam's steps, by the index of the param.
    pub adam_steps: BTreeMap<usize, usize>,
}

impl Elsewhere {
    pub fn add(&mut self, owner: &str, name: &str, tensor: Tensor) {
        self.tensors.push((slot(owner, name), tensor));
    }
}

impl Core {
    /// # Errors
    /// When a Var has no name to save it under.
    pub fn check_named(&self) -> Result<()> {
        if let Some(param) = self.vars.iter().find(|p| !p.named) {
            bail!(
                "{}: a Var of shape {:?} has no name to save it under; build the optimizer with from_varmap",
                self.name(),
                param.var.dims()
            )
        }
        Ok(())
    }

    /// Writes everything, with what is elsewhere and the numbers that a GPU may know better.
    pub fn save(
        &self,
        path: &Path,
        elsewhere: Elsewhere,
        slopes: Slopes,
        previous_rate: Option<f64>,
        skipped: usize,
    ) -> Result<()> {
        // What is forgotten here does not compile.
        let Self {
            params,
            vars,
            frozen,
            blocks,
            adam,
            steps,
            skipped: _,
            previous_rate: _,
            damping,
            slopes: _,
            adam_rate,
            predicted,
            averages,
            models,
            pending,
            closure_checked,
            ownership: _,
        } = self;
        let mut tensors = BTreeMap::new();
        for param in vars {
            tensors.insert(param.name.clone(), param.var.as_detached_tensor());
            if let Some(master) = &param.master {
                tensors.insert(slot(&param.name, "master"), master.clone());
            }
        }
        for (name, var) in frozen {
            tensors.insert(name.clone(), var.as_detached_tensor());
        }
        for block in blocks {
            for (name, tensor) in block.state.slots() {
                tensors.insert(slot(&block.name, name), tensor.contiguous()?);
            }
        }
        if let Some(pending) = pending {
            insert_pending(&mut tensors, blocks, pending)?;
        }
        for Adam { param, steps: _, moments } in adam {
            if let Some((first, second)) = moments {
                tensors.insert(slot(&vars[*param].name, "first_moment"), first.clone());
                tensors.insert(slot(&vars[*param].name, "second_moment"), second.clone());
            }
        }
        for (index, model) in models.iter().enumerate() {
            for (Param { name, .. }, value) in vars.iter().zip(model) {
                tensors.insert(slot(name, &format!("model{index}")), value.clone());
            }
        }
        for (Param { name, .. }, average) in vars.iter().zip(averages) {
            tensors.insert(slot(name, "average"), average.clone());
        }

        tensors.extend(elsewhere.tensors);

        let mut numbers = String::new();
        let mut note = |name: &str, value: String| numbers.extend([name, " = ", &value, "\n"]);
        note("format", FORMAT.to_string());
        note("optimizer", self.name().to_string());
        note("steps", steps.to_string());
        note("skipped", skipped.to_string());
        note("lr", params.lr.to_string());
        note("damping", damping.to_string());
        note("models", models.len().to_string());
        note("closure_checked", closure_checked.to_string());
        note("tensors", tensors.len().to_string());
        if let Some(PendingInverses { from, damping, .. }) = pending {
            note("ahead_from", from.to_string());
            note("ahead_damping", damping.to_string());
        }
        if let Some(previous_rate) = previous_rate {
            note("previous_rate", previous_rate.to_string());
        }
        let Slopes { after, before, last, length, terms } = slopes;
        for (name, value) in SLOPES.into_iter().zip([after, before, last, length]) {
            note(name, value.to_string());
        }
        if terms > 0.0 {
            note("terms", terms.to_string());
        }
        if let Some(Predicted { loss, change }) = predicted {
            note("predicted_loss", loss.to_string());
            note("predicted_change", change.to_string());
        }
        // Where the options give the proportion, they say it again.
        if let AdamRate { at, warming_up: true, .. } = adam_rate {
            note("largest_lr", at.to_string());
        }
        for Adam { param, steps, moments: _ } in adam {
            let steps = elsewhere.adam_steps.get(param).unwrap_or(steps);
            note(&format!("adam_steps.{}", vars[*param].name), steps.to_string());
        }
        Checkpoint { tensors, metadata: [(KEY.to_string(), numbers)].into(), ..Default::default() }
            .write(path)
    }
}

fn insert_pending(
    tensors: &mut BTreeMap<String, Tensor>,
    blocks: &[Block],
    pending: &PendingInverses,
) -> Result<()> {
    for (block, made) in blocks.iter().zip(pending.wait()?) {
        for (name, tensor) in made.iter().flat_map(Preconditioner::parts) {
            tensors.insert(slot(&block.name, &format!("{PENDING}{name}")), tensor.contiguous()?);
        }
    }
    Ok(())
}
