//! Softmax over the last dimension, its logarithm, and the cross-entropy of labels: safe for large inputs, differentiable.
//!
//! For a row with largest entry `m`: `log softmax(x) = (x - m) - log sum exp(x - m)`. A row of -inf alone, or with a NaN or
//! +inf, gives NaN, as in PyTorch.

use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, dot, float_dispatch, sum};

/// `exp(x) / sum exp(x)` over the last dimension, in the shape and dtype of `x`. Fails on a tensor without elements in
/// that dimension.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: false }.apply(x)
}

/// `log softmax(x)` over the last dimension, in the shape and dtype of `x`. Fails as [`softmax_last_dim`] does.
pub fn log_softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    Softmax { log: true }.apply(x)
}

#[derive(Clone, Copy)]
struct Softmax {
    log: bool,
}

/// The largest entry `m` of a row, and `log sum exp(x - m)`: apart, since in the sum of the two a large `m` would swallow
/// the other.
fn log_sum_exp<T: Element>(row: &[T]) -> (T::Acc, T::Acc) {
    let max = row.iter().fold(T::Acc::NEG_INFINITY, |m, v| m.max(v.widen()));
    (max, sum(row, |v| (v - max).exp()).ln())
}

/// The exponentials `exp(x - m)` of a row in `exps`, and one over their sum.
fn exponentials<T: Element>(row: &[T], exps: &mut Vec<T::Acc>) -> T::Acc {
    let max = row.iter().fold(T::Acc::NEG_INFINITY, |m, v| m.max(v.widen()));
    exps.clear();
    exps.extend(row.iter().map(|v| (v.widen() - max).exp()));
    T::Acc::from_f64(1.) / sum(exps, |v| v)
}

/// Rows that are worth a task of their own.
fn rows_of_part(d: usize) -> usize {
    (1024 / d).max(1)
}

impl Softmax {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        if !matches!(x.dims().last(), Some(1..)) {
            bail!("{}: expected an input [.., classes], got {:?}", self.name(), x.dims())
        }
        if x.device().is_cpu() { x.apply_op1(self) } else { self.compose(x) }
    }

    /// The same from candle's own operations.
    fn compose(self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let x = x.to_dtype(wide)?;
        // The largest entry moves nothing: no gradient need flow through it.
        let x = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
        let exp = x.exp()?;
        let sum = exp.sum_keepdim(D::Minus1)?;
        let y = if self.log { x.broadcast_sub(&sum.log()?)? } else { exp.broadcast_div(&sum)? };
        y.to_dtype(dtype)
    }

    fn forward<T: Element>(self, x: &[T], d: usize) -> Vec<T> {
        let mut y = vec![T::narrow(T::Acc::ZERO); x.len()];
        let rows = y.par_chunks_exact_mut(d).zip(x.par_chunks_exact(d));
        rows.with_min_len(rows_of_part(d)).for_each_init(Vec::new, |exps, (y, x)| {
            if self.log {
                let (max, log_sum) = log_sum_exp(x);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = T::narrow(x.widen() - max - log_sum));
            } else {
                let scale = exponentials(x, exps);
                y.iter_mut().zip(exps).for_each(|(y, e)| *y = T::narrow(*e * scale));
            }
        });
        y
    }

    /// `y (g - sum g y)`, and `g - exp(y) sum g` for the logarithm.
    fn backward<T: Element>(self, y: &[T], gy: &[T], d: usize) -> Vec<T> {
        let mut gx = vec![T::narrow(T::Acc::ZERO); y.len()];
        let rows = gx.par_chunks_exact_mut(d).zip(y.par_chunks_exact(d).zip(gy.par_chunks_exact(d)));
        rows.with_min_len(rows_of_part(d)).for_each(|(gx, (y, gy))| {
            let pairs = gx.iter_mut().zip(y.iter().zip(gy));
            let pairs = pairs.map(|(gx, (y, g))| (gx, y.widen(), g.widen()));
            if self.log {
                let total = sum(gy, |v| v);
                pairs.for_each(|(gx, y, g)| *gx = T::narrow(g - y.exp() * total));
            } else {
                let total = dot(y, gy);
                pairs.for_each(|(gx, y, g)| *gx = T::narrow(y * (g - total)));
            }
        });
        gx
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax_last_dim" } else { "softmax_last_dim" }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let d = layout.shape().dim(D::Minus1)?;
        float_dispatch!(self.name(), x.dtype(), T => {
            let y = self.forward(&contiguous::<T>(x, layout)?, d);
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        float_dispatch!(self.name(), y.dtype(), T => {
            let hosts = [Host::of(y), Host::of(gy)];
            let gx = self.backward(&hosts[0].values::<T>()?, &hosts[1].values::<T>()?, y.dim(D::Minus1)?);
            Ok(Some(Tensor::from_vec(gx, y.shape(), &Device::Cpu)?))
        })
    }
}

/// The mean over the batch of `-log softmax(logits)[target]`, a scalar in the dtype of `logits [n, c]`; `targets [n]` are
/// u32 or i64. The gradient is `(softmax - onehot) / n`. Fails on an empty batch and on a label outside `0..c`, which are
/// read on the host.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let &[n, c] = logits.dims() else {
        bail!("cross_entropy: expected logits [batch, classes], got {:?}", logits.dims())
    };
    if targets.dims() != [n] || !matches!(targets.dtype(), DType::U32 | DType::I64) {
        let (dims, dtype) = (targets.dims(), targets.dtype());
        bail!("cross_entropy: expected targets [{n}] of u32 or i64, got {dims:?} of {dtype:?}")
    }
    if n == 0 {
        bail!("cross_entropy: the batch is empty")
    }
    let labels = targets.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    if let Some(row) = labels.iter().position(|&label| !(0..c as i64).contains(&label)) {
        bail!("cross_entropy: label {} in row {row} is not one of {c} classes", labels[row])
    }
    if logits.device().is_cpu() {
        return logits.apply_op1(CrossEntropy { labels: labels.into_iter().map(|l| l as usize).collect() });
    }
    cross_entropy_compose(logits, targets)
}

fn cross_entropy_compose(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let log_p = Softmax { log: true }.compose(&logits.to_dtype(wide)?)?;
    log_p.gather(&targets.unsqueeze(1)?.contiguous()?, 1)?.mean_all()?.neg()?.to_dtype(logits.dtype())
}

struct CrossEntropy {
    labels: Vec<usize>,
}

impl CrossEntropy {
    fn forward<T: Element>(&self, logits: &[T]) -> f64 {
        let c = logits.len() / self.labels.len();
        let row_loss = |(row, &label): (&[T], &usize)| {
            let (max, log_sum) = log_sum_exp(row);
            (log_sum - (row[label].widen() - max)).to_f64()
        };
        logits.chunks_exact(c).zip(&self.labels).map(row_loss).sum::<f64>() / self.labels.len() as f64
    }

    fn backward<T: Element>(&self, logits: &[T], scale: f64) -> Vec<T> {
        let c = logits.len() / self.labels.len();
        let scale = T::Acc::from_f64(scale / self.labels.len() as f64);
        let mut grad = vec![T::narrow(T::Acc::ZERO); logits.len()];
        let rows = grad.par_chunks_exact_mut(c).zip(logits.par_chunks_exact(c).zip(&self.labels));
        rows.with_min_len(rows_of_part(c)).for_each_init(Vec::new, |exps, (grad, (row, &label))| {
            let one_over_sum = exponentials(row, exps);
            grad.iter_mut().zip(&*exps).for_each(|(g, e)| *g = T::narrow(*e * one_over_sum * scale));
            grad[label] = T::narrow((exps[label] * one_over_sum - T::Acc::from_f64(1.)) * scale);
        });
        grad
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        float_dispatch!(self.name(), logits.dtype(), T => {
            let loss = self.forward(&contiguous::<T>(logits, layout)?);
            Ok((T::to_cpu_storage_owned(vec![T::from_f64(loss)]), Shape::from(())))
        })
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let scale = grad.to_dtype(DType::F64)?.to_scalar()?;
        float_dispatch!(self.name(), logits.dtype(), T => {
            let host = Host::of(logits);
            let grad = self.backward(&host.values::<T>()?, scale);
            Ok(Some(Tensor::from_vec(grad, logits.shape(), &Device::Cpu)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    #[test]
    fn values_and_gradients() -> Result<()> {
        for dims in [[4, 5], [1, 1], [3, 37]] {
            let x = random_var(0, &dims)?;
            let p: Vec<f64> = values(&x)?
                .chunks(dims[1])
                .flat_map(|row| {
                    let total: f64 = row.iter().map(|v| v.exp()).sum();
                    row.iter().map(move |v| v.exp() / total).collect::<Vec<_>>()
                })
                .collect();
            let log_p: Vec<f64> = p.iter().map(|p| p.ln()).collect();
            for (softmax, expected) in [(Softmax { log: false }, &p), (Softmax { log: true }, &log_p)] {
                assert_close(&softmax.apply(&x)?, expected, 1e-14);
                assert_close(&softmax.compose(&x)?, expected, 1e-14);
                check_gradients(std::slice::from_ref(&x), |a| softmax.apply(&a[0]));
            }
            let targets: Vec<u32> = (0..dims[0]).map(|i| (i * 7 % dims[1]) as u32).collect();
            let loss =
                -targets.iter().enumerate().map(|(i, &t)| log_p[i * dims[1] + t as usize]).sum::<f64>()
                    / dims[0] as f64;
            let targets = Tensor::new(targets, &Device::Cpu)?;
            assert_close(&cross_entropy(&x, &targets)?, &[loss], 1e-14);
            assert_close(&cross_entropy_compose(&x, &targets)?, &[loss], 1e-14);
            check_gradients(std::slice::from_ref(&x), |a| {
                cross_entropy(&a[0], &targets.to_dtype(DType::I64)?)
            });
            check_gradients(std::slice::from_ref(&x), |a| cross_entropy_compose(&a[0], &targets));
        }
        Ok(())
    }

    #[test]
    fn extreme_rows() -> Result<()> {
        let inf = f32::INFINITY;
        let x = Var::new(&[[1e4f32, 1e4, -1e4], [-1e30, -1e30, -inf], [0., 100., -100.]], &Device::Cpu)?;
        assert_close(&softmax_last_dim(&x)?, &[0.5, 0.5, 0., 0.5, 0.5, 0., 0., 1., 0.], 1e-7);
        let loss = cross_entropy(&x, &Tensor::new(&[2u32, 0, 0], &Device::Cpu)?)?;
        let ln2 = std::f64::consts::LN_2;
        assert_close(&loss, &[(2e4 + ln2 + ln2 + 100.) / 3.], 1e-6);
        let grads = loss.backward()?;
        let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
        let third = 1. / 3.;
        let expected = [0.5, 0.5, -1., -0.5, 0.5, 0., -1., 1., 0.].map(|v| v * third);
        assert_close(&Tensor::new(&grad[..], &Device::Cpu)?, &expected, 1e-6);
        for bad in [[f32::NAN, 0.], [inf, 0.], [-inf, -inf]] {
            let p = values(&softmax_last_dim(&Tensor::new(&bad, &Device::Cpu)?)?)?;
            assert!(p.iter().any(|p| p.is_nan()), "{bad:?} gives {p:?}");
        }
        Ok(())
    }

    #[test]
    fn other_layouts_and_dtypes() -> Result<()> {
        let x = random_var(0, &[6, 4, 5])?;
        let turned = x.transpose(0, 2)?;
        let expected = values(&softmax_last_dim(&turned.contiguous()?)?)?;
        assert_close(&softmax_last_dim(&turned)?, &expected, 1e-15);
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)] {
            assert_close(&softmax_last_dim(&turned.to_dtype(dtype)?)?, &expected, tolerance);
        }
        Ok(())
    }

    #[test]
    fn refusals_name_the_row() -> Result<()> {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        for label in [-1i64, 3] {
            let targets = Tensor::new(&[0, label], &Device::Cpu)?;
            let message = cross_entropy(&x, &targets).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(
                message.contains(&format!("label {label} in row 1 is not one of 3 classes")),
                "{message}"
            );
        }
        assert!(cross_entropy(&x, &Tensor::new(&[0u32], &Device::Cpu)?).is_err());
        assert!(cross_entropy(&x, &Tensor::new(&[0f32, 1.], &Device::Cpu)?).is_err());
        assert!(cross_entropy(&x.narrow(0, 0, 0)?, &Tensor::zeros(0, DType::U32, &Device::Cpu)?).is_err());
        assert!(softmax_last_dim(&x.narrow(1, 0, 0)?).is_err());
        Ok(())
    }
}
