//! Optimizers that see gradients alone, as baselines and for what needs no curvature: gradient descent with momentum, and AdamW.

use super::{LossScale, ParamsAdamW};
use crate::checkpoint::Checkpoint;
use crate::ops::simd::vectorized;
use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore, bail};
use candle_nn::{Optimizer, VarMap};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// Options of [`Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsSgd {
    /// Learning rate; 0.01.
    pub lr: f64,
    /// How much of the last direction stays in the next, in [0, 1); 0.9.
    pub momentum: f64,
    /// What is added to the gradient, times the parameter; 0.
    pub weight_decay: f64,
}

impl Default for ParamsSgd {
    fn default() -> Self {
        Self { lr: 0.01, momentum: 0.9, weight_decay: 0.0 }
    }
}

/// Gradient descent with momentum, as PyTorch's: `v <- momentum v + g + weight_decay p`, then `p <- p - lr v`.
pub type Sgd = FirstOrder<ParamsSgd>;

/// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019), as candle_nn's, which is `nn::AdamW` here.
pub type AdamW = FirstOrder<ParamsAdamW>;

/// What a step of a [`FirstOrder`] optimizer does with a gradient: implemented by [`ParamsSgd`] and [`ParamsAdamW`].
pub trait Update: Clone {
    /// Averages that are kept for each parameter.
    #[doc(hidden)]
    const AVERAGES: usize;
    #[doc(hidden)]
    fn lr(&mut self) -> &mut f64;
    /// What is wrong with the options.
    #[doc(hidden)]
    fn check(&self) -> Result<()>;
    /// A parameter and its averages after step number `step` (from 1); `averages` has as many as `AVERAGES`.
    #[doc(hidden)]
    fn update(
        &self,
        step: usize,
        value: &Tensor,
        grad: &Tensor,
        averages: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)>;
}

/// An optimizer of gradients alone, see [`Sgd`] and [`AdamW`].
///
/// Beside candle_nn's of the same rule it can be saved and resumed bit for bit, refuses Vars that got no gradient, and keeps f32 values and
/// averages behind f16 and bf16 parameters. A parameter that something else has changed since the last step, such as a projection, goes on
/// from its new value.
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
    steps: usize,
    slots: Vec<Slot>,
}

/// A parameter with its state.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    /// The value in f32, of a parameter in f16 or bf16.
    wide: Option<Tensor>,
    averages: Vec<Tensor>,
}

impl Slot {
    fn new(name: String, var: Var, averages: usize) -> Result<Self> {
        let wide = match var.dtype() {
            DType::F32 | DType::F64 => None,
            DType::F16 | DType::BF16 => Some(var.as_detached_tensor().to_dtype(DType::F32)?),
            other => bail!("{name}: expected a parameter of f64, f32, f16 or bf16, got {other:?}"),
        };
        let zeros = wide.as_ref().unwrap_or(var.as_tensor()).zeros_like()?;
        Ok(Self { name, var, wide, averages: vec![zeros.detach(); averages] })
    }

    /// The parameter as the averages have it.
    fn value(&self) -> Result<Tensor> {
        let value = self.var.as_detached_tensor();
        match &self.wide {
            None => Ok(value),
            // What is rounded is the parameter, but where something else has set it since.
            Some(wide) => {
                wide.to_dtype(value.dtype())?.eq(&value)?.where_cond(wide, &value.to_dtype(DType::F32)?)
            }
        }
    }

    fn set(&mut self, value: Tensor, averages: Vec<Tensor>) -> Result<()> {
        self.var.set(&value.to_dtype(self.var.dtype())?)?;
        self.averages = averages;
        if self.wide.is_some() {
            self.wide = Some(value);
        }
        Ok(())
    }
}

impl<P: Update> FirstOrder<P> {
    /// An optimizer of all Vars of `varmap`, under their names.
    ///
    /// # Errors
    /// When an option is out of its range, or a Var is not of a floating point type.
    pub fn from_varmap(varmap: &VarMap, params: P) -> Result<Self> {
        let mut named: Vec<(String, Var)> = match varmap.data().lock() {
            Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
            Err(_) => bail!("first-order: the VarMap's lock is poisoned"),
        };
        named.sort_by(|a, b| a.0.cmp(&b.0));
        Self::named(named, params)
    }

    fn named(named: Vec<(String, Var)>, params: P) -> Result<Self> {
        params.check()?;
        let slots = named.into_iter().map(|(name, var)| Slot::new(name, var, P::AVERAGES));
        Ok(Self { params, steps: 0, slots: slots.collect::<Result<_>>()? })
    }

    /// The options.
    pub fn params(&self) -> &P {
        &self.params
    }

    /// Steps taken, those before a [`resume`](Self::resume) and those that a loss scale left out included.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Bytes of the state: averages, and values in f32 of parameters in f16 and bf16.
    pub fn bytes(&self) -> usize {
        let tensors = self.slots.iter().flat_map(|slot| slot.averages.iter().chain(&slot.wide));
        tensors.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// [`backward_step`](Optimizer::backward_step) by way of a scaled loss, for models in f16. Whether there was a step: none is taken, but
    /// counted, where a gradient overflows.
    ///
    /// # Errors
    /// As [`LossScale::backward`], and when a Var got no gradient.
    pub fn backward_step_scaled(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<bool> {
        let vars: Vec<Var> = self.slots.iter().map(|slot| slot.var.clone()).collect();
        let grads = scale.backward(loss, &vars)?;
        match &grads {
            Some(grads) => self.step(grads)?,
            None => self.steps += 1,
        }
        Ok(grads.is_some())
    }

    /// Writes parameters, averages and the number of steps as safetensors.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let steps = Tensor::new(self.steps as i64, &Device::Cpu)?;
        let mut tensors = BTreeMap::from([("step".to_string(), steps)]);
        for slot in &self.slots {
            tensors.insert(format!("value.{}", slot.name), slot.value()?);
            for (i, average) in slot.averages.iter().enumerate() {
                tensors.insert(format!("average{i}.{}", slot.name), average.clone());
            }
        }
        Checkpoint { tensors, ..Default::default() }.write(path)
    }

    /// Goes on from what [`save`](Self::save) wrote for the same model, rule and element types: the next steps are those that would have
    /// followed there, bit for bit. Options, the learning rate among them, are not in the file.
    ///
    /// # Errors
    /// When the file cannot be read or does not fit; nothing is changed then.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let file = path.as_ref().display().to_string();
        let mut tensors = Checkpoint::read(path, &Device::Cpu)?.tensors;
        let mut take = |key: &str, like: &Tensor| match tensors.remove(key) {
            Some(t) if t.dims() == like.dims() && t.dtype() == like.dtype() => t.to_device(like.device()),
            Some(t) => {
                let (found, expected) = ((t.dtype(), t.dims()), (like.dtype(), like.dims()));
                bail!("{file}: {key} is {found:?}, expected {expected:?}")
            }
            None => bail!("{file}: {key} is missing: another model or optimizer wrote this file"),
        };
        let steps = take("step", &Tensor::new(0i64, &Device::Cpu)?)?.to_scalar::<i64>()?;
        let mut read = Vec::new();
        for slot in &self.slots {
            let like = slot.wide.as_ref().unwrap_or(slot.var.as_tensor());
            let value = take(&format!("value.{}", slot.name), like)?;
            let averages = (0..P::AVERAGES).map(|i| take(&format!("average{i}.{}", slot.name), like));
            read.push((value, averages.collect::<Result<Vec<_>>>()?));
        }
        if let Some(extra) = tensors.keys().next() {
            bail!("{file}: {extra} has no place here: another model or optimizer wrote this file")
        }
        for (slot, (value, averages)) in self.slots.iter_mut().zip(read) {
            slot.set(value, averages)?;
        }
        self.steps = steps as usize;
        Ok(())
    }
}

impl<P: Update> Optimizer for FirstOrder<P> {
    type Config = P;

    /// Vars without names are called by their places, from `0`.
    fn new(vars: Vec<Var>, params: P) -> Result<Self> {
        Self::named(vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var)).collect(), params)
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let mut next = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let Some(grad) = grads.get(&slot.var) else {
                bail!("{} got no gradient: leave it out of the optimizer's VarMap, or use it", slot.name)
            };
            let value = slot.value()?;
            let grad = grad.detach().to_dtype(value.dtype())?;
            next.push(self.params.update(self.steps + 1, &value, &grad, &slot.averages)?);
        }
        for (slot, (value, averages)) in self.slots.iter_mut().zip(next) {
            slot.set(value, averages)?;
        }
        self.steps += 1;
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        *self.params.clone().lr()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        *self.params.lr() = lr;
    }
}

/// Asserts that an option is a finite number with `fits`.
fn in_range(name: &str, value: f64, fits: bool, expected: &str) -> Result<()> {
    if !(value.is_finite() && fits) {
        bail!("first-order: expected {name} {expected}, got {value}")
    }
    Ok(())
}

impl Update for ParamsSgd {
    const AVERAGES: usize = 1;

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, momentum, weight_decay } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        in_range("momentum", momentum, (0.0..1.0).contains(&momentum), "in [0, 1)")?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")
    }

    fn update(
        &self,
        _: usize,
        value: &Tensor,
        grad: &Tensor,
        averages: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let v = (((&averages[0] * self.momentum)? + grad)? + (value * self.weight_decay)?)?;
        Ok(((value - (&v * self.lr)?)?, vec![v]))
    }
}

impl Update for ParamsAdamW {
    const AVERAGES: usize = 2;

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, beta1, beta2, eps, weight_decay } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        in_range("beta1", beta1, (0.0..1.0).contains(&beta1), "in [0, 1)")?;
        in_range("beta2", beta2, (0.0..1.0).contains(&beta2), "in [0, 1)")?;
        in_range("eps", eps, eps > 0.0, "above 0")?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")
    }

    fn update(
        &self,
        step: usize,
        value: &Tensor,
        grad: &Tensor,
        averages: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let &Self { lr, beta1, beta2, eps, weight_decay } = self;
        let bias = |beta: f64| 1.0 - beta.powf(step as f64);
        if value.dtype() == DType::F32 && value.device().is_cpu() {
            return one_pass(self, bias(beta1), bias(beta2), [value, grad, &averages[0], &averages[1]]);
        }
        let m = ((&averages[0] * beta1)? + (grad * (1.0 - beta1))?)?;
        let v = ((&averages[1] * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let mean = (&m / bias(beta1))?;
        let scale = ((&v / bias(beta2))?.sqrt()? + eps)?;
        let kept = (value * (1.0 - lr * weight_decay))?;
        Ok(((kept - ((mean / scale)? * lr)?)?, vec![m, v]))
    }
}

/// Elements that a thread takes at once.
const CHUNK: usize = 1 << 14;

/// A step of AdamW on the host: the same numbers, but those that are too small to count are zero. Without an input a weight with a penalty goes
/// to zero for ever, and below f32's normal range every operation takes many times as long.
fn one_pass(
    params: &ParamsAdamW,
    bias1: f64,
    bias2: f64,
    tensors: [&Tensor; 4],
) -> Result<(Tensor, Vec<Tensor>)> {
    #[inline(always)]
    fn flushed(value: f32, least: f32) -> f32 {
        if value.abs() < least { 0.0 } else { value }
    }
    let shape = tensors[0].shape();
    let read = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    let (mut value, grad) = (read(tensors[0])?, read(tensors[1])?);
    let (mut mean, mut square) = (read(tensors[2])?, read(tensors[3])?);
    let (b1, b2) = (params.beta1 as f32, params.beta2 as f32);
    let (c1, c2) = ((1.0 - params.beta1) as f32, (1.0 - params.beta2) as f32);
    let (bias1, bias2) = ((1.0 / bias1) as f32, (1.0 / bias2) as f32);
    let (lr, eps, kept) =
        (params.lr as f32, params.eps as f32, (1.0 - params.lr * params.weight_decay) as f32);
    let chunks = value.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
    chunks.zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK))).for_each(
        |((value, grad), (mean, square))| {
            vectorized(
                #[inline(always)]
                || {
                    for (((value, grad), mean), square) in value.iter_mut().zip(grad).zip(mean).zip(square) {
                        let g = flushed(*grad, 1e-18);
                        *mean = flushed(*mean * b1 + g * c1, 1e-18);
                        *square = flushed(*square * b2 + g * g * c2, 1e-36);
                        let direction = *mean * bias1 / ((*square * bias2).sqrt() + eps);
                        *value = flushed(*value * kept - direction * lr, 1e-18);
                    }
                },
            )
        },
    );
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(value)?, vec![tensor(mean)?, tensor(square)?]))
}

#[cfg(test)]
mod tests;
