//! Groups of Vars by name: rates, decay, freezing and rules.

use crate::curvature::FactorLimit;
use crate::pattern::matches;
use candle_core::{Result, bail};

/// Which update a Var gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateRule {
    /// Its layer's Kronecker block; the default of tapped linear layers, convolutions and embeddings.
    Kronecker,
    /// A Kronecker block from its own gradient alone, for layers that are not tapped, as in models of plain candle_nn. The weight has two or
    /// more dimensions, `[out, ..]`.
    ///
    /// The factors are averages of `M M^T` and `M^T M`, with `M` the gradient `[out, columns]` of a mean loss, scaled such that their product
    /// estimates the Fisher matrix (Gupta, Koren & Singer 2018; Morwani et al. 2024). With
    /// [`Fisher::Sampled`](crate::tape::Fisher::Sampled) the labels of that loss are drawn, which takes a backward pass a draw. Otherwise it
    /// is the loss of the step, whose mean gradient then counts as curvature.
    ///
    /// The gradient of a batch is one draw, of low rank; a tapped layer has one draw for each example. So average over more steps, with a
    /// `stat_decay` of 0.95. K-FAC and SO train with them by a learning rate and a KL clip. KLD-WRM, whose steps find their own length, trains with
    /// them too, worse than with those of tapped layers: `benches/results/finetune.md`.
    GradientFactors,
    /// Adam, see [`super::Params::fallback_adam`]; the default of everything else.
    Adam,
}

/// What holds for the Vars whose name matches `pattern`.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// A name in which `*` stands for any run of characters and `?` for any one: `encoder.*.bias`.
    pub pattern: String,
    /// Multiplies the learning rate; 1 by default.
    pub lr_scale: f64,
    /// Replaces the weight decay.
    pub weight_decay: Option<f64>,
    /// Frozen Vars are not updated and may lack a gradient.
    pub frozen: bool,
    /// Whether Vars may take no part in a step: experts without a token, skipped layers, heads by turns; not by default.
    ///
    /// Where such a Var has no gradient, it sits the step out with its Kronecker block: no decay, no wake, no average, no statistics. Other
    /// blocks are not concerned. What sits out is said once, by a `tracing` event. A block whose curvature has never been seen sits out
    /// until it is seen. Does not go with [`super::Params::overlap`]. On a GPU such an optimizer takes the host's path.
    pub optional: bool,
    /// Replaces the update that the Vars get by default.
    pub rule: Option<UpdateRule>,
    /// Replaces [`super::Params::factor_limit`]; a folded bias follows its weight.
    pub factor_limit: Option<FactorLimit>,
}

impl Group {
    /// A group that changes nothing yet: `Group { frozen: true, ..Group::named("conv*") }`.
    pub fn named(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            lr_scale: 1.0,
            weight_decay: None,
            frozen: false,
            optional: false,
            rule: None,
            factor_limit: None,
        }
    }
}

/// An ordered list of groups; of several that match a name, the last one alone holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Groups(pub Vec<Group>);

impl Groups {
    /// The group that holds for `name`, if any matches.
    pub fn of(&self, name: &str) -> Option<&Group> {
        self.0.iter().rev().find(|g| matches(&g.pattern, name))
    }

    /// Refuses senseless values, and patterns that match none of `names`: most likely misspelt.
    pub(crate) fn check(&self, names: &[&str]) -> Result<()> {
        for group in &self.0 {
            if !(group.lr_scale.is_finite() && group.lr_scale >= 0.0) {
                bail!(
                    "group {:?}: expected lr_scale to be zero or more, got {}",
                    group.pattern,
                    group.lr_scale
                )
            }
            if let Some(decay) = group.weight_decay
                && !(decay.is_finite() && decay >= 0.0)
            {
                bail!("group {:?}: expected weight_decay to be zero or more, got {decay}", group.pattern)
            }
            if let Some(limit) = group.factor_limit {
                limit.check()?;
            }
            if !names.iter().any(|n| matches(&group.pattern, n)) {
                bail!("group {:?}: matches no Var; the Vars are {}", group.pattern, names.join(", "))
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_match_holds() {
        let groups = Groups(vec![
            Group { frozen: true, ..Group::named("*") },
            Group { lr_scale: 0.1, ..Group::named("fc*") },
        ]);
        assert!(groups.of("conv1.weight").is_some_and(|g| g.frozen));
        assert!(groups.of("fc1.weight").is_some_and(|g| !g.frozen && g.lr_scale == 0.1));
    }
}
