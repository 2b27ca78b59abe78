//! Losses scaled so that half precision holds what follows from them.

use super::numbers::numbers;
use crate::curvature::wide;
use crate::stack::deep;
use candle_core::{Result, Tensor, Var, backprop::GradStore, bail};

/// A factor on the loss, so that gradients too small for half precision are not rounded to zero. It is halved when a gradient overflows, and
/// doubled after `interval` steps in a row without. Models in f16 need it; bf16 has the exponents of f32.
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
    /// Steps without an overflow after which the factor is doubled; 2,000 by default.
    pub interval: usize,
    /// Steps without an overflow since the factor last changed.
    pub good_steps: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65_536.0, interval: 2_000, good_steps: 0 }
    }
}

impl LossScale {
    /// Computes the gradients of the scalar `loss` times the scale, and divides those of `vars` by the scale again, half types in f32.
    ///
    /// Returns `None` where one is not finite: leave that step out. The scale of the next is smaller. With the optimizer of this crate use
    /// [`NaturalGradient::backward_step_scaled`](super::NaturalGradient::backward_step_scaled).
    ///
    /// # Errors
    /// If the scale is not a finite number above 0, the loss is no scalar, or the backward pass fails.
    pub fn backward(&mut self, loss: &Tensor, vars: &[Var]) -> Result<Option<GradStore>> {
        let scaled = self.scaled(loss)?;
        let mut grads = deep(|| scaled.backward())?;
        let held: Vec<&Var> = vars.iter().filter(|var| grads.get(var).is_some()).collect();
        let found = held.iter().filter_map(|var| grads.get(var).cloned()).collect();
        let Some(unscaled) = self.unscaled(found)? else { return Ok(None) };
        for (var, grad) in held.into_iter().zip(unscaled) {
            grads.insert(var, grad);
        }
        Ok(Some(grads))
    }

    /// The loss, in f32 at least, times the scale.
    pub(super) fn scaled(&self, loss: &Tensor) -> Result<Tensor> {
        if !(self.scale.is_finite() && self.scale > 0.0) {
            bail!("loss scale: expected a finite number above 0, got {}", self.scale)
        }
        if loss.elem_count() != 1 {
            bail!("loss: expected a scalar, got shape {:?}", loss.dims())
        }
        wide(loss)? * self.scale
    }

    /// Gradients of a scaled loss divided by the scale, which follows from whether they are finite.
    pub(super) fn unscaled(&mut self, grads: Vec<Tensor>) -> Result<Option<Vec<Tensor>>> {
        let (grads, finite) = self.divided(grads)?;
        self.follow(finite);
        Ok(finite.then_some(grads))
    }

    /// Gradients of a scaled loss divided by the scale, and whether they are finite.
    pub(super) fn divided(&self, grads: Vec<Tensor>) -> Result<(Vec<Tensor>, bool)> {
        let unscale = |grad: &Tensor| wide(grad)? * (1.0 / self.scale);
        let grads = grads.iter().map(unscale).collect::<Result<Vec<_>>>()?;
        let sums = grads.iter().map(|grad| grad.sum_all()).collect::<Result<Vec<_>>>()?;
        let finite = numbers(&sums)?.iter().all(|sum| sum.is_finite());
        Ok((grads, finite))
    }

    /// Takes the next scale, after gradients that were `finite` or not.
    pub(super) fn follow(&mut self, finite: bool) {
        if !finite {
            (self.scale, self.good_steps) = (self.scale / 2.0, 0);
            return;
        }
        self.good_steps += 1;
        if self.good_steps >= self.interval {
            // Beyond this no loss of any type is left.
            (self.scale, self.good_steps) = ((self.scale * 2.0).min(f64::from(f32::MAX).sqrt()), 0);
        }
    }
}
