//! One interface to the optimizers of this example.

use super::args::{Args, Choice};
use super::first_order::{FirstOrder, Rule};
use candle_core::{DType, Result, Tensor, Var, backprop::GradStore, bail};
use kronwake::nn::VarMap;
use kronwake::optim::{
    Decay, KFacRule, LossScale, Natural, NonFinite, Optimizer, Params, So, TwoRate, WakeRule, clip_gradients,
};
use kronwake::tape::{Fisher, Likelihood, Tape};
use std::path::Path;

/// An optimizer of `vars`, with what is done to its gradients first.
pub struct Tuner {
    inner: Box<dyn Inner>,
    vars: Vec<Var>,
    tape: Tape,
    clip: Option<f64>,
    /// For f16.
    scale: Option<LossScale>,
}

impl Tuner {
    /// The optimizer `choice` of all of `vars`, which belong to a model that was built on `tape`.
    pub fn new(choice: Choice, args: &Args, vars: &VarMap, tape: &Tape) -> Result<Self> {
        if args.clip.is_some() && args.dtype == DType::F16 {
            bail!("--clip does not go with --dtype f16, whose gradients are scaled; bf16 needs no scale")
        }
        let lr = args.lr(choice);
        let inner: Box<dyn Inner> = match choice {
            Choice::So => Box::new(natural::<So>(args, lr, vars, tape)?),
            Choice::Kfac => Box::new(natural::<KFacRule>(args, lr, vars, tape)?),
            Choice::Kldwrm => Box::new(natural::<TwoRate>(args, lr, vars, tape)?),
            Choice::Adamw => Box::new(FirstOrder::new(vars, Rule::AdamW, lr, args.weight_decay)?),
            Choice::Compare => bail!("compare is not one optimizer"),
        };
        let scale = (args.dtype == DType::F16).then(LossScale::default);
        Ok(Self { inner, vars: vars.all_vars(), tape: tape.clone(), clip: args.clip, scale })
    }

    /// Bytes of its state.
    pub fn bytes(&self) -> usize {
        self.inner.bytes(&self.vars)
    }

    /// Which parameter is in which block of the curvature, as a table.
    pub fn summary(&self) -> Option<String> {
        self.inner.summary()
    }

    /// Steps taken, those before a resume included.
    pub fn steps(&self) -> usize {
        self.inner.steps()
    }

    pub fn lr(&self) -> f64 {
        self.inner.lr()
    }

    /// A step on a batch's logits and mean loss at the learning rate `lr`; `mask`: which of its positions count.
    pub fn step(&mut self, logits: &Tensor, loss: &Tensor, mask: Option<&Tensor>, lr: f64) -> Result<()> {
        self.inner.set_lr(lr);
        self.tape.mask(mask)?;
        self.inner.observe(logits)?;
        if let Some(scale) = &mut self.scale {
            return self.inner.scaled(loss, &self.vars, scale);
        }
        let mut grads = loss.backward()?;
        if let Some(norm) = self.clip {
            clip_gradients(&mut grads, &self.vars, norm)?;
        }
        self.inner.step(&grads)
    }

    /// Runs `f` at the averaged parameters, where the optimizer keeps such.
    pub fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.inner.at_average(f)
    }

    /// Makes them the model's.
    pub fn adopt_average(&mut self) -> Result<()> {
        self.inner.adopt_average()
    }

    /// Writes parameters and state.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.inner.save(path)
    }

    /// Sets them.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        self.inner.resume(path)
    }
}

/// The optimizers' own part.
trait Inner {
    fn summary(&self) -> Option<String>;
    fn bytes(&self, vars: &[Var]) -> usize;
    fn steps(&self) -> usize;
    fn lr(&self) -> f64;
    fn set_lr(&mut self, lr: f64);
    fn observe(&mut self, logits: &Tensor) -> Result<()>;
    fn step(&mut self, grads: &GradStore) -> Result<()>;
    /// A step by way of the scaled loss, or none.
    fn scaled(&mut self, loss: &Tensor, vars: &[Var], scale: &mut LossScale) -> Result<()>;
    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    fn adopt_average(&mut self) -> Result<()>;
    fn save(&self, path: &Path) -> Result<()>;
    fn resume(&mut self, path: &Path) -> Result<()>;
}

/// The defaults of the rule with what the command line says.
fn natural<R: WakeRule>(args: &Args, lr: f64, vars: &VarMap, tape: &Tape) -> Result<Natural<R>> {
    let default = Params::<R>::on(tape);
    let fisher = match default.fisher {
        Fisher::Sampled { draws, .. } => Fisher::Sampled { draws, seed: args.seed },
        other => other,
    };
    let params = Params {
        lr,
        weight_decay: args.weight_decay,
        decay: Decay::Decoupled,
        fisher,
        step_rule: args.step_rule(default.step_rule),
        kl_clip: args.kl_clip(default.step_rule).or(default.kl_clip),
        // Adapters start from zero: their curvature grows fast.
        early_refresh: default.early_refresh || args.lora.is_some(),
        // A scaled loss overflows now and then.
        non_finite: if args.dtype == DType::F16 { NonFinite::Skip } else { NonFinite::Error },
        ..default
    };
    Natural::from_varmap(vars, params)
}

impl<R: WakeRule> Inner for Natural<R> {
    fn summary(&self) -> Option<String> {
        Some(Natural::summary(self).to_string())
    }

    fn bytes(&self, _: &[Var]) -> usize {
        Natural::summary(self).bytes()
    }

    fn steps(&self) -> usize {
        Natural::steps(self)
    }

    fn lr(&self) -> f64 {
        Optimizer::learning_rate(self)
    }

    fn set_lr(&mut self, lr: f64) {
        Optimizer::set_learning_rate(self, lr);
    }

    fn observe(&mut self, logits: &Tensor) -> Result<()> {
        Natural::observe(self, logits, Likelihood::Categorical)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        Optimizer::step(self, grads)
    }

    fn scaled(&mut self, loss: &Tensor, _: &[Var], scale: &mut LossScale) -> Result<()> {
        self.backward_step_scaled(loss, scale).map(drop)
    }

    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Natural::at_average(self, f)
    }

    fn adopt_average(&mut self) -> Result<()> {
        Natural::adopt_average(self)
    }

    fn save(&self, path: &Path) -> Result<()> {
        Natural::save(self, path)
    }

    fn resume(&mut self, path: &Path) -> Result<()> {
        Natural::resume(self, path)
    }
}

impl Inner for FirstOrder {
    fn summary(&self) -> Option<String> {
        None
    }

    fn bytes(&self, vars: &[Var]) -> usize {
        let of = |var: &Var| match var.dtype() {
            DType::F64 => 16 * var.elem_count(),
            DType::F32 => 8 * var.elem_count(),
            // With the values in f32.
            _ => 12 * var.elem_count(),
        };
        vars.iter().map(of).sum()
    }

    fn steps(&self) -> usize {
        self.step
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn set_lr(&mut self, lr: f64) {
        self.lr = lr;
    }

    fn observe(&mut self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        self.update(grads)
    }

    fn scaled(&mut self, loss: &Tensor, vars: &[Var], scale: &mut LossScale) -> Result<()> {
        match scale.backward(loss, vars)? {
            Some(grads) => self.update(&grads),
            None => {
                self.step += 1;
                Ok(())
            }
        }
    }

    fn at_average(&mut self, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        f()
    }

    fn adopt_average(&mut self) -> Result<()> {
        Ok(())
    }

    fn save(&self, path: &Path) -> Result<()> {
        FirstOrder::save(self, path)
    }

    fn resume(&mut self, path: &Path) -> Result<()> {
        FirstOrder::resume(self, path)
    }
}
