//! candle_nn's losses, exact for extreme inputs and strict about labels, and two with weights of the terms.

use candle_core::{DType, Result, Tensor, bail};

pub use candle_nn::loss::*;

pub use super::weighted_loss::{BinaryCrossEntropy, CrossEntropy, Reduction};
pub use crate::ops::softmax::cross_entropy;

/// The mean over the batch of `-inp[target]`: `inp` `[n, c]` are logarithms of probabilities, `target` `[n]` are class numbers of an integer
/// dtype.
///
/// # Errors
/// On an empty batch, when shapes do not fit, and for a class number outside `0..c`. (candle takes the largest u32 for a term of loss 0.
/// On a GPU, where the host reads no class number, candle's kernel still does.)
pub fn nll(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    let &[n, c] = inp.dims() else {
        bail!("nll: expected log probabilities [batch, classes], got {:?}", inp.dims())
    };
    if target.dims() != [n] || !target.dtype().is_int() || n == 0 {
        bail!(
            "nll: expected class numbers [{n}] of an integer dtype and a batch of 1 or more, got {:?} of {:?}",
            target.dims(),
            target.dtype()
        )
    }
    if target.device().is_cpu() {
        let labels = target.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        if let Some(row) = labels.iter().position(|&label| !(0..c as i64).contains(&label)) {
            bail!("nll: label {} in row {row} is not one of {c} classes", labels[row])
        }
    }
    candle_nn::loss::nll(inp, target)
}

/// The mean over all elements of `-y ln s - (1 - y) ln(1 - s)` with `s = sigmoid(inp)` and `y` the target, a scalar in the dtype of `inp`.
/// Targets lie in 0..=1, in the shape of `inp`, of any dtype. The gradient is `(s - y) / elements`.
///
/// candle's takes the logarithm of the sigmoid itself, which is infinite from logits of about 17 on in f32. This one is exact for all
/// finite logits. With weights: [`BinaryCrossEntropy`].
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::nn::loss::binary_cross_entropy_with_logit;
///
/// let z = Var::new(&[17f32], &Device::Cpu)?;
/// let loss = binary_cross_entropy_with_logit(&z, &Tensor::new(&[0f32], &Device::Cpu)?)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 17.);
/// assert!((loss.backward()?.get(&z).unwrap().to_vec1::<f32>()?[0] - 1.).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes differ, `inp` is empty or its dtype no float.
pub fn binary_cross_entropy_with_logit(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    BinaryCrossEntropy::default().loss(inp, target)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    #[test]
    fn binary_cross_entropy_of_extreme_logits() -> Result<()> {
        // ln(1 + e^-17) = e^-17 - e^-34 / 2 + ..; of the others the excess is below half a last bit.
        let small = 4.139937633089747e-8;
        for (z, y, loss, slope) in [
            (17., 1., small, -4.139937547394331e-8),
            (17., 0., 17. + small, 1. - small),
            (-17., 1., 17. + small, small - 1.),
            (0., 1., std::f64::consts::LN_2, -0.5),
            (0., 0.25, std::f64::consts::LN_2, 0.25),
            (1e4, 0., 1e4, 1.),
            (1e4, 1., 0., 0.),
            (-1e4, 0., 0., 0.),
            (-1e4, 0.5, 5e3, -0.5),
        ] {
            for (dtype, eps) in
                [(DType::F64, 1e-9), (DType::F32, 3e-7), (DType::F16, 2e-3), (DType::BF16, 1e-2)]
            {
                let of = |v: f64| Tensor::new(&[v], &Device::Cpu)?.to_dtype(dtype);
                let z = Var::from_tensor(&of(z)?)?;
                let found = binary_cross_entropy_with_logit(&z, &of(y)?)?;
                assert_eq!((found.rank(), found.dtype()), (0, dtype));
                let grads = found.backward()?;
                let least = if dtype == DType::F16 { 6e-8 } else { 0. };
                let near = |found: f64, expected: f64| {
                    // In f32 the slope is the difference of two numbers near 1.
                    (found - expected).abs() <= eps * expected.abs() + least
                };
                let grad = values(grads.get(&z).unwrap_or(&found))?[0];
                assert!(near(values(&found)?[0], loss), "{dtype:?} {z} {y}: {found}");
                assert!(near(grad, slope) || (grad - slope).abs() < 1e-7, "{dtype:?} {z} {y}: {grad}");
            }
        }
        Ok(())
    }

    #[test]
    fn binary_cross_entropy_is_candles_where_that_is_exact() -> Result<()> {
        let (z, y) = (random_var(0, &[4, 3])?, random_var(1, &[4, 3])?);
        let y = Var::from_tensor(&candle_nn::ops::sigmoid(&y)?)?;
        let candles = candle_nn::loss::binary_cross_entropy_with_logit(&z, &y)?;
        assert_close(&binary_cross_entropy_with_logit(&z, &y)?, &values(&candles)?, 1e-14);
        // Of the targets too, which may be a teacher's.
        check_gradients(&[z.clone(), y], |a| binary_cross_entropy_with_logit(&a[0], &a[1]));
        let whole = Tensor::new(&[0u8, 1, 1], &Device::Cpu)?.expand((4, 3))?;
        let float = whole.to_dtype(DType::F64)?;
        let expected = values(&binary_cross_entropy_with_logit(&z, &float)?)?;
        assert_close(&binary_cross_entropy_with_logit(&z, &whole)?, &expected, 0.);
        for dims in [&[4][..], &[4, 1], &[3], &[1, 3], &[3, 4]] {
            let y = Tensor::zeros(dims, DType::F64, &Device::Cpu)?;
            let message = binary_cross_entropy_with_logit(&z, &y).err().map(|e| e.to_string());
            assert!(message.is_some_and(|m| m.contains("expected targets of shape [4, 3]")));
        }
        Ok(())
    }

    /// candle's other losses against differences, and labels that are none.
    #[test]
    fn siblings() -> Result<()> {
        let (z, y) = (random_var(0, &[4, 3])?, random_var(1, &[4, 3])?);
        check_gradients(&[z.clone(), y.clone()], |a| mse(&a[0], &a[1]));
        for delta in [0.3, 1., 10.] {
            check_gradients(&[z.clone(), y.clone()], |a| huber(&a[0], &a[1], delta));
        }
        // The branch that is not taken overflows.
        let far = Var::new(&[1e30f32], &Device::Cpu)?;
        let loss = huber(&far, &far.zeros_like()?, 2.)?;
        assert_close(&loss, &[2e30], 1e-6);
        assert_close(loss.backward()?.get(&far).unwrap_or(&loss), &[2.], 1e-6);
        let labels = Tensor::new(&[2u32, 0, 1, 1], &Device::Cpu)?;
        check_gradients(std::slice::from_ref(&z), |a| nll(&a[0], &labels));
        for wrong in [u32::MAX, 3] {
            let labels = Tensor::new(&[2, 0, wrong, 1], &Device::Cpu)?;
            let expected = format!("label {wrong} in row 2 is not one of 3 classes");
            for loss in [nll, cross_entropy] {
                let message = loss(&z, &labels).err().map(|e| e.to_string()).unwrap_or_default();
                assert!(message.contains(&expected), "{message}");
            }
        }
        let labels = Tensor::new(&[2u8, 0, 1, 1], &Device::Cpu)?;
        let wide = labels.to_dtype(DType::I64)?;
        assert_close(&cross_entropy(&z, &labels)?, &values(&cross_entropy(&z, &wide)?)?, 0.);
        assert_close(&nll(&z, &labels)?, &values(&nll(&z, &wide)?)?, 0.);
        assert!(nll(&z.narrow(0, 0, 0)?, &labels.narrow(0, 0, 0)?).is_err());
        Ok(())
    }
}
