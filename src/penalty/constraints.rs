//! What holds for which weights: a table from names to penalties, projections and multipliers.

use super::ball::Set;
use super::multiplier::{Dual, Multiplier, Omega, Report};
use super::{Penalty, Spatial};
use crate::ops::group::check_factor;
use crate::pattern::matches;
use candle_core::{DType, Error, Result, Tensor, Var, bail};
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
    Arrange {
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
        set: Set,
    },
    /// Sets weights to zero after each step, so that what was pruned stays away.
    Mask {
        /// U8 in the Var's shape: 0 for the weights that are zero, anything else for the others.
        mask: Tensor,
    },
    /// Adds to the loss what keeps `omega(w) <= bound` in the end, with a multiplier for each group.
    Multiply {
        /// The function that is bounded.
        omega: Omega,
        /// Its bound, zero or more.
        bound: f64,
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
/// use kronwake::penalty::{Constraints, Dual, Grouping, Omega, Rule, Set};
///
/// let target = Tensor::new(&[3f64, 4.], &Device::Cpu)?;
/// let multiply = Rule::Multiply { omega: Omega::Norm(Grouping::Whole), bound: 1.0, dual: Dual::nu_pi(1.0, 0.1, 0.0) };
/// for rule in [Rule::Project { set: Set::L2 { radius: 1.0 } }, multiply] {
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
/// Proximal steps and projections are Euclidean whatever the optimizer's metric; projections of convex sets leave averages of
/// parameters in the set.
///
/// **Half precision.** The optimizers of this crate keep an f32 master of each f16 or bf16 Var, from which the next step starts:
/// [`Constraints::after_step`] changes the Var alone, and the next step would undo it. With those call
/// [`NaturalGradient::constrain`](crate::optim::NaturalGradient::constrain) in its place, which projects the masters.
#[derive(Debug)]
pub struct Constraints {
    entries: Vec<Entry>,
    arranged: Vec<Arranged>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    var: Var,
    /// All rules of this Var alone but those in `multipliers`.
    rules: Vec<Rule>,
    multipliers: Vec<Multiplier>,
}

/// The spatial penalty of several Vars.
#[derive(Debug)]
struct Arranged {
    penalty: Spatial,
    factor: f64,
    /// Their places among the entries.
    places: Vec<usize>,
}

/// What a step will change: entries' new values, and all their multipliers.
pub(crate) struct Changes {
    pub values: Vec<(Var, Tensor)>,
    multipliers: Vec<Vec<Multiplier>>,
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
        let matching = |pattern: &str| {
            let places = entries.iter().enumerate().filter(|(_, entry)| matches(pattern, &entry.name));
            places.map(|(place, _)| place).collect()
        };
        let arranged = rules.iter().filter_map(|(pattern, rule)| match *rule {
            Rule::Arrange { penalty, factor } => {
                Some(Arranged { penalty, factor, places: matching(pattern) })
            }
            _ => None,
        });
        let arranged = arranged.collect();
        Ok(Self { entries, arranged })
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

    /// Multipliers, excesses and slackness at the Vars' values, by name; those of several rules of a Var one after the other.
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
        Ok(reports)
    }

    /// What [`Constraints::after_step`] is to change, where `at` gives a Var's value and learning rate.
    pub(crate) fn changes(&self, at: impl Fn(&Var) -> (Tensor, f64)) -> Result<Changes> {
        let mut changes = Changes { values: vec![], multipliers: Vec::with_capacity(self.entries.len()) };
        for entry in &self.entries {
            let (value, lr) = at(&entry.var);
            let (moved, multipliers) = entry.next(&value, lr).map_err(|e| named(&entry.name, e))?;
            changes.values.extend(moved.map(|moved| (entry.var.clone(), moved)));
            changes.multipliers.push(multipliers);
        }
        Ok(changes)
    }

    /// Takes over the multipliers of `changes`, whose values have been written.
    pub(crate) fn adopt(&mut self, changes: Changes) {
        for (entry, multipliers) in self.entries.iter_mut().zip(changes.multipliers) {
            entry.multipliers = multipliers;
        }
    }
}

fn named(name: &str, error: Error) -> Error {
    error.context(format!("constraints: {name}"))
}

/// Refuses what a penalty made of weights in another dtype or shape than theirs.
fn check_like(penalty: &dyn Penalty, what: &str, made: &Tensor, weights: &Tensor) -> Result<()> {
    if made.dims() != weights.dims() || made.dtype() != weights.dtype() {
        bail!(
            "{}: expected {what} in {:?} {:?}, got {:?} {:?}",
            penalty.name(),
            weights.dtype(),
            weights.dims(),
            made.dtype(),
            made.dims()
        )
    }
    Ok(())
}

impl Entry {
    fn add(&mut self, rule: &Rule) -> Result<()> {
        if !(self.var.dtype().is_float() || matches!(rule, Rule::Free)) {
            bail!("expected a floating point Var, got {:?}", self.var.dtype())
        }
        match rule {
            Rule::Free => {}
            Rule::Arrange { penalty, factor } => check_factor(&penalty.name(), *factor)?,
            Rule::Penalize { penalty, factor } | Rule::Proximal { penalty, factor } => {
                check_factor(&penalty.name(), *factor)?;
                self.rules.push(rule.clone());
            }
            Rule::Project { set } => {
                set.check_for(self.var.dims())?;
                self.rules.push(rule.clone());
            }
            Rule::Mask { mask } => {
                if mask.dims() != self.var.dims() || mask.dtype() != DType::U8 {
                    bail!(
                        "expected a mask of U8 {:?}, got {:?} {:?}",
                        self.var.dims(),
                        mask.dtype(),
                        mask.dims()
                    )
                }
                // As factors: a product is fast on every device.
                let mask = mask.ne(0u8)?.to_dtype(self.var.dtype())?.to_device(self.var.device())?;
                self.rules.push(Rule::Mask { mask });
            }
            Rule::Multiply { omega, bound, dual } => {
                self.multipliers.push(Multiplier::new(*omega, *bound, *dual, self.var.dims())?);
            }
        }
        Ok(())
    }

    /// The value that the rules make of `value`, if another, and the multipliers there.
    fn next(&self, value: &Tensor, lr: f64) -> Result<(Option<Tensor>, Vec<Multiplier>)> {
        let mut moved: Option<Tensor> = None;
        for rule in &self.rules {
            let now = moved.as_ref().unwrap_or(value);
            let next = match rule {
                Rule::Proximal { penalty, factor } => {
                    if !(lr.is_finite() && lr >= 0.0) {
                        bail!("expected a finite learning rate of zero or more, got {lr}")
                    }
                    let next = penalty.prox(now, lr * factor)?;
                    check_like(penalty.as_ref(), "a proximal step", &next, value)?;
                    // A penalty may give back the weights themselves, which a Var does not take.
                    Some(next.copy()?)
                }
                Rule::Project { set } => set.moved(now)?,
                Rule::Mask { mask } => Some((now * mask.to_dtype(now.dtype())?)?),
                Rule::Free | Rule::Penalize { .. } | Rule::Arrange { .. } | Rule::Multiply { .. } => None,
            };
            moved = next.or(moved);
        }
        let mut multipliers = self.multipliers.clone();
        for multiplier in &mut multipliers {
            multiplier.update(moved.as_ref().unwrap_or(value))?;
        }
        Ok((moved, multipliers))
    }
}

mod save;
mod terms;
#[cfg(test)]
mod tests;
