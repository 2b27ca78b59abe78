//! Defaults that depend on the optimizer: this example's own, and the library's, as `--help` shows them.

use super::values::Choice;
use kronwake::curvature::Damping;
use kronwake::optim::{
    AdaptiveKl, Defaults, Inner, KFacRule, Params, Q, Qe, So, StepRule, TwoRate, WakeRule,
};
use kronwake::tape::{Fisher, Tape};

/// What a baseline starts from; tuned on the bundled data.
pub struct FirstOrder {
    pub lr: f64,
    pub weight_decay: f64,
}

pub const SGD: FirstOrder = FirstOrder { lr: 0.05, weight_decay: 1e-3 };
pub const ADAMW: FirstOrder = FirstOrder { lr: 0.01, weight_decay: 0.1 };

/// The library's default is none; 6,000 images need some.
pub const WEIGHT_DECAY: f64 = 3e-3;

/// What `--damping` says of it.
pub fn amount(damping: Damping) -> f64 {
    match damping {
        Damping::Relative(relative) => relative.fraction,
        other => other.initial(),
    }
}

/// All of them as text.
pub fn table() -> String {
    let mut text = format!(
        "Defaults by optimizer:\n  {:9} {:>6} {:>12} {:>8} {:>12} {:>10} {:>8}  fisher\n",
        "optimizer", "lr", "weight-decay", "damping", "damping-kind", "stat-decay", "kl-clip"
    );
    for (choice, FirstOrder { lr, weight_decay }) in [(Choice::Sgd, SGD), (Choice::Adamw, ADAMW)] {
        text.push_str(&format!("  {:9} {lr:>6} {weight_decay:>12}\n", choice.name()));
    }
    for (choice, defaults) in [
        (Choice::Kfac, KFacRule.defaults()),
        (Choice::So, So::default().defaults()),
        (Choice::Q, Q::default().defaults()),
        (Choice::Qe, Qe::default().defaults()),
        (Choice::Kldwrm, TwoRate::default().defaults()),
    ] {
        let Defaults { lr, step_rule, damping, stat_decay, kl_clip, fisher, average, early_refresh } =
            defaults;
        let kind = match damping {
            Damping::Adaptive(_) => "adaptive".to_string(),
            Damping::Relative(_) => "relative".to_string(),
            fixed => format!("{:?}", fixed.kind()).to_lowercase(),
        };
        let fisher = match fisher {
            Fisher::Empirical => "empirical",
            Fisher::Sampled { .. } => "sampled",
            Fisher::Exact => "exact",
        };
        text.push_str(&format!(
            "  {:9} {lr:>6} {WEIGHT_DECAY:>12} {:>8} {kind:>12} {stat_decay:>10} {:>8}  {fisher}\n",
            choice.name(),
            amount(damping),
            kl_clip.map_or("none".to_string(), |clip| clip.to_string()),
        ));
        if let StepRule::AdaptiveKl(AdaptiveKl { initial, .. }) = step_rule {
            let TwoRate { model_decay, wake_decay, .. } = TwoRate::default();
            let power = average.map_or("none".to_string(), |average| average.power.to_string());
            text.push_str(&format!(
                "  {:9} --step-rule adaptive-kl, --kl-target {initial}, --model-decay {model_decay}, --wake-decay {wake_decay}, \
                 --average {power}, --early-refresh {early_refresh}\n",
                ""
            ));
        }
    }
    let common = Params::<Qe>::on(&Tape::new());
    let Inner { steps, lr, momentum, models, .. } = Inner::default();
    text.push_str(&format!(
        "  --factor-every {}, --inverse-every {}, --overlap {}, --bias {}, --q-solve {}, --qe-steps {steps}, --qe-lr {lr}, \
         --qe-momentum {momentum}, --qe-models {models}\n",
        common.every.factors,
        common.every.inverses,
        common.overlap,
        format!("{:?}", common.bias).to_lowercase(),
        format!("{:?}", common.wake.solve).to_lowercase(),
    ));
    text
}
