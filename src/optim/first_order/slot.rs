//! A parameter with its state.

use super::update::Update;
use crate::optim::{Group, Groups, UpdateRule};
use candle_core::{DType, Result, Tensor, Var, bail};

/// What a parameter gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// The optimizer's own rule.
    Own,
    /// AdamW, within an optimizer of matrices.
    Adam,
    /// Nothing.
    Frozen,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub name: String,
    pub var: Var,
    pub way: Way,
    pub lr_scale: f64,
    /// In place of the optimizer's.
    pub weight_decay: Option<f64>,
    /// The value in f32, of a parameter in f16 or bf16.
    pub wide: Option<Tensor>,
    /// What a file calls the tensors of `state`.
    pub keys: Vec<&'static str>,
    pub state: Vec<Tensor>,
}

impl Slot {
    pub fn new<P: Update>(params: &P, name: String, var: Var, groups: &Groups) -> Result<Self> {
        let group = groups.of(&name).cloned().unwrap_or_else(|| Group::named("*"));
        let way = way(params, &var, &group)?;
        let wide = match var.dtype() {
            DType::F32 | DType::F64 => None,
            DType::F16 | DType::BF16 if way == Way::Frozen => None,
            DType::F16 | DType::BF16 => Some(var.as_detached_tensor().to_dtype(DType::F32)?),
            other => bail!("{name}: expected a parameter of f64, f32, f16 or bf16, got {other:?}"),
        };
        let (lr_scale, weight_decay) = (group.lr_scale, group.weight_decay);
        let mut slot = Self { name, var, way, lr_scale, weight_decay, wide, keys: vec![], state: vec![] };
        (slot.keys, slot.state) = slot.fresh_state(params)?;
        Ok(slot)
    }

    /// The state before the first step, with what a file calls its tensors.
    pub fn fresh_state<P: Update>(&self, params: &P) -> Result<(Vec<&'static str>, Vec<Tensor>)> {
        let value = self.wide.as_ref().unwrap_or(self.var.as_tensor());
        let state = match (self.way, params.adam()) {
            (Way::Frozen, _) => vec![],
            (Way::Adam, Some(adam)) => adam.state(value)?,
            _ => params.state(value)?,
        };
        Ok(state.into_iter().unzip())
    }

    /// The parameter as the state has it.
    pub fn value(&self) -> Result<Tensor> {
        let value = self.var.as_detached_tensor();
        match &self.wide {
            None => Ok(value),
            // What is rounded is the parameter, but where something else has set it since.
            Some(wide) => {
                wide.to_dtype(value.dtype())?.eq(&value)?.where_cond(wide, &value.to_dtype(DType::F32)?)
            }
        }
    }

    pub fn set(&mut self, value: Tensor, state: Vec<Tensor>) -> Result<()> {
        self.var.set(&value.to_dtype(self.var.dtype())?)?;
        self.state = state;
        if self.wide.is_some() {
            self.wide = Some(value);
        }
        Ok(())
    }
}

/// What a parameter gets by its shape and its group, which may ask for what the optimizer does not have.
fn way<P: Update>(params: &P, var: &Var, group: &Group) -> Result<Way> {
    let (pattern, name) = (&group.pattern, P::NAME);
    if group.optional {
        bail!(
            "group {pattern:?}: optional is for NaturalGradient; every Var takes part in each step of {name}"
        )
    }
    if group.factor_limit.is_some() {
        bail!(
            "group {pattern:?}: factor_limit is for NaturalGradient; soap and shampoo have max_dim in its place"
        )
    }
    match (group.rule, params.adam()) {
        (Some(rule @ (UpdateRule::Kronecker | UpdateRule::GradientFactors)), _) => {
            bail!("group {pattern:?}: the rule {rule:?} is for NaturalGradient, not for {name}")
        }
        (Some(UpdateRule::Adam), None) => {
            bail!("group {pattern:?}: {name} has no Adam beside it; use adamw, muon, soap or shampoo")
        }
        _ => {}
    }
    if group.frozen {
        return Ok(Way::Frozen);
    }
    let matrix = var.rank() >= 2 && var.elem_count() > 0;
    let adam = group.rule == Some(UpdateRule::Adam) || !matrix;
    Ok(if params.for_matrices() && adam { Way::Adam } else { Way::Own })
}
