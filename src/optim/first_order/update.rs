//! What a rule has to say, and what all rules share.

pub(super) use crate::ops::adam::LEAST;
use crate::ops::adam::{CHUNK, flushed};
use crate::ops::element::Host;
use crate::ops::simd::vectorized;
use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use crate::optim::ParamsAdamW;

/// The state of a parameter: tensors of any shapes, each with the word by which a file calls it.
#[doc(hidden)]
pub type State = Vec<(&'static str, Tensor)>;

/// Where a parameter stands in its training.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// Of the parameter.
    pub name: &'a str,
    /// The number of the step, from 1.
    pub step: usize,
    /// The same without the steps that were left out.
    pub taken: usize,
    /// The learning rate for this parameter.
    pub lr: f64,
    /// The weight decay for this parameter.
    pub weight_decay: f64,
}

/// What a step of a [`FirstOrder`](super::FirstOrder) optimizer does with a gradient: implemented by [`ParamsSgd`](super::ParamsSgd),
/// [`ParamsAdamW`], [`ParamsMuon`](super::ParamsMuon), [`ParamsSoap`](super::ParamsSoap) and [`ParamsShampoo`](super::ParamsShampoo).
pub trait Update: Clone + std::fmt::Debug + Send + Sync {
    /// What messages call the optimizer.
    #[doc(hidden)]
    const NAME: &'static str;
    #[doc(hidden)]
    fn lr(&mut self) -> &mut f64;
    #[doc(hidden)]
    fn weight_decay(&self) -> f64;
    /// What is wrong with the options.
    #[doc(hidden)]
    fn check(&self) -> Result<()>;
    /// AdamW, for the parameters that a group asks it for; none where the optimizer has no such part.
    #[doc(hidden)]
    fn adam(&self) -> Option<ParamsAdamW>;
    /// AdamW's own rate, where it is another than the learning rate.
    #[doc(hidden)]
    fn adam_lr(&self) -> Option<f64> {
        None
    }
    /// Whether the rule is for matrices alone; what is none gets AdamW.
    #[doc(hidden)]
    fn for_matrices(&self) -> bool {
        false
    }
    /// The state of a parameter before the first step; `value` as the averages have it, in f32 or f64.
    #[doc(hidden)]
    fn state(&self, value: &Tensor) -> Result<State>;
    /// A parameter and its state after a step; `state` has the tensors of [`Update::state`].
    #[doc(hidden)]
    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)>;
}

/// AdamW's options within [`ParamsMuon`](super::ParamsMuon), [`ParamsSoap`](super::ParamsSoap) and
/// [`ParamsShampoo`](super::ParamsShampoo): for vectors and scalars, and for the parameters that a
/// [`Group`](crate::optim::Group) with the rule [`UpdateRule::Adam`](crate::optim::UpdateRule::Adam) names. The weight decay is the optimizer's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FallbackAdam {
    /// Its learning rate, which belongs to the optimizer's own: `set_learning_rate` changes both in proportion. None, the default, is the
    /// optimizer's.
    pub lr: Option<f64>,
    /// Decay of the mean of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of their squares, in [0, 1).
    pub beta2: f64,
    /// What is added to the root of that mean; 1e-8.
    pub eps: f64,
}

impl FallbackAdam {
    pub(super) fn of(beta1: f64, beta2: f64) -> Self {
        Self { lr: None, beta1, beta2, eps: 1e-8 }
    }

    pub(super) fn check(&self) -> Result<()> {
        if let Some(lr) = self.lr {
            in_range("fallback_adam.lr", lr, lr >= 0.0, "of at least 0")?;
        }
        decay("fallback_adam.beta1", self.beta1)?;
        decay("fallback_adam.beta2", self.beta2)?;
        in_range("fallback_adam.eps", self.eps, self.eps > 0.0, "above 0")
    }

    /// The same as options of AdamW itself; rates come with each step.
    pub(super) fn options(&self) -> Option<ParamsAdamW> {
        let &Self { beta1, beta2, eps, .. } = self;
        Some(ParamsAdamW { beta1, beta2, eps, ..Default::default() })
    }
}

/// Asserts that an option is a finite number with `fits`.
pub(super) fn in_range(name: &str, value: f64, fits: bool, expected: &str) -> Result<()> {
    if !(value.is_finite() && fits) {
        bail!("first-order: expected {name} {expected}, got {value}")
    }
    Ok(())
}

/// Asserts that an option is in [0, 1).
pub(super) fn decay(name: &str, value: f64) -> Result<()> {
    in_range(name, value, (0.0..1.0).contains(&value), "in [0, 1)")
}

/// Asserts that an option is a whole number of at least 1.
pub(super) fn at_least_one(name: &str, value: usize) -> Result<()> {
    if value == 0 {
        bail!("first-order: expected {name} of at least 1, got 0")
    }
    Ok(())
}

/// `kept a + share b`. On the host in f32 what is smaller than `least` is zero.
pub(super) fn mix(a: &Tensor, kept: f64, b: &Tensor, share: f64, least: f32) -> Result<Tensor> {
    if a.dtype() != DType::F32 || !a.device().is_cpu() {
        return (a * kept)? + (b * share)?;
    }
    let hosts = (Host::of(a), Host::of(b));
    let (x, y) = (hosts.0.values::<f32>()?, hosts.1.values::<f32>()?);
    let (kept, share) = (kept as f32, share as f32);
    let mut mixed = vec![0f32; x.len()];
    mixed.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK))).for_each(
        |(mixed, (x, y))| {
            vectorized(
                #[inline(always)]
                || {
                    for ((mixed, x), y) in mixed.iter_mut().zip(x).zip(y) {
                        *mixed = flushed(x * kept + y * share, least);
                    }
                },
            )
        },
    );
    Tensor::from_vec(mixed, a.shape(), &Device::Cpu)
}

/// `(1 - lr weight_decay) value - rate direction`: a step with decoupled decay.
pub(super) fn moved(at: &At, value: &Tensor, direction: &Tensor, rate: f64) -> Result<Tensor> {
    mix(value, 1.0 - at.lr * at.weight_decay, &direction.reshape(value.shape())?, -rate, LEAST)
}

/// A parameter or gradient `[out, ..]` as the matrix `[out, rest]`.
pub(super) fn as_matrix(t: &Tensor) -> Result<Tensor> {
    t.flatten_from(1)?.contiguous()
}
