//! A model as a fine-tuning has left it, beside what it was fine-tuned from.

use super::args::Args;
use super::task::{Forward, Inputs, Side, Task};
use super::train;
use crate::values::Choice;
use candle_core::{DType, Device, Result, Tensor, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{Lora, ParamsLora, VarBuilder, VarMap};
use kronwake::parallel::World;
use kronwake::tape::Tape;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The model, its examples and its start.
pub struct Opened {
    pub title: String,
    /// Of the model, and of its adapters where it has some.
    pub vars: VarMap,
    pub tape: Tape,
    pub forward: Forward,
    pub adapted: bool,
    /// The prefix of the last layer's parameters, which the base does not have.
    pub head: Option<String>,
    /// Inputs and labels for training and for tests.
    pub sides: [(Inputs, Tensor); 2],
    /// What was fine-tuned as it was before: adapters' first values, or else the base's parameters but for the last layer's.
    pub start: BTreeMap<String, Tensor>,
}

/// Reads what `finetune` has written to `tuned` (`tuned-OPTIMIZER.safetensors`, and the adapters beside it), for the options `args` of that
/// fine-tuning, whose `checkpoint` is the base. Without `tuned` it is fine-tuned first, and the files are left in `args.out`.
pub fn open(args: &Args, tuned: Option<&Path>, device: &Device) -> Result<Opened> {
    let task = super::task_of(args, device)?;
    let (base, tuned) = match (&args.checkpoint, tuned) {
        (Some(base), Some(tuned)) => (base.clone(), tuned.to_path_buf()),
        (None, Some(_)) => bail!("--tuned needs --checkpoint: the base that it was fine-tuned from"),
        (base, None) => fine_tuned(args, task.as_ref(), base.as_deref(), device)?,
    };
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, args.dtype, device);
    let beside = adapters_beside(&tuned);
    let adapters = match beside.as_deref().filter(|path| path.exists()) {
        Some(path) => Some((Lora::new(ParamsLora { seed: args.seed, ..ParamsLora::read(path)? })?, path)),
        None => None,
    };
    let build = || tape.build(|| task.build(vb));
    let forward = match &adapters {
        Some((lora, _)) => lora.build(build)?,
        None => build()?,
    };
    let head = |name: &str| task.head().is_some_and(|head| name.starts_with(head));
    let mut before = task.read(&base)?;
    before.tensors.retain(|name, _| !head(name));
    let after = Checkpoint::read(&tuned, &Device::Cpu)?;
    let start = match &adapters {
        None => {
            after.load_into(&vars).map_err(|e| in_file(&tuned, e))?;
            before.tensors
        }
        Some((lora, path)) => {
            let mut parameters = before.clone();
            parameters.tensors.extend(
                after.tensors.iter().filter(|(name, _)| head(name)).map(|(n, t)| (n.clone(), t.clone())),
            );
            let differences = parameters.load_partly(&vars).map_err(|e| in_file(&base, e))?;
            if !differences.missing.is_empty() {
                bail!("{} and {} lack {}", base.display(), tuned.display(), differences.missing.join(", "))
            }
            let start = Checkpoint::from_varmap(lora.varmap())?.tensors;
            let start = start.into_iter().map(|(name, t)| Ok((name, t.copy()?)));
            let start = start.collect::<Result<BTreeMap<_, _>>>()?;
            lora.load(path)?;
            let merged = lora.merged(&before)?;
            for layer in lora.layers() {
                let name = format!("{layer}.weight");
                same(&name, merged.tensors.get(&name), after.tensors.get(&name), [&base, path, &tuned])?;
            }
            join(&vars, lora.varmap())?;
            start
        }
    };
    Ok(Opened {
        title: task.title(),
        vars,
        tape,
        forward,
        adapted: adapters.is_some(),
        head: task.head().map(String::from),
        sides: [all(task.as_ref(), Side::Train)?, all(task.as_ref(), Side::Test)?],
        start,
    })
}

fn in_file(path: &Path, error: candle_core::Error) -> candle_core::Error {
    candle_core::Error::Msg(format!("{}: {}", path.display(), crate::sentence::sentence(&error)))
}

fn all(task: &dyn Task, side: Side) -> Result<(Inputs, Tensor)> {
    task.batch(side, &(0..task.len(side)).collect::<Vec<_>>())
}

/// Fine-tunes by AdamW: the base and what came of it.
fn fine_tuned(
    args: &Args,
    task: &dyn Task,
    base: Option<&Path>,
    device: &Device,
) -> Result<(PathBuf, PathBuf)> {
    let base = match base {
        Some(base) => base.to_path_buf(),
        None => {
            let path = args.out.join("base.safetensors");
            task.train_base(args, &path, &World::alone())?;
            path
        }
    };
    println!();
    train::tune(Choice::Adamw, args, task, Some(&base), (device, &World::alone()))?;
    println!();
    Ok((base, args.out.join("tuned-adamw.safetensors")))
}

/// `adapters-X.safetensors` beside `tuned-X.safetensors`.
fn adapters_beside(tuned: &Path) -> Option<PathBuf> {
    let rest = tuned.file_name()?.to_str()?.strip_prefix("tuned-")?;
    Some(tuned.with_file_name(format!("adapters-{rest}")))
}

/// Refuses a base from which, with its adapters, something else comes than what was written.
fn same(name: &str, made: Option<&Tensor>, written: Option<&Tensor>, files: [&Path; 3]) -> Result<()> {
    let [base, adapters, tuned] = files.map(Path::display);
    let (Some(made), Some(written)) = (made, written) else { bail!("{tuned} or {base} lacks {name}") };
    let wide = |t: &Tensor| t.to_dtype(DType::F64);
    let apart = match made.dims() == written.dims() {
        true => (wide(made)? - wide(written)?)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt(),
        false => f64::INFINITY,
    };
    let size = wide(written)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
    if apart <= 1e-2 * size {
        return Ok(());
    }
    bail!(
        "{name} of {base} with the adapters of {adapters} is not that of {tuned}: --checkpoint has to be the base that was fine-tuned"
    )
}

/// Adds the Vars of `more`.
fn join(vars: &VarMap, more: &VarMap) -> Result<()> {
    match (vars.data().lock(), more.data().lock()) {
        (Ok(mut vars), Ok(more)) => {
            vars.extend(more.iter().map(|(name, var)| (name.clone(), var.clone())));
            Ok(())
        }
        _ => bail!("the table of parameters was left locked by a thread that failed"),
    }
}
