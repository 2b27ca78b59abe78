//! Saving and resuming a first-order optimizer, bit for bit.

use super::{FirstOrder, Next, Update};
use crate::checkpoint::Checkpoint;
use candle_core::{Device, Result, Tensor, bail};
use std::collections::BTreeMap;
use std::path::Path;

/// What a file says.
struct Read {
    slots: Vec<Next>,
    steps: usize,
    skipped: usize,
}

impl<P: Update> FirstOrder<P> {
    /// Writes parameters, state and the number of steps as safetensors. Of several processes all call it and rank 0 writes.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let messages = self.gather_elsewhere()?;
        let write = || self.write(path.as_ref(), self.elsewhere(messages)?);
        self.all_did("save", if self.writes() { write() } else { Ok(()) })
    }

    fn write(&self, path: &Path, elsewhere: Vec<(String, Tensor)>) -> Result<()> {
        let count = |count: usize| Tensor::new(count as i64, &Device::Cpu);
        let mut tensors = BTreeMap::from([("step".to_string(), count(self.steps)?)]);
        if self.skipped > 0 {
            tensors.insert("skipped".into(), count(self.skipped)?);
        }
        for slot in &self.slots {
            tensors.insert(format!("value.{}", slot.name), slot.value()?);
            for (key, tensor) in slot.keys.iter().zip(&slot.state) {
                tensors.insert(format!("{key}.{}", slot.name), tensor.clone());
            }
        }
        tensors.extend(elsewhere);
        Checkpoint { tensors, ..Default::default() }.write(path)
    }

    /// Goes on from what [`save`](Self::save) wrote for the same model, rule, frozen Vars and element types: the next steps are those that would
    /// have followed there, bit for bit. Options, the learning rate among them, are not in the file.
    ///
    /// # Errors
    /// When the file cannot be read or does not fit; nothing is changed then.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let (found, outcome) = match self.read(path.as_ref()) {
            Ok(found) => (Some(found), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.all_did("resume", outcome)?;
        let Some(Read { slots, steps, skipped }) = found else { bail!("first-order: no state was read") };
        let mut pairs = self.slots.iter_mut().zip(slots);
        let set = pairs.try_for_each(|(slot, (value, state))| slot.set(value, state));
        if set.is_ok() {
            (self.steps, self.skipped) = (steps, skipped);
        }
        self.forget();
        self.agree_on_state(set)?;
        self.keep_own();
        Ok(())
    }

    fn read(&self, path: &Path) -> Result<Read> {
        let file = path.display().to_string();
        let mut tensors = Checkpoint::read(path, &Device::Cpu)?.tensors;
        let none_skipped = !tensors.contains_key("skipped");
        let mut take = |key: &str, like: &Tensor| match tensors.remove(key) {
            Some(t) if t.dims() == like.dims() && t.dtype() == like.dtype() => t.to_device(like.device()),
            Some(t) => {
                let (found, expected) = ((t.dtype(), t.dims()), (like.dtype(), like.dims()));
                bail!("{file}: {key} is {found:?}, expected {expected:?}")
            }
            None => bail!("{file}: {key} is missing: another model or optimizer wrote this file"),
        };
        let mut count = |key: &str| take(key, &Tensor::new(0i64, &Device::Cpu)?)?.to_scalar::<i64>();
        let steps = count("step")?;
        let skipped = if none_skipped { 0 } else { count("skipped")? };
        if !(0..=steps).contains(&skipped) {
            bail!(
                "{file}: expected steps of at least 0 and no more of them left out, got {steps} and {skipped}"
            )
        }
        let mut read = Vec::new();
        for slot in &self.slots {
            let like = slot.wide.as_ref().unwrap_or(slot.var.as_tensor());
            let value = take(&format!("value.{}", slot.name), like)?;
            // What others own has its forms from a state before the first step.
            let fresh = if slot.state.is_empty() { slot.fresh_state(&self.params)?.1 } else { vec![] };
            let forms = if slot.state.is_empty() { &fresh } else { &slot.state };
            let state = slot.keys.iter().zip(forms);
            let state = state.map(|(key, like)| take(&format!("{key}.{}", slot.name), like));
            read.push((value, state.collect::<Result<Vec<_>>>()?));
        }
        if let Some(extra) = tensors.keys().next() {
            bail!("{file}: {extra} has no place here: another model or optimizer wrote this file")
        }
        Ok(Read { slots: read, steps: steps as usize, skipped: skipped as usize })
    }
}
