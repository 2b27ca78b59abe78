//! Products of cuBLAS with an arithmetic of the caller's choice; candle's is one for the whole process.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaDevice, D, DType, Error, Result, Tensor};

use super::Gpu;

/// A factor as it lies in memory: by rows, or by columns where it is `turned`.
pub(crate) struct Factor {
    pub data: Tensor,
    pub turned: bool,
}

/// Numbers of f32 in 16 bytes: cuBLAS's fast kernels want each row or column to begin at a multiple of them, as those of a block with a folded bias,
/// of 769 columns say, do not.
const ALIGNED: usize = 4;
/// Multiplications of a product from which it pays to copy operands that are not aligned. An estimate; nothing was measured.
const WORTH_ALIGNING: usize = 1 << 28;

/// From one row of `columns` numbers in memory to the next.
fn leading(columns: usize, worth: bool) -> usize {
    if worth { columns.next_multiple_of(ALIGNED) } else { columns }
}

/// A factor's matrices with their leading dimension, which is aligned where that is `worth` it: the factor itself, or a copy. What fills up is
/// never read.
fn aligned(gpu: &Gpu, factor: &Factor, worth: bool) -> Result<(Tensor, usize)> {
    let data = &factor.data;
    let (columns, last) = (data.dim(D::Minus1)?, data.rank() - 1);
    let wide = leading(columns, worth);
    if wide == columns {
        return Ok((data.clone(), columns));
    }
    let mut dims = data.dims().to_vec();
    dims[last] = wide;
    let copy = gpu.tensor(dims, data.dtype())?;
    copy.slice_set(data, last, 0)?;
    Ok((copy, wide))
}

/// The f32 product `[.., m, n]` of `[.., m, k]` and `[.., k, n]` with operands rounded to TF32 and sums in f32. Nothing where a size is 0 or
/// beyond what cuBLAS takes.
pub(crate) fn tf32_product(
    device: &CudaDevice,
    (a, b): (&Factor, &Factor),
    (batch, [m, k, n]): (&[usize], [usize; 3]),
) -> Result<Option<Tensor>> {
    let groups: usize = batch.iter().product();
    let gpu = Gpu::Cuda(device.clone());
    let worth = [m, k, n].into_iter().fold(groups, usize::saturating_mul) >= WORTH_ALIGNING;
    let ((left, lda), (right, ldb)) = (aligned(&gpu, a, worth)?, aligned(&gpu, b, worth)?);
    let ldc = leading(n, worth);
    let sizes =
        [m, k, n, groups, lda, ldb, ldc].map(|size| i32::try_from(size).ok().filter(|size| *size > 0));
    let [Some(rows), Some(inner), Some(columns), Some(count), Some(lead_a), Some(lead_b), Some(lead_out)] =
        sizes
    else {
        return Ok(None);
    };
    let out = gpu.tensor([batch, &[m, ldc]].concat(), DType::F32)?;
    let address = |tensor: &Tensor| gpu.operand(tensor, "product").map(|operand| operand.address());
    let [of_left, of_right, to] = [address(&left)?, address(&right)?, address(&out)?];
    // cuBLAS's matrices are by columns: ours are their transposes, and `out^T = b^T a^T`.
    let operation = |factor: &Factor| match factor.turned {
        false => sys::cublasOperation_t::CUBLAS_OP_N,
        true => sys::cublasOperation_t::CUBLAS_OP_T,
    };
    // From one matrix of a factor to the next.
    let stride = |lying: &Tensor, lead: usize| Ok::<_, Error>((lying.dim(D::Minus2)? * lead) as i64);
    let (stride_a, stride_b) = (stride(&left, lda)?, stride(&right, ldb)?);
    let (one, zero) = (1f32, 0f32);
    let blas = device.cublas_handle();
    // SAFETY: the operands are contiguous, of these sizes, and outlive the product in the stream's order; the scalars are of the host.
    unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            columns,
            rows,
            inner,
            (&raw const one).cast(),
            of_right as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            lead_b,
            stride_b,
            of_left as *const _,
            sys::cudaDataType_t::CUDA_R_32F,
            lead_a,
            stride_a,
            (&raw const zero).cast(),
            to as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            lead_out,
            (m * ldc) as i64,
            count,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    super::cuda::queued(device)?;
    match ldc == n {
        true => Ok(Some(out)),
        false => out.narrow(D::Minus1, 0, n)?.contiguous().map(Some),
    }
}
