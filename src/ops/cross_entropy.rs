//! The cross-entropy of labels under the softmax of logits, differentiable.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use rayon::prelude::*;

use super::element::{Element, Host, Real, contiguous, float_dispatch};
use super::row_launch::{THREADS, a_team_each};
use super::simd::{Level, with_level};
use super::softmax::{Softmax, exponentials, log_sum_exp, rows_of_part};
use crate::gpu::{self, Gpu, Grid, Module, Operand, args, typed};

/// The mean over the batch of `-log softmax(logits)[target]`, a scalar in the dtype of `logits [n, c]`; `targets [n]` are
/// u8, u32 or i64. The gradient is `(softmax - onehot) / n`. A row of -inf alone makes the loss inf, and has a gradient of 0.
///
/// # Errors
/// On an empty batch, when shapes or dtypes do not fit, and on the CPU for a label outside `0..c`. On a GPU, where the host reads no label, such a
/// label makes the loss and its row's gradient NaN.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let &[n, c] = logits.dims() else {
        bail!("cross_entropy: expected logits [batch, classes], got {:?}", logits.dims())
    };
    if targets.dims() != [n] || !matches!(targets.dtype(), DType::U8 | DType::U32 | DType::I64) {
        let (dims, dtype) = (targets.dims(), targets.dtype());
        bail!("cross_entropy: expected targets [{n}] of u8, u32 or i64, got {dims:?} of {dtype:?}")
    }
    let targets = &if targets.dtype() == DType::U8 { targets.to_dtype(DType::U32)? } else { targets.clone() };
    if n == 0 {
        bail!("cross_entropy: the batch is empty")
    }
    if Gpu::of(logits.device()).is_some() {
        let labels = Labels::Device(targets.to_device(logits.device())?.contiguous()?);
        return logits.contiguous()?.apply_op1(CrossEntropy { labels });
    }
    let labels = targets.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    if let Some(row) = labels.iter().position(|&label| !(0..c as i64).contains(&label)) {
        bail!("cross_entropy: label {} in row {row} is not one of {c} classes", labels[row])
    }
    if logits.device().is_cpu() {
        let labels = Labels::Host(labels.into_iter().map(|l| l as usize).collect());
        return logits.apply_op1(CrossEntropy { labels });
    }
    cross_entropy_compose(logits, targets)
}

fn cross_entropy_compose(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let log_p = Softmax { log: true }.compose(&logits.to_dtype(wide)?)?;
    log_p.gather(&targets.unsqueeze(1)?.contiguous()?, 1)?.mean_all()?.neg()?.to_dtype(logits.dtype())
}

struct CrossEntropy {
    labels: Labels,
}

enum Labels {
    /// Checked.
    Host(Vec<usize>),
    /// u32 or i64, contiguous.
    Device(Tensor),
}

fn forward<T: Element>(logits: &[T], labels: &[usize]) -> f64 {
    let c = logits.len() / labels.len();
    // The rows are cut by their length alone, so that the sum does not depend on the number of threads.
    let part = rows_of_part(c);
    let parts = logits.par_chunks(part * c).zip(labels.par_chunks(part));
    let sums: Vec<f64> = parts
        .map(|(logits, labels)| {
            with_level!(level => level.call(#[inline(always)] || {
                let mut total = 0.;
                for (row, &label) in logits.chunks_exact(c).zip(labels) {
                    let (max, log_sum) = log_sum_exp(level, row);
                    total += (log_sum - (row[label].widen() - max)).to_f64();
                }
                total
            }))
        })
        .collect();
    sums.iter().sum::<f64>() / labels.len() as f64
}

fn backward<T: Element>(logits: &[T], labels: &[usize], scale: f64) -> Vec<T> {
    let c = logits.len() / labels.len();
    let scale = T::Acc::from_f64(scale / labels.len() as f64);
    let mut grad = vec![T::narrow(T::Acc::ZERO); logits.len()];
    let part = rows_of_part(c);
    let parts = grad.par_chunks_mut(part * c).zip(logits.par_chunks(part * c).zip(labels.par_chunks(part)));
    parts.for_each(|(grad, (logits, labels))| {
        with_level!(level => level.call(#[inline(always)] || backward_rows(level, logits, labels, scale, grad)))
    });
    grad
}

#[inline(always)]
fn backward_rows<L: Level, T: Element>(
    level: L,
    logits: &[T],
    labels: &[usize],
    scale: T::Acc,
    grad: &mut [T],
) {
    let c = logits.len() / labels.len();
    let mut exps = Vec::new();
    for (grad, (row, &label)) in grad.chunks_exact_mut(c).zip(logits.chunks_exact(c).zip(labels)) {
        let one_over_sum = exponentials(level, row, &mut exps);
        // A row of -inf alone has no probabilities: its gradient stays 0.
        if one_over_sum == T::Acc::ZERO {
            continue;
        }
        grad.iter_mut().zip(&exps).for_each(|(g, e)| *g = T::narrow(*e * one_over_sum * scale));
        grad[label] = T::narrow((exps[label] * one_over_sum - T::Acc::from_f64(1.)) * scale);
    }
}

impl CrossEntropy {
    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Result<&Tensor> {
        match &self.labels {
            Labels::Device(labels) => Ok(labels),
            Labels::Host(_) => bail!("cross_entropy: the labels are on the CPU, the logits on a GPU"),
        }
    }
}

args! {
    /// The argument of `cross_entropy` in `cross_entropy.cu`.
    struct LossArgs { x: u64, labels: u64, losses: u64, rows: u64, d: u64, wide_labels: u32, block: u32 }
}

args! {
    /// The argument of `cross_entropy_mean` in `cross_entropy.cu`.
    struct MeanArgs { losses: u64, mean: u64, rows: u64 }
}

args! {
    /// The argument of `cross_entropy_gradient` in `cross_entropy.cu`.
    struct LossGradientArgs {
        x: u64, labels: u64, scale: u64, gx: u64, rows: u64, d: u64, divisor: f64, wide_labels: u32, block: u32,
    }
}

fn gpu_forward(gpu: &Gpu, x: &Operand, labels: &Tensor) -> Result<Storage> {
    const NAME: &str = "cross_entropy";
    let rows = labels.elem_count();
    let d = x.len / rows.max(1);
    let losses = gpu.tensor(rows, if x.dtype == DType::F64 { x.dtype } else { DType::F32 })?;
    let out = gpu.storage((), x.dtype)?;
    let (of_labels, of_losses) = (gpu.operand(labels, NAME)?, gpu.operand(&losses, NAME)?);
    let mean = gpu.of_storage(&out, 1, NAME)?;
    let (grid, block) = a_team_each(rows, d, x.dtype)?;
    let args = LossArgs {
        x: x.address(),
        labels: of_labels.address(),
        losses: of_losses.address(),
        rows: rows as u64,
        d: d as u64,
        wide_labels: u32::from(labels.dtype() == DType::I64),
        block,
    };
    gpu.launch(Module::CrossEntropy, &typed(NAME, x.dtype)?, grid, &args)?;
    let args = MeanArgs { losses: of_losses.address(), mean: mean.address(), rows: rows as u64 };
    let grid = Grid::line(1, THREADS)?;
    gpu.launch(Module::CrossEntropy, &typed("cross_entropy_mean", x.dtype)?, grid, &args)?;
    Ok(out)
}

/// `(softmax(logits) - onehot(labels)) scale / divisor`; `scale` has one element, 1 if absent.
fn gpu_backward(
    gpu: &Gpu,
    logits: &Tensor,
    labels: &Tensor,
    scale: Option<&Tensor>,
    divisor: f64,
) -> Result<Tensor> {
    let (logits, labels) = (logits.contiguous()?, labels.contiguous()?);
    let gx = gpu.tensor(logits.shape(), logits.dtype())?;
    let operand = |t: &Tensor| gpu.operand(t, "cross_entropy");
    let (of_logits, of_labels, of_gx) = (operand(&logits)?, operand(&labels)?, operand(&gx)?);
    let of_scale = scale.map(operand).transpose()?;
    let (rows, d) = logits.dims2()?;
    let (grid, block) = a_team_each(rows, d, logits.dtype())?;
    let args = LossGradientArgs {
        x: of_logits.address(),
        labels: of_labels.address(),
        scale: of_scale.as_ref().map_or(0, Operand::address),
        gx: of_gx.address(),
        rows: rows as u64,
        d: d as u64,
        divisor,
        wide_labels: u32::from(labels.dtype() == DType::I64),
        block,
    };
    gpu.launch(Module::CrossEntropy, &typed("cross_entropy_gradient", logits.dtype())?, grid, &args)?;
    Ok(gx)
}

/// `softmax(logits) - onehot(labels)` for `logits [n, c]` and `labels [n]` of u32 on one GPU; NaN where a label is none of
/// `0..c`. Not differentiable.
pub(crate) fn gpu_residual(gpu: &Gpu, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let &[n, _] = logits.dims() else {
        bail!("cross_entropy: expected logits [batch, classes], got {:?}", logits.dims())
    };
    if labels.dims() != [n] || labels.dtype() != DType::U32 {
        bail!("cross_entropy: expected labels [{n}] of u32, got {:?} of {:?}", labels.dims(), labels.dtype())
    }
    gpu_backward(gpu, logits, labels, None, 1.)
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let labels = match &self.labels {
            Labels::Host(labels) => labels,
            Labels::Device(labels) => {
                let Some(gpu) = Gpu::emulated() else {
                    bail!("cross_entropy: the labels are on a GPU, the logits on the CPU")
                };
                let loss = gpu_forward(&gpu, &gpu.on_cpu(logits, layout, "cross_entropy")?, labels)?;
                return Ok((gpu::into_cpu(loss)?, Shape::from(())));
            }
        };
        float_dispatch!("cross_entropy", logits.dtype(), T => {
            let loss = forward(&contiguous::<T>(logits, layout)?, labels);
            Ok((T::to_cpu_storage_owned(vec![T::from_f64(loss)]), Shape::from(())))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(logits.device.clone());
        let logits = gpu.on_cuda(logits, layout, "cross_entropy")?;
        let loss = gpu_forward(&gpu, &logits, self.on_device()?)?;
        Ok((gpu::into_cuda(loss)?, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let labels = match (&self.labels, Gpu::of(logits.device())) {
            (Labels::Host(labels), _) => labels,
            (Labels::Device(labels), Some(gpu)) => {
                let n = labels.elem_count() as f64;
                return Ok(Some(gpu_backward(&gpu, logits, labels, Some(&grad.contiguous()?), n)?));
            }
            (Labels::Device(_), None) => {
                bail!("cross_entropy: the labels are on a GPU, the logits on the CPU")
            }
        };
        let scale = grad.to_dtype(DType::F64)?.to_scalar()?;
        float_dispatch!("cross_entropy", logits.dtype(), T => {
            let host = Host::of(logits);
            let grad = backward(&host.values::<T>()?, labels, scale);
            Ok(Some(Tensor::from_vec(grad, logits.shape(), &Device::Cpu)?))
        })
    }
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::Var;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::softmax::{log_softmax_last_dim, softmax_last_dim};
    use crate::ops::testing::{assert_close, check_gradients, extreme, random_var, values};

    #[test]
    pub(in crate::ops) fn values_and_gradients() -> Result<()> {
        for dims in [[4, 5], [1, 1], [3, 37]] {
            let x = random_var(0, &dims)?;
            let log_p = values(&log_softmax_last_dim(&x)?)?;
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
        let check = || -> Result<()> {
            let loss = cross_entropy(&x, &Tensor::new(&[2u32, 0, 0], &Device::Cpu)?)?;
            let ln2 = std::f64::consts::LN_2;
            assert_close(&loss, &[(2e4 + ln2 + ln2 + 100.) / 3.], 1e-6);
            let grads = loss.backward()?;
            let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
            let third = 1. / 3.;
            let expected = [0.5, 0.5, -1., -0.5, 0.5, 0., -1., 1., 0.].map(|v| v * third);
            assert_close(&Tensor::new(&grad[..], &Device::Cpu)?, &expected, 1e-6);
            Ok(())
        };
        check()?;
        emulate(check)
    }

    /// A row of -inf alone: an infinite loss, as the label has probability 0, and no gradient. The other row has its own.
    #[test]
    fn a_row_wholly_masked() -> Result<()> {
        let inf = f64::INFINITY;
        let x = Var::new(&[[-inf, -inf, -inf], [0., 0., -inf]], &Device::Cpu)?;
        let check = || -> Result<()> {
            let loss = cross_entropy(&x, &Tensor::new(&[1u32, 0], &Device::Cpu)?)?;
            assert_eq!(loss.to_scalar::<f64>()?, inf);
            let grads = loss.backward()?;
            assert_close(grads.get(&x).unwrap_or(&loss), &[0., 0., 0., -0.25, 0.25, 0.], 1e-15);
            Ok(())
        };
        check()?;
        emulate(check)
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        let all = [1, 3, 31, 33, 127, 513, 1000]
            .into_iter()
            .flat_map(|d| [DType::F32, DType::F64, DType::F16, DType::BF16].map(|dtype| ([11, d], dtype)));
        let few = [
            ([300, 3], DType::F32),
            ([5, 4099], DType::F32),
            ([5, 5003], DType::F16),
            ([5, 2501], DType::F64),
        ];
        for (dims, dtype) in all.chain(few) {
            let x = extreme(dims)?.to_dtype(dtype)?;
            let labels: Vec<i64> = (0..dims[0]).map(|i| (i * 7 % dims[1]) as i64).collect();
            let labels = Tensor::new(labels, &Device::Cpu)?;
            let tolerance = match dtype {
                DType::F64 => 1e-13,
                DType::F32 => 2e-6,
                DType::F16 => 1e-3,
                _ => 1e-2,
            };
            // The loss of rows that have one, and the gradient of all.
            let tame: Vec<u32> = (0..dims[0] as u32).filter(|row| matches!(row % 5, 0 | 4)).collect();
            let tame = Tensor::new(tame, &Device::Cpu)?;
            let (tame, tame_labels) = (
                x.index_select(&tame, 0)?.affine(0.125, 0.)?,
                labels.index_select(&tame, 0)?.to_dtype(DType::U32)?,
            );
            let run = || -> Result<Vec<Vec<f64>>> {
                let x = Var::from_tensor(&x)?;
                let loss = (cross_entropy(&x, &labels)? * 3.)?;
                let grads = loss.backward()?;
                let loss = cross_entropy(&tame, &tame_labels)?;
                [Some(&loss), grads.get(&x)].into_iter().flatten().map(values).collect()
            };
            let (found, expected) = (emulate(run)?, run()?);
            assert_eq!((found.len(), expected.len()), (2, 2));
            for (found, expected) in found.iter().zip(&expected) {
                assert_close(&Tensor::new(&found[..], &Device::Cpu)?, expected, tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn a_wrong_label_gives_nan_on_a_gpu() -> Result<()> {
        let x = Var::new(&[[1f64, 2.], [3., 4.]], &Device::Cpu)?;
        emulate(|| {
            for targets in [Tensor::new(&[0i64, -1], &Device::Cpu)?, Tensor::new(&[0u32, 2], &Device::Cpu)?] {
                let loss = cross_entropy(&x, &targets)?;
                assert!(values(&loss)?[0].is_nan());
                let grads = loss.backward()?;
                let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
                assert!(grad[..2].iter().all(|g| g.is_finite()) && grad[2..].iter().all(|g| g.is_nan()));
            }
            Ok(())
        })
    }

    #[test]
    fn residuals() -> Result<()> {
        let x = random_var(0, &[3, 5])?;
        let labels = Tensor::new(&[4u32, 0, 2], &Device::Cpu)?;
        let mut expected = values(&softmax_last_dim(&x)?)?;
        [4, 5, 12].iter().for_each(|&at| expected[at] -= 1.);
        emulate(|| {
            let Some(gpu) = Gpu::emulated() else { return Ok(()) };
            assert_close(&gpu_residual(&gpu, &x, &labels)?, &expected, 1e-14);
            assert!(gpu_residual(&gpu, &x, &labels.narrow(0, 0, 2)?).is_err());
            Ok(())
        })
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
        Ok(())
    }
}
