//! 2x2 max pooling with a true gradient. candle's own `max_pool2d` gives a quarter of it (it multiplies by the mean of a
//! 0/1 mask over the window), and several times it where values tie, which on a black background they do.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

/// The largest value of each 2x2 window: `[n, c, h, w] -> [n, c, h/2, w/2]`, for f32, f64, f16 and bf16. An odd last row or
/// column is left out. The gradient goes to the first of equal values in row-major order, as in PyTorch.
pub fn max_pool2(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { x.contiguous()?.apply_op1(MaxPool) } else { composed(x) }
}

/// The same from candle's operations, on any device.
fn composed(x: &Tensor) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let (rows, cols) = (h / 2, w / 2);
    let whole = x.narrow(2, 0, 2 * rows)?.narrow(3, 0, 2 * cols)?.contiguous()?;
    let windows = whole.reshape(vec![n, c, rows, 2, cols, 2])?.permute(vec![0, 1, 2, 4, 3, 5])?;
    let windows = windows.contiguous()?.reshape((n, c, rows, cols, 4))?;
    windows.gather(&windows.argmax_keepdim(D::Minus1)?.contiguous()?, D::Minus1)?.squeeze(D::Minus1)
}

struct MaxPool;

/// From the input of [`MaxPool`] and the gradient of its output: the gradient of the input.
struct Scatter;

/// Runs `$body` with `$x` the values of a CPU storage of any float type (and `$y` those of a second one).
macro_rules! floats {
    ($storage:expr, $layout:expr, $x:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32(x) => {
                let $x = values(x, $layout)?;
                CpuStorage::F32($body)
            }
            CpuStorage::F64(x) => {
                let $x = values(x, $layout)?;
                CpuStorage::F64($body)
            }
            CpuStorage::F16(x) => {
                let $x = values(x, $layout)?;
                CpuStorage::F16($body)
            }
            CpuStorage::BF16(x) => {
                let $x = values(x, $layout)?;
                CpuStorage::BF16($body)
            }
            _ => bail!("max_pool2: expected f32, f64, f16 or bf16"),
        }
    };
}

fn values<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("max_pool2: expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool2"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let pooled = floats!(storage, layout, x => pool(x, h, w));
        Ok((pooled, (n, c, h / 2, w / 2).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.apply_op2_no_bwd(&grad.contiguous()?, &Scatter)?))
    }
}

impl CustomOp2 for Scatter {
    fn name(&self) -> &'static str {
        "max-pool2-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, _, h, w) = lx.shape().dims4()?;
        let scattered =
            floats!(x, lx, x => scatter(x, values(WithDType::cpu_storage_as_slice(g)?, lg)?, h, w));
        Ok((scattered, lx.shape().clone()))
    }
}

/// The place (0 to 3, row by row) and the value of the largest of a window; the first of equals, NaN above all.
#[inline(always)]
fn largest<T: Copy + PartialOrd>(window: [T; 4]) -> (usize, T) {
    let mut best = (0, window[0]);
    for (i, &v) in window.iter().enumerate().skip(1) {
        // A number that does not equal itself is NaN.
        #[allow(clippy::eq_op)]
        if v > best.1 || v != v {
            best = (i, v);
        }
    }
    best
}

/// Windows of a plane of width `w`, row of windows by row of windows: four values each.
#[inline(always)]
fn window<T: Copy>(upper: &[T], lower: &[T], j: usize) -> [T; 4] {
    [upper[2 * j], upper[2 * j + 1], lower[2 * j], lower[2 * j + 1]]
}

fn pool<T: WithDType>(x: &[T], h: usize, w: usize) -> Vec<T> {
    let (rows, cols) = (h / 2, w / 2);
    let mut out = vec![T::zero(); x.len().checked_div(h * w).unwrap_or(0) * rows * cols];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(rows * cols).zip(x.par_chunks(h * w)).with_min_len(16).for_each(|(out, x)| {
        for (out, x) in out.chunks_mut(cols).zip(x.chunks_exact(2 * w)) {
            let (upper, lower) = x.split_at(w);
            for (j, out) in out.iter_mut().enumerate() {
                *out = largest(window(upper, lower, j)).1;
            }
        }
    });
    out
}

fn scatter<T: WithDType>(x: &[T], grad: &[T], h: usize, w: usize) -> Vec<T> {
    let (rows, cols) = (h / 2, w / 2);
    let mut out = vec![T::zero(); x.len()];
    if grad.is_empty() {
        return out;
    }
    let planes = out.par_chunks_mut(h * w).zip(x.par_chunks(h * w)).zip(grad.par_chunks(rows * cols));
    planes.with_min_len(16).for_each(|((out, x), grad)| {
        for ((out, x), grad) in
            out.chunks_exact_mut(2 * w).zip(x.chunks_exact(2 * w)).zip(grad.chunks_exact(cols))
        {
            let (upper, lower) = x.split_at(w);
            for (j, &g) in grad.iter().enumerate() {
                let place = largest(window(upper, lower, j)).0;
                out[(place / 2) * w + 2 * j + place % 2] = g;
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    type Pool = fn(&Tensor) -> Result<Tensor>;

    /// Output and input gradient of `sum(pool(x) * [1, 2, 3, ..])`.
    fn both(pool: Pool, x: &Var) -> (Vec<f64>, Vec<f64>) {
        let y = pool(x).unwrap();
        let weights = Tensor::arange(1f64, y.elem_count() as f64 + 1.0, &Device::Cpu).unwrap();
        let weights = weights.reshape(y.shape()).unwrap().to_dtype(x.dtype()).unwrap();
        let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let list = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (list(&y), list(grads.get(x).unwrap()))
    }

    #[test]
    fn value_and_gradient_of_a_worked_example() {
        // A single largest value, ties, and an odd row and column that take no part.
        let x = [
            [1f64, 2., 3., 3., 9.],
            [4., 3., 3., 0., 9.],
            [0., 0., -5., -1., 9.],
            [0., 0., -1., -7., 9.],
            [8.; 5],
        ];
        let x = Tensor::new(&x, &Device::Cpu).unwrap().reshape((1, 1, 5, 5)).unwrap();
        let grad =
            [[0., 0., 2., 0., 0.], [1., 0., 0., 0., 0.], [3., 0., 0., 4., 0.], [0.; 5], [0.; 5]].concat();
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!(both(max_pool2, &x), (vec![4., 3., 0., -1.], grad.clone()), "{dtype:?}");
        }
        let x = Var::from_tensor(&x).unwrap();
        assert_eq!(both(composed, &x), (vec![4., 3., 0., -1.], grad));
    }

    #[test]
    fn agrees_with_candle_operations_on_random_tensors() {
        for shape in [(3, 5, 24, 24), (2, 40, 7, 9), (1, 1, 2, 2)] {
            // Rounded, so that many values tie.
            let x = (Tensor::randn(0f64, 3.0, shape, &Device::Cpu).unwrap()).round().unwrap();
            let x = Var::from_tensor(&x).unwrap();
            assert_eq!(both(max_pool2, &x), both(composed, &x), "{shape:?}");
        }
    }

    #[test]
    fn nan_is_not_hidden_and_small_images_are_empty() {
        for place in 0..4 {
            let mut x = [1f32, 2.0, 3.0, 4.0];
            x[place] = f32::NAN;
            let y =
                max_pool2(&Tensor::new(&x, &Device::Cpu).unwrap().reshape((1, 1, 2, 2)).unwrap()).unwrap();
            assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0].is_nan(), "{place}");
        }
        let x = Tensor::ones((2, 3, 1, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(max_pool2(&x).unwrap().dims(), [2, 3, 0, 2]);
    }
}
