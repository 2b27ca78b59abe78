//! Defaults that depend on the optimizer: this example's own, and the library's, as `--help` shows them.

use super::values::Choice;
use kronwake::curvature::Damping;
use kronwake::optim::{Defaults, Inner, KFacRule, Params, Q, Qe, So, WakeRule};
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
    ] {
        let Defaults { lr, damping, stat_decay, kl_clip, fisher } = defaults;
        let kind = match damping {
            Damping::Adaptive(_) => "adaptive".to_string(),
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
            damping.initial(),
            kl_clip.map_or("none".to_string(), |clip| clip.to_string()),
        ));
    }
    let common = Params::<Qe>::on(&Tape::new());
    let Inner { steps, lr, momentum, models, .. } = Inner::default();
    text.push_str(&format!(
        "  --factor-every {}, --inverse-every {}, --bias {}, --q-solve {}, --qe-steps {steps}, --qe-lr {lr}, \
         --qe-momentum {momentum}, --qe-models {models}\n",
        common.every.factors,
        common.every.inverses,
        format!("{:?}", common.bias).to_lowercase(),
        format!("{:?}", common.wake.solve).to_lowercase(),
    ));
    text
}
