//! A bound on the norm of gradients.

use super::numbers::numbers;
use crate::curvature::wide;
use candle_core::{DType, Result, Tensor, Var, backprop::GradStore, bail};

/// Scales the gradients of `vars` so that their joint L2 norm is at most `max_norm`. Returns the norm before. Vars without a gradient do not
/// count. Any optimizer takes the gradients: [`Optimizer::step`](super::Optimizer::step).
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
/// If `max_norm` is not a finite number above 0. If a gradient is not finite: the message names the place of the first such Var in `vars`.
/// The gradients are then as they were.
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
