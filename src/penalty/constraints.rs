//! What holds for which weights: a table from names to penalties, projections and multipliers.

use super::ball::FeasibleSet;
use super::multiplier::{Bound, Dual, Multiplier, Omega, Report};
use super::{Penalty, Spatial};
use crate::pattern::matches;
use candle_core::{Error, Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::sync::Arc;

/// What holds for the Vars whose names match a pattern.
#[derive(Debug, Clone)]
pub enum Rule {
    /// Nothing, and on purpose.
    Free,
    /// Adds `factor penalty(w)` to the loss.
    Penalize {
        /// The penalty.
        penalty: Arc<dyn Penalty>,
        /// Its factor, zero or more.
        factor: f64,
    },
    /// Adds `factor` times [`Spatial::total`] of all the Vars together to the loss.
    SpatialTotal {
        /// The penalty.
        penalty: Spatial,
        /// Its factor, zero or more.
        factor: f64,
    },
    /// Takes the penalty's proximal step of length `lr factor` after each step.
    Proximal {
        /// The penalty.
        penalty: Arc<dyn Penalty>,
        /// Its factor, zero or more.
        factor: f64,
    },
    /// Moves the weights to the nearest point of a set after each step.
    Project {
        /// The set.
        set: FeasibleSet,
    },
    /// Sets weights to zero after each step, so that what was pruned stays away. Whatever a masked weight was, NaN or an infinity too, it
    /// is 0 then; the others are not looked at.
    Mask {
        /// U8 in the Var's shape: 0 for the weights that are zero, anything else for the others.
        mask: Tensor,
    },
    /// Adds to the loss what keeps `omega(w)` at most at a bound, or equal to it, in the end, with a multiplier for each group.
    Lagrangian {
        /// The function that is bounded.
        omega: Omega,
        /// Its bound, zero or more.
        bound: Bound,
        /// How the multipliers follow.
        dual: Dual,
    },
    /// The same for all the Vars together: their groups of the same index are one group with one multiplier. With [`Grouping::Whole`] there
    /// is one for all weights; with rows, of a layer's weight and bias, one for each unit. All Vars have as many groups, and are on
    /// one device.
    ///
    /// [`Grouping::Whole`]: super::Grouping::Whole
    LagrangianTotal {
        /// The function that is bounded, of the groups that are made of all the Vars.
        omega: Omega,
        /// Its bound, zero or more.
        bound: Bound,
        /// How the multipliers follow.
        dual: Dual,
    },
}

/// Penalties, projections and multipliers for the Vars of a model, beside any [`candle_nn::Optimizer`].
///
/// All rules whose pattern matches a name hold for it (`*` stands for any run of characters, `?` for one), in the order of the table.
/// Add [`Constraints::loss`] to the loss, or, for less work, its gradient to the loss's with [`Constraints::add_gradients`]; and call
/// [`Constraints::after_step`] after the optimizer's step.
///
/// Worked by hand: the least `1/2 [(x - 3)^2 + (y - 4)^2]` with `||(x, y)|| <= 1` lies on the way from the origin to `(3, 4)`, at
/// `(0.6, 0.8)`. There the loss pulls outwards with `(2.4, 3.2)`, of norm 4; the norm's gradient is `(0.6, 0.8)`, so the multiplier
/// is 4: relaxing the bound by a little `d` would lower the loss by `4 d`. Projection and multiplier find the same point:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::nn::{Optimizer, SGD, VarBuilder, VarMap};
/// use kronwake::penalty::{Bound, Constraints, Dual, Grouping, Omega, Rule, FeasibleSet};
///
/// let target = Tensor::new(&[3f64, 4.], &Device::Cpu)?;
/// let dual = Dual::nu_pi(1.0, 0.1, 0.0);
/// let lagrangian = Rule::Lagrangian { omega: Omega::Norm(Grouping::Whole), bound: Bound::AtMost(1.0), dual };
/// for rule in [Rule::Project { set: FeasibleSet::L2 { radius: 1.0 } }, lagrangian] {
///     let varmap = VarMap::new();
///     let w = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu).get(2, "w")?;
///     let mut constraints = Constraints::new(&varmap, &[("w", rule)])?;
///     let mut sgd = SGD::new(varmap.all_vars(), 0.1)?;
///     for _ in 0..1000 {
///         let loss = ((&w - &target)?.sqr()?.sum_all()? * 0.5)?;
///         sgd.backward_step(&(loss + constraints.loss()?)?)?;
///         constraints.after_step(0.1)?;
///     }
///     let found = w.to_vec1::<f64>()?;
///     assert!((found[0] - 0.6).abs() < 1e-6 && (found[1] - 0.8).abs() < 1e-6);
///     for (name, report) in constraints.report()? {
///         assert_eq!(name, "w");
///         assert!((report.alpha[0] - 4.0).abs() < 1e-6);
///     }
/// }
/// # candle_core::Result::Ok(())
/// ```
///
/// Proximal steps and projections are Euclidean whatever the optimizer's metric. An average of points of a convex set is in it; one of
/// points of a sphere is not, nor one from before a mask was set: [`Constraints::let_through`] makes averages meet the rules too.
///
/// **Half precision.** The optimizers of this crate keep an f32 master of each f16 or bf16 Var, from which the next step starts:
/// [`Constraints::after_step`] changes the Var alone, and the next step would undo it. With those call
/// [`NaturalGradient::constrain`](crate::optim::NaturalGradient::constrain) in its place, which projects the masters.
#[derive(Debug, Clone)]
pub struct Constraints {
    entries: Vec<Entry>,
    spatial_totals: Vec<SpatialTotal>,
    lagrangian_totals: Vec<LagrangianTotal>,
}

/// The spatial penalty of several Vars.
#[derive(Debug, Clone)]
struct SpatialTotal {
    penalty: Spatial,
    factor: f64,
    /// Their places among the entries.
    places: Vec<usize>,
}

/// The multipliers of several Vars together.
#[derive(Debug, Clone)]
struct LagrangianTotal {
    /// Of the Vars' names.
    pattern: String,
    multiplier: Multiplier,
    /// Their places among the entries.
    places: Vec<usize>,
}

/// What a step will change: entries' new values, and all their multipliers.
pub(crate) struct Changes {
    pub values: Vec<(Var, Tensor)>,
    multipliers: Vec<Vec<Multiplier>>,
    lagrangian_totals: Vec<Multiplier>,
}

impl Constraints {
    /// The rules for the Vars of `varmap`.
    ///
    /// # Errors
    /// If a Var has no rule ([`Rule::Free`] is one), a pattern matches no Var, a factor, radius or bound is negative, infinite or NaN,
    /// a grouping or a mask does not fit, or a Var that is not of floating point has another rule than [`Rule::Free`].
    pub fn new(varmap: &VarMap, rules: &[(&str, Rule)]) -> Result<Self> {
        let mut vars: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("constraints: the VarMap's lock is poisoned"),
        };
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        for (pattern, _) in rules {
            if !vars.iter().any(|(name, _)| matches(pattern, name)) {
                let names: Vec<&str> = vars.iter().map(|(name, _)| name.as_str()).collect();
                bail!("constraints: {pattern:?} matches no Var; the Vars are {}", names.join(", "))
            }
        }
        let free = |name: &str| !rules.iter().any(|(pattern, _)| matches(pattern, name));
        let without: Vec<&str> =
            vars.iter().map(|(name, _)| name.as_str()).filter(|name| free(name)).collect();
        if !without.is_empty() {
            bail!("constraints: no rule for {}; if none is meant, give them Rule::Free", without.join(", "))
        }
        let mut entries = Vec::with_capacity(vars.len());
        for (name, var) in vars {
            let mut entry = Entry { name, var, rules: vec![], multipliers: vec![] };
            for (pattern, rule) in rules {
                if matches(pattern, &entry.name) {
                    entry.add(rule).map_err(|e| named(&entry.name, e))?;
                }
            }
            entries.push(entry);
        }
        let (mut spatial_totals, mut lagrangian_totals) = (vec![], vec![]);
        for (pattern, rule) in rules {
            let matching = entries.iter().enumerate().filter(|(_, entry)| matches(pattern, &entry.name));
            let places: Vec<usize> = matching.map(|(place, _)| place).collect();
            match rule {
                Rule::SpatialTotal { penalty, factor } => {
                    spatial_totals.push(SpatialTotal { penalty: *penalty, factor: *factor, places });
                }
                Rule::LagrangianTotal { omega, bound, dual } => {
                    let vars: Vec<&Var> = places.iter().map(|&place| &entries[place].var).collect();
                    let multiplier = total(*omega, *bound, *dual, &vars).map_err(|e| named(pattern, e))?;
                    lagrangian_totals.push(LagrangianTotal {
                        pattern: (*pattern).to_string(),
                        multiplier,
                        places,
                    });
                }
                Rule::Free
                | Rule::Penalize { .. }
                | Rule::Proximal { .. }
                | Rule::Project { .. }
                | Rule::Mask { .. }
                | Rule::Lagrangian { .. } => {}
            }
        }
        Ok(Self { entries, spatial_totals, lagrangian_totals })
    }

    /// Proximal steps and projections, in the order of the rules, then a step of the multipliers. `lr` is the learning rate of the
    /// optimizer's step.
    ///
    /// # Errors
    /// If there are proximal steps and `lr` is negative or not finite, a penalty has no proximal step, or weights are NaN or infinite; the
    /// message names the Var, and neither a Var nor a multiplier has changed.
    pub fn after_step(&mut self, lr: f64) -> Result<()> {
        let changes = self.changes(|var| (var.as_detached_tensor(), lr))?;
        for (var, value) in &changes.values {
            var.set(value)?;
        }
        self.adopt(changes);
        Ok(())
    }

    /// Multipliers, excesses, slackness and signs of infeasibility at the Vars' values, by name; those of several rules of a Var one after the
    /// other, and at the end those of [`Rule::LagrangianTotal`] by its pattern.
    ///
    /// # Errors
    /// As for [`Constraints::loss`].
    pub fn report(&self) -> Result<Vec<(&str, Report)>> {
        let mut reports = vec![];
        for entry in &self.entries {
            for multiplier in &entry.multipliers {
                let report = multiplier.report(&entry.var).map_err(|e| named(&entry.name, e))?;
                reports.push((entry.name.as_str(), report));
            }
        }
        for total in &self.lagrangian_totals {
            let report =
                total.multiplier.total_report(&self.weights(&total.places)).map_err(|e| total.named(e))?;
            reports.push((total.pattern.as_str(), report));
        }
        Ok(reports)
    }

    /// What the rules make of other values of the Vars, such as averages of theirs: [`Rule::Mask`] and [`Rule::Project`], in their order. Values
    /// that meet the rules come back as they are; multipliers and the Vars do not change.
    ///
    /// `values` are by the Vars' names and of their shapes, in any floating point dtype, as many of the Vars as there are; what comes back has
    /// their order and dtypes. A [`Rule::Proximal`] takes a step of length zero, which moves nothing but by a penalty that is a set's
    /// indicator: the steps that the Vars have taken have done the shrinking.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kronwake::nn::{VarBuilder, VarMap};
    /// use kronwake::penalty::{Constraints, Grouping, Rule, FeasibleSet};
    ///
    /// let varmap = VarMap::new();
    /// VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu).get(2, "w")?;
    /// let set = FeasibleSet::Sphere { grouping: Grouping::Whole, radius: 1.0 };
    /// let constraints = Constraints::new(&varmap, &[("w", Rule::Project { set })])?;
    /// // The mean of (1, 0) and (0, 1) is not on the circle.
    /// let mean = Tensor::new(&[0.5f64, 0.5], &Device::Cpu)?;
    /// let average = &constraints.let_through(&[("w", &mean)])?[0];
    /// assert!(average.to_vec1::<f64>()?.iter().all(|w| (w - 0.5f64.sqrt()).abs() < 1e-12));
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// If no Var has a name, a shape is not its Var's, or a value that is projected is NaN or infinite; the message names the Var.
    pub fn let_through(&self, values: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
        let each = |(name, value): &(&str, &Tensor)| {
            let Some(entry) = self.entries.iter().find(|entry| entry.name == *name) else {
                bail!("constraints: {name}: no Var has this name")
            };
            let moved = entry.let_through(value).map_err(|e| named(name, e))?;
            Ok(moved.unwrap_or_else(|| (*value).clone()))
        };
        values.iter().map(each).collect()
    }

    /// [`Constraints::let_through`] of one Var's; nothing where the value stays.
    pub(crate) fn let_through_of(&self, var: &Var, value: &Tensor) -> Result<Option<Tensor>> {
        match self.entries.iter().find(|entry| entry.var.id() == var.id()) {
            Some(entry) => entry.let_through(value).map_err(|e| named(&entry.name, e)),
            None => Ok(None),
        }
    }

    /// What [`Constraints::after_step`] is to change, where `at` gives a Var's value and learning rate.
    pub(crate) fn changes(&self, at: impl Fn(&Var) -> (Tensor, f64)) -> Result<Changes> {
        let mut changes = Changes { values: vec![], multipliers: vec![], lagrangian_totals: vec![] };
        let mut values = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let (value, lr) = at(&entry.var);
            let (moved, multipliers) = entry.next(&value, lr).map_err(|e| named(&entry.name, e))?;
            values.push(moved.clone().unwrap_or(value));
            changes.values.extend(moved.map(|moved| (entry.var.clone(), moved)));
            changes.multipliers.push(multipliers);
        }
        for total in &self.lagrangian_totals {
            let weights: Vec<&Tensor> = total.places.iter().map(|&place| &values[place]).collect();
            let mut multiplier = total.multiplier.clone();
            multiplier.total_update(&weights).map_err(|e| total.named(e))?;
            changes.lagrangian_totals.push(multiplier);
        }
        Ok(changes)
    }

    /// Takes over the multipliers of `changes`, whose values have been written.
    pub(crate) fn adopt(&mut self, changes: Changes) {
        for (entry, multipliers) in self.entries.iter_mut().zip(changes.multipliers) {
            entry.multipliers = multipliers;
        }
        for (total, multiplier) in self.lagrangian_totals.iter_mut().zip(changes.lagrangian_totals) {
            total.multiplier = multiplier;
        }
    }

    fn weights(&self, places: &[usize]) -> Vec<&Tensor> {
        places.iter().map(|&place| self.entries[place].var.as_tensor()).collect()
    }
}

impl LagrangianTotal {
    fn named(&self, error: Error) -> Error {
        named(&self.pattern, error)
    }
}

/// The multipliers of several Vars together.
fn total(omega: Omega, bound: Bound, dual: Dual, vars: &[&Var]) -> Result<Multiplier> {
    if let [first, rest @ ..] = vars
        && let Some(other) = rest.iter().find(|var| !var.device().same_device(first.device()))
    {
        bail!(
            "multiplier: expected all Vars on one device, got {:?} and {:?}",
            first.device().location(),
            other.device().location()
        )
    }
    let dims: Vec<&[usize]> = vars.iter().map(|var| var.dims()).collect();
    Multiplier::total(omega, bound, dual, &dims)
}

fn named(name: &str, error: Error) -> Error {
    error.context(format!("constraints: {name}"))
}

mod entry;
mod save;
mod terms;
#[cfg(test)]
mod tests;

use entry::{Entry, check_like};
