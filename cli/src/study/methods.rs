//! The methods: what each tunes, and how its optimizer is made from a setting.

use super::setting::{Knob, Range, Setting};
use crate::optimizer::{self, Optimizer, seeded};
use candle_core::{Result, bail};
use kronwake::curvature::Damping;
use kronwake::nn::VarMap;
use kronwake::optim::{
    AdaptiveKl, Average, Every, Groups, Inner, NonFinite, Params, ParamsAdamW, ParamsMuon, ParamsSgd,
    ParamsShampoo, ParamsSoap, Q, Qe, So, StepRule, TwoRate, Wake,
};
use kronwake::tape::{Fisher, Tape};

/// What an optimizer is made for.
pub struct Context<'a> {
    pub vars: &'a VarMap,
    /// The tape on which the model was built.
    pub tape: &'a Tape,
    /// What the names of the last layer's parameters begin with.
    pub head: String,
    /// Periods of the curvature.
    pub every: Every,
    /// Of the sampled labels.
    pub seed: u64,
}

/// An optimizer with what is tuned of it.
#[derive(Debug)]
pub struct Method {
    /// As options and lines of the log spell it.
    pub name: &'static str,
    knobs: &'static [&'static [Knob]],
    pub build: fn(&Setting, &Context) -> Result<Optimizer>,
}

impl Method {
    pub fn knobs(&self) -> impl Iterator<Item = Knob> {
        self.knobs.iter().flat_map(|list| list.iter().copied())
    }
}

const fn log(name: &'static str, low: f64, high: f64) -> Knob {
    Knob { name, range: Range::LogUniform(low, high) }
}

const fn uniform(name: &'static str, low: f64, high: f64) -> Knob {
    Knob { name, range: Range::Uniform(low, high) }
}

const fn choice(name: &'static str, list: &'static [&'static str]) -> Knob {
    Knob { name, range: Range::Choice(list) }
}

const SGD: &[Knob] = &[log("lr", 1e-3, 1.0), log("1-momentum", 0.01, 0.5), log("weight_decay", 1e-5, 1e-2)];
const ADAMW: &[Knob] =
    &[log("lr", 1e-4, 1e-1), log("weight_decay", 1e-4, 1.0), choice("beta1", &["0.8", "0.9", "0.95"])];
/// As many as AdamW's, of the same ranges: steps are as long as its own. AdamW has the last layer and the biases at the same rate.
const MUON: &[Knob] =
    &[log("lr", 1e-4, 1e-1), log("weight_decay", 1e-4, 1.0), choice("momentum", &["0.8", "0.9", "0.95"])];
const SOAP: &[Knob] =
    &[log("lr", 1e-4, 1e-1), log("weight_decay", 1e-4, 1.0), choice("beta2", &["0.8", "0.9", "0.95"])];
const SHAMPOO: &[Knob] =
    &[log("lr", 1e-4, 1e-1), log("weight_decay", 1e-4, 1.0), choice("beta2", &["0.9", "0.95", "0.99"])];
/// What all methods with curvature tune. `lr` is that of a steady state: with a gradient that stays the same, a step is
/// `lr F^-1 g` whatever the momentum or the wake.
const CURVED: &[Knob] = &[
    log("lr", 1e-2, 1.0),
    log("damping", 1e-4, 1e-1),
    log("weight_decay", 1e-5, 1e-2),
    log("kl_clip", 1e-3, 1e-1),
    choice("fisher", &["sampled", "empirical"]),
    choice("stat_decay", &["0.5", "0.8", "0.95"]),
];
/// [`CURVED`] where a KL divergence takes the place of the learning rate: the range of that of the clip, of which it is half.
const FIXED_KL: &[Knob] = &[
    log("kl_target", 5e-4, 5e-2),
    log("damping", 1e-4, 1e-1),
    log("weight_decay", 1e-5, 1e-2),
    choice("fisher", &["sampled", "empirical"]),
    choice("stat_decay", &["0.5", "0.8", "0.95"]),
];
/// What is left where the optimizer finds the rest.
const FREE: &[Knob] = &[log("kl_target", 5e-4, 5e-2), log("weight_decay", 1e-5, 1e-2)];
const RATES: &[Knob] = &[uniform("model_decay", 0.5, 0.95), uniform("wake_decay", 0.0, 0.9)];
const MOMENTUM: &[Knob] = &[uniform("momentum", 0.5, 0.95)];
const WAKE: &[Knob] = &[uniform("wake_decay", 0.05, 0.5)];
const INNER: &[Knob] = &[log("inner_lr", 1e-3, 1.0)];

/// All methods, in the order of reports.
pub const METHODS: &[Method] = &[
    Method { name: "sgd", knobs: &[SGD], build: sgd },
    Method { name: "adamw", knobs: &[ADAMW], build: adamw },
    Method { name: "kfac", knobs: &[CURVED], build: kfac },
    Method { name: "kfac-momentum", knobs: &[CURVED, MOMENTUM], build: kfac_momentum },
    Method { name: "so", knobs: &[CURVED, WAKE], build: so },
    Method { name: "q", knobs: &[CURVED, WAKE], build: q },
    Method { name: "qe", knobs: &[CURVED, WAKE, INNER], build: qe },
    Method { name: "kfac-average", knobs: &[CURVED], build: kfac_average },
    Method { name: "fixed-kl", knobs: &[FIXED_KL], build: fixed_kl },
    Method { name: "two-rate", knobs: &[CURVED, RATES], build: two_rate },
    Method { name: "kld-wrm", knobs: &[FREE], build: kld_wrm },
    Method { name: "muon", knobs: &[MUON], build: muon },
    Method { name: "soap", knobs: &[SOAP], build: soap },
    Method { name: "shampoo", knobs: &[SHAMPOO], build: shampoo },
    Method { name: "kl-shampoo", knobs: &[SHAMPOO], build: kl_shampoo },
];

/// The method called `name`.
pub fn method(name: &str) -> std::result::Result<&'static Method, String> {
    let names: Vec<_> = METHODS.iter().map(|method| method.name).collect();
    let found = METHODS.iter().find(|method| method.name == name);
    found.ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

fn sgd(s: &Setting, c: &Context) -> Result<Optimizer> {
    let (lr, weight_decay) = (s.number("lr")?, s.number("weight_decay")?);
    Optimizer::sgd(c.vars, ParamsSgd { lr, momentum: 1.0 - s.number("1-momentum")?, weight_decay })
        .map(Optimizer::skipping)
}

fn adamw(s: &Setting, c: &Context) -> Result<Optimizer> {
    let (lr, beta1, weight_decay) = (s.number("lr")?, s.number("beta1")?, s.number("weight_decay")?);
    Optimizer::adamw(c.vars, ParamsAdamW { lr, beta1, weight_decay, ..Default::default() })
        .map(Optimizer::skipping)
}

/// The last layer, which AdamW has.
fn ends(c: &Context) -> Result<Groups> {
    optimizer::ends(c.vars, &[format!("{}*", c.head)])
}

fn muon(s: &Setting, c: &Context) -> Result<Optimizer> {
    let (lr, momentum, weight_decay) = (s.number("lr")?, s.number("momentum")?, s.number("weight_decay")?);
    let params = ParamsMuon { lr, momentum, weight_decay, ..Default::default() };
    Optimizer::muon(c.vars, params, ends(c)?).map(Optimizer::skipping)
}

fn soap(s: &Setting, c: &Context) -> Result<Optimizer> {
    let (lr, beta2, weight_decay) = (s.number("lr")?, s.number("beta2")?, s.number("weight_decay")?);
    let params = ParamsSoap { lr, beta2, weight_decay, ..Default::default() };
    Optimizer::soap(c.vars, params, ends(c)?).map(Optimizer::skipping)
}

fn shampoo_params(s: &Setting) -> Result<ParamsShampoo> {
    let (lr, beta2, weight_decay) = (s.number("lr")?, s.number("beta2")?, s.number("weight_decay")?);
    Ok(ParamsShampoo { lr, beta2, weight_decay, ..Default::default() })
}

fn shampoo(s: &Setting, c: &Context) -> Result<Optimizer> {
    Optimizer::shampoo(c.vars, shampoo_params(s)?, ends(c)?).map(Optimizer::skipping)
}

fn kl_shampoo(s: &Setting, c: &Context) -> Result<Optimizer> {
    Optimizer::shampoo(c.vars, optimizer::kl_shampoo(shampoo_params(s)?), ends(c)?).map(Optimizer::skipping)
}

/// The optimizer with the common knobs and a wake; `change` has the last word.
fn curved(
    wake: impl Into<Wake>,
    s: &Setting,
    c: &Context,
    change: impl FnOnce(&mut Params) -> Result<()>,
) -> Result<Optimizer> {
    let mut params = Params {
        lr: s.number("lr")?,
        damping: Damping::Eigenvalue(s.number("damping")?),
        kl_clip: Some(s.number("kl_clip")?),
        fisher: fisher(s, c)?,
        stat_decay: s.number("stat_decay")?,
        ..Params::of(wake, c.tape)
    };
    change(&mut params)?;
    natural(params, s, c)
}

/// With what all methods with curvature have.
fn natural(params: Params, s: &Setting, c: &Context) -> Result<Optimizer> {
    let weight_decay = s.number("weight_decay")?;
    // A step that is left out ends the run as diverged.
    Optimizer::natural(c.vars, Params { weight_decay, every: c.every, non_finite: NonFinite::Skip, ..params })
}

fn kfac(s: &Setting, c: &Context) -> Result<Optimizer> {
    curved(Wake::KFac, s, c, |_| Ok(()))
}

/// Heavy ball adds up to `1 / (1 - momentum)` directions: rate and clip are those of the sum.
fn kfac_momentum(s: &Setting, c: &Context) -> Result<Optimizer> {
    curved(Wake::KFac, s, c, |params| {
        params.momentum = s.number("momentum")?;
        let share = 1.0 - params.momentum;
        params.lr *= share;
        params.kl_clip = params.kl_clip.map(|clip| clip * share * share);
        Ok(())
    })
}

/// A wake leaves `1 - wake_decay` of a gradient that stays the same. The clip measures the step as it is taken.
fn steady(wake: impl FnOnce(Option<f64>) -> Wake, s: &Setting, c: &Context) -> Result<Optimizer> {
    let wake_decay = s.number("wake_decay")?;
    curved(wake(Some(wake_decay)), s, c, |params| {
        params.lr /= 1.0 - wake_decay;
        Ok(())
    })
}

fn so(s: &Setting, c: &Context) -> Result<Optimizer> {
    steady(|wake_decay| So { wake_decay }.into(), s, c)
}

fn q(s: &Setting, c: &Context) -> Result<Optimizer> {
    steady(|wake_decay| Q { wake_decay, ..Default::default() }.into(), s, c)
}

fn qe(s: &Setting, c: &Context) -> Result<Optimizer> {
    let inner =
        Inner { lr: s.number("inner_lr")?, steps: 1, models: 2, preconditioned: true, ..Default::default() };
    steady(|wake_decay| Qe { wake_decay, inner, ..Default::default() }.into(), s, c)
}

/// The control for [`kld_wrm`]: K-FAC with its averaged parameters and its early refreshes.
fn kfac_average(s: &Setting, c: &Context) -> Result<Optimizer> {
    curved(Wake::KFac, s, c, |params| {
        params.average = Some(Average::default());
        params.early_refresh = true;
        Ok(())
    })
}

/// K-FAC with steps of fixed KL.
fn fixed_kl(s: &Setting, c: &Context) -> Result<Optimizer> {
    let params = Params {
        damping: Damping::Eigenvalue(s.number("damping")?),
        fisher: fisher(s, c)?,
        stat_decay: s.number("stat_decay")?,
        ..Params::k_fac(c.tape).fixed_kl(s.number("kl_target")?)
    };
    natural(params, s, c)
}

/// Two rates alone, at learning rates and dampings as K-FAC's.
fn two_rate(s: &Setting, c: &Context) -> Result<Optimizer> {
    let (model_decay, wake_decay) = (s.number("model_decay")?, s.number("wake_decay")?);
    curved(TwoRate { model_decay, wake_decay, ..Default::default() }, s, c, |params| {
        params.step_rule = StepRule::LearningRate;
        params.average = None;
        params.early_refresh = false;
        Ok(())
    })
}

/// The crate's recommended optimizer, as it comes.
fn kld_wrm(s: &Setting, c: &Context) -> Result<Optimizer> {
    let step = AdaptiveKl { initial: s.number("kl_target")?, ..AdaptiveKl::default() };
    let params = Params::kld_wrm(c.tape).adaptive_kl(step);
    natural(Params { fisher: seeded(params.fisher, c.seed), ..params }, s, c)
}

fn fisher(s: &Setting, c: &Context) -> Result<Fisher> {
    match s.choice("fisher")? {
        "sampled" => Ok(Fisher::Sampled { draws: 1, seed: c.seed }),
        "empirical" => Ok(Fisher::Empirical),
        other => bail!("fisher {other}: expected sampled or empirical"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use kronwake::nn::{VarBuilder, linear};

    #[test]
    fn every_method_is_built_from_its_random_settings() {
        for method in METHODS {
            for index in 0..10 {
                let (vars, tape) = (VarMap::new(), Tape::new());
                tape.build(|| linear(3, 2, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)))
                    .unwrap();
                let every = Every { factors: 30, inverses: 30 };
                let context = Context { vars: &vars, tape: &tape, head: "fc9.".into(), every, seed: 1 };
                let setting = Setting::random(method.knobs(), 0, index);
                let built = (method.build)(&setting, &context).unwrap();
                let share = match method.name {
                    "kfac-momentum" => 1.0 - setting.number("momentum").unwrap(),
                    "so" | "q" | "qe" => 1.0 / (1.0 - setting.number("wake_decay").unwrap()),
                    _ => 1.0,
                };
                // Where a divergence decides, the rate is the schedule's fraction of it.
                let expected = setting.number("lr").map_or(1.0, |lr| lr * share);
                assert!((built.learning_rate() / expected - 1.0).abs() < 1e-12, "{}", method.name);
            }
            let mut names: Vec<_> = method.knobs().map(|knob| knob.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), method.knobs().count(), "{}: a knob twice", method.name);
        }
        assert!(method("lbfgs").unwrap_err().starts_with("expected one of sgd, adamw, kfac"));
    }
}
