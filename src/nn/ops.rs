//! candle_nn's `ops`, with the functions replaced that cut the graph or have a wrong derivative in candle.

use candle_core::{D, DType, Result, Tensor, bail, shape::Dim};

pub use candle_nn::ops::*;

use crate::ops::softmax::log_softmax_last_dim;

pub use super::attention::sdpa;
pub use super::dropout::Dropout;
pub use crate::ops::{
    pool::{max_pool2d, relu},
    softmax::softmax_last_dim,
};

/// Softmax over `dim`. What is -inf throughout has weight 0 and gradient 0.
///
/// # Errors
/// When there is no such dimension, or it has no elements, or the dtype is no float.
pub fn softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(xs.shape(), "softmax")?;
    as_last(xs, dim, softmax_last_dim)
}

/// The logarithm of the softmax over `d`. What is -inf throughout stays so, with gradient 0.
///
/// # Errors
/// When there is no such dimension, or it has no elements, or the dtype is no float.
pub fn log_softmax<D: Dim>(xs: &Tensor, d: D) -> Result<Tensor> {
    let dim = d.to_index(xs.shape(), "log-softmax")?;
    as_last(xs, dim, log_softmax_last_dim)
}

/// `f`, a function of the last dimension, of dimension `dim`.
fn as_last(xs: &Tensor, dim: usize, f: fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if dim + 1 == xs.rank() {
        return f(xs);
    }
    f(&xs.transpose(dim, D::Minus1)?)?.transpose(dim, D::Minus1)
}

/// `x sigmoid(x)`, in f32 at least: candle's gradient is a difference of two numbers as large as `x`, of which bf16 leaves nothing above 256.
///
/// # Errors
/// When the dtype is no float.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    in_f32(xs, crate::ops::activation::silu)
}

/// `silu(a) b` of the halves `a` and `b` of the last dimension.
///
/// # Errors
/// When the dtype is no float, or the last dimension has no two halves.
pub fn swiglu(xs: &Tensor) -> Result<Tensor> {
    let halves = xs.chunk(2, D::Minus1)?;
    match &halves[..] {
        [a, b] => silu_product(a, b),
        _ => bail!("swiglu: expected an input whose last dimension has two halves, got {:?}", xs.dims()),
    }
}

/// `silu(a) b`, the gated unit of many decoders, for `a` and `b` of one shape; in f32 at least. On the CPU it is one pass over memory forward and one
/// back.
///
/// # Errors
/// When the dtype is no float, or the shapes differ.
pub fn silu_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match a.dtype() {
        dtype @ (DType::F16 | DType::BF16) if !a.device().is_cpu() => {
            crate::ops::activation::silu_product(&a.to_dtype(DType::F32)?, &b.to_dtype(DType::F32)?)?
                .to_dtype(dtype)
        }
        // The CPU's version widens by itself.
        _ => crate::ops::activation::silu_product(a, b),
    }
}

/// `f` in f32 where the dtype of `xs` is shorter, given back in that.
pub(super) fn in_f32(xs: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match xs.dtype() {
        dtype @ (DType::F16 | DType::BF16) => f(&xs.to_dtype(DType::F32)?)?.to_dtype(dtype),
        _ => f(xs),
    }
}

/// `x tanh(ln(1 + e^x))`, in f32 at least. candle's gradient is NaN where `e^x` overflows.
///
/// # Errors
/// When the dtype is no float.
pub fn mish(xs: &Tensor) -> Result<Tensor> {
    in_f32(xs, |x| {
        // With w = e^x the tangent is (w^2 + 2w) / (w^2 + 2w + 2), from x = 20 on 1 in double precision.
        let w = x.minimum(20.)?.exp()?;
        let w = (w.sqr()? + (w * 2.)?)?;
        x * (&w / (&w + 2.)?)?
    })
}

/// `gamma x` above 0, `gamma alpha (e^x - 1)` elsewhere. candle's gradient is NaN where `e^x` overflows.
///
/// # Errors
/// When the dtype is no float.
pub fn selu(xs: &Tensor, alpha: f32, gamma: f32) -> Result<Tensor> {
    let positive = xs.gt(0.)?;
    // Of what is not taken the exponential must stay finite: its gradient is multiplied by 0.
    let below = positive.where_cond(&xs.zeros_like()?, xs)?;
    let below = ((below.exp()? - 1.)? * f64::from(alpha))?;
    positive.where_cond(xs, &below)? * f64::from(gamma)
}

/// [`rms_norm`](crate::ops::norm::rms_norm) with candle's signature: `alpha` is the weight.
///
/// # Errors
/// As that one.
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    crate::ops::norm::rms_norm(xs, alpha, eps.into())
}

/// [`layer_norm`](crate::ops::norm::layer_norm) with candle's signature: `alpha` is the weight, `beta` the bias.
///
/// # Errors
/// As that one.
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    crate::ops::norm::layer_norm(xs, alpha, Some(beta), eps.into())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};

    #[test]
    fn candles_values_with_gradients() -> Result<()> {
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (3, 4, 5), &Device::Cpu)?)?;
        let w = Var::from_tensor(&Tensor::randn(0f32, 1f32, 5, &Device::Cpu)?)?;
        let pairs = [
            (softmax(&x, 1)?, candle_nn::ops::softmax(&x, 1)?),
            (softmax(&x, D::Minus1)?, candle_nn::ops::softmax(&x, D::Minus1)?),
            (log_softmax(&x, 0)?, candle_nn::ops::log_softmax(&x, 0)?),
            (log_softmax(&x, 2)?, candle_nn::ops::log_softmax(&x, 2)?),
            (softmax_last_dim(&x)?, candle_nn::ops::softmax_last_dim(&x)?),
            (rms_norm(&x, &w, 1e-5)?, candle_nn::ops::rms_norm(&x, &w, 1e-5)?),
            (layer_norm(&x, &w, &w, 1e-5)?, candle_nn::ops::layer_norm(&x, &w, &w, 1e-5)?),
        ];
        for (ours, candles) in pairs {
            let error = (&ours - candles)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 1e-5, "{error}");
            assert!(ours.sqr()?.sum_all()?.backward()?.get(&x).is_some());
        }
        assert!(softmax(&x, 3).is_err() && log_softmax(&x, 3).is_err());
        Ok(())
    }

    #[test]
    fn mish_and_selu() -> Result<()> {
        let x = random_var(0, &[3, 5])?;
        let at = values(&x)?;
        let mish_of = |x: f64| x * x.exp().ln_1p().tanh();
        let selu_of = |x: f64| 1.25 * if x > 0. { x } else { 1.5 * x.exp_m1() };
        assert_close(&mish(&x)?, &at.iter().copied().map(mish_of).collect::<Vec<_>>(), 1e-15);
        assert_close(&selu(&x, 1.5, 1.25)?, &at.iter().copied().map(selu_of).collect::<Vec<_>>(), 1e-15);
        check_gradients(std::slice::from_ref(&x), |a| mish(&a[0]));
        check_gradients(std::slice::from_ref(&x), |a| selu(&a[0], 1.5, 1.25));
        for (dtype, large) in [(DType::F16, 100.), (DType::BF16, 1e3), (DType::F32, 1e3), (DType::F64, 1e3)] {
            let x = Var::from_tensor(&Tensor::new(&[-large, 0., large], &Device::Cpu)?.to_dtype(dtype)?)?;
            for (y, ends, slopes) in [
                (mish(&x)?, [0., 0., large], [0., 0.6, 1.]),
                (selu(&x, 1.5, 1.25)?, [-1.875, 0., 1.25 * large], [0., 1.875, 1.25]),
            ] {
                assert_close(&y, &ends, 4e-3);
                let grads = y.sum_all()?.backward()?;
                assert_close(grads.get(&x).unwrap_or(&y), &slopes, 4e-3);
            }
        }
        Ok(())
    }

    /// A row of -inf alone in any dimension: weight 0, gradient 0, and the others as they are without it.
    #[test]
    fn masked_slices() -> Result<()> {
        let inf = f64::INFINITY;
        for dim in [0, 1] {
            let x = Tensor::new(&[[1f64, -inf, 2.], [0.5, -inf, -inf]], &Device::Cpu)?;
            let x = Var::from_tensor(&if dim == 0 { x } else { x.t()? })?;
            let p = 1. / (1. + (-0.5f64).exp());
            for (log, y) in [(false, softmax(&x, dim)?), (true, log_softmax(&x, dim)?)] {
                let by_row = |t: &Tensor| if dim == 0 { Ok(t.clone()) } else { t.t() };
                let probabilities = if log { y.exp()? } else { y.clone() };
                assert_close(&by_row(&probabilities)?, &[p, 0., 1., 1. - p, 0., 0.], 1e-15);
                // The loss leaves the masked slice out, by a product with 0 where it can.
                let kept =
                    if log { by_row(&y)?.narrow(1, 0, 1)? } else { (y * by_row(&random(0, &[2, 3])?)?)? };
                let grads = kept.sqr()?.sum_all()?.backward()?;
                let grad = values(&by_row(grads.get(&x).unwrap_or(&kept))?)?;
                assert!(grad.iter().all(|g| g.is_finite()), "{grad:?}");
                assert_eq!((grad[1], grad[4], grad[5]), (0., 0., 0.));
                assert!(grad[0].abs() > 1e-3);
            }
        }
        Ok(())
    }
}
