//! Layers that are no products: their outputs pass through unchanged, and their gradients are recorded on the way back.

use super::{Inputs, Tap};
use crate::ops::norm::Norm;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

/// What the layer's weight has seen.
enum Seen {
    /// A norm's inputs.
    Normed(Norm, Tensor),
    /// An embedding's numbers.
    Indices(Tensor),
}

struct TapIdentity {
    tap: Tap,
    seen: Seen,
}

/// A norm over the last dimension of `x`, tapped or not.
pub(crate) fn normed(
    norm: Norm,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    tap: Option<&Tap>,
) -> Result<Tensor> {
    let Some(tap) = tap.filter(|_| x.rank() > 1) else { return norm.apply(x, weight, bias) };
    // One operation where there is one: an identity behind it would copy the outputs and their gradients.
    if let Some(y) = norm.apply_as(x, weight, bias, TappedNorm { norm, tap: tap.clone() })? {
        return Ok(y);
    }
    let y = norm.apply(x, weight, bias)?.contiguous()?;
    y.apply_op1(TapIdentity { tap: tap.clone(), seen: Seen::Normed(norm, x.detach()) })
}

/// The rows `numbers` `[n, ..]` of a table `[rows, features]`, `[n, .., features]`, tapped or not.
pub(crate) fn picked(numbers: &Tensor, table: &Tensor, tap: Option<&Tap>) -> Result<Tensor> {
    let mut dims = numbers.dims().to_vec();
    dims.push(table.dim(1)?);
    let y = table.index_select(&numbers.flatten_all()?, 0)?.reshape(dims)?;
    match tap {
        Some(tap) if numbers.rank() > 0 => {
            let batch = numbers.dim(0)?;
            let shared = numbers.elem_count() / batch.max(1);
            let numbers = numbers.to_dtype(DType::U32)?.reshape((batch, shared))?;
            y.contiguous()?.apply_op1(TapIdentity { tap: tap.clone(), seen: Seen::Indices(numbers) })
        }
        _ => Ok(y),
    }
}

impl CustomOp1 for TapIdentity {
    fn name(&self) -> &'static str {
        "tap"
    }

    fn cpu_fwd(&self, y: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("tap: expected a contiguous tensor of its own")
        }
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, y: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            bail!("tap: expected a contiguous tensor of its own")
        }
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        record(&self.tap, &self.seen, gy)?;
        Ok(Some(gy.clone()))
    }
}

/// Hands a record of `seen` and of the gradient of the outputs to the tape, if somebody listens.
fn record(tap: &Tap, seen: &Seen, gy: &Tensor) -> Result<()> {
    if !tap.wanted().1 {
        return Ok(());
    }
    let (batch, features) = (gy.dim(0)?, gy.dims().last().copied().unwrap_or(1));
    let shared = gy.elem_count() / (batch * features).max(1);
    let grads = gy.contiguous()?.reshape((batch, shared, features))?;
    let inputs = match seen {
        Seen::Normed(norm, x) => {
            let ones = Tensor::ones(features, x.dtype(), x.device())?;
            Inputs::Rows(norm.apply(x, &ones, None)?.reshape((batch, shared, features))?)
        }
        Seen::Indices(numbers) => Inputs::Indices(numbers.clone()),
    };
    tap.record(inputs, grads)
}

/// A norm that hands its record to the tape on the way back.
struct TappedNorm {
    norm: Norm,
    tap: Tap,
}

impl TappedNorm {
    fn record(&self, x: &Tensor, gy: &Tensor) -> Result<()> {
        record(&self.tap, &Seen::Normed(self.norm, x.detach()), gy)
    }
}

impl CustomOp2 for TappedNorm {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        CustomOp2::cpu_fwd(&self.norm, x, x_l, w, w_l)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_l: &Layout,
        w: &CudaStorage,
        w_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        CustomOp2::cuda_fwd(&self.norm, x, x_l, w, w_l)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.record(x, gy)?;
        CustomOp2::bwd(&self.norm, x, w, y, gy)
    }
}

impl CustomOp3 for TappedNorm {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        CustomOp3::cpu_fwd(&self.norm, x, x_l, w, w_l, b, b_l)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_l: &Layout,
        w: &CudaStorage,
        w_l: &Layout,
        b: &CudaStorage,
        b_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        CustomOp3::cuda_fwd(&self.norm, x, x_l, w, w_l, b, b_l)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.record(x, gy)?;
        CustomOp3::bwd(&self.norm, x, w, b, y, gy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{LayerNorm, Module};
    use crate::ops::testing::{assert_close, assert_emulated, check_gradients, random, random_var, values};
    use crate::tape::{Keep, Tape};

    /// A tapped norm records its normalized inputs and the gradients of its outputs, and computes what it does without a tape.
    #[test]
    fn norms_record_what_they_see() -> Result<()> {
        let (x, w, b) = (random_var(0, &[3, 2, 4])?, random_var(1, &[4])?, random_var(2, &[4])?);
        for (with_bias, center) in [(true, true), (false, true), (false, false)] {
            let layer = |a: &[Tensor]| match (with_bias, center) {
                (true, _) => LayerNorm::new(a[1].clone(), a[2].clone(), 1e-3),
                (false, true) => LayerNorm::new_no_bias(a[1].clone(), 1e-3),
                (false, false) => LayerNorm::rms_norm(a[1].clone(), 1e-3),
            };
            let tensors = [&x, &w, &b].map(|var| var.as_tensor().clone());
            let (tape, cotangent) = (Tape::new(), random(5, &[3, 2, 4])?);
            let tapped = tape.build(|| Ok(layer(&tensors)))?;
            assert_close(&tapped.forward(&x)?, &values(&layer(&tensors).forward(&x)?)?, 1e-15);
            let run = || -> Result<Vec<Tensor>> {
                let kept = tape.reduce(&tapped.forward(&x)?, &cotangent, Keep::default())?;
                assert_eq!(kept.0.len(), 1);
                Ok(vec![kept.0[0].1.inputs.rows()?, kept.0[0].1.grads.clone()])
            };
            let expected: Vec<f64> = values(&x)?
                .chunks(4)
                .flat_map(|row| {
                    let mean = if center { row.iter().sum::<f64>() / 4. } else { 0. };
                    let scale = (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4. + 1e-3).sqrt();
                    row.iter().map(|v| (v - mean) / scale).collect::<Vec<_>>()
                })
                .collect();
            let found = run()?;
            assert_close(&found[0], &expected, 1e-14);
            assert_close(&found[1], &values(&cotangent)?, 0.);
            assert_emulated(run, 1e-12)?;
            let vars = [x.clone(), w.clone(), b.clone()];
            let wanted = if with_bias { 3 } else { 2 };
            check_gradients(&vars[..wanted], |a| {
                let all = [a[0].clone(), a[1].clone(), a.get(2).unwrap_or(b.as_tensor()).clone()];
                tape.build(|| Ok(layer(&all)))?.forward(&a[0])
            });
        }
        Ok(())
    }
}
