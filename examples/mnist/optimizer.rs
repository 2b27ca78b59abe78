//! One interface to every optimizer of this example.

use super::args::Args;
use super::defaults;
use super::first_order::{FirstOrder, Rule};
use super::train::Outcome;
use super::values::{BiasKind, CarryKind, Choice, DampingKind, FisherKind, QSolveKind, StepKind};
use candle_core::{Result, Tensor, bail};
use kronwake::curvature::{Adaptive, Damping, Relative};
use kronwake::nn::VarMap;
use kronwake::optim::{
    AdaptiveKl, Average, Bias, Carry, Defaults, Every, Inner, KFacRule, Natural, Optimizer, Params, Q,
    QSolve, Qe, Replay, So, StepRule, TwoRate, WakeRule,
};
use kronwake::penalty::Constraints;
use kronwake::tape::{Fisher, Likelihood, Tape};
use std::path::Path;
use tracing::info_span;

/// A batch that has been through the model.
pub struct Pass<'a> {
    /// `[n, 10]`
    pub logits: &'a Tensor,
    /// The mean over the batch.
    pub loss: &'a Tensor,
    /// The logits at the parameters' current values, without dropout.
    pub logits_now: &'a dyn Fn() -> Result<Tensor>,
    /// The loss at the parameters' current values, with the dropout of `loss`.
    pub loss_now: &'a dyn Fn() -> Result<Tensor>,
}

/// Forward, backward, and the step of the optimizer that it is given.
pub type Whole<'a> = dyn FnMut(&mut dyn Train) -> Result<Outcome> + 'a;

/// What the training loop needs of an optimizer.
pub trait Train {
    /// The options that matter most, on a line.
    fn settings(&self) -> String;
    /// Which parameter is in which block of the curvature, as a table.
    fn summary(&self) -> Option<String>;
    /// Steps taken, those before a resume included.
    fn steps(&self) -> usize;
    fn learning_rate(&self) -> f64;
    fn set_learning_rate(&mut self, lr: f64);
    /// One step.
    fn step(&mut self, pass: &Pass) -> Result<()>;
    /// What `constraints` say of the parameters after the step.
    fn constrain(&mut self, constraints: &mut Constraints) -> Result<()>;
    /// A whole training step by way of `replay`, where the optimizer can be recorded.
    fn replay(&mut self, replay: &mut Replay<Outcome>, pass: &mut Whole<'_>) -> Result<Outcome>;
    /// Runs `f` at the averaged parameters, where the optimizer keeps such.
    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        f()
    }
    /// Makes the averaged parameters the model's.
    fn adopt_average(&mut self) -> Result<()> {
        Ok(())
    }
    /// Steps of a linear rise of the learning rate at the start.
    fn warmup(&self) -> usize {
        0
    }
    /// Writes parameters and state.
    fn save(&self, path: &Path) -> Result<()>;
    /// Sets parameters and state.
    fn resume(&mut self, path: &Path) -> Result<()>;
}

/// The optimizer `choice` of all parameters in `vars`, which belong to a model built on `tape`.
pub fn build(choice: Choice, args: &Args, vars: &VarMap, tape: &Tape) -> Result<Box<dyn Train>> {
    let wake_decay = args.wake_decay;
    let solve = match args.q_solve {
        Some(QSolveKind::Factor) => QSolve::Factor,
        Some(QSolveKind::Exact) => QSolve::Exact,
        None => QSolve::default(),
    };
    let default = Inner::default();
    let inner = Inner {
        steps: args.qe_steps.unwrap_or(default.steps),
        lr: args.qe_lr.unwrap_or(default.lr),
        momentum: args.qe_momentum.unwrap_or(default.momentum),
        models: args.qe_models.unwrap_or(default.models),
        preconditioned: args.qe_preconditioned,
        ..default
    };
    match choice {
        Choice::Sgd => first_order(Rule::Sgd { momentum: 0.9 }, defaults::SGD, args, vars),
        Choice::Adamw => first_order(Rule::AdamW, defaults::ADAMW, args, vars),
        Choice::Kfac => curved(KFacRule, args, vars, tape),
        Choice::So => curved(So { wake_decay }, args, vars, tape),
        Choice::Q => curved(Q { wake_decay, solve }, args, vars, tape),
        Choice::Qe => curved(Qe { wake_decay, solve, inner }, args, vars, tape),
        Choice::Kldwrm => {
            let default = TwoRate::default();
            let model_decay = args.model_decay.unwrap_or(default.model_decay);
            let wake_decay = wake_decay.unwrap_or(default.wake_decay);
            curved(TwoRate { model_decay, wake_decay, ..default }, args, vars, tape)
        }
        Choice::Compare => bail!("compare is not one optimizer"),
    }
}

fn first_order(
    rule: Rule,
    default: defaults::FirstOrder,
    args: &Args,
    vars: &VarMap,
) -> Result<Box<dyn Train>> {
    let decay = args.decay_or(default.weight_decay);
    Ok(Box::new(FirstOrder::new(vars, rule, args.lr.unwrap_or(default.lr), decay)?))
}

fn curved<R: Stepping>(wake: R, args: &Args, vars: &VarMap, tape: &Tape) -> Result<Box<dyn Train>> {
    Ok(Box::new(Natural::from_varmap(vars, params(wake, args, tape)?)?))
}

/// The defaults of the rule, with steps as long as the command line says.
fn stepped<R: WakeRule>(args: &Args, tape: &Tape) -> Result<Params<R>> {
    let default = Params::on(tape);
    let target = args.kl_target.unwrap_or(AdaptiveKl::default().initial);
    let adaptive = AdaptiveKl { initial: target, ..AdaptiveKl::default() };
    match (args.step_rule, default.step_rule) {
        (Some(StepKind::FixedKl), _) => Ok(default.fixed_kl(target)),
        (Some(StepKind::AdaptiveKl), _) | (None, StepRule::AdaptiveKl(_)) => {
            Ok(default.adaptive_kl(adaptive))
        }
        _ if args.kl_target.is_some() => bail!("--kl-target needs --step-rule fixed-kl or adaptive-kl"),
        // Where the default is none, the usual one.
        (Some(StepKind::Lr), StepRule::AdaptiveKl(_)) => {
            let Defaults { lr, kl_clip, .. } = KFacRule.defaults();
            Ok(Params { lr, kl_clip, step_rule: StepRule::LearningRate, ..default })
        }
        _ => Ok(default),
    }
}

/// The defaults of the rule with what the command line says.
fn params<R: WakeRule>(wake: R, args: &Args, tape: &Tape) -> Result<Params<R>> {
    let default = stepped(args, tape)?;
    let damping = args.damping.unwrap_or(defaults::amount(default.damping));
    Ok(Params {
        lr: args.lr.unwrap_or(default.lr),
        damping: match (args.damping_kind, default.damping) {
            (Some(DampingKind::Pi), _) | (None, Damping::Pi(_)) => Damping::Pi(damping),
            (Some(DampingKind::Adaptive), _) => {
                Damping::Adaptive(Adaptive { initial: damping, ..Adaptive::default() })
            }
            (Some(DampingKind::Relative), _) | (None, Damping::Relative(_)) => {
                Damping::Relative(Relative { fraction: damping, ..Relative::default() })
            }
            _ => Damping::Eigenvalue(damping),
        },
        stat_decay: args.stat_decay.unwrap_or(default.stat_decay),
        every: Every {
            factors: args.factor_every.unwrap_or(default.every.factors),
            inverses: args.inverse_every.unwrap_or(default.every.inverses),
        },
        fisher: match args.fisher {
            Some(FisherKind::Empirical) => Fisher::Empirical,
            Some(FisherKind::Sampled) => Fisher::Sampled { draws: 1, seed: args.seed },
            Some(FisherKind::Exact) => Fisher::Exact,
            None => match default.fisher {
                Fisher::Sampled { draws, .. } => Fisher::Sampled { draws, seed: args.seed },
                other => other,
            },
        },
        bias: match args.bias {
            Some(BiasKind::Folded) => Bias::Folded,
            Some(BiasKind::Split) => Bias::Split,
            None => default.bias,
        },
        kl_clip: args.kl_clip.map_or(default.kl_clip, |limit| limit.0),
        average: match args.average {
            Some(power) => power.0.map(|power| Average { power }),
            // The average of zeros and of what was not zero at first is not zero.
            None => default.average.filter(|_| !args.penalty.is_some_and(|penalty| penalty.proximal())),
        },
        rms_clip: args.rms_clip.map_or(default.rms_clip, |limit| limit.0),
        weight_decay: args.decay_or(defaults::WEIGHT_DECAY),
        carry: match args.carry {
            Some(CarryKind::Gradient) => Carry::Gradient,
            Some(CarryKind::Literal) => Carry::Literal,
            None => default.carry,
        },
        early_refresh: args.early_refresh.unwrap_or(default.early_refresh),
        overlap: args.overlap.unwrap_or(default.overlap),
        wake,
        ..default
    })
}

/// How a rule's optimizer takes a step once it has observed the curvature.
trait Stepping: WakeRule + 'static {
    fn advance(optimizer: &mut Natural<Self>, pass: &Pass) -> Result<()> {
        optimizer.backward_step(pass.loss)
    }
}

impl Stepping for KFacRule {}
impl Stepping for So {}
impl Stepping for Q {}
impl Stepping for TwoRate {}

impl Stepping for Qe {
    fn advance(optimizer: &mut Natural<Self>, pass: &Pass) -> Result<()> {
        optimizer.step_with(pass.loss, Likelihood::Categorical, &mut || (pass.logits_now)())
    }
}

impl<R: Stepping> Train for Natural<R> {
    fn settings(&self) -> String {
        let Params { lr, step_rule, damping, stat_decay, every, fisher, weight_decay, .. } = self.params();
        let length = match step_rule {
            StepRule::LearningRate => format!("learning rate {lr}"),
            StepRule::FixedKl { target } => format!("steps of KL {target}"),
            StepRule::AdaptiveKl(AdaptiveKl { initial, .. }) => format!("steps of KL {initial} at first"),
        };
        let rho = match self.params().wake.wake_decay(*stat_decay) {
            Some(wake_decay) => format!("{stat_decay} (statistics) and {wake_decay} (wake)"),
            None => stat_decay.to_string(),
        };
        format!(
            "{length}, {damping:?}, rho {rho}, {fisher:?}, weight decay {weight_decay}, factors every {} and inverses every \
             {} steps",
            every.factors, every.inverses
        )
    }

    fn summary(&self) -> Option<String> {
        Some(Natural::summary(self).to_string())
    }

    fn steps(&self) -> usize {
        Natural::steps(self)
    }

    fn learning_rate(&self) -> f64 {
        Optimizer::learning_rate(self)
    }

    fn set_learning_rate(&mut self, lr: f64) {
        Optimizer::set_learning_rate(self, lr);
    }

    fn step(&mut self, pass: &Pass) -> Result<()> {
        self.observe(pass.logits, Likelihood::Categorical)?;
        R::advance(self, pass)?;
        if self.wants_loss_after() {
            self.adapt_damping(&(pass.loss_now)()?)?;
        }
        Ok(())
    }

    fn constrain(&mut self, constraints: &mut Constraints) -> Result<()> {
        Natural::constrain(self, constraints)
    }

    fn replay(&mut self, replay: &mut Replay<Outcome>, pass: &mut Whole<'_>) -> Result<Outcome> {
        replay.step(self, |optimizer| pass(optimizer))
    }

    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Natural::at_average(self, f)
    }

    fn adopt_average(&mut self) -> Result<()> {
        Natural::adopt_average(self)
    }

    fn warmup(&self) -> usize {
        // Where the divergence decides, the first steps would be as long as all others on curvature hardly known.
        if self.params().step_rule == StepRule::LearningRate { 0 } else { 30 }
    }

    fn save(&self, path: &Path) -> Result<()> {
        Natural::save(self, path)
    }

    fn resume(&mut self, path: &Path) -> Result<()> {
        Natural::resume(self, path)
    }
}

impl Train for FirstOrder {
    fn settings(&self) -> String {
        format!("learning rate {}, weight decay {}", self.lr, self.decay)
    }

    fn summary(&self) -> Option<String> {
        None
    }

    fn steps(&self) -> usize {
        self.step
    }

    fn learning_rate(&self) -> f64 {
        self.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn step(&mut self, pass: &Pass) -> Result<()> {
        let grads = info_span!("backward").in_scope(|| pass.loss.backward())?;
        info_span!("step").in_scope(|| self.update(&grads))
    }

    fn constrain(&mut self, constraints: &mut Constraints) -> Result<()> {
        constraints.after_step(self.lr)?;
        self.read_back()
    }

    fn replay(&mut self, _: &mut Replay<Outcome>, pass: &mut Whole<'_>) -> Result<Outcome> {
        pass(self)
    }

    fn save(&self, path: &Path) -> Result<()> {
        FirstOrder::save(self, path)
    }

    fn resume(&mut self, path: &Path) -> Result<()> {
        FirstOrder::resume(self, path)
    }
}
