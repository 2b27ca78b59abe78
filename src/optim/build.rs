//! From Vars and a tape to blocks: which Var is trained how.

use super::block::{Block, BlockState, Param, Part, master, parts};
use super::groups::Rule;
use super::length::Slopes;
use super::natural::Natural;
use super::params::Params;
use super::rest::Adam;
use super::rule::WakeRule;
use crate::curvature::{Beyond, FactorLimit, Runs, Want, WantWeight};
use crate::tape::{Kind, Layer};
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::sync::{Arc, OnceLock};

impl<R: WakeRule> Natural<R> {
    /// An optimizer of every float Var of `varmap`, which also gives their names. Prefer this to `new`: state is saved and
    /// groups are matched by name, and a `Vec<Var>` has none for Vars outside tapped layers.
    pub fn from_varmap(varmap: &VarMap, params: Params<R>) -> Result<Self> {
        let mut vars: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("{}: the VarMap's lock is poisoned", R::NAME),
        };
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        Self::build(vars.into_iter().map(|(name, var)| (Some(name), var)).collect(), params)
    }

    pub(super) fn build(vars: Vec<(Option<String>, Var)>, params: Params<R>) -> Result<Self> {
        params.check()?;
        let layers = params.tape.layers();
        let layer_name = |var: &Var| {
            layers.iter().find_map(|layer| {
                let is = |t: &Tensor| t.id() == var.id();
                (is(&layer.weight).then(|| format!("{}.weight", layer.name)))
                    .or_else(|| layer.bias.as_ref().is_some_and(is).then(|| format!("{}.bias", layer.name)))
            })
        };
        let mut all: Vec<(String, bool, Var)> = vec![];
        for (index, (name, var)) in vars.into_iter().enumerate() {
            if !var.dtype().is_float() || all.iter().any(|(_, _, seen)| seen.id() == var.id()) {
                continue;
            }
            let name = name.or_else(|| layer_name(&var));
            all.push((name.clone().unwrap_or_else(|| format!("var{index}")), name.is_some(), var));
        }
        let names: Vec<&str> = all.iter().map(|(name, _, _)| name.as_str()).collect();
        params.groups.check(&names)?;

        let mut trained = vec![];
        let mut frozen = vec![];
        let mut rules = vec![];
        for (name, named, var) in all {
            let group = params.groups.of(&name);
            if group.is_some_and(|g| g.frozen) {
                frozen.push((name, var));
                continue;
            }
            rules.push(group.and_then(|g| g.rule));
            trained.push(Param {
                master: master(&var)?,
                lr_scale: group.map_or(1.0, |g| g.lr_scale),
                weight_decay: group.and_then(|g| g.weight_decay).unwrap_or(params.weight_decay),
                name,
                named,
                var,
            });
        }
        let given = |index: usize| params.groups.of(&trained[index].name)?.factor_limit;
        let tapped = |i: &usize| matches!(rules[*i], None | Some(Rule::Kronecker));
        let find = |t: &Tensor| (0..trained.len()).filter(tapped).find(|&i| trained[i].var.id() == t.id());
        let mut blocks: Vec<Block> = vec![];
        let mut wants = vec![];
        for layer in &layers {
            let weight = find(&layer.weight);
            let bias = layer.bias.as_ref().and_then(find);
            // A table that is a linear layer's weight too has the block of that use: a sum of Kronecker products is none.
            let multiplies = |l: &Arc<Layer>| l.is_use_of(layer.weight.id(), Kind::Matrix);
            let parts = match layer.kind {
                Kind::Matrix => parts(weight.map(|i| &trained[i]), bias.map(|i| &trained[i]), params.bias),
                Kind::Table if weight.is_some() && !layers.iter().any(multiplies) => vec![Part::Table],
                Kind::Table | Kind::Gain => vec![],
            };
            let first = blocks.len();
            for part in parts {
                let leader = if part == Part::Bias { bias } else { weight };
                let given = leader.and_then(given);
                let limit = given.unwrap_or(params.factor_limit);
                let mut block = block(layer, part, weight, bias, limit, &trained)?;
                let picks = |l: &Arc<Layer>| l.is_use_of(layer.weight.id(), Kind::Table);
                let tied = matches!(part, Part::Folded | Part::Weight) && layers.iter().any(picks);
                if tied && given.is_none() {
                    // The rows are a vocabulary, whose numbers say nothing of what belongs together.
                    let limit = FactorLimit { beyond: Beyond::Diagonal, ..limit };
                    block.rows = Runs::limited(block.rows.dim, limit);
                }
                blocks.push(block);
            }
            let keep = params.ekfac && layer.kind == Kind::Matrix;
            let mut want = Want { weight: None, bias: None, keep };
            for block in &blocks[first..] {
                let (a, g) = (block.columns, block.rows);
                match block.part {
                    Part::Bias => want.bias = Some(g),
                    Part::Table => want.weight = Some(WantWeight { folded: false, a: g, g: a }),
                    part => want.weight = Some(WantWeight { folded: part == Part::Folded, a, g }),
                }
            }
            wants.push((blocks.len() > first).then_some(want));
        }
        for (index, param) in trained.iter().enumerate() {
            if rules[index] == Some(Rule::GradientFactors) {
                if params.ekfac {
                    bail!("{}: ekfac needs records, and {} has gradient-only factors", R::NAME, param.name)
                }
                let limit = given(index).unwrap_or(params.factor_limit);
                blocks.push(gradient_block(R::NAME, param, index, limit)?);
            }
            if rules[index] == Some(Rule::Kronecker) && !blocks.iter().any(|b| b.params.contains(&index)) {
                bail!(
                    "{}: group asks for a Kronecker block, but {} belongs to no tapped layer; \
                     Rule::GradientFactors needs none",
                    R::NAME,
                    param.name
                )
            }
        }
        let rest = (0..trained.len())
            .filter(|i| !blocks.iter().any(|b| b.params.contains(i)))
            .map(|param| Adam { param, steps: 0, moments: None })
            .collect();
        let rest_ratio = if params.lr > 0.0 { params.rest.lr / params.lr } else { 1.0 };
        let built = Self {
            damping: params.damping.initial(),
            params,
            vars: trained,
            frozen,
            blocks,
            rest,
            layers,
            wants,
            steps: 0,
            skipped: 0,
            previous_rate: None,
            rest_ratio,
            observed: None,
            accumulated: None,
            predicted: None,
            slopes: Slopes::default(),
            averages: vec![],
            models: vec![],
            ahead: None,
            beside: OnceLock::new(),
            device: None,
            captured: false,
            keep_inverses: false,
            moves: 0,
            closure_checked: false,
        };
        built.check_low_rank()?;
        built.check_memory()?;
        Ok(built)
    }
}

impl<R: WakeRule> Natural<R> {
    /// Refuses an EKFAC correction of eigenvectors that a factor of low rank does not have.
    fn check_low_rank(&self) -> Result<()> {
        let corrected = |block: &&Block| self.params.ekfac && block.part != Part::Table;
        if let Some(block) = self.blocks.iter().filter(corrected).find(|block| block.is_low_rank()) {
            let name = block.params.first().map_or(&block.name, |&index| &self.vars[index].name);
            bail!(
                "{}: ekfac needs all eigenvectors, and {name} has factors of low rank; Beyond::BlockDiagonal and \
                 Beyond::Diagonal have them",
                R::NAME
            )
        }
        Ok(())
    }
}

/// The block of a weight whose layer records nothing.
fn gradient_block(optimizer: &str, param: &Param, index: usize, limit: FactorLimit) -> Result<Block> {
    let (rows, columns) = match param.var.dims() {
        [out, columns @ ..] if !columns.is_empty() && param.var.elem_count() > 0 => {
            (*out, columns.iter().product())
        }
        dims => bail!(
            "{optimizer}: gradient-only factors need a weight of two or more dimensions, and {} is {dims:?}",
            param.name
        ),
    };
    Ok(Block {
        name: param.name.strip_suffix(".weight").unwrap_or(&param.name).to_string(),
        layer: None,
        part: Part::Gradient,
        groups: 1,
        rows: Runs::limited(rows, limit),
        columns: Runs::limited(columns, limit),
        params: vec![index],
        lr_scale: param.lr_scale,
        state: BlockState::default(),
    })
}

/// One block of a layer.
fn block(
    layer: &Layer,
    part: Part,
    weight: Option<usize>,
    bias: Option<usize>,
    limit: FactorLimit,
    params: &[Param],
) -> Result<Block> {
    let (out, columns, groups) = (layer.out_features(), layer.in_features(), layer.groups.max(1));
    let base = match weight {
        Some(w) => params[w].name.strip_suffix(".weight").unwrap_or(&params[w].name).to_string(),
        None => layer.name.clone(),
    };
    let (indices, name, groups, columns) = match part {
        Part::Folded => (vec![weight, bias], base, groups, columns + 1),
        Part::Weight if layer.bias.is_none() => (vec![weight], base, groups, columns),
        Part::Weight => (vec![weight], format!("{base}.weight"), groups, columns),
        Part::Bias => (vec![bias], format!("{base}.bias"), 1, 1),
        Part::Table => (vec![weight], base, 1, out),
        Part::Gradient => bail!("{base}: the block of a layer is made of its records"),
    };
    let rows = match part {
        // A pass picks one at a time.
        Part::Table => Runs::diagonal(layer.weight.dims().first().copied().unwrap_or(0)),
        _ => Runs::limited(out / groups, limit),
    };
    let indices: Vec<usize> = indices.into_iter().flatten().collect();
    let lr_scale = indices.first().map_or(1.0, |&i| params[i].lr_scale);
    let state = BlockState::default();
    Ok(Block {
        name,
        layer: Some(layer.index),
        part,
        groups,
        rows,
        columns: Runs::limited(columns, limit),
        params: indices,
        lr_scale,
        state,
    })
}
