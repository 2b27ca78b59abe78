//! From Vars and a tape to blocks: which Var is trained how.

use super::NaturalGradient;
use crate::curvature::{Beyond, FactorLimit, FactorShape, Sharing, Want, WantWeight};
use crate::optim::cost::{Costs, Planned};
use crate::optim::groups::UpdateRule;
use crate::optim::params::{Bias, Params};
use crate::optim::state::block::{Block, BlockState, Part};
use crate::optim::state::param::{Adam, Param, master};
use crate::optim::state::pending::Workplace;
use crate::optim::state::{AdamRate, Core, Slopes};
use crate::optim::summary::{check_memory, free_memory};
use crate::tape::{Kind, Layer};
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::sync::Arc;

/// A Var with its name, and whether that is its own and not a stand-in.
struct Named {
    name: String,
    own: bool,
    var: Var,
}

/// The Vars that are trained, each with the rule that its group asks for.
struct Trained<'a> {
    options: &'a Params,
    /// Uses of layers' weights with other biases than the layers'.
    other_biases: Vec<Arc<Layer>>,
    params: Vec<Param>,
    rules: Vec<Option<UpdateRule>>,
}

impl NaturalGradient {
    /// Makes an optimizer of every float Var of `varmap`, which also gives their names. Prefer this to `new`: state is saved and groups are
    /// matched by name, and in a `Vec<Var>` only those of tapped layers have one.
    ///
    /// # Errors
    /// - When an option is senseless, or a group matches no Var.
    /// - When no Var gets a Kronecker block, unless a group asks for [`UpdateRule::Adam`]: most likely the model was not built inside
    ///   [`Tape::build`](crate::tape::Tape::build).
    /// - When state and work space take more memory than they may.
    pub fn from_varmap(varmap: &VarMap, params: Params) -> Result<Self> {
        let mut vars: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("{}: the VarMap's lock is poisoned", params.wake.name()),
        };
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        Self::build(vars.into_iter().map(|(name, var)| (Some(name), var)).collect(), params)
    }

    pub(super) fn build(vars: Vec<(Option<String>, Var)>, params: Params) -> Result<Self> {
        params.check()?;
        let layers = params.tape.layers();
        let all = named(vars, &layers);
        let names: Vec<&str> = all.iter().map(|named| named.name.as_str()).collect();
        params.groups.check(&names)?;

        let (trained, frozen) = divided(all, &params)?;
        let mut planned: Vec<Planned> = vec![];
        for layer in &layers {
            planned.extend(trained.layer_blocks(layer, &layers)?);
        }
        planned.extend(trained.gradient_blocks()?);
        Costs::new(&params, &trained.params).choose(&mut planned);
        let blocks: Vec<Block> = planned.into_iter().map(|one| one.block).collect();
        trained.check_blocks(&blocks)?;
        let adam = (0..trained.params.len())
            .filter(|index| !blocks.iter().any(|block| block.params.contains(index)))
            .map(|param| Adam { param, steps: 0, moments: None })
            .collect();
        let vars = trained.params;
        let told = vec![false; vars.len()];
        let core = Core {
            damping: params.damping.initial(),
            adam_rate: AdamRate::of(&params),
            params,
            vars,
            frozen,
            blocks,
            adam,
            steps: 0,
            skipped: 0,
            previous_rate: None,
            slopes: Slopes::default(),
            predicted: None,
            averages: vec![],
            models: vec![],
            pending: None,
            closure_checked: false,
            ownership: None,
        };
        check_memory(&core, free_memory(&core)?)?;
        let wants = wants(&core, &layers);
        Ok(Self {
            core,
            layers,
            wants,
            observed: None,
            accumulated: None,
            shared: None,
            workplace: Workplace::default(),
            device: None,
            told,
            captured: false,
            keep_inverses: false,
            moves: 0,
        })
    }
}

/// The float Vars, each once; those without a name have that of their layer, or a stand-in.
fn named(vars: Vec<(Option<String>, Var)>, layers: &[Arc<Layer>]) -> Vec<Named> {
    let layer_name = |var: &Var| {
        layers.iter().find_map(|layer| {
            let is = |t: &Tensor| t.id() == var.id();
            (is(&layer.weight).then(|| format!("{}.weight", layer.name)))
                .or_else(|| layer.bias.as_ref().is_some_and(is).then(|| format!("{}.bias", layer.name)))
        })
    };
    let mut all: Vec<Named> = vec![];
    for (index, (name, var)) in vars.into_iter().enumerate() {
        if !var.dtype().is_float() || all.iter().any(|seen| seen.var.id() == var.id()) {
            continue;
        }
        let name = name.or_else(|| layer_name(&var));
        let own = name.is_some();
        all.push(Named { name: name.unwrap_or_else(|| format!("var{index}")), own, var });
    }
    all
}

/// Those that are trained, and those that are frozen.
fn divided(all: Vec<Named>, options: &Params) -> Result<(Trained<'_>, Vec<(String, Var)>)> {
    let (mut params, mut rules, mut frozen) = (vec![], vec![], vec![]);
    for Named { name, own, var } in all {
        let group = options.groups.of(&name);
        if group.is_some_and(|g| g.frozen) {
            frozen.push((name, var));
            continue;
        }
        rules.push(group.and_then(|g| g.rule));
        params.push(Param {
            master: master(&var)?,
            lr_scale: group.map_or(1.0, |g| g.lr_scale),
            weight_decay: group.and_then(|g| g.weight_decay).unwrap_or(options.weight_decay),
            optional: group.is_some_and(|g| g.optional),
            name,
            named: own,
            var,
        });
    }
    options.check_devices(&params)?;
    if options.overlap > 0
        && let Some(param) = params.iter().find(|param| param.optional)
    {
        bail!(
            "{}: {} may sit out steps (Group {{ optional: true, .. }}), and inverses that are made beside the steps are those of all \
             blocks; expected overlap 0, got {}",
            options.wake.name(),
            param.name,
            options.overlap
        )
    }
    Ok((Trained { options, other_biases: options.tape.other_biases(), params, rules }, frozen))
}

impl NaturalGradient {
    /// Finds out anew what records are wanted for, where factors have other shapes than before.
    pub(super) fn want_again(&mut self) {
        self.wants = wants(&self.core, &self.layers);
    }
}

/// What each layer's records are wanted for.
fn wants(core: &Core, layers: &[Arc<Layer>]) -> Vec<Option<Want>> {
    layers.iter().map(|layer| want(core, layer)).collect()
}

fn want(core: &Core, layer: &Layer) -> Option<Want> {
    let blocks = || core.blocks.iter().filter(|block| block.layer == Some(layer.index));
    let of_bias = layer.bias.as_ref().map(Tensor::id);
    let keep = core.params.ekfac && layer.kind.is_linear();
    let optional = blocks().any(|block| core.is_optional(block));
    let mut want = Want { weight: None, bias: None, of_bias, keep, optional };
    for block in blocks() {
        let (a, g) = (block.columns, block.rows);
        match block.part {
            Part::Bias => want.bias = Some(g),
            Part::Table => want.weight = Some(WantWeight { folded: false, a: g, g: a }),
            Part::Folded => want.weight = Some(WantWeight { folded: true, a, g }),
            Part::Weight | Part::Gradient => want.weight = Some(WantWeight { folded: false, a, g }),
        }
    }
    blocks().next().is_some().then_some(want)
}

impl Trained<'_> {
    /// The param that is a layer's tensor, where its rule lets a layer make its block.
    fn find(&self, tensor: &Tensor) -> Option<usize> {
        let tapped = |&i: &usize| match self.rules[i] {
            None | Some(UpdateRule::Kronecker) => true,
            Some(UpdateRule::GradientFactors | UpdateRule::Adam) => false,
        };
        (0..self.params.len()).filter(tapped).find(|&i| self.params[i].var.id() == tensor.id())
    }

    /// Whether an embedding's table has a block: with orthogonal directions only where a group asks for one.
    fn is_block(&self, index: usize) -> bool {
        self.options.orthogonal.is_none() || self.rules[index] == Some(UpdateRule::Kronecker)
    }

    /// The factor limit that a param's group gives.
    fn given_limit(&self, index: usize) -> Option<FactorLimit> {
        self.options.groups.of(&self.params[index].name)?.factor_limit
    }

    fn layer_blocks(&self, layer: &Layer, layers: &[Arc<Layer>]) -> Result<Vec<Planned>> {
        let weight = self.find(&layer.weight);
        let bias = layer.bias.as_ref().and_then(|bias| self.find(bias));
        let used_as = |kind| layers.iter().any(|other| other.is_use_of(layer.weight.id(), kind));
        let parts = match layer.kind {
            Kind::Linear => {
                let of = |index: Option<usize>| index.map(|index| &self.params[index]);
                parts(of(weight), of(bias), self.biases_of(layer)?)
            }
            // A table that is a linear layer's weight too has the block of that use: a sum of Kronecker products is none.
            Kind::Embedding if weight.is_some_and(|w| self.is_block(w)) && !used_as(Kind::Linear) => {
                vec![Part::Table]
            }
            Kind::Embedding | Kind::Norm => vec![],
        };
        let mut blocks = Vec::with_capacity(parts.len());
        for part in parts {
            let leader = if part == Part::Bias { bias } else { weight };
            let given = leader.and_then(|index| self.given_limit(index));
            let limit = given.unwrap_or(self.options.factor_limit);
            let mut block = self.layer_block(layer, part, weight, bias, limit)?;
            let all_vectors = self.options.ekfac && part != Part::Table;
            let lesser = if all_vectors { Beyond::BlockDiagonal } else { Planned::LESSER };
            let mut by_cost = [Planned::by_cost(limit, lesser); 2];
            if part == Part::Table {
                by_cost[0] = None;
            }
            let tied = matches!(part, Part::Folded | Part::Weight) && used_as(Kind::Embedding);
            if tied && given.is_none() {
                // The rows are a vocabulary, whose numbers say nothing of what belongs together.
                by_cost[0] = Planned::by_cost(limit, Beyond::Diagonal);
                if by_cost[0].is_none() {
                    let limit = FactorLimit { beyond: Beyond::Diagonal, ..limit };
                    block.rows = FactorShape::limited(block.rows.dim, limit);
                }
            }
            blocks.push(Planned { block, by_cost });
        }
        Ok(blocks)
    }

    /// Whether a layer's bias is folded into its weight's block. It is not where the weight is also used without it.
    fn biases_of(&self, layer: &Layer) -> Result<Bias> {
        if !self.other_biases.iter().any(|other| other.index == layer.index) {
            return Ok(self.options.bias);
        }
        match self.options.sharing {
            Sharing::Expand => Ok(Bias::Split),
            Sharing::Reduce => bail!(
                "{}: layer {} uses its weight with several biases or without one, whose gradients Sharing::Reduce sums as one; \
                 Sharing::Expand does not",
                self.options.wake.name(),
                layer.name
            ),
        }
    }

    /// One block of a layer.
    fn layer_block(
        &self,
        layer: &Layer,
        part: Part,
        weight: Option<usize>,
        bias: Option<usize>,
        limit: FactorLimit,
    ) -> Result<Block> {
        let (out, columns, groups) = (layer.out_features(), layer.in_features(), layer.groups.max(1));
        let base = match weight {
            Some(w) => base_name(&self.params[w].name).to_string(),
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
            Part::Table => FactorShape::diagonal(layer.weight.dims().first().copied().unwrap_or(0)),
            Part::Folded | Part::Weight | Part::Bias | Part::Gradient => {
                FactorShape::limited(out / groups, limit)
            }
        };
        let indices: Vec<usize> = indices.into_iter().flatten().collect();
        Ok(Block {
            name,
            layer: Some(layer.index),
            part,
            groups,
            rows,
            columns: FactorShape::limited(columns, limit),
            lr_scale: indices.first().map_or(1.0, |&i| self.params[i].lr_scale),
            params: indices,
            state: BlockState::default(),
        })
    }

    /// The blocks of weights whose layers record nothing.
    fn gradient_blocks(&self) -> Result<Vec<Planned>> {
        let optimizer = self.options.wake.name();
        let mut blocks = vec![];
        for (index, param) in self.params.iter().enumerate() {
            if self.rules[index] != Some(UpdateRule::GradientFactors) {
                continue;
            }
            if self.options.ekfac {
                bail!("{optimizer}: ekfac needs records, and {} has gradient-only factors", param.name)
            }
            let (rows, columns) = match param.var.dims() {
                [out, columns @ ..] if !columns.is_empty() && param.var.elem_count() > 0 => {
                    (*out, columns.iter().product())
                }
                dims => bail!(
                    "{optimizer}: gradient-only factors need a weight of two or more dimensions, and {} is {dims:?}",
                    param.name
                ),
            };
            let limit = self.given_limit(index).unwrap_or(self.options.factor_limit);
            let block = Block {
                name: base_name(&param.name).to_string(),
                layer: None,
                part: Part::Gradient,
                groups: 1,
                rows: FactorShape::limited(rows, limit),
                columns: FactorShape::limited(columns, limit),
                params: vec![index],
                lr_scale: param.lr_scale,
                state: BlockState::default(),
            };
            let by_cost = Planned::by_cost(limit, Planned::LESSER);
            blocks.push(Planned { block, by_cost: [by_cost; 2] });
        }
        Ok(blocks)
    }

    /// Refuses blocks that are not what was asked for.
    fn check_blocks(&self, blocks: &[Block]) -> Result<()> {
        let name = self.options.wake.name();
        let in_a_block = |index: usize| blocks.iter().any(|b| b.params.contains(&index));
        let asked = |index: &usize| self.rules[*index] == Some(UpdateRule::Kronecker) && !in_a_block(*index);
        if let Some(index) = (0..self.params.len()).find(asked) {
            bail!(
                "{name}: group asks for a Kronecker block, but {} belongs to no tapped layer; \
                 UpdateRule::GradientFactors needs none",
                self.params[index].name
            )
        }
        let adam = |rule: &Option<UpdateRule>| *rule == Some(UpdateRule::Adam);
        if blocks.is_empty() && !self.params.is_empty() && !self.rules.iter().any(adam) {
            bail!(
                "{name}: no Var has a Kronecker block, so that all {} would be left to Adam. Build the model inside \
                 tape.build(|| ..), of kronwake::nn's layers, with the tape of the options; or ask for \
                 UpdateRule::GradientFactors or UpdateRule::Adam by a Group",
                self.params.len()
            )
        }
        let corrected = |block: &&Block| self.options.ekfac && block.part != Part::Table;
        if let Some(block) = blocks.iter().filter(corrected).find(|block| block.is_low_rank()) {
            let of = block.params.first().map_or(&block.name, |&index| &self.params[index].name);
            bail!(
                "{name}: ekfac needs all eigenvectors, and {of} has factors of low rank; Beyond::BlockDiagonal and \
                 Beyond::Diagonal have them"
            )
        }
        Ok(())
    }
}

/// A weight's name without `.weight`.
fn base_name(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// How a layer's trained params divide into blocks: one, unless the bias is to be (or has to be) apart.
fn parts(weight: Option<&Param>, bias: Option<&Param>, wanted: Bias) -> Vec<Part> {
    match (weight, bias) {
        (Some(w), Some(b)) if wanted == Bias::Folded && w.lr_scale == b.lr_scale => vec![Part::Folded],
        (Some(_), Some(_)) => vec![Part::Weight, Part::Bias],
        (Some(_), None) => vec![Part::Weight],
        (None, Some(_)) => vec![Part::Bias],
        (None, None) => vec![],
    }
}
