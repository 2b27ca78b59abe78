//! The optimizer as data, which knows no step: what it trains, what it carries from step to step, and the file of both.

pub(super) mod block;
pub(super) mod ownership;
pub(super) mod param;
pub(super) mod pending;
mod reader;
mod resume;
mod save;

pub use reader::Resumed;
pub(super) use save::Elsewhere;

use super::params::{AdaptiveKl, Decay, Params, StepRule};
use super::wake::Model;
use crate::curvature::{Adaptive, Damping};
use block::Block;
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::ParamsAdamW;
use ownership::Ownership;
use param::{Adam, Param};
use pending::PendingInverses;

/// Options, parameters, and all that a step changes. [`save`](Core::save) writes every field or says why not.
#[derive(Debug)]
pub(super) struct Core {
    pub params: Params,
    pub vars: Vec<Param>,
    /// Vars that are not trained, with their names.
    pub frozen: Vec<(String, Var)>,
    pub blocks: Vec<Block>,
    /// Of the `vars` without a block.
    pub adam: Vec<Adam>,
    /// Steps taken.
    pub steps: usize,
    pub skipped: usize,
    /// `1 / lambda` of the last step.
    pub previous_rate: Option<f64>,
    /// The one that all blocks share, of the inverses as they are.
    pub damping: f64,
    /// What the lengths of steps have led to, under [`StepRule::AdaptiveKl`].
    pub slopes: Slopes,
    pub adam_rate: AdamRate,
    /// A prediction of the loss change that waits for the measured one.
    pub predicted: Option<Predicted>,
    /// The averaged parameters, one a param, under [`Params::average`] and after the first step.
    pub averages: Vec<Tensor>,
    /// QE's stored models, oldest first: a tensor for each of `vars`.
    pub models: Vec<Vec<Tensor>>,
    /// Inverses that no step has used yet, under [`Params::overlap`].
    pub pending: Option<PendingInverses>,
    /// Whether QE's closure has been seen to give the same outputs twice.
    pub closure_checked: bool,
    /// Which process owns which part, where they divide the state.
    pub ownership: Option<Ownership>,
}

/// Slopes along the steps, and the length that they led to; see [`AdaptiveKl`](super::AdaptiveKl).
#[derive(Debug, Clone, Copy)]
pub(super) struct Slopes {
    /// Averages of the slopes where steps ended, and of their sizes where they began.
    pub after: f64,
    pub before: f64,
    /// The size of the slope where the last step began.
    pub last: f64,
    /// What multiplies the length of a step.
    pub length: f64,
    /// Loss terms of a step, as the first had; 0 where that is not known yet.
    pub terms: f64,
}

impl Default for Slopes {
    fn default() -> Self {
        Self { after: 0.0, before: 0.0, last: 0.0, length: 1.0, terms: 0.0 }
    }
}

/// How Adam's rate follows the learning rate: in the proportion that the options give. An optimizer that begins with `lr` 0, for a
/// warm-up, has none yet: there the rate of the options belongs to the largest `lr` so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdamRate {
    rate: f64,
    /// The learning rate that `rate` belongs to.
    pub at: f64,
    pub warming_up: bool,
}

impl AdamRate {
    pub fn of(params: &Params) -> Self {
        Self::new(params.fallback_adam.lr, params.lr)
    }

    /// Adam's `rate` at the learning rate `at`.
    pub fn new(rate: f64, at: f64) -> Self {
        Self { rate, at, warming_up: at == 0.0 }
    }

    /// Adam's rate at the learning rate `lr`.
    pub fn follow(&mut self, lr: f64) -> f64 {
        if self.warming_up {
            self.at = self.at.max(lr);
        }
        if self.at > 0.0 { self.rate / self.at * lr } else { self.rate }
    }
}

/// A step whose effect on the loss is to be compared with the quadratic model's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Predicted {
    pub loss: f64,
    pub change: f64,
}

/// What a step does by the options and the number of steps taken.
impl Core {
    /// The optimizer's name in messages and files.
    pub fn name(&self) -> &'static str {
        self.params.wake.name()
    }

    /// Takes note of the loss terms of a step, and sets the length of the first one.
    pub fn begin_length(&mut self, terms: f64) {
        if !(self.measures_slopes() && terms.is_finite() && terms > 0.0) {
            return;
        }
        if self.steps == 0 {
            self.slopes.length = AdaptiveKl::first_length(terms);
        }
        if self.slopes.terms == 0.0 {
            self.slopes.terms = terms;
        }
    }

    /// The quotient of slopes that the length aims at, at the whole length of a step.
    pub fn slope_aim(&self, rule: AdaptiveKl) -> f64 {
        rule.slope * rule.signal_share(self.slopes.terms)
    }

    /// Whether the coming step renews the factors; as long as a block that cannot sit it out has none, they are due.
    pub fn curvature_due(&self) -> bool {
        !self.blocks.is_empty() && (self.due(self.params.every.factors, self.steps) || self.has_new_block())
    }

    fn has_new_block(&self) -> bool {
        let blocks = self.blocks.iter().enumerate();
        blocks.filter(|(_, block)| !self.is_optional(block)).any(|(index, _)| !self.has_curvature(index))
    }

    /// Whether a block may take no part in a step.
    pub fn is_optional(&self, block: &Block) -> bool {
        block.params.iter().any(|&index| self.vars[index].optional)
    }

    /// Inverses are renewed every `inverses` steps. A quadratic wake's matrix holds the factors of the step itself, which
    /// one step later are the averages again: it is renewed then too.
    pub fn inverses_due(&self) -> bool {
        let period = self.params.every.inverses;
        let once_more = match self.params.wake.model() {
            Model::Linear => false,
            Model::Quadratic(_) => self.steps > 0 && self.due(period, self.steps - 1),
        };
        self.due(period, self.steps) || once_more || self.has_new_block()
    }

    /// Whether what is renewed every `period` steps is renewed at `step`.
    fn due(&self, period: usize, step: usize) -> bool {
        step.is_multiple_of(period) || (self.params.early_refresh && step < period && step.is_power_of_two())
    }

    /// `rho_d` of the wake, where there is one.
    pub fn wake_decay(&self) -> Option<f64> {
        self.params.wake.wake_decay(self.params.stat_decay)
    }

    /// `1 / lambda` where the options give it; nothing where a divergence decides.
    pub fn given_rate(&self) -> Option<f64> {
        match self.params.step_rule {
            StepRule::LearningRate => Some(self.params.lr * self.params.wake.rate_scale()),
            StepRule::FixedKl { .. } | StepRule::AdaptiveKl(_) => None,
        }
    }

    /// Whether the slopes along steps are measured.
    pub fn measures_slopes(&self) -> bool {
        match self.params.step_rule {
            StepRule::AdaptiveKl(_) => true,
            StepRule::LearningRate | StepRule::FixedKl { .. } => false,
        }
    }

    /// The damping of a block. A step of fixed KL counts the curvature of the weight decay in, which is a penalty's Hessian.
    pub fn damping_of(&self, block: &Block, damping: f64) -> f64 {
        let penalty = |&i: &usize| self.vars[i].weight_decay;
        match (self.params.step_rule, self.params.decay) {
            (StepRule::LearningRate, _) | (_, Decay::Decoupled) => damping,
            (StepRule::FixedKl { .. } | StepRule::AdaptiveKl(_), Decay::AfterWake | Decay::Loss) => {
                damping + block.params.iter().map(penalty).fold(0.0, f64::max)
            }
        }
    }

    /// The damping that adapts to measured losses, where it does.
    pub fn adaptive(&self) -> Option<Adaptive> {
        match self.params.damping {
            Damping::Adaptive(adaptive) => Some(adaptive),
            Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Relative(_) => None,
        }
    }

    /// Takes a learning rate, and Adam's in proportion.
    pub fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
        self.params.fallback_adam.lr = self.adam_rate.follow(lr);
    }

    /// Adam's options for a step; at a learning rate of 0 nothing moves.
    pub fn fallback_adam(&self) -> ParamsAdamW {
        let options = &self.params.fallback_adam;
        ParamsAdamW { lr: if self.params.lr == 0.0 { 0.0 } else { options.lr }, ..options.clone() }
    }

    /// # Errors
    /// Refuses a rate that makes no sense.
    pub fn check_rate(&self) -> Result<()> {
        if !(self.params.lr.is_finite() && self.params.lr >= 0.0) {
            bail!("{}: expected a learning rate of zero or more, got {}", self.name(), self.params.lr)
        }
        Ok(())
    }
}
