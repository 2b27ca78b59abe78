//! The tapped affine map `y = x W^T + b`, the whole of a linear layer as one op.

use super::{Inputs, Owed, Tap};
use crate::gpu::Gpu;
use crate::ops::bias::{gpu_add, gpu_sum};
use crate::ops::dense::{self, Matrices, products};
use crate::ops::simd::vectorized;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use half::{bf16, f16};
use rayon::prelude::*;

/// `x W^T + b` for `x` of shape `[.., in]`, `weight` `[out, in]`, `bias` `[out]`: `[.., out]`. A bias of another shape, as long as
/// it broadcasts, is added apart.
pub(crate) fn affine(
    name: &str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    tap: Option<Tap>,
) -> Result<Tensor> {
    let out = weight.dim(0)?;
    let (x, weight) = operands(name, x, weight)?;
    match bias {
        Some(bias) if bias.dims() != [out] => x.apply_op2(&weight, Affine { tap })?.broadcast_add(bias),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Affine { tap }),
        None => x.apply_op2(&weight, Affine { tap }),
    }
}

/// The input and the weight as the operation reads them.
pub(super) fn operands(name: &str, x: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, inputs) = weight.dims2()?;
    if x.rank() < 2 || x.dims().last() != Some(&inputs) {
        bail!(
            "layer {name}: expected an input of shape [.., {inputs}] and rank 2 or more, got {:?}",
            x.dims()
        )
    }
    if x.dtype() != weight.dtype() {
        bail!("layer {name}: the weight is {:?}, the input {:?}", weight.dtype(), x.dtype())
    }
    Ok((x.contiguous()?, if weight.is_contiguous() { weight.clone() } else { weight.contiguous()? }))
}

pub(super) struct Affine {
    pub(super) tap: Option<Tap>,
}

/// Rows, outputs and inputs of the product; the operands are contiguous.
fn sizes(x: &Layout, w: &Layout) -> Result<(usize, usize, usize)> {
    let (out, inputs) = w.shape().dims2()?;
    Ok((x.shape().elem_count() / inputs.max(1), out, inputs))
}

fn product<S: BackendStorage>(x: &S, x_l: &Layout, w: &S, w_l: &Layout) -> Result<(S, Shape)> {
    let (rows, out, inputs) = sizes(x_l, w_l)?;
    let flat = Layout::contiguous_with_offset((rows, inputs), x_l.start_offset());
    let y = x.matmul(w, (1, rows, out, inputs), &flat, &w_l.transpose(0, 1)?)?;
    let mut dims = x_l.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    Ok((y, Shape::from(dims)))
}

/// [`product`], in single and double precision with the crate's own choice of kernels.
fn cpu_product(x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
    fn dense<T: WithDType + faer::traits::RealField>(
        (x, x_l): (&[T], &Layout),
        (w, w_l): (&[T], &Layout),
    ) -> Result<CpuStorage> {
        let (rows, out, inputs) = sizes(x_l, w_l)?;
        let (x, w) = (&x[x_l.start_offset()..], &w[w_l.start_offset()..]);
        let x = Matrices { data: x, rows, columns: inputs, transposed: false };
        let w = Matrices { data: w, rows: inputs, columns: out, transposed: true };
        Ok(<T as WithDType>::to_cpu_storage_owned(products(&x, &w, 1)))
    }
    let y = match (x, w) {
        (CpuStorage::F32(x), CpuStorage::F32(w)) => dense((x, x_l), (w, w_l))?,
        (CpuStorage::F64(x), CpuStorage::F64(w)) => dense((x, x_l), (w, w_l))?,
        _ => return product(x, x_l, w, w_l),
    };
    let (_, out, _) = sizes(x_l, w_l)?;
    let mut dims = x_l.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    Ok((y, Shape::from(dims)))
}

/// Adds `bias` to every row of `y`.
fn add_to_rows(y: &mut CpuStorage, bias: &CpuStorage, layout: &Layout) -> Result<()> {
    fn rows<T: Copy + std::ops::AddAssign + Send + Sync>(y: &mut [T], bias: &[T]) {
        let add = |y: &mut [T]| {
            vectorized(
                #[inline(always)]
                || {
                    for row in y.chunks_mut(bias.len().max(1)) {
                        row.iter_mut().zip(bias).for_each(|(y, b)| *y += *b);
                    }
                },
            )
        };
        // Below some thousand elements the hand-over to other threads costs more than the sum.
        if y.len() < 1 << 16 { add(y) } else { y.par_chunks_mut(64 * bias.len().max(1)).for_each(add) }
    }
    let at = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    match (y, bias) {
        (CpuStorage::F32(y), CpuStorage::F32(b)) => rows::<f32>(y, &b[at]),
        (CpuStorage::F64(y), CpuStorage::F64(b)) => rows::<f64>(y, &b[at]),
        (CpuStorage::F16(y), CpuStorage::F16(b)) => rows::<f16>(y, &b[at]),
        (CpuStorage::BF16(y), CpuStorage::BF16(b)) => rows::<bf16>(y, &b[at]),
        (y, b) => bail!("linear layer: the outputs are {:?}, the bias {:?}", y.dtype(), b.dtype()),
    }
    Ok(())
}

impl Affine {
    /// Gradients of x, W and b, as far as they are owed; the record on the way.
    pub(super) fn grads(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let owed = Owed::new(self.tap.as_ref(), x, w, b);
        let (out, inputs) = w.dims2()?;
        let rows = x.elem_count() / inputs.max(1);
        let gy = gy.contiguous()?.reshape((rows, out))?;
        let flat = x.detach().reshape((rows, inputs))?;
        if let (true, Some(tap)) = (owed.record, &self.tap) {
            let batch = x.dim(0)?;
            let shared = rows / batch.max(1);
            let inputs = Inputs::Rows(flat.reshape((batch, shared, inputs))?);
            tap.record(inputs, gy.reshape((batch, shared, out))?)?;
        }
        let dx = if owed.input { Some(dense::product(&gy, &w.detach())?.reshape(x.shape())?) } else { None };
        let dw = if owed.weight { Some(dense::product(&gy.t()?, &flat)?) } else { None };
        let db = if owed.bias { Some(sum_rows(&gy)?) } else { None };
        Ok((dx, dw, db))
    }
}

/// The sum of the rows of `[rows, out]`, on the CPU as a product with ones: a reduction over a leading dimension is candle's
/// slowest, a matrix product its fastest. Half precision is summed in f32.
fn sum_rows(gy: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(gy.device()) {
        return gpu_sum(&gpu, gy);
    }
    let wide = if gy.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let ones = Tensor::ones((1, gy.dim(0)?), wide, gy.device())?;
    dense::product(&ones, &gy.to_dtype(wide)?)?.squeeze(0)?.to_dtype(gy.dtype())
}

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        "affine"
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
        let (mut y, shape) = cpu_product(x, x_l, w, w_l)?;
        if let Some(gpu) = Gpu::emulated() {
            let of_y = gpu.on_cpu(&y, &Layout::contiguous(&shape), "linear layer")?;
            gpu_add(&gpu, &of_y, &gpu.on_cpu(b, b_l, "linear layer")?)?;
            return Ok((y, shape));
        }
        add_to_rows(&mut y, b, b_l)?;
        Ok((y, shape))
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
        let (y, shape) = product(x, x_l, w, w_l)?;
        let gpu = Gpu::Cuda(x.device.clone());
        let of_y = gpu.on_cuda(&y, &Layout::contiguous(&shape), "linear layer")?;
        gpu_add(&gpu, &of_y, &gpu.on_cuda(b, b_l, "linear layer")?)?;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.grads(x, w, Some(b), gy)
    }
}

impl CustomOp2 for Affine {
    fn name(&self) -> &'static str {
        "affine-no-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu_product(x, x_l, w, w_l)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_l: &Layout,
        w: &CudaStorage,
        w_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        product(x, x_l, w, w_l)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.grads(x, w, None, gy)?;
        Ok((dx, dw))
    }
}
