//! The optimizers of all programs, chosen at run time.

use candle_core::{D, Result, Tensor, backprop::GradStore};
use kronwake::nn::VarMap;
use kronwake::nn::init;
use kronwake::optim::{
    AdamW, Grafting, Group, Groups, LossScale, Muon, NaturalGradient, NonFinite, Optimizer as _, Params,
    ParamsAdamW, ParamsMuon, ParamsSgd, ParamsShampoo, ParamsSoap, Sgd, Shampoo, ShampooFactors, Soap,
    UpdateRule,
};
use kronwake::parallel::{Placement, World};
use kronwake::penalty::Constraints;
use kronwake::tape::{Fisher, Likelihood};
use std::path::Path;
use tracing::info_span;

/// One of the library's optimizers.
pub enum Optimizer {
    Sgd(Sgd),
    AdamW(AdamW),
    Muon(Muon),
    Soap(Soap),
    Shampoo(Shampoo),
    Natural(Box<NaturalGradient>),
}

/// A batch that has been through the model.
pub struct Pass<'a> {
    /// `[n, classes]`
    pub logits: &'a Tensor,
    /// The mean over the batch.
    pub loss: &'a Tensor,
    /// The logits at the parameters' current values, without dropout.
    pub logits_now: &'a dyn Fn() -> Result<Tensor>,
    /// The loss at the parameters' current values, with the dropout of `loss`.
    pub loss_now: &'a dyn Fn() -> Result<Tensor>,
}

/// What all of them have under the same name.
macro_rules! each {
    ($of:expr, $one:ident => $what:expr) => {
        match $of {
            Optimizer::Sgd($one) => $what,
            Optimizer::AdamW($one) => $what,
            Optimizer::Muon($one) => $what,
            Optimizer::Soap($one) => $what,
            Optimizer::Shampoo($one) => $what,
            Optimizer::Natural($one) => $what,
        }
    };
}

impl Optimizer {
    pub fn sgd(vars: &VarMap, params: ParamsSgd) -> Result<Self> {
        Sgd::from_varmap(vars, params).map(Self::Sgd)
    }

    pub fn adamw(vars: &VarMap, params: ParamsAdamW) -> Result<Self> {
        AdamW::from_varmap(vars, params).map(Self::AdamW)
    }

    /// `ends` get AdamW; see [`ends`].
    pub fn muon(vars: &VarMap, params: ParamsMuon, ends: Groups) -> Result<Self> {
        Muon::from_varmap_with(vars, params, ends).map(Self::Muon)
    }

    /// `ends` get AdamW; see [`ends`].
    pub fn soap(vars: &VarMap, params: ParamsSoap, ends: Groups) -> Result<Self> {
        Soap::from_varmap_with(vars, params, ends).map(Self::Soap)
    }

    /// `ends` get AdamW; see [`ends`].
    pub fn shampoo(vars: &VarMap, params: ParamsShampoo, ends: Groups) -> Result<Self> {
        Shampoo::from_varmap_with(vars, params, ends).map(Self::Shampoo)
    }

    /// The same, leaving out steps of gradients that are not finite. One with curvature has that in its options.
    pub fn skipping(mut self) -> Self {
        match &mut self {
            Self::Sgd(one) => one.non_finite = NonFinite::Skip,
            Self::AdamW(one) => one.non_finite = NonFinite::Skip,
            Self::Muon(one) => one.non_finite = NonFinite::Skip,
            Self::Soap(one) => one.non_finite = NonFinite::Skip,
            Self::Shampoo(one) => one.non_finite = NonFinite::Skip,
            Self::Natural(_) => {}
        }
        self
    }

    /// Of parameters that belong to a model which was built on the tape of `params`.
    pub fn natural(vars: &VarMap, params: Params) -> Result<Self> {
        Ok(Self::Natural(Box::new(NaturalGradient::from_varmap(vars, params)?)))
    }

    /// Which parameter is in which block of the curvature, as a table.
    pub fn summary(&self) -> Option<String> {
        match self {
            Self::Natural(natural) => Some(natural.summary().to_string()),
            _ => None,
        }
    }

    /// Bytes of its state.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Sgd(sgd) => sgd.bytes(),
            Self::AdamW(adamw) => adamw.bytes(),
            Self::Muon(muon) => muon.bytes(),
            Self::Soap(soap) => soap.bytes(),
            Self::Shampoo(shampoo) => shampoo.bytes(),
            Self::Natural(natural) => natural.summary().bytes(),
        }
    }

    /// Ties it to those of the other processes.
    pub fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        let placement = match (&*self, placement) {
            // One that compares with others on the same command line, and has no inverses to divide.
            (first_order, Placement::Gathered) if !matches!(first_order, Self::Natural(_)) => {
                Placement::Replicated
            }
            (_, placement) => placement,
        };
        each!(self, one => one.share(world, placement))
    }

    /// The step of a process that has no rows of a batch.
    pub fn step_without_rows(&mut self) -> Result<()> {
        each!(self, one => one.step_without_rows())
    }

    /// [`Self::observe`] of a process that has no rows of a batch.
    pub fn observe_without_rows(&mut self) -> Result<()> {
        match self {
            Self::Natural(natural) => natural.observe_without_rows(),
            first_order => {
                first_order.count_terms(0.0);
                Ok(())
            }
        }
    }

    /// Makes gradients the means of all processes.
    pub fn mean_gradients(&mut self, grads: &mut GradStore) -> Result<()> {
        each!(self, one => one.mean_gradients(grads))
    }

    /// Steps taken, those before a resume included.
    pub fn steps(&self) -> usize {
        each!(self, one => one.steps())
    }

    pub fn learning_rate(&self) -> f64 {
        each!(self, one => one.learning_rate())
    }

    pub fn set_learning_rate(&mut self, lr: f64) {
        each!(self, one => one.set_learning_rate(lr));
    }

    /// One step; whether it was taken, and not left out because a number in it was not finite.
    pub fn step(&mut self, pass: &Pass) -> Result<bool> {
        if let Self::Natural(natural) = self {
            return natural_step(natural, pass);
        }
        let before = each!(self, one => one.skipped());
        self.observe(pass.logits)?;
        let grads = info_span!("backward").in_scope(|| pass.loss.backward())?;
        info_span!("step").in_scope(|| self.apply(&grads))?;
        Ok(each!(self, one => one.skipped()) == before)
    }

    /// Shows the curvature a batch's logits, and counts its loss terms, before their loss goes to [`Self::apply`] or [`Self::step_scaled`].
    pub fn observe(&mut self, logits: &Tensor) -> Result<()> {
        match self {
            Self::Natural(natural) => natural.observe(logits, Likelihood::Categorical),
            first_order => {
                first_order.count_terms(terms(logits)?);
                Ok(())
            }
        }
    }

    /// Counts the loss terms of a batch; the curvature counts them itself.
    fn count_terms(&mut self, terms: f64) {
        match self {
            Self::Natural(_) => {}
            Self::Sgd(one) => one.count_terms(terms),
            Self::AdamW(one) => one.count_terms(terms),
            Self::Muon(one) => one.count_terms(terms),
            Self::Soap(one) => one.count_terms(terms),
            Self::Shampoo(one) => one.count_terms(terms),
        }
    }

    /// A step by gradients.
    pub fn apply(&mut self, grads: &GradStore) -> Result<()> {
        each!(self, one => one.step(grads))
    }

    /// A step by way of the scaled loss, or none.
    pub fn step_scaled(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<bool> {
        each!(self, one => one.backward_step_scaled(loss, scale))
    }

    /// What `constraints` say of the parameters after the step.
    pub fn constrain(&mut self, constraints: &mut Constraints) -> Result<()> {
        match self {
            Self::Natural(natural) => natural.constrain(constraints),
            _ => constraints.after_step(self.learning_rate()),
        }
    }

    /// Runs `f` at the averaged parameters, where there are such.
    pub fn at_average<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        match self {
            Self::Natural(natural) => natural.at_average(f),
            _ => f(),
        }
    }

    /// Makes the averaged parameters the model's.
    pub fn adopt_average(&mut self) -> Result<()> {
        match self {
            Self::Natural(natural) => natural.adopt_average(),
            _ => Ok(()),
        }
    }

    /// Writes parameters and state.
    pub fn save(&self, path: &Path) -> Result<()> {
        each!(self, one => one.save(path))
    }

    /// Sets parameters and state.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        each!(self, one => one.resume(path))
    }
}

/// The groups of embedding tables and of the layer that makes the outputs, which Muon, SOAP and Shampoo leave to AdamW, as their authors do;
/// those of `patterns` that match a parameter. A training of a part has none of the others.
pub fn ends(vars: &VarMap, patterns: &[String]) -> Result<Groups> {
    let names = init::named(vars)?;
    let group = |pattern: &String| Group { rule: Some(UpdateRule::Adam), ..Group::named(pattern) };
    let groups = patterns.iter().map(group).filter(|group| {
        let one = Groups(vec![group.clone()]);
        names.iter().any(|(name, _)| one.of(name).is_some())
    });
    Ok(Groups(groups.collect()))
}

/// Shampoo's options made KL-Shampoo's. The published one has no grafting; without it the steps of wide layers are far too long while their
/// factors are of low rank, and a fine-tuning of few steps never recovers.
pub fn kl_shampoo(params: ParamsShampoo) -> ParamsShampoo {
    ParamsShampoo { factors: ShampooFactors::KlDivergence, grafting: Grafting::Adam, ..params }
}

/// Loss terms of logits `[.., classes]`.
fn terms(logits: &Tensor) -> Result<f64> {
    Ok((logits.elem_count() / logits.dim(D::Minus1)?.max(1)) as f64)
}

/// [`Optimizer::step`] with curvature.
pub fn natural_step(natural: &mut NaturalGradient, pass: &Pass) -> Result<bool> {
    let before = natural.skipped();
    natural.observe(pass.logits, Likelihood::Categorical)?;
    natural.step_with(pass.loss, Likelihood::Categorical, &mut || (pass.logits_now)())?;
    if natural.wants_loss_after() {
        natural.adapt_damping(&(pass.loss_now)()?)?;
    }
    Ok(natural.skipped() == before)
}

/// A Fisher whose labels, if they are sampled, follow from `seed`.
pub fn seeded(fisher: Fisher, seed: u64) -> Fisher {
    match fisher {
        Fisher::Sampled { draws, .. } => Fisher::Sampled { draws, seed },
        other => other,
    }
}

/// A Fisher in words.
pub fn fisher_in_words(fisher: Fisher) -> String {
    match fisher {
        Fisher::Empirical => "Fisher of the data's labels".into(),
        Fisher::Sampled { draws: 1, .. } => "Fisher of a sampled label".into(),
        Fisher::Sampled { draws, .. } => format!("Fisher of {draws} sampled labels"),
        Fisher::Exact => "Fisher of all labels".into(),
    }
}
