//! Gradients made to fit: a bound on their norm, and losses scaled so that half precision holds what follows from them.

use super::natural::{Natural, scalar};
use super::observe::lock;
use super::rule::WakeRule;
use super::step::numbers;
use crate::curvature::wide;
use candle_core::{DType, Result, Tensor, Var, backprop::GradStore, bail};

/// Scales the gradients of `vars` so that their joint L2 norm is at most `max_norm`, for [`Optimizer::step`](super::Optimizer::step) of any
/// optimizer. Returns the norm before; Vars without a gradient do not count.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::optim::clip_gradients;
///
/// let theta = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut grads = theta.sqr()?.sum_all()?.backward()?;
/// assert_eq!(clip_gradients(&mut grads, &[theta.clone()], 1.0)?, 10.0);
/// let clipped = grads.get(&theta).unwrap().to_vec1::<f32>()?;
/// assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// If `max_norm` is not a finite number above 0, or the norm is not finite, which says the place of the first such Var in `vars`; the
/// gradients are then as they were.
pub fn clip_gradients(grads: &mut GradStore, vars: &[Var], max_norm: f64) -> Result<f64> {
    if !(max_norm.is_finite() && max_norm > 0.0) {
        bail!("clip: expected a largest norm above 0, got {max_norm}")
    }
    let mut found = Vec::new();
    for (index, var) in vars.iter().enumerate() {
        if let Some(grad) = grads.get(var) {
            found.push((index, var, grad.dtype(), wide(grad)?));
        }
    }
    let each = |of: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Vec<f64>> {
        let scalars = found.iter().map(|(.., grad)| of(grad)?.to_dtype(DType::F64));
        numbers(&scalars.collect::<Result<Vec<_>>>()?)
    };
    let sizes = each(&|grad| grad.abs()?.flatten_all()?.max(0))?;
    for ((index, var, ..), size) in found.iter().zip(&sizes) {
        if !size.is_finite() {
            bail!("clip: the gradient of Var {index} {:?} has NaN or infinite elements", var.dims())
        }
    }
    // f32 does not hold the squares of all that it holds.
    let largest = sizes.into_iter().fold(0.0, f64::max);
    if largest == 0.0 {
        return Ok(0.0);
    }
    let squares = each(&|grad| (grad / largest)?.sqr()?.sum_all())?;
    let norm = largest * squares.iter().sum::<f64>().sqrt();
    if norm > max_norm {
        for (_, var, dtype, grad) in &found {
            grads.insert(var, (grad * (max_norm / norm))?.to_dtype(*dtype)?);
        }
    }
    Ok(norm)
}

/// A factor on the loss, so that gradients too small for half precision are not rounded to zero: halved when a gradient overflows, doubled
/// after `interval` steps in a row without. Needed for f16; bf16 has the exponents of f32.
///
/// Source: Micikevicius et al., "Mixed precision training" (ICLR 2018), with PyTorch's `GradScaler`'s schedule.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use kronwake::optim::LossScale;
///
/// let theta = Var::from_tensor(&Tensor::new(&[0.5f32, 2.], &Device::Cpu)?.to_dtype(DType::F16)?)?;
/// let mut scale = LossScale::default();
/// let loss = (theta.to_dtype(DType::F32)?.sum_all()? * 1e-9)?; // f16 has no number between 0 and 6e-8
/// let grads = scale.backward(&loss, &[theta.clone()])?.expect("nothing overflows");
/// assert!((grads.get(&theta).unwrap().to_vec1::<f32>()?[0] - 1e-9).abs() < 1e-11);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    /// The factor as it is now; 65,536 at first.
    pub scale: f64,
    /// Steps without an overflow after which it is doubled; 2,000.
    pub interval: usize,
    /// Such steps since the factor last changed.
    pub good_steps: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65_536.0, interval: 2_000, good_steps: 0 }
    }
}

impl LossScale {
    /// The gradients of `loss`, a scalar, by way of the scaled loss: those of `vars` are divided again, and of half types in f32. `None`
    /// where one is not finite: leave that step out, the next has a smaller scale. For the optimizers of this crate see
    /// [`Natural::backward_step_scaled`].
    ///
    /// # Errors
    /// If the scale is not a finite number above 0, the loss is no scalar, or the backward pass fails.
    pub fn backward(&mut self, loss: &Tensor, vars: &[Var]) -> Result<Option<GradStore>> {
        let mut grads = self.scaled(loss)?.backward()?;
        let held: Vec<&Var> = vars.iter().filter(|var| grads.get(var).is_some()).collect();
        let found = held.iter().filter_map(|var| grads.get(var).cloned()).collect();
        let Some(unscaled) = self.unscaled(found)? else { return Ok(None) };
        for (var, grad) in held.into_iter().zip(unscaled) {
            grads.insert(var, grad);
        }
        Ok(Some(grads))
    }

    /// The loss, in f32 at least, times the scale.
    fn scaled(&self, loss: &Tensor) -> Result<Tensor> {
        if !(self.scale.is_finite() && self.scale > 0.0) {
            bail!("loss scale: expected a finite number above 0, got {}", self.scale)
        }
        if loss.elem_count() != 1 {
            bail!("loss: expected a scalar, got shape {:?}", loss.dims())
        }
        wide(loss)? * self.scale
    }

    /// Gradients of a scaled loss divided by the scale, which follows from whether they are finite.
    fn unscaled(&mut self, grads: Vec<Tensor>) -> Result<Option<Vec<Tensor>>> {
        let unscale = |grad: &Tensor| wide(grad)? * (1.0 / self.scale);
        let grads = grads.iter().map(unscale).collect::<Result<Vec<_>>>()?;
        let sums = grads.iter().map(|grad| grad.sum_all()).collect::<Result<Vec<_>>>()?;
        if numbers(&sums)?.iter().any(|sum| !sum.is_finite()) {
            (self.scale, self.good_steps) = (self.scale / 2.0, 0);
            return Ok(None);
        }
        self.good_steps += 1;
        if self.good_steps >= self.interval {
            // Beyond this no loss of any type is left.
            (self.scale, self.good_steps) = ((self.scale * 2.0).min(f64::from(f32::MAX).sqrt()), 0);
        }
        Ok(Some(grads))
    }
}

impl<R: WakeRule> Natural<R> {
    /// [`backward_step`](super::Optimizer::backward_step) by way of the scaled loss, for models in f16. Whether there was a step: none is taken
    /// where a gradient overflows, and what was observed for it is forgotten.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kronwake::nn::{self, Module, VarBuilder, VarMap, loss};
    /// use kronwake::optim::{KFac, LossScale, ParamsKFac};
    /// use kronwake::tape::{Likelihood, Tape};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let (vars, tape) = (VarMap::new(), Tape::new());
    /// let vb = VarBuilder::from_varmap(&vars, DType::F16, &Device::Cpu);
    /// let model = tape.build(|| nn::linear(3, 2, vb.pp("fc")))?;
    /// let (mut kfac, mut scale) = (KFac::from_varmap(&vars, ParamsKFac::on(&tape))?, LossScale::default());
    /// let x = Tensor::randn(0f32, 1., (8, 3), &Device::Cpu)?.to_dtype(DType::F16)?;
    /// let y = Tensor::from_iter((0..8).map(|i| i % 2u32), &Device::Cpu)?;
    /// let logits = model.forward(&x)?.to_dtype(DType::F32)?;
    /// kfac.observe(&logits, Likelihood::Categorical)?;
    /// assert!(kfac.backward_step_scaled(&loss::cross_entropy(&logits, &y)?, &mut scale)?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As `backward_step`, and if the scale is not a finite number above 0.
    pub fn backward_step_scaled(&mut self, loss: &Tensor, scale: &mut LossScale) -> Result<bool> {
        self.no_closure("backward_step_scaled")?;
        match self.scaled_gradients(loss, scale) {
            Ok(Some((value, grads))) => self.advance(grads, Some(value)).map(|()| true),
            Ok(None) => {
                self.forget();
                Ok(false)
            }
            Err(error) => {
                self.forget();
                Err(error)
            }
        }
    }

    fn scaled_gradients(
        &mut self,
        loss: &Tensor,
        scale: &mut LossScale,
    ) -> Result<Option<(f64, Vec<Tensor>)>> {
        let value = scalar(loss)?;
        self.check_loss(value)?;
        let scaled = scale.scaled(loss)?;
        if let Some(observed) = self.observed.as_ref().filter(|observed| observed.armed) {
            lock(&observed.sums).divide(scale.scale);
        }
        let grads = self.gradients(&scaled.backward()?)?;
        Ok(scale.unscaled(grads)?.map(|grads| (value, grads)))
    }
}
