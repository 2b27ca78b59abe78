//! Optimizers that see gradients alone, to compare with and for what needs no curvature: gradient descent with momentum, AdamW, Muon, SOAP and
//! Shampoo. One optimizer, [`FirstOrder`], keeps state and files; a rule is its options, which say what a step does with a gradient.

mod adamw;
mod file;
mod muon;
mod owned;
mod sgd;
mod shampoo;
mod sides;
mod slot;
mod soap;
mod together;
mod update;

pub use muon::{MuonScale, ParamsMuon};
pub use sgd::ParamsSgd;
pub use shampoo::{Grafting, ParamsShampoo, ShampooFactors};
pub use soap::{ParamsSoap, SoapBasis};
pub use update::{FallbackAdam, Update};

use super::numbers::numbers;
use super::share::Share;
use super::state::AdamRate;
use super::step::gradients::Refusal;
use super::{Groups, LossScale, NonFinite, ParamsAdamW};
use crate::curvature::wide_dtype;
use crate::stack::deep;
use candle_core::{DType, Result, Tensor, Var, backprop::GradStore, bail};
use candle_nn::{Optimizer, VarMap};
use rayon::prelude::*;
use slot::{Slot, Way};
use update::At;

/// Gradient descent with momentum, as PyTorch's: `v <- momentum v + g + weight_decay p`, then `p <- p - lr v`.
pub type Sgd = FirstOrder<ParamsSgd>;

/// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019), as candle_nn's, which is `nn::AdamW` here.
pub type AdamW = FirstOrder<ParamsAdamW>;

/// Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): momentum, orthogonalized.
///
/// Of a matrix `[rows, columns]`, with `G` its gradient,
///
/// ```text
/// B <- momentum B + G
/// M = G + momentum B              (nesterov; else B)
/// O = U p(S) V^T, M / |M| = U S V^T
/// W <- (1 - lr weight_decay) W - lr scale O
/// ```
///
/// where `p`, five steps of a Newton-Schulz iteration, takes singular values to about 1, and `scale` is [`MuonScale`]'s. Weights of more
/// dimensions, `[out, ..]`, are the matrices `[out, rest]`. Vectors and scalars get AdamW. As published, embedding tables and the layer that
/// makes the outputs get it too: a group says so.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::nn::VarMap;
/// use kronwake::optim::{Group, Groups, Muon, Optimizer, ParamsMuon, UpdateRule};
///
/// let (vars, w, head) = (VarMap::new(), Var::zeros((3, 2), candle_core::DType::F32, &Device::Cpu)?, Var::new(&[[1f32, 2.]], &Device::Cpu)?);
/// vars.data().lock().unwrap().extend([("hidden.weight".into(), w.clone()), ("head.weight".into(), head.clone())]);
/// let groups = Groups(vec![Group { rule: Some(UpdateRule::Adam), ..Group::named("head.*") }]);
/// let mut opt = Muon::from_varmap_with(&vars, ParamsMuon { lr: 0.03, ..Default::default() }, groups)?;
/// let target = Tensor::new(&[[1f32, 0.], [0., 1.], [0.5, 0.]], &Device::Cpu)?;
/// for step in 0..300 {
///     // Steps have the length that the rate says, however small the gradient is: the rate has to fall.
///     opt.set_learning_rate(0.03 * (1. - f64::from(step) / 300.));
///     opt.backward_step(&((w.as_tensor() - &target)?.sqr()?.sum_all()? + head.sqr()?.sum_all()?)?)?;
/// }
/// assert!((w.as_tensor() - &target)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.05);
/// # candle_core::Result::Ok(())
/// ```
pub type Muon = FirstOrder<ParamsMuon>;

/// SOAP (Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024, algorithm 3): Adam in the eigenbases of Shampoo's factors.
///
/// Of a matrix, with `G` its gradient and `Q_L`, `Q_R` the bases,
///
/// ```text
/// M <- beta1 M + (1 - beta1) G
/// V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2
/// W <- (1 - lr weight_decay) W - lr Q_L [Q_L^T M Q_R / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)] Q_R^T
/// L <- shampoo_beta L + (1 - shampoo_beta) G G^T,    R likewise of G^T G
/// ```
///
/// and every `period` steps, at its end, `Q_L` and `Q_R` are renewed from `L` and `R` ([`SoapBasis`]). The first step makes the bases alone, as
/// the authors' program has it, so that no gradient is measured in a basis that is its own: matrices do not move in it, and `t` counts from the
/// second. Weights of more dimensions, `[out, ..]`, are the matrices `[out, rest]`. Vectors and scalars get AdamW, from the first step on.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::optim::{Optimizer, ParamsSoap, Soap};
///
/// let w = Var::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let mut opt = Soap::new(vec![w.clone()], ParamsSoap { lr: 0.05, weight_decay: 0., period: 1, ..Default::default() })?;
/// let target = Tensor::new(&[[1f32, 2.], [2., -1.]], &Device::Cpu)?;
/// for _ in 0..300 {
///     opt.backward_step(&(w.as_tensor() - &target)?.sqr()?.sum_all()?)?;
/// }
/// assert!((w.as_tensor() - &target)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.1);
/// # candle_core::Result::Ok(())
/// ```
pub type Soap = FirstOrder<ParamsSoap>;

/// Shampoo (Gupta, Koren and Singer, "Shampoo: preconditioned stochastic tensor optimization", ICML 2018) with grafting (Anil et al., "Scalable
/// second order optimization for deep learning", 2020) and means in place of sums, as Shi et al. 2023 (arXiv 2309.06497) write it.
///
/// Of a matrix, with `G` its gradient,
///
/// ```text
/// L <- beta2 L + (1 - beta2) G G^T,    R likewise of G^T G
/// M <- beta1 M + (1 - beta1) G
/// D = L'^-p [M / (1 - beta1^t)] R'^-p,    X' = X / (1 - beta2^t) + eps max(eigenvalues) I,    p = 1/4
/// W <- (1 - lr weight_decay) W - lr |A| / |D| D
/// ```
///
/// with `A` the step whose length is taken ([`Grafting`]). The roots are renewed at each of the first `period` steps, then every
/// `period` steps. With
/// [`ShampooFactors::KlDivergence`] it is KL-Shampoo. Weights of more dimensions, `[out, ..]`, are the matrices `[out, rest]`. Vectors and
/// scalars get AdamW.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::optim::{Optimizer, ParamsShampoo, Shampoo};
///
/// let w = Var::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let mut opt = Shampoo::new(vec![w.clone()], ParamsShampoo { lr: 0.02, period: 1, ..Default::default() })?;
/// let target = Tensor::new(&[[1f32, 0.5], [0.5, -1.]], &Device::Cpu)?;
/// for _ in 0..300 {
///     opt.backward_step(&(w.as_tensor() - &target)?.sqr()?.sum_all()?)?;
/// }
/// assert!((w.as_tensor() - &target)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.1);
/// # candle_core::Result::Ok(())
/// ```
pub type Shampoo = FirstOrder<ParamsShampoo>;

/// An optimizer of gradients alone, see [`Sgd`], [`AdamW`], [`Muon`], [`Soap`] and [`Shampoo`].
///
/// Beside candle_nn's of the same rule it can be saved and resumed bit for bit, has [`Groups`], refuses Vars that got no gradient and gradients
/// that are not finite, and keeps f32 values and averages behind f16 and bf16 parameters. A parameter that something else has changed since the
/// last step, such as a projection, goes on from its new value.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::nn::VarMap;
/// use kronwake::optim::{AdamW, Optimizer, ParamsAdamW};
///
/// let (vars, w) = (VarMap::new(), Var::new(&[3f32, -2.], &Device::Cpu)?);
/// vars.data().lock().unwrap().insert("w".into(), w.clone());
/// let mut opt = AdamW::from_varmap(&vars, ParamsAdamW { lr: 0.1, ..Default::default() })?;
/// for _ in 0..200 {
///     opt.backward_step(&(w.as_tensor() - 1.)?.sqr()?.sum_all()?)?;
/// }
/// assert!(w.to_vec1::<f32>()?.iter().all(|w| (w - 1.).abs() < 0.05));
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct FirstOrder<P> {
    params: P,
    /// What happens on NaN or infinite gradients; [`NonFinite::Error`] at first.
    pub non_finite: NonFinite,
    steps: usize,
    /// Those of `steps` that were left out.
    skipped: usize,
    /// AdamW's rate within another rule, where it is its own.
    adam: Option<(AdamRate, f64)>,
    slots: Vec<Slot>,
    /// The tie to the optimizers of other processes, where there are some.
    shared: Option<Share>,
    /// Who of the processes alone holds the state of each slot; empty where all hold all.
    owners: Vec<usize>,
}

/// A parameter and its state after a step.
type Next = (Tensor, Vec<Tensor>);

impl<P: Update> FirstOrder<P> {
    /// An optimizer of all Vars of `varmap`, under their names.
    ///
    /// # Errors
    /// When an option is out of its range, or a Var is not of a floating point type.
    pub fn from_varmap(varmap: &VarMap, params: P) -> Result<Self> {
        Self::from_varmap_with(varmap, params, Groups::default())
    }

    /// The same with groups: their rates, decays and frozen Vars hold for all rules, and the rule
    /// [`UpdateRule::Adam`](super::UpdateRule::Adam) for those that have an AdamW beside.
    ///
    /// # Errors
    /// As [`from_varmap`](Self::from_varmap). When a group matches no Var, has a senseless value, or asks for what is
    /// [`NaturalGradient`](super::NaturalGradient)'s alone: `optional`, `factor_limit` and the rules with curvature.
    pub fn from_varmap_with(varmap: &VarMap, params: P, groups: Groups) -> Result<Self> {
        let mut named: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("first-order: the VarMap's lock is poisoned"),
        };
        named.sort_by(|a, b| a.0.cmp(&b.0));
        Self::named(named, params, &groups)
    }

    fn named(named: Vec<(String, Var)>, mut params: P, groups: &Groups) -> Result<Self> {
        params.check()?;
        groups.check(&named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>())?;
        let slots = named.into_iter().map(|(name, var)| Slot::new(&params, name, var, groups));
        let slots = slots.collect::<Result<_>>()?;
        let lr = *params.lr();
        let adam = params.adam_lr().map(|rate| (AdamRate::new(rate, lr), if lr == 0.0 { 0.0 } else { rate }));
        let non_finite = NonFinite::default();
        Ok(Self { params, non_finite, steps: 0, skipped: 0, adam, slots, shared: None, owners: vec![] })
    }

    /// The options.
    pub fn params(&self) -> &P {
        &self.params
    }

    /// Steps taken, those before a [`resume`](Self::resume) and those that were left out included.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// How many of them were left out, by a loss scale or by [`NonFinite::Skip`].
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Bytes of the state: averages, factors and their bases or roots, and values in f32 of parameters in f16 and bf16.
    pub fn bytes(&self) -> usize {
        let tensors = self.slots.iter().flat_map(|slot| slot.state.iter().chain(&slot.wide));
        tensors.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// [`backward_step`](Optimizer::backward_step) by way of a scaled loss, for models in f16. Whether there was a step: none is taken, but
    /// counted, where a gradient overflows.
    ///
    /// # Errors
    /// As [`LossScale::backward`], and when a Var got no gradient.
    pub fn backward_step_scaled(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<bool> {
        let local = self.scaled_gradients(loss, scale);
        let (grads, finite) = self.all_finite(local, scale.scale)?;
        scale.follow(finite);
        match finite {
            true => self.advance(Ok(grads))?,
            false => self.leave_out(),
        }
        Ok(finite)
    }

    fn scaled_gradients(&self, loss: &Tensor, scale: &LossScale) -> Result<(Vec<Option<Tensor>>, bool)> {
        if self.has_no_rows() {
            return Ok((self.no_gradients(), true));
        }
        let scaled = scale.scaled(loss)?;
        let grads = self.picked(&deep(|| scaled.backward())?)?;
        let (grads, finite) = scale.divided(grads.into_iter().flatten().collect())?;
        Ok((grads.into_iter().map(Some).collect(), finite))
    }

    fn leave_out(&mut self) {
        self.forget();
        self.steps += 1;
        self.skipped += 1;
    }

    /// The parameter and the state of a slot after the coming step.
    fn next(&self, slot: &Slot, value: &Tensor, grad: &Tensor, lr: f64) -> Result<Next> {
        let mut at = At {
            name: &slot.name,
            step: self.steps + 1,
            taken: self.steps + 1 - self.skipped,
            lr: lr * slot.lr_scale,
            weight_decay: slot.weight_decay.unwrap_or(self.params.weight_decay()),
        };
        match (slot.way, self.params.adam()) {
            (Way::Adam, Some(adam)) => {
                at.lr = self.adam.map_or(lr, |(_, rate)| rate) * slot.lr_scale;
                adam.update(&at, value, grad, &slot.state)
            }
            _ => self.params.update(&at, value, grad, &slot.state),
        }
    }

    /// The gradients of what is trained, in the order of the slots.
    fn picked(&self, grads: &GradStore) -> Result<Vec<Option<Tensor>>> {
        let gradient = |slot: &Slot| match grads.get(&slot.var) {
            Some(grad) => grad.detach().to_dtype(wide_dtype(slot.var.dtype())).map(Some),
            None => bail!("{} got no gradient: leave it out of the optimizer's VarMap, or use it", slot.name),
        };
        self.trained().map(gradient).collect()
    }

    fn trained(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.way != Way::Frozen)
    }

    /// A step on this process's gradients, and on what the others have.
    fn advance(&mut self, local: Result<Vec<Option<Tensor>>>) -> Result<()> {
        let incoming = self.incoming(local);
        self.forget();
        match incoming {
            Ok(grads) => self.take(grads),
            Err(Refusal::NonFinite(what)) => match self.non_finite {
                NonFinite::Error => bail!("{what}"),
                NonFinite::Skip => {
                    self.leave_out();
                    Ok(())
                }
            },
            Err(Refusal::Failed(error)) => Err(error),
        }
    }

    /// Refuses gradients that are not finite.
    fn check_finite(&self, grads: &[Option<Tensor>]) -> std::result::Result<(), Refusal> {
        let sum = |grad: &Tensor| grad.sum_all()?.to_dtype(DType::F64);
        let sums = grads.iter().flatten().map(sum).collect::<Result<Vec<_>>>()?;
        for ((slot, grad), sum) in self.trained().zip(grads.iter().flatten()).zip(numbers(&sums)?) {
            // The sum of finite numbers may be infinite; that of their products with 0 is not.
            if !sum.is_finite() && !numbers(&[(grad * 0.0)?.sum_all()?])?[0].is_finite() {
                let what = format!("the gradient of {} has NaN or infinite elements", slot.name);
                return Err(Refusal::NonFinite(what));
            }
        }
        Ok(())
    }

    /// What a step on finite gradients leads to.
    fn all_next(&self, grads: &[Option<Tensor>]) -> Result<Vec<Next>> {
        let lr = self.learning_rate();
        let given = self.trained().zip(grads).filter_map(|(slot, grad)| Some((slot, grad.as_ref()?)));
        let given = given.map(|(slot, grad)| Ok((slot, slot.value()?, grad))).collect::<Result<Vec<_>>>()?;
        let next = |(slot, value, grad): &(&Slot, Tensor, &Tensor)| self.next(slot, value, grad, lr);
        let on_host = given.iter().all(|(_, value, _)| value.device().is_cpu());
        match on_host && given.len() > 1 {
            true => given.par_iter().map(next).collect(),
            false => given.iter().map(next).collect(),
        }
    }

    /// The step on finite gradients, or on what this process could not make of the sums.
    fn take(&mut self, grads: Result<Vec<Option<Tensor>>>) -> Result<()> {
        let next = grads.and_then(|grads| self.all_next(&grads));
        let next = if self.owners.is_empty() { self.all_agree(next)? } else { self.with_owners(next)? };
        let trained = self.slots.iter_mut().filter(|slot| slot.way != Way::Frozen);
        for (slot, (value, state)) in trained.zip(next) {
            slot.set(value, state)?;
        }
        self.steps += 1;
        Ok(())
    }
}

impl<P: Update> Optimizer for FirstOrder<P> {
    type Config = P;

    /// Vars without names are called by their places, from `0`.
    fn new(vars: Vec<Var>, params: P) -> Result<Self> {
        let named = vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var));
        Self::named(named.collect(), params, &Groups::default())
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let local = if self.has_no_rows() { Ok(self.no_gradients()) } else { self.picked(grads) };
        self.advance(local)
    }

    fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        let local = match self.has_no_rows() {
            true => Ok(self.no_gradients()),
            false => deep(|| loss.backward()).and_then(|grads| self.picked(&grads)),
        };
        self.advance(local)
    }

    fn learning_rate(&self) -> f64 {
        *self.params.clone().lr()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        *self.params.lr() = lr;
        if let Some((rule, rate)) = &mut self.adam {
            let followed = rule.follow(lr);
            // At a learning rate of 0 nothing moves.
            *rate = if lr == 0.0 { 0.0 } else { followed };
        }
    }
}

#[cfg(test)]
mod tests;
