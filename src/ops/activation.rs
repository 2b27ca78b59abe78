//! Smooth activations with their derivatives, element by element, on the CPU.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, float_dispatch};
use super::elementary::Distribution;
use super::simd::{Level, with_level};

/// `x Phi(x)`, with the distribution function of the standard normal distribution. Values and derivatives are within 1e-7 of `max(1, |x|)`
/// in f32.
pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { x.apply_op1(Activation::Gelu) } else { x.gelu_erf() }
}

/// `x sigmoid(x)`, as exact as [`gelu`].
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { x.apply_op1(Activation::Silu) } else { x.silu() }
}

/// `silu(a) b`, as exact as [`silu`], for `a` and `b` of one shape: one operation on the CPU, with one pass back.
pub(crate) fn silu_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() && a.dims() == b.dims() && a.dtype() == b.dtype() {
        return a.apply_op2(b, SiluProduct);
    }
    silu(a)? * b
}

/// Which activation.
#[derive(Clone, Copy)]
pub(crate) enum Activation {
    Gelu,
    Silu,
}

/// Elements that are worth a task of their own.
const SHARE: usize = 1 << 14;

/// The logistic distribution: its function is `1 / (1 + e^-x)`.
#[inline(always)]
fn logistic<L: Level, A: Real>(level: L, x: A) -> Distribution<A> {
    let (zero, one) = (A::ZERO, A::rounded(1.));
    let e = (zero - x.abs()).exp_in(level);
    let large = one / (one + e);
    let small = e * large;
    let (step, rest) = if x < zero { (zero, small) } else { (one, zero - small) };
    Distribution { step, rest, density: small * large }
}

/// `x y`, 0 where `y` is 0 and `x` infinite.
#[inline(always)]
fn times<A: Real>(x: A, y: A) -> A {
    if y == A::ZERO { y } else { x * y }
}

/// `x F(x)`.
#[inline(always)]
fn value<A: Real>(x: A, f: Distribution<A>) -> A {
    times(x, f.step) + times(x, f.rest)
}

/// The derivative of [`value`].
#[inline(always)]
fn slope<A: Real>(x: A, f: Distribution<A>) -> A {
    f.step + (f.rest + times(x, f.density))
}

impl Activation {
    #[inline(always)]
    fn values<L: Level, T: Element>(self, level: L, x: &[T], y: &mut [T]) {
        let pairs = y.iter_mut().zip(x.iter().map(|x| x.widen()));
        match self {
            Self::Gelu => {
                for (y, x) in pairs {
                    *y = T::narrow(value(x, x.normal(level)));
                }
            }
            Self::Silu => {
                for (y, x) in pairs {
                    *y = T::narrow(value(x, logistic(level, x)));
                }
            }
        }
    }

    #[inline(always)]
    fn gradients<L: Level, T: Element>(self, level: L, x: &[T], gy: &[T], gx: &mut [T]) {
        let all = gx.iter_mut().zip(x.iter().map(|x| x.widen()).zip(gy));
        match self {
            Self::Gelu => {
                for (gx, (x, gy)) in all {
                    *gx = T::narrow(slope(x, x.normal(level)) * gy.widen());
                }
            }
            Self::Silu => {
                for (gx, (x, gy)) in all {
                    *gx = T::narrow(slope(x, logistic(level, x)) * gy.widen());
                }
            }
        }
    }

    fn forward<T: Element>(self, x: &[T]) -> Vec<T> {
        let mut y = vec![T::narrow(T::Acc::ZERO); x.len()];
        y.par_chunks_mut(SHARE).zip(x.par_chunks(SHARE)).for_each(
            |(y, x)| with_level!(level => level.call(#[inline(always)] || self.values(level, x, y))),
        );
        y
    }

    fn backward<T: Element>(self, x: &[T], gy: &[T]) -> Vec<T> {
        let mut gx = vec![T::narrow(T::Acc::ZERO); x.len()];
        let shares = gx.par_chunks_mut(SHARE).zip(x.par_chunks(SHARE).zip(gy.par_chunks(SHARE)));
        shares.for_each(|(gx, (x, gy))| {
            with_level!(level => level.call(#[inline(always)] || self.gradients(level, x, gy, gx)))
        });
        gx
    }
}

impl Activation {
    /// The values at the numbers of a storage.
    pub(crate) fn of_storage(self, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        use candle_core::backend::BackendStorage;
        float_dispatch!(self.name(), x.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.forward(&contiguous::<T>(x, layout)?)))
        })
    }

    /// The derivative at `x` times `gy`, for tensors on the CPU.
    pub(crate) fn gradient(self, x: &Tensor, gy: &Tensor) -> Result<Tensor> {
        float_dispatch!(self.name(), x.dtype(), T => {
            let hosts = [Host::of(x), Host::of(gy)];
            let gx = self.backward(&hosts[0].values::<T>()?, &hosts[1].values::<T>()?);
            Tensor::from_vec(gx, x.shape(), &Device::Cpu)
        })
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        match self {
            Self::Gelu => "gelu",
            Self::Silu => "silu",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.of_storage(x, layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("{}: the operation is the CPU's alone", self.name())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        self.gradient(x, gy).map(Some)
    }
}

struct SiluProduct;

impl SiluProduct {
    fn forward<T: Element>(a: &[T], b: &[T]) -> Vec<T> {
        let mut y = vec![T::narrow(T::Acc::ZERO); a.len()];
        let shares = y.par_chunks_mut(SHARE).zip(a.par_chunks(SHARE).zip(b.par_chunks(SHARE)));
        shares.for_each(|(y, (a, b))| {
            with_level!(level => level.call(
                #[inline(always)]
                || {
                    for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
                        let a = a.widen();
                        *y = T::narrow(value(a, logistic(level, a)) * b.widen());
                    }
                },
            ))
        });
        y
    }

    /// The gradients of `a` and `b`.
    fn backward<T: Element>(a: &[T], b: &[T], gy: &[T]) -> (Vec<T>, Vec<T>) {
        let mut ga = vec![T::narrow(T::Acc::ZERO); a.len()];
        let mut gb = ga.clone();
        let grads = ga.par_chunks_mut(SHARE).zip(gb.par_chunks_mut(SHARE));
        let shares = a.par_chunks(SHARE).zip(b.par_chunks(SHARE)).zip(gy.par_chunks(SHARE));
        grads.zip(shares).for_each(|((ga, gb), ((a, b), gy))| {
            with_level!(level => level.call(
                #[inline(always)]
                || {
                    let grads = ga.iter_mut().zip(gb.iter_mut());
                    for ((ga, gb), ((a, b), gy)) in grads.zip(a.iter().zip(b).zip(gy)) {
                        let (a, gy) = (a.widen(), gy.widen());
                        let f = logistic(level, a);
                        *ga = T::narrow(slope(a, f) * b.widen() * gy);
                        *gb = T::narrow(value(a, f) * gy);
                    }
                },
            ))
        });
        (ga, gb)
    }
}

impl CustomOp2 for SiluProduct {
    fn name(&self) -> &'static str {
        "silu_product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        float_dispatch!("silu_product", a.dtype(), T => {
            let y = Self::forward(&contiguous::<T>(a, a_l)?, &contiguous::<T>(b, b_l)?);
            Ok((T::to_cpu_storage_owned(y), a_l.shape().clone()))
        })
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        float_dispatch!("silu_product", a.dtype(), T => {
            let hosts = [Host::of(a), Host::of(b), Host::of(gy)];
            let (ga, gb) =
                Self::backward(&hosts[0].values::<T>()?, &hosts[1].values::<T>()?, &hosts[2].values::<T>()?);
            Ok((
                Some(Tensor::from_vec(ga, a.shape(), &Device::Cpu)?),
                Some(Tensor::from_vec(gb, b.shape(), &Device::Cpu)?),
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::ops::simd::forced::each_level;
    use crate::ops::testing::{check_gradients, random_var, values};

    type Function = fn(&Tensor) -> Result<Tensor>;

    /// The value and the derivative in f64.
    fn exact(f: Function, x: f64) -> (f64, f64) {
        if std::ptr::fn_addr_eq(f, gelu as Function) {
            let below = 0.5 * candle_core::cpu::erf::erfc_f64(-x / 2f64.sqrt());
            (x * below, below + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt())
        } else {
            let s = 1. / (1. + (-x).exp());
            (x * s, s * (1. + x / (1. + x.exp())))
        }
    }

    #[test]
    fn values_and_gradients() -> Result<()> {
        let x: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 * 5e-4).collect();
        for f in [gelu as Function, silu] {
            for (level, found) in each_level(|| -> Result<_> {
                let x = Var::new(&x[..], &Device::Cpu)?;
                let y = f(&x)?;
                let grads = y.sum_all()?.backward()?;
                Ok((values(&y)?, grads.get(&x).map(values).transpose()?.unwrap_or_default()))
            }) {
                let (y, slopes) = found?;
                assert_eq!((y.len(), slopes.len()), (x.len(), x.len()));
                for (&x, (y, slope)) in x.iter().zip(y.iter().zip(&slopes)) {
                    let x = f64::from(x);
                    let (value, derivative) = exact(f, x);
                    let allowed = 1e-7 * x.abs().max(1.);
                    assert!((y - value).abs() <= allowed, "{level} {x}: {y}, expected {value}");
                    assert!(
                        (slope - derivative).abs() <= 2e-7,
                        "{level} {x}: {slope}, expected {derivative}"
                    );
                }
            }
            check_gradients(&[random_var(0, &[3, 5])?], |a| f(&a[0].t()?));
        }
        Ok(())
    }

    #[test]
    fn silu_times_another() -> Result<()> {
        let vars = [random_var(0, &[4, 7])?, random_var(1, &[4, 7])?];
        let plain = |a: &Tensor, b: &Tensor| a.silu()?.mul(b);
        crate::ops::testing::assert_close(
            &silu_product(&vars[0], &vars[1])?,
            &values(&plain(&vars[0], &vars[1])?)?,
            1e-14,
        );
        check_gradients(&vars, |a| silu_product(&a[0], &a[1]));
        check_gradients(&vars, |a| silu_product(&a[0].t()?, &a[1].t()?));
        for dtype in [DType::F32, DType::BF16] {
            let narrow = |t: &Tensor| Var::from_tensor(&t.to_dtype(dtype)?);
            let (a, b) = (narrow(&vars[0])?, narrow(&vars[1])?);
            let wide =
                [Var::from_tensor(&a.to_dtype(DType::F64)?)?, Var::from_tensor(&b.to_dtype(DType::F64)?)?];
            let found = silu_product(&a, &b)?.sum_all()?.backward()?;
            let expected = plain(&wide[0], &wide[1])?.sum_all()?.backward()?;
            for (var, wide) in [(&a, &wide[0]), (&b, &wide[1])] {
                let (Some(found), Some(expected)) = (found.get(var), expected.get(wide)) else {
                    candle_core::bail!("no gradient")
                };
                let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-2 };
                crate::ops::testing::assert_close(found, &values(expected)?, tolerance);
            }
        }
        assert!(silu_product(&vars[0], &vars[1].t()?).is_err());
        Ok(())
    }

    #[test]
    fn ends_and_dtypes() -> Result<()> {
        let inf = f64::INFINITY;
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for f in [gelu as Function, silu] {
                let ends = Tensor::new(&[-inf, -6e4, 0., 6e4, inf], &Device::Cpu)?.to_dtype(dtype)?;
                let x = Var::from_tensor(&ends)?;
                let y = f(&x)?;
                assert_eq!(y.dtype(), dtype);
                assert_eq!(values(&y)?, [0., 0., 0., values(&x)?[3], inf], "{dtype:?}");
                let grads = y.sum_all()?.backward()?;
                let slopes = grads.get(&x).map(values).transpose()?;
                assert_eq!(slopes, Some(vec![0., 0., 0.5, 1., 1.]), "{dtype:?}");
                assert!(values(&f(&Tensor::new(f64::NAN, &Device::Cpu)?.to_dtype(dtype)?)?)?[0].is_nan());
            }
        }
        assert!(gelu(&Tensor::new(&[1u32], &Device::Cpu)?).is_err());
        Ok(())
    }
}
