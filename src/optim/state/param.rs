//! Vars that are trained, and Adam's state of those without a block.

use crate::curvature::wide;
use candle_core::{Result, Tensor, Var};

/// A Var that is trained.
#[derive(Debug, Clone)]
pub(crate) struct Param {
    pub name: String,
    /// Whether `name` is the Var's own and not a stand-in; state is saved by name.
    pub named: bool,
    pub var: Var,
    /// The single-precision value of a half-precision Var.
    pub master: Option<Tensor>,
    pub lr_scale: f64,
    pub weight_decay: f64,
    /// Whether it may take no part in a step.
    pub optional: bool,
}

impl Param {
    /// The value in the dtype of the optimizer's state; an alias of the Var's storage, so read it before the next set.
    pub fn value(&self) -> Tensor {
        self.master.clone().unwrap_or_else(|| self.var.as_detached_tensor())
    }

    /// Writes a value that has the state's dtype.
    pub fn write(&mut self, value: &Tensor) -> Result<()> {
        self.show(value)?;
        if self.master.is_some() {
            self.master = Some(value.clone());
        }
        Ok(())
    }

    /// Writes the Var, for a forward pass at other values, and leaves the master alone.
    pub fn show(&self, value: &Tensor) -> Result<()> {
        self.var.set(&value.to_dtype(self.var.dtype())?)
    }

    /// A copy of the value that later writes do not change.
    pub fn snapshot(&self) -> Result<Tensor> {
        self.value().copy()
    }
}

/// A param's single-precision master, where its Var is in half precision.
pub(crate) fn master(var: &Var) -> Result<Option<Tensor>> {
    let value = var.as_detached_tensor();
    if wide(&value)?.dtype() == value.dtype() { Ok(None) } else { Ok(Some(wide(&value)?)) }
}

/// Adam's state for one Var (Kingma & Ba 2015, with the decoupled decay of Loshchilov & Hutter 2019).
#[derive(Debug, Clone)]
pub(crate) struct Adam {
    /// Index of the param.
    pub param: usize,
    pub steps: usize,
    /// Averages of the gradient and of its square, in the Var's shape.
    pub moments: Option<(Tensor, Tensor)>,
}
