//! A checkpoint's tensors into a model's Vars.

use super::{Checkpoint, values};
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::MutexGuard;

/// What a checkpoint and a model do not share, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Vars that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that no Var takes, those of integers and [`Checkpoint::skipped`] ones too.
    pub unexpected: Vec<String>,
}

impl Checkpoint {
    /// The Vars of a model by name, which they share their memory with: what the model learns later is in the checkpoint too.
    ///
    /// # Errors
    /// When the VarMap's lock is poisoned.
    pub fn from_varmap(varmap: &VarMap) -> Result<Self> {
        let vars = locked(varmap)?;
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
        Ok(Self { tensors, ..Default::default() })
    }

    /// Sets every Var of `varmap` to the tensor of its name ([`Checkpoint::get`]), converted to the Var's dtype.
    ///
    /// Tensors of integers that no Var takes are no parameters, as PyTorch's `num_batches_tracked` and masks of attention: they are left, as are
    /// [`Checkpoint::skipped`] ones. [`Checkpoint::load_partly`] lists them.
    ///
    /// # Errors
    /// When names are missing, left over, of another shape, integers for floating point or the reverse, or when finite elements would be
    /// infinite in the Var's dtype (70000 in f16): one message lists them all, and no Var has changed.
    pub fn load_into(&self, varmap: &VarMap) -> Result<()> {
        self.load(varmap, false).map(drop)
    }

    /// [`Checkpoint::load_into`] for a model that the file is not quite of, as PyTorch's `strict=False`: Vars that the file lacks stay as they are, and
    /// tensors that no Var takes are left. Both are returned.
    ///
    /// # Errors
    /// When a name that both have does not fit, as in [`Checkpoint::load_into`]: one message lists all, and no Var has changed.
    pub fn load_partly(&self, varmap: &VarMap) -> Result<Differences> {
        self.load(varmap, true)
    }

    fn load(&self, varmap: &VarMap, partly: bool) -> Result<Differences> {
        let data = locked(varmap)?;
        let mut wrong = vec![];
        let mut differences = Differences::default();
        let (mut used, mut converted) = (BTreeSet::new(), BTreeMap::new());
        for (name, var) in data.iter() {
            let stored = self.stored(name);
            used.insert(stored);
            let shown = if stored == name { name.clone() } else { format!("{name} (in the file {stored})") };
            if let Some(why) = self.skipped.get(stored) {
                wrong.push(format!("{shown} is {why}"));
                continue;
            }
            let Some(tensor) = self.tensors.get(stored) else {
                differences.missing.push(name.clone());
                continue;
            };
            match fitted(tensor, var) {
                Ok(Ok(value)) => {
                    converted.insert(name, value);
                }
                Ok(Err(why)) => wrong.push(format!("{shown} {why}")),
                Err(error) => {
                    let (from, to) = (tensor.dtype(), var.dtype());
                    wrong.push(format!("{shown} cannot be converted from {from:?} to {to:?}: {error}"))
                }
            }
        }
        differences.missing.sort();
        let left = |names: &mut dyn Iterator<Item = &String>| -> Vec<String> {
            names.filter(|name| !used.contains(name.as_str())).cloned().collect()
        };
        let parameters = left(&mut self.tensors.iter().filter(|(_, t)| !t.dtype().is_int()).map(|(n, _)| n));
        differences.unexpected = left(&mut self.tensors.keys().chain(self.skipped.keys()));
        differences.unexpected.sort();
        if !partly {
            let shape = |name: &String| data.get(name).map(|var| var.dims().to_vec()).unwrap_or_default();
            wrong.extend(differences.missing.iter().map(|name| format!("missing {name} {:?}", shape(name))));
            wrong.extend(parameters.iter().map(|name| format!("unexpected {name}")));
        }
        if !wrong.is_empty() {
            wrong.sort();
            bail!("checkpoint does not fit the model: {}", wrong.join("; "))
        }
        set(&data, converted)?;
        Ok(differences)
    }
}

fn locked(varmap: &VarMap) -> Result<MutexGuard<'_, HashMap<String, Var>>> {
    match varmap.data().lock() {
        Ok(data) => Ok(data),
        Err(_) => bail!("checkpoint: the VarMap's lock is poisoned"),
    }
}

/// `tensor` as a value of `var`, or what is wrong with it, to be said after its name.
fn fitted(tensor: &Tensor, var: &Var) -> Result<std::result::Result<Tensor, String>> {
    if tensor.dims() != var.dims() {
        return Ok(Err(format!("has shape {:?}, expected {:?}", tensor.dims(), var.dims())));
    }
    let kind = |int: bool| if int { "integers" } else { "floating point" };
    if tensor.dtype().is_int() != var.dtype().is_int() {
        return Ok(Err(format!("is {:?}, expected {}", tensor.dtype(), kind(var.dtype().is_int()))));
    }
    Ok(values::checked(tensor, var.dtype(), var.device())?.map_err(|why| format!("is {why}")))
}

/// Sets Vars by name. Values that are other Vars' memory, as in a checkpoint made of the model itself, are copied before any Var changes.
fn set(vars: &HashMap<String, Var>, values: BTreeMap<&String, Tensor>) -> Result<()> {
    let memory = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0) as usize;
    let owned: BTreeSet<usize> = vars.values().map(|var| memory(var)).collect();
    let mut apart = vec![];
    for (name, value) in values {
        if let Some(var) = vars.get(name) {
            apart.push((var, if owned.contains(&memory(&value)) { value.copy()? } else { value }));
        }
    }
    apart.into_iter().try_for_each(|(var, value)| var.set(&value))
}
