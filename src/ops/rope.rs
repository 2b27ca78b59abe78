//! Rotary position embeddings (Su et al. 2021, eq. 34) with their gradient: a turn by the opposite angle.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp3, D, Layout, Result, Shape, Storage, Tensor, WithDType, backend::BackendStorage,
    bail,
};
use rayon::prelude::*;

use super::element::{Element, contiguous, float_dispatch};
use super::row_launch::THREADS;
use super::simd::vectorized;
use crate::gpu::{self, Gpu, Grid, Module, Operand, args, typed};

/// The pairs of elements that are turned, and where a row's position is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rope {
    /// Pairs are neighbours, `(0, 1), (2, 3), ..`; otherwise half a row apart, `(0, d / 2), (1, d / 2 + 1), ..`.
    pub interleaved: bool,
    /// Inputs are `[batch, positions, heads, d]`; otherwise `[batch, heads, positions, d]`.
    pub heads_last: bool,
}

#[derive(Clone, Copy)]
struct Turn {
    rope: Rope,
    sizes: Sizes,
    back: bool,
}

#[derive(Clone, Copy)]
struct Sizes {
    seq: usize,
    half: usize,
    /// Rows of one position that lie together.
    inner: usize,
    batch_rows: usize,
    /// Elements from one example's angles to the next's.
    batch_angle: usize,
}

args! {
    /// The argument of `rope` in `rope.cu`.
    struct RopeArgs {
        x: u64, cos: u64, sin: u64, y: u64, pairs: u64, batch_rows: u64, batch_angle: u64,
        half: u32, seq: u32, inner: u32, interleaved: u32, back: u32,
    }
}

impl Rope {
    /// Turns the pairs of `x` by the angles whose cosines and sines are `[positions, d / 2]` or, one table an example,
    /// `[batch, positions, d / 2]`; tables of more positions than `x` has are read from their start.
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit.
    pub fn apply(self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let sizes = self.sizes(x, cos, sin)?;
        let fused = x.device().is_cpu() || Gpu::of(x.device()).is_some();
        if !fused || cos.track_op() || sin.track_op() {
            return self.compose(x, cos, sin, sizes);
        }
        let turn = Turn { rope: self, sizes, back: false };
        x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, turn)
    }

    fn sizes(self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Sizes> {
        let (batch, a, b, d) = x.dims4()?;
        let (seq, inner) = if self.heads_last { (a, b) } else { (b, 1) };
        let fits = match *cos.dims() {
            [n, positions, half] => n == batch && positions >= seq && 2 * half == d,
            [positions, half] => positions >= seq && 2 * half == d,
            _ => false,
        };
        if !fits || cos.dims() != sin.dims() {
            bail!(
                "rope: expected cosines and sines [>= {seq}, {}] (or one table for each of {batch} examples) for inputs {:?}, got {:?} and {:?}",
                d / 2,
                x.dims(),
                cos.dims(),
                sin.dims()
            )
        }
        if cos.dtype() != x.dtype() || sin.dtype() != x.dtype() {
            bail!(
                "rope: the input is {:?}, the cosines {:?}, the sines {:?}",
                x.dtype(),
                cos.dtype(),
                sin.dtype()
            )
        }
        let batch_angle = if cos.rank() == 3 { cos.dim(1)? * d / 2 } else { 0 };
        Ok(Sizes { seq, half: d / 2, inner, batch_rows: a * b, batch_angle })
    }

    /// The same from candle's own operations, with gradients for the angles too.
    fn compose(
        self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        Sizes { seq, half, .. }: Sizes,
    ) -> Result<Tensor> {
        let angles = |t: &Tensor| -> Result<Tensor> {
            let t = t.narrow(t.rank() - 2, 0, seq)?;
            let t = if t.rank() == 2 { t.unsqueeze(0)? } else { t };
            t.unsqueeze(if self.heads_last { 2 } else { 1 })
        };
        let (cos, sin) = (angles(cos)?, angles(sin)?);
        let (a, b) = if self.interleaved {
            let (n, p, q, _) = x.dims4()?;
            let pairs = x.reshape((n, p, q, half, 2))?;
            (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
        } else {
            (x.narrow(3, 0, half)?, x.narrow(3, half, half)?)
        };
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        if self.interleaved {
            Tensor::stack(&[first, second], D::Minus1)?.flatten_from(3)
        } else {
            Tensor::cat(&[first, second], D::Minus1)
        }
    }
}

impl Turn {
    fn cpu<T: Element>(&self, x: &[T], cos: &[T], sin: &[T]) -> Vec<T> {
        let Sizes { seq, half, inner, batch_rows, batch_angle } = self.sizes;
        let mut y = vec![T::narrow(<T::Acc as super::element::Real>::ZERO); x.len()];
        if x.is_empty() {
            return y;
        }
        let turn = |a: T, b: T, c: T, s: T| {
            let (a, b, c, s) = (a.widen(), b.widen(), c.widen(), s.widen());
            match self.back {
                false => (T::narrow(a * c - b * s), T::narrow(a * s + b * c)),
                true => (T::narrow(a * c + b * s), T::narrow(b * c - a * s)),
            }
        };
        let rows = y.par_chunks_exact_mut(2 * half).zip(x.par_chunks_exact(2 * half)).enumerate();
        rows.with_min_len((4096 / half).max(1)).for_each(|(row, (y, x))| {
            let start = row / batch_rows * batch_angle + row / inner % seq * half;
            let angles = cos[start..start + half].iter().zip(&sin[start..start + half]);
            vectorized(
                #[inline(always)]
                || {
                    if self.rope.interleaved {
                        for ((y, x), (&c, &s)) in y.chunks_exact_mut(2).zip(x.chunks_exact(2)).zip(angles) {
                            (y[0], y[1]) = turn(x[0], x[1], c, s);
                        }
                    } else {
                        let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
                        let pairs = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2));
                        for (((y1, y2), (&a, &b)), (&c, &s)) in pairs.zip(angles) {
                            (*y1, *y2) = turn(a, b, c, s);
                        }
                    }
                },
            )
        });
        y
    }

    fn gpu(&self, gpu: &Gpu, x: &Operand, cos: &Operand, sin: &Operand) -> Result<Storage> {
        let Sizes { seq, half, inner, batch_rows, batch_angle } = self.sizes;
        let out = gpu.storage(x.len, x.dtype)?;
        let y = gpu.of_storage(&out, x.len, "rope")?;
        let pairs = x.len / 2;
        let args = RopeArgs {
            x: x.address(),
            cos: cos.address(),
            sin: sin.address(),
            y: y.address(),
            pairs: pairs as u64,
            batch_rows: batch_rows as u64,
            batch_angle: batch_angle as u64,
            half: half as u32,
            seq: seq as u32,
            inner: inner as u32,
            interleaved: self.rope.interleaved.into(),
            back: self.back.into(),
        };
        let grid = Grid::line(pairs.div_ceil(THREADS as usize), THREADS)?;
        gpu.launch(Module::Rope, &typed("rope", x.dtype)?, grid, &args)?;
        Ok(out)
    }
}

impl CustomOp3 for Turn {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        cos: &CpuStorage,
        of_cos: &Layout,
        sin: &CpuStorage,
        of_sin: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(gpu) = Gpu::emulated() {
            let (cos, sin) = (gpu.on_cpu(cos, of_cos, "rope")?, gpu.on_cpu(sin, of_sin, "rope")?);
            let y = self.gpu(&gpu, &gpu.on_cpu(x, layout, "rope")?, &cos, &sin)?;
            return Ok((gpu::into_cpu(y)?, layout.shape().clone()));
        }
        float_dispatch!("rope", x.dtype(), T => {
            let (x, cos) = (contiguous::<T>(x, layout)?, contiguous::<T>(cos, of_cos)?);
            let y = self.cpu(&x, &cos, &contiguous::<T>(sin, of_sin)?);
            Ok((T::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        cos: &CudaStorage,
        of_cos: &Layout,
        sin: &CudaStorage,
        of_sin: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let (cos, sin) = (gpu.on_cuda(cos, of_cos, "rope")?, gpu.on_cuda(sin, of_sin, "rope")?);
        let y = self.gpu(&gpu, &gpu.on_cuda(x, layout, "rope")?, &cos, &sin)?;
        Ok((gpu::into_cuda(y)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let back = Turn { back: !self.back, ..*self };
        Ok((Some(gy.contiguous()?.detach().apply_op3_no_bwd(cos, sin, &back)?), None, None))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::testing::{assert_close, assert_emulated, check_gradients, random, random_var, values};

    fn all() -> impl Iterator<Item = Rope> {
        [(false, false), (true, false), (false, true)]
            .into_iter()
            .map(|(interleaved, heads_last)| Rope { interleaved, heads_last })
    }

    /// `x` of 2 examples, 3 heads, 5 positions and 4 features, and angles of 6 positions.
    fn case(rope: Rope, per_example: bool) -> Result<(Var3, [usize; 4])> {
        let dims = if rope.heads_last { [2, 5, 3, 4] } else { [2, 3, 5, 4] };
        let angles: &[usize] = if per_example { &[2, 6, 2] } else { &[6, 2] };
        Ok(([random_var(0, &dims)?, random_var(1, angles)?, random_var(2, angles)?], dims))
    }
    type Var3 = [candle_core::Var; 3];

    #[test]
    fn values_against_loops_and_gradients() -> Result<()> {
        for rope in all() {
            for per_example in [false, true] {
                let ([x, cos, sin], dims) = case(rope, per_example)?;
                let (xs, cs, ss) = (values(&x)?, values(&cos)?, values(&sin)?);
                let mut expected = vec![0.; xs.len()];
                for at in 0..xs.len() {
                    let (i, row) = (at % 4, at / 4);
                    let (b, t) = (row / 15, if rope.heads_last { row / 3 % 5 } else { row % 5 });
                    let (pair, second) = if rope.interleaved { (i / 2, i % 2) } else { (i % 2, i / 2) };
                    let other = if rope.interleaved { at ^ 1 } else { at ^ 2 };
                    let angle = if per_example { b * 12 } else { 0 } + t * 2 + pair;
                    let sign = if second == 1 { 1. } else { -1. };
                    expected[at] = xs[at] * cs[angle] + sign * xs[other] * ss[angle];
                }
                let (cos_of, sin_of) = (cos.as_detached_tensor(), sin.as_detached_tensor());
                assert_close(&rope.apply(&x, &cos_of, &sin_of)?, &expected, 1e-14);
                assert_close(&rope.apply(&x, &cos, &sin)?, &expected, 1e-14);
                assert_eq!(rope.apply(&x, &cos_of, &sin_of)?.dims(), dims);
                check_gradients(std::slice::from_ref(&x), |a| rope.apply(&a[0], &cos_of, &sin_of));
                check_gradients(&[x, cos, sin], |a| rope.apply(&a[0], &a[1], &a[2]));
            }
        }
        Ok(())
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        for rope in all() {
            for (dtype, tolerance) in
                [(DType::F32, 1e-6), (DType::F64, 1e-15), (DType::F16, 1e-3), (DType::BF16, 1e-2)]
            {
                for per_example in [false, true] {
                    let ([x, cos, sin], dims) = case(rope, per_example)?;
                    let x = candle_core::Var::from_tensor(&x.to_dtype(dtype)?)?;
                    let (cos, sin) = (cos.detach().to_dtype(dtype)?, sin.detach().to_dtype(dtype)?);
                    let gy = random(3, &dims)?.to_dtype(dtype)?;
                    let run = || {
                        let y = rope.apply(&x, &cos, &sin)?;
                        let grads = (&y * &gy)?.sum_all()?.backward()?;
                        let Some(grad) = grads.get(&x) else { bail!("no gradient") };
                        Ok(vec![y, grad.clone()])
                    };
                    assert_emulated(run, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_angles_are_refused() -> Result<()> {
        let x = Tensor::zeros((2, 3, 5, 4), DType::F32, &Device::Cpu)?;
        let rope = Rope { interleaved: false, heads_last: false };
        let angles = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
        let good = angles(&[5, 2], DType::F32)?;
        for bad in [&[4, 2][..], &[5, 3], &[5], &[1, 5, 2], &[3, 5, 2]] {
            let bad = angles(bad, DType::F32)?;
            assert!(rope.apply(&x, &bad, &bad).is_err() && rope.apply(&x, &good, &bad).is_err());
        }
        assert!(rope.apply(&x, &good, &angles(&[5, 2], DType::F64)?).is_err());
        assert!(rope.apply(&x.narrow(3, 0, 3)?, &good, &good).is_err());
        Ok(())
    }
}
