//! `ln(1 + e^x)`, exact for large `x` of either sign, with its gradient.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, WithDType};

use super::element::{Host, contiguous, float_dispatch};

/// `ln(1 + e^x)` element by element, in the shape and dtype of `x`; the gradient is `sigmoid(x)`. An element of -inf gives 0, one of +inf
/// +inf. Fails on a dtype that is no float.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.apply_op1(Softplus);
    }
    compose(x)
}

/// The same from candle's own operations. Its value is a constant to candle, and its gradient comes by way of a product with 0.
fn compose(x: &Tensor) -> Result<Tensor> {
    let at = x.detach();
    let e = at.abs()?.neg()?.exp()?;
    // ln(1 + e) to the last bits, after Kahan: what rounding does to 1 + e, it does to both sides of the fraction.
    let u = (&e + 1.)?;
    let over = (&u - 1.)?;
    let rounded = over.eq(0.)?;
    let fraction = (u.log()? / rounded.where_cond(&over.ones_like()?, &over)?)?;
    let log = rounded.where_cond(&e, &(&e * fraction)?)?;
    let value = (at.relu()? + log)?;
    // 1 / (1 + e^-x), or e^x / (1 + e^x) below 0: neither overflows.
    let slope = (at.lt(0.)?.where_cond(&e, &e.ones_like()?)? / &u)?;
    let zero = (x - x.detach())?;
    value + (zero * slope)?
}

struct Softplus;

impl CustomOp1 for Softplus {
    fn name(&self) -> &'static str {
        "softplus"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        float_dispatch!(self.name(), x.dtype(), T => {
            let x = contiguous::<T>(x, layout)?;
            let softplus = |x: f64| if x.is_nan() { x } else { x.max(0.) + (-x.abs()).exp().ln_1p() };
            let y: Vec<T> = x.iter().map(|x| T::from_f64(softplus(x.to_f64()))).collect();
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("softplus: the operation is the CPU's alone")
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        let shape = x.shape();
        float_dispatch!(self.name(), x.dtype(), T => {
            let hosts = [Host::of(x), Host::of(gy)];
            let (x, gy) = (hosts[0].values::<T>()?, hosts[1].values::<T>()?);
            let slope = |(x, gy): (&T, &T)| T::from_f64(gy.to_f64() / (1. + (-x.to_f64()).exp()));
            let gx: Vec<T> = x.iter().zip(&*gy).map(slope).collect();
            Ok(Some(Tensor::from_vec(gx, shape, &Device::Cpu)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    #[test]
    fn values_and_gradients() -> Result<()> {
        let x = random_var(0, &[3, 5])?;
        for f in [softplus, compose] {
            let expected: Vec<f64> = values(&x)?.iter().map(|x| x.exp().ln_1p()).collect();
            assert_close(&f(&x)?, &expected, 1e-15);
            assert_close(&f(&x.t()?)?.t()?, &expected, 1e-15);
            check_gradients(std::slice::from_ref(&x), |a| f(&a[0]));
        }
        Ok(())
    }

    /// Each to the last bits of its own size, with slopes that are exact at 0 and at both ends.
    #[test]
    fn extremes() -> Result<()> {
        for f in [softplus, compose] {
            for (dtype, eps) in
                [(DType::F64, 1e-15), (DType::F32, 3e-7), (DType::F16, 2e-3), (DType::BF16, 1e-2)]
            {
                for (at, value, slope) in [
                    (0., std::f64::consts::LN_2, 0.5),
                    (-8., 3.3540637289576886e-4, 3.353501304664781e-4),
                    (17., 17. + 4.139937633089747e-8, 1. - 4.139937547394331e-8),
                    (-17., 4.139937633089747e-8, 4.139937547394331e-8),
                    (6e4, 6e4, 1.),
                    (-6e4, 0., 0.),
                ] {
                    let x = Var::from_tensor(&Tensor::new(at, &Device::Cpu)?.to_dtype(dtype)?)?;
                    let at = values(&x)?[0];
                    let value = if at == 6e4 || at.abs() < 20. { value } else { at.max(0.) };
                    let y = f(&x)?;
                    let grads = y.backward()?;
                    let (y, grad) = (values(&y)?[0], values(grads.get(&x).unwrap_or(&y))?[0]);
                    // f16 has its smallest number at 6e-8.
                    let least = if dtype == DType::F16 { 6e-8 } else { 0. };
                    assert!(
                        (y - value).abs() <= eps * value + least,
                        "{dtype:?} {at}: {y}, expected {value}"
                    );
                    assert!(
                        (grad - slope).abs() <= 2. * eps * slope + 1e-7 * least.signum() + least,
                        "{grad} {slope}"
                    );
                }
            }
            let nan = f(&Tensor::new(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY], &Device::Cpu)?);
            assert!(values(&nan?)?[0].is_nan());
        }
        let ends = softplus(&Tensor::new(&[f64::INFINITY, f64::NEG_INFINITY], &Device::Cpu)?)?;
        assert_eq!(values(&ends)?, [f64::INFINITY, 0.]);
        assert!(softplus(&Tensor::new(&[1u32], &Device::Cpu)?).is_err());
        Ok(())
    }
}
