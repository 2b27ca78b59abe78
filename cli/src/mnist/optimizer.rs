//! The optimizers as the command line asks for them.

use super::args::Args;
use super::defaults::{self, ADAMW, OF_MATRICES, PRIOR_PRECISION, SGD};
use crate::optimizer::{self, Optimizer, fisher_in_words, seeded};
use crate::values::{BiasKind, CarryKind, Choice, DampingKind, FisherKind, QSolveKind, StepKind};
use candle_core::{Result, bail};
use kronwake::curvature::{Adaptive, Damping, Relative};
use kronwake::nn::VarMap;
use kronwake::optim::{
    AdaptiveKl, Average, Bias, Carry, Every, Inner, Params, ParamsAdamW, ParamsMuon, ParamsSgd,
    ParamsShampoo, ParamsSoap, Q, QSolve, Qe, So, StepRule, TwoRate, Wake,
};
use kronwake::tape::{Fisher, Tape};

/// The optimizer `choice` of all parameters in `vars`, which belong to a model built on `tape`, for so many training images.
pub fn build(choice: Choice, args: &Args, images: usize, vars: &VarMap, tape: &Tape) -> Result<Optimizer> {
    let first_order =
        |default: defaults::FirstOrder| (args.lr.unwrap_or(default.lr), args.decay_or(default.weight_decay));
    match (choice, choice.wake()) {
        (_, Some(wake)) => Optimizer::natural(vars, params(own(wake, args), args, images, tape)?),
        (Choice::Sgd, _) => {
            let (lr, weight_decay) = first_order(SGD);
            Optimizer::sgd(vars, ParamsSgd { lr, weight_decay, ..Default::default() })
        }
        (Choice::Adamw, _) => {
            let (lr, weight_decay) = first_order(ADAMW);
            Optimizer::adamw(vars, ParamsAdamW { lr, weight_decay, ..Default::default() })
        }
        (Choice::Compare, _) => bail!("compare is not one optimizer"),
        _ => of_matrices(choice, first_order(OF_MATRICES), args, vars),
    }
}

/// Muon, SOAP, Shampoo or KL-Shampoo, with AdamW for the last layer.
fn of_matrices(
    choice: Choice,
    (lr, weight_decay): (f64, f64),
    args: &Args,
    vars: &VarMap,
) -> Result<Optimizer> {
    let ends = optimizer::ends(vars, &[format!("{}*", args.model.head())])?;
    let shampoo = ParamsShampoo { lr, weight_decay, ..Default::default() };
    match choice {
        Choice::Muon => Optimizer::muon(vars, ParamsMuon { lr, weight_decay, ..Default::default() }, ends),
        Choice::Soap => Optimizer::soap(vars, ParamsSoap { lr, weight_decay, ..Default::default() }, ends),
        Choice::Shampoo => Optimizer::shampoo(vars, shampoo, ends),
        _ => Optimizer::shampoo(vars, optimizer::kl_shampoo(shampoo), ends),
    }
}

/// The wake with what the command line says of its own options.
fn own(wake: Wake, args: &Args) -> Wake {
    let wake_decay = args.wake_decay;
    let solve = match args.q_solve {
        Some(QSolveKind::Factor) => QSolve::Factor,
        Some(QSolveKind::Exact) => QSolve::Exact,
        None => QSolve::default(),
    };
    match wake {
        Wake::KFac => Wake::KFac,
        Wake::So(_) => So { wake_decay }.into(),
        Wake::Q(_) => Q { wake_decay, solve }.into(),
        Wake::Qe(Qe { inner, .. }) => {
            let inner = Inner {
                steps: args.qe_steps.unwrap_or(inner.steps),
                lr: args.qe_lr.unwrap_or(inner.lr),
                momentum: args.qe_momentum.unwrap_or(inner.momentum),
                models: args.qe_models.unwrap_or(inner.models),
                preconditioned: args.qe_preconditioned,
                ..inner
            };
            Qe { wake_decay, solve, inner }.into()
        }
        Wake::KldWrm(two_rate) => TwoRate {
            model_decay: args.model_decay.unwrap_or(two_rate.model_decay),
            wake_decay: wake_decay.unwrap_or(two_rate.wake_decay),
            ..two_rate
        }
        .into(),
    }
}

/// The defaults of the wake, with steps as long as the command line says.
fn stepped(wake: Wake, args: &Args, tape: &Tape) -> Result<Params> {
    let default = Params::of(wake, tape);
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
            let Params { lr, kl_clip, .. } = Params::k_fac(tape);
            Ok(Params { lr, kl_clip, step_rule: StepRule::LearningRate, ..default })
        }
        _ => Ok(default),
    }
}

/// The defaults of the wake with what the command line says.
fn params(wake: Wake, args: &Args, images: usize, tape: &Tape) -> Result<Params> {
    let default = stepped(wake, args, tape)?;
    let damping = args.damping.unwrap_or(defaults::amount(default.damping));
    let kind = args.damping_kind.unwrap_or(match default.damping {
        Damping::Pi(_) => DampingKind::Pi,
        Damping::Relative(_) => DampingKind::Relative,
        _ => DampingKind::Eigenvalue,
    });
    Ok(Params {
        lr: args.lr.unwrap_or(default.lr),
        damping: match kind {
            DampingKind::Eigenvalue => Damping::Eigenvalue(damping),
            DampingKind::Pi => Damping::Pi(damping),
            DampingKind::Adaptive => Damping::Adaptive(Adaptive { initial: damping, ..Default::default() }),
            DampingKind::Relative => Damping::Relative(Relative { fraction: damping, ..Default::default() }),
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
            None => seeded(default.fisher, args.seed),
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
        weight_decay: args.decay_or(PRIOR_PRECISION / images as f64),
        carry: match args.carry {
            Some(CarryKind::Gradient) => Carry::Gradient,
            Some(CarryKind::Literal) => Carry::Literal,
            None => default.carry,
        },
        early_refresh: args.early_refresh.unwrap_or(default.early_refresh),
        overlap: args.overlap.unwrap_or(default.overlap),
        orthogonal: default.orthogonal.map(|usual| args.orthogonal.unwrap_or(usual)),
        orthogonal_side: args.orthogonal_side.unwrap_or(default.orthogonal_side),
        ..default
    })
}

/// The options that matter most, on a line.
pub fn settings(optimizer: &Optimizer) -> String {
    let (lr, weight_decay) = match optimizer {
        Optimizer::Sgd(sgd) => (sgd.params().lr, sgd.params().weight_decay),
        Optimizer::AdamW(adamw) => (adamw.params().lr, adamw.params().weight_decay),
        Optimizer::Muon(muon) => (muon.params().lr, muon.params().weight_decay),
        Optimizer::Soap(soap) => (soap.params().lr, soap.params().weight_decay),
        Optimizer::Shampoo(shampoo) => (shampoo.params().lr, shampoo.params().weight_decay),
        Optimizer::Natural(natural) => return curved_settings(natural.params()),
    };
    format!("learning rate {lr}, weight decay {weight_decay}")
}

fn curved_settings(params: &Params) -> String {
    let Params { lr, step_rule, damping, stat_decay, every, fisher, weight_decay, wake, .. } = params;
    let length = match step_rule {
        StepRule::LearningRate => format!("learning rate {lr}"),
        StepRule::FixedKl { target } => format!("steps of KL {target}"),
        StepRule::AdaptiveKl(AdaptiveKl { initial, .. }) => {
            format!("first steps of KL {initial} (for 1024 loss terms)")
        }
    };
    let rho = match wake.wake_decay(*stat_decay) {
        Some(wake_decay) => format!("{stat_decay} (statistics) and {wake_decay} (wake)"),
        None => stat_decay.to_string(),
    };
    format!(
        "{length}, {damping}, rho {rho}, {}, weight decay {weight_decay}, factors every {} and inverses every {} steps",
        fisher_in_words(*fisher),
        every.factors,
        every.inverses
    )
}

/// Steps of a linear rise of the learning rate at the start.
pub fn warmup(optimizer: &Optimizer) -> usize {
    match optimizer {
        // Where the divergence decides, the first steps would be as long as all others on curvature hardly known.
        Optimizer::Natural(natural) if natural.params().step_rule != StepRule::LearningRate => 30,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use clap::Parser;
    use kronwake::nn::{VarBuilder, linear};

    #[test]
    fn settings_are_words() -> Result<()> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        tape.build(|| linear(3, 2, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("fc")))?;
        for (choice, line, expected) in [
            (Choice::Sgd, "", "learning rate 0.05, weight decay 0.001"),
            (Choice::Adamw, "--lr 0.5", "learning rate 0.5, weight decay 0.1"),
            (Choice::Muon, "--lr 0.5", "learning rate 0.5, weight decay 0.1"),
            (Choice::Soap, "", "learning rate 0.01, weight decay 0.1"),
            (Choice::Shampoo, "--weight-decay 0.2", "learning rate 0.01, weight decay 0.2"),
            (Choice::KlShampoo, "", "learning rate 0.01, weight decay 0.1"),
            (
                Choice::Kldwrm,
                "",
                "first steps of KL 0.02 (for 1024 loss terms), eigenvalue damping of 0.02 times the factors' mean curvature, rho 0.5 (statistics) and 0.5 (wake), \
                 Fisher of a sampled label, weight decay 0.003, factors every 10 and inverses every 10 steps",
            ),
            (
                Choice::Kfac,
                "--damping-kind pi --fisher exact --inverse-every 3",
                "learning rate 0.075, pi damping of 0.011, rho 0.95, Fisher of all labels, weight decay 0.003, \
                 factors every 10 and inverses every 3 steps",
            ),
            (
                Choice::So,
                "--damping-kind adaptive --wake-decay 0.25",
                "learning rate 0.37, eigenvalue damping of 0.0033 at first, adapted to the loss, rho 0.5 (statistics) and 0.25 (wake), \
                 Fisher of the data's labels, weight decay 0.003, factors every 10 and inverses every 10 steps",
            ),
        ] {
            let words = ["mnist", "--optimizer", choice.name()].into_iter().chain(line.split_whitespace());
            let args = Args::try_parse_from(words).map_err(candle_core::Error::wrap)?;
            assert_eq!(settings(&build(choice, &args, 6_000, &vars, &tape)?), expected);
        }
        Ok(())
    }
}
