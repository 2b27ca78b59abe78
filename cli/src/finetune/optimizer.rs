//! The optimizers as the command line asks for them, and what is done to gradients first.

use super::args::Args;
use crate::optimizer::{self, Optimizer, seeded};
use crate::values::Choice;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kronwake::curvature::Damping;
use kronwake::nn::VarMap;
use kronwake::optim::{
    Decay, FallbackAdam, Groups, LossScale, NonFinite, Params, ParamsAdamW, ParamsMuon, ParamsSgd,
    ParamsShampoo, ParamsSoap, StepDivergence, Wake, clip_gradients,
};
use kronwake::tape::{Likelihood, Tape, Terms};

/// An optimizer with what is done to its gradients.
pub struct Tuner {
    pub optimizer: Optimizer,
    vars: Vec<Var>,
    tape: Tape,
    clip: Option<f64>,
    /// For f16.
    scale: Option<LossScale>,
    /// Which steps are measured.
    measure_every: Option<usize>,
}

impl Tuner {
    /// The optimizer `choice` of all of `vars`, which belong to a model that was built on `tape`; `ends` are the patterns of its embedding
    /// tables and of the layer that makes the outputs.
    pub fn new(choice: Choice, args: &Args, vars: &VarMap, tape: &Tape, ends: &[String]) -> Result<Self> {
        if args.clip.is_some() && args.dtype == DType::F16 {
            bail!("--clip does not go with --dtype f16, whose gradients are scaled; bf16 needs no scale")
        }
        let optimizer = match choice.wake() {
            Some(wake) => Optimizer::natural(vars, params(wake, args, args.lr(choice), tape))?,
            None => first_order(choice, args, vars, optimizer::ends(vars, ends)?)?,
        };
        let scale = (args.dtype == DType::F16).then(LossScale::default);
        let (vars, tape) = (vars.all_vars(), tape.clone());
        Ok(Self { optimizer, vars, tape, clip: args.clip, scale, measure_every: args.measure_every })
    }

    /// The step of a process that has no rows of a batch.
    pub fn step_without_rows(&mut self, lr: f64) -> Result<()> {
        self.optimizer.set_learning_rate(lr);
        self.optimizer.observe_without_rows()?;
        self.advance(&Tensor::zeros((), DType::F32, &Device::Cpu)?)
    }

    /// A step on a batch's logits and mean loss at the learning rate `lr`; `mask`: which of its positions count. `now` makes the logits anew. What the
    /// step did, where it is one that is measured.
    pub fn step(
        &mut self,
        (logits, loss): (&Tensor, &Tensor),
        mask: Option<&Tensor>,
        lr: f64,
        now: &dyn Fn() -> Result<Tensor>,
    ) -> Result<Option<StepDivergence>> {
        self.optimizer.set_learning_rate(lr);
        self.tape.mask(mask)?;
        self.optimizer.observe(logits)?;
        let nth = self.optimizer.steps() + 1;
        match (&mut self.optimizer, self.measure_every) {
            (Optimizer::Natural(natural), Some(every)) if nth.is_multiple_of(every) => {
                natural.step_measured(loss, Likelihood::Categorical, &Terms::equal(), &mut || now()).map(Some)
            }
            _ => self.advance(loss).map(|()| None),
        }
    }

    fn advance(&mut self, loss: &Tensor) -> Result<()> {
        if let Some(scale) = &mut self.scale {
            return self.optimizer.step_scaled(loss, scale).map(drop);
        }
        let mut grads = loss.backward()?;
        if let Some(norm) = self.clip {
            self.optimizer.mean_gradients(&mut grads)?;
            clip_gradients(&mut grads, &self.vars, norm)?;
        }
        self.optimizer.apply(&grads)
    }
}

/// An optimizer without curvature.
fn first_order(choice: Choice, args: &Args, vars: &VarMap, ends: Groups) -> Result<Optimizer> {
    let (lr, weight_decay) = (args.lr(choice), args.weight_decay);
    let fallback = |default: FallbackAdam| FallbackAdam { lr: args.ends_lr, ..default };
    match choice {
        Choice::Sgd => {
            let default = ParamsSgd::default();
            let momentum = args.momentum.unwrap_or(default.momentum);
            Optimizer::sgd(vars, ParamsSgd { lr, momentum, weight_decay })
        }
        Choice::Muon => {
            let default = ParamsMuon::default();
            let momentum = args.momentum.unwrap_or(default.momentum);
            let fallback_adam = fallback(default.fallback_adam);
            Optimizer::muon(vars, ParamsMuon { lr, momentum, weight_decay, fallback_adam, ..default }, ends)
        }
        Choice::Soap => {
            let default = ParamsSoap::default();
            let beta1 = args.momentum.unwrap_or(default.beta1);
            let beta2 = args.beta2.unwrap_or(default.beta2);
            let period = args.period.unwrap_or(default.period);
            let fallback_adam = fallback(default.fallback_adam);
            Optimizer::soap(
                vars,
                ParamsSoap { lr, beta1, beta2, period, weight_decay, fallback_adam, ..default },
                ends,
            )
        }
        Choice::Shampoo | Choice::KlShampoo => {
            let default = ParamsShampoo::default();
            let beta1 = args.momentum.unwrap_or(default.beta1);
            let beta2 = args.beta2.unwrap_or(default.beta2);
            let period = args.period.unwrap_or(default.period);
            let fallback_adam = fallback(default.fallback_adam);
            let params = ParamsShampoo { lr, beta1, beta2, period, weight_decay, fallback_adam, ..default };
            let kl = choice == Choice::KlShampoo;
            Optimizer::shampoo(vars, if kl { optimizer::kl_shampoo(params) } else { params }, ends)
        }
        Choice::Adamw => {
            let default = ParamsAdamW::default();
            let beta1 = args.momentum.unwrap_or(default.beta1);
            let beta2 = args.beta2.unwrap_or(default.beta2);
            Optimizer::adamw(vars, ParamsAdamW { lr, beta1, beta2, weight_decay, ..default })
        }
        other => bail!("{} is not one optimizer of gradients alone", other.name()),
    }
}

/// The defaults of the wake with what the command line says.
fn params(wake: Wake, args: &Args, lr: f64, tape: &Tape) -> Params {
    let default = Params::of(wake, tape);
    Params {
        lr,
        weight_decay: args.weight_decay,
        decay: Decay::Decoupled,
        fisher: seeded(default.fisher, args.seed),
        step_rule: args.step_rule(default.step_rule),
        kl_clip: args.kl_clip(default.step_rule).or(default.kl_clip),
        damping: args.damping.map_or(default.damping, Damping::Eigenvalue),
        factor_limit: args.factors.unwrap_or(default.factor_limit),
        orthogonal: default.orthogonal.map(|usual| args.orthogonal.unwrap_or(usual)),
        orthogonal_side: args.orthogonal_side.unwrap_or(default.orthogonal_side),
        // Adapters start from zero: their curvature grows fast.
        early_refresh: default.early_refresh || args.lora.is_some(),
        // A scaled loss overflows now and then.
        non_finite: if args.dtype == DType::F16 { NonFinite::Skip } else { NonFinite::Error },
        ..default
    }
}
