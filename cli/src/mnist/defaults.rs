//! Defaults that depend on the optimizer: this program's own, and the library's, as `--help` shows them.

use crate::values::Choice;
use kronwake::curvature::{Damping, Relative};
use kronwake::optim::{AdaptiveKl, Bias, Inner, Params, Q, QSolve, StepRule, TwoRate, Wake};
use kronwake::tape::{Fisher, Tape};

/// What a baseline starts from; tuned on the bundled data.
pub struct FirstOrder {
    pub lr: f64,
    pub weight_decay: f64,
}

pub const SGD: FirstOrder = FirstOrder { lr: 0.05, weight_decay: 1e-3 };
pub const ADAMW: FirstOrder = FirstOrder { lr: 0.01, weight_decay: 0.1 };
/// Of muon, soap, shampoo and kl-shampoo, whose steps are as long as AdamW's: the same, not tuned.
pub const OF_MATRICES: FirstOrder = ADAMW;

/// Weight decay times training images of the optimizers with curvature: the precision of a Gaussian prior. The library's default is none; 6,000 images
/// need some, and 60,000 a tenth of it.
pub const PRIOR_PRECISION: f64 = 18.0;

/// What `--damping` says of it.
pub fn amount(damping: Damping) -> f64 {
    match damping {
        Damping::Relative(Relative { fraction, .. }) => fraction,
        other => other.initial(),
    }
}

/// All of them as text.
pub fn table() -> String {
    let mut text = format!(
        "Defaults by optimizer:\n  {:9} {:>6} {:>12} {:>8} {:>12} {:>10} {:>8}  fisher\n",
        "optimizer", "lr", "weight-decay", "damping", "damping-kind", "stat-decay", "kl-clip"
    );
    let of_matrices = [Choice::Muon, Choice::Soap, Choice::Shampoo, Choice::KlShampoo];
    let first_order = [(Choice::Sgd, SGD), (Choice::Adamw, ADAMW)].into_iter();
    for (choice, default) in first_order.chain(of_matrices.map(|choice| (choice, OF_MATRICES))) {
        let FirstOrder { lr, weight_decay } = default;
        text.push_str(&format!("  {:10} {lr:>5} {weight_decay:>12}\n", choice.name()));
    }
    let or_none = |value: Option<f64>| value.map_or("none".to_string(), |value| value.to_string());
    for choice in [Choice::Kfac, Choice::So, Choice::Q, Choice::Qe, Choice::Kldwrm] {
        let Some(wake) = choice.wake() else { continue };
        let params = Params::of(wake, &Tape::new());
        let kind = match params.damping {
            Damping::Adaptive(_) => "adaptive".to_string(),
            Damping::Relative(_) => "relative".to_string(),
            fixed => fixed.kind().to_string(),
        };
        let fisher = match params.fisher {
            Fisher::Empirical => "empirical",
            Fisher::Sampled { .. } => "sampled",
            Fisher::Exact => "exact",
        };
        text.push_str(&format!(
            "  {:9} {:>6} {:>12} {:>8} {kind:>12} {:>10} {:>8}  {fisher}\n",
            choice.name(),
            params.lr,
            format!("{PRIOR_PRECISION}/images"),
            amount(params.damping),
            params.stat_decay,
            or_none(params.kl_clip),
        ));
        if let (StepRule::AdaptiveKl(AdaptiveKl { initial, .. }), Wake::KldWrm(two_rate)) =
            (params.step_rule, &params.wake)
        {
            let TwoRate { model_decay, wake_decay, .. } = two_rate;
            text.push_str(&format!(
                "  {:9} --step-rule adaptive-kl, --kl-target {initial}, --model-decay {model_decay}, --wake-decay {wake_decay}, \
                 --average {}, --early-refresh {}\n",
                "",
                or_none(params.average.map(|average| average.power)),
                params.early_refresh
            ));
        }
    }
    let common = Params::q_kld_wrm(&Tape::new());
    let Inner { steps, lr, momentum, models, .. } = Inner::default();
    text.push_str(&format!(
        "  --factor-every {}, --inverse-every {}, --overlap {}, --bias {}, --q-solve {}, --qe-steps {steps}, --qe-lr {lr}, \
         --qe-momentum {momentum}, --qe-models {models}\n",
        common.every.factors,
        common.every.inverses,
        common.overlap,
        if common.bias == Bias::Folded { "folded" } else { "split" },
        if Q::default().solve == QSolve::Factor { "factor" } else { "exact" },
    ));
    text
}
