//! What a file of optimizer state holds, read and checked.

use super::block::{Block, BlockState};
use super::save::{KEY, slot};
use crate::checkpoint::Checkpoint;
use crate::curvature::{FactorShape, Preconditioner};
use crate::linalg::sketch::diagonal_of;
use crate::optim::numbers::sum;
use candle_core::{DType, Result, Tensor, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

/// What [`NaturalGradient::resume_partly`](crate::optim::NaturalGradient::resume_partly) has not found, and not taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resumed {
    /// Names of the Vars and of the Kronecker blocks that the file says nothing of: the Vars' values stay, the blocks' state begins anew.
    pub fresh: Vec<String>,
    /// Names of the tensors of the file that nothing takes.
    pub unused: Vec<String>,
}

/// Reads the numbers of a file's metadata.
pub(super) struct Numbers<'a> {
    pub path: &'a Path,
    pub values: BTreeMap<&'a str, &'a str>,
}

impl Numbers<'_> {
    pub fn optional<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.values.get(name) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => {
                bail!("{}: metadata {KEY}: {name} is {text:?}, expected a number", self.path.display())
            }
        }
    }

    pub fn needed<T: FromStr>(&self, name: &str) -> Result<T> {
        match self.optional(name)? {
            Some(value) => Ok(value),
            None => bail!("{}: metadata {KEY}: {name} is missing", self.path.display()),
        }
    }
}

/// What an optimizer cannot go on without, beside the factors.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub wake: bool,
    pub step: bool,
}

/// Looks tensors of a file up, and notes all that is wrong, to be said at once.
pub(super) struct StateReader<'a> {
    file: &'a Checkpoint,
    /// Whether Vars and blocks that the file does not know are in order, as are tensors that nothing takes.
    pub partly: bool,
    pub wrong: Vec<String>,
    used: BTreeSet<String>,
    fresh: Vec<String>,
}

impl<'a> StateReader<'a> {
    pub fn new(file: &'a Checkpoint, partly: bool) -> Self {
        Self { file, partly, wrong: vec![], used: BTreeSet::new(), fresh: vec![] }
    }

    /// Whether a Var is to be read, which in part it is only where it is there.
    pub fn knows(&mut self, name: &str) -> bool {
        self.note(name, self.file.tensors.contains_key(name))
    }

    /// The same of a block's state.
    pub fn knows_state_of(&mut self, block: &str) -> bool {
        let prefix = slot(block, "");
        self.note(block, self.file.tensors.keys().any(|name| name.starts_with(&prefix)))
    }

    fn note(&mut self, name: &str, there: bool) -> bool {
        if self.partly && !there {
            self.fresh.push(name.to_string());
        }
        !self.partly || there
    }

    pub fn tensor(&mut self, name: &str, dims: &[usize], dtype: DType, needed: bool) -> Option<Tensor> {
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

    pub fn block(&mut self, block: &Block, dtype: DType, started: bool, needs: Needs) -> BlockState {
        let name = |part: &str| slot(&block.name, part);
        let (square_a, square_g) = (block.columns.dims(block.groups), block.rows.dims(block.groups));
        let (matrix, inside) = (block.shape(), block.inside());
        let preconditioner = self.inverse(block, dtype, "");
        let mut get = |part: &str, dims: &[usize], needed| self.tensor(&name(part), dims, dtype, needed);
        let factor_a = get("factor_a", &square_a, started);
        let factor_g = get("factor_g", &square_g, started);
        let state = BlockState {
            inputs: get("inputs", &[block.groups, 2, block.columns.dim], false),
            damping_inputs: get("damping_inputs", &[block.groups, 2, block.columns.dim], false),
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

    /// A block's inverse, whose parts' names begin with `prefix`.
    pub fn inverse(&mut self, block: &Block, dtype: DType, prefix: &str) -> Option<Preconditioner> {
        let name = |part: &str| slot(&block.name, &format!("{prefix}{part}"));
        let (square_a, square_g) = (block.columns.dims(block.groups), block.rows.dims(block.groups));
        // Of low rank, an exact solve has other vectors, and its next inverse may be of another kind.
        let scale = self.file.tensors.get(&name("scale")).map(Tensor::dims);
        let exact = block.is_low_rank() && scale == Some(&block.scale(true));
        let bases = [block.columns, block.rows].map(|side| side.basis(block.groups, exact));
        let mut get = |part: &str, dims: &[usize], needed| self.tensor(&name(part), dims, dtype, needed);
        let inverse = get("inv_a", &square_a, false).zip(get("inv_g", &square_g, false));
        let basis = get("basis_a", &bases[0], false).zip(get("basis_g", &bases[1], false));
        let scale = get("scale", &block.scale(exact), false);
        let mut root = |part, side: FactorShape| match exact && side.has_root() {
            true => get(part, &side.dims(block.groups), true),
            false => None,
        };
        let (root_a, root_g) = (root("root_a", block.columns), root("root_g", block.rows));
        match (inverse, basis.zip(scale)) {
            (Some((inv_a, inv_g)), None) => Some(Preconditioner::Factors { inv_a, inv_g }),
            (None, Some(((basis_a, basis_g), scale))) => Some(match block.is_low_rank() {
                true => Preconditioner::LowRank { basis_a, basis_g, scale, root_a, root_g },
                false => Preconditioner::Basis { basis_a, basis_g, scale },
            }),
            _ => None,
        }
    }

    /// What was not found and not taken.
    ///
    /// # Errors
    /// When something is wrong.
    pub fn finish(mut self, path: &Path) -> Result<Resumed> {
        let unused: Vec<String> =
            self.file.tensors.keys().filter(|name| !self.used.contains(*name)).cloned().collect();
        if !self.partly {
            self.wrong.extend(unused.iter().map(|name| format!("unexpected {name}")));
        }
        if !self.wrong.is_empty() {
            bail!("{}: does not fit this optimizer and model: {}", path.display(), self.wrong.join("; "))
        }
        let mut fresh = self.fresh;
        fresh.sort();
        fresh.dedup();
        Ok(Resumed { fresh, unused })
    }
}

/// A sum of outer products has no negative diagonal element.
fn non_negative_diagonal(factor: &Tensor) -> bool {
    let smallest =
        || -> Result<f64> { diagonal_of(factor)?.flatten_all()?.min(0)?.to_dtype(DType::F64)?.to_scalar() };
    smallest().is_ok_and(|smallest| smallest >= 0.0)
}
