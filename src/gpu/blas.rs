//! Products of cuBLAS with an arithmetic of the caller's choice; candle's is one for the whole process.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaDevice, DType, Result, Tensor};

use super::Gpu;

/// A factor as it lies in memory: by rows, or by columns where it is `turned`.
pub(crate) struct Factor {
    pub data: Tensor,
    pub turned: bool,
}

/// The f32 product `[.., m, n]` of `[.., m, k]` and `[.., k, n]` with operands rounded to TF32 and sums in f32. Nothing where a size is 0 or
/// beyond what cuBLAS takes.
pub(crate) fn tf32_product(
    device: &CudaDevice,
    (a, b): (&Factor, &Factor),
    (batch, [m, k, n]): (&[usize], [usize; 3]),
) -> Result<Option<Tensor>> {
    let groups: usize = batch.iter().product();
    let sizes = [m, k, n, groups].map(|size| i32::try_from(size).ok().filter(|size| *size > 0));
    let [Some(rows), Some(inner), Some(columns), Some(count)] = sizes else { return Ok(None) };
    let gpu = Gpu::Cuda(device.clone());
    let out = gpu.tensor([batch, &[m, n]].concat(), DType::F32)?;
    let address = |tensor: &Tensor| gpu.operand(tensor, "product").map(|operand| operand.address());
    let [left, right, to] = [address(&a.data)?, address(&b.data)?, address(&out)?];
    // cuBLAS's matrices are by columns: ours are their transposes, and `out^T = b^T a^T`.
    let kept = |factor: &Factor, by_rows: i32, by_columns: i32| match factor.turned {
        false => (sys::cublasOperation_t::CUBLAS_OP_N, by_rows),
        true => (sys::cublasOperation_t::CUBLAS_OP_T, by_columns),
    };
    let ((of_b, ldb), (of_a, lda)) = (kept(b, columns, inner), kept(a, inner, rows));
    let stride = |rows: usize, columns: usize| (rows * columns) as i64;
    let (one, zero) = (1f32, 0f32);
    let blas = device.cublas_handle();
    // SAFETY: the operands are contiguous, of these sizes, and outlive the product in the stream's order; the scalars are of the host.
    unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            of_b,
            of_a,
            columns,
            rows,
            inner,
            (&raw const one).cast(),
            right as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            ldb,
            stride(k, n),
            left as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            lda,
            stride(m, k),
            (&raw const zero).cast(),
            to as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            columns,
            stride(m, n),
            count,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    super::cuda::queued(device)?;
    Ok(Some(out))
}
