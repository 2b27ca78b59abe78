//! What cuBLAS alone does for a Kronecker factor: a product of the records with themselves, in their own type, added up in f32 to the decayed
//! average that is there already. It computes both triangles.

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Result, Storage, Tensor, bail};
use std::ffi::c_void;

/// A contiguous matrix on a GPU: where it begins, and its type to cuBLAS.
fn address(device: &CudaDevice, t: &Tensor) -> Result<(u64, sys::cudaDataType)> {
    let (storage, layout) = t.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("bench: expected a contiguous matrix, got {layout:?}")
    };
    let Storage::Cuda(storage) = &*storage else { bail!("bench: expected a matrix on a GPU") };
    let stream = device.cuda_stream();
    let (first, kind) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(&stream).0, sys::cudaDataType_t::CUDA_R_32F),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(&stream).0, sys::cudaDataType_t::CUDA_R_16F),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(&stream).0, sys::cudaDataType_t::CUDA_R_16BF),
        _ => bail!("bench: expected f32, f16 or bf16, got {:?}", t.dtype()),
    };
    Ok((first + (start * t.dtype().size_in_bytes()) as u64, kind))
}

/// `bar = decay bar + (1 - decay) x^T x` of `x` `[n, d]` and `bar` `[d, d]` of f32, by `cublasGemmEx`; `tf32` lets it round operands of f32.
pub fn average(x: &Tensor, bar: &Tensor, decay: f32, tf32: bool) -> Result<()> {
    let (n, d) = x.dims2()?;
    if bar.dims() != [d, d] || bar.dtype() != DType::F32 {
        bail!("bench: expected an average [{d}, {d}] of f32, got {:?} of {:?}", bar.dims(), bar.dtype())
    }
    let device = x.device().as_cuda_device()?;
    let ((from, kind), (to, _)) = (address(device, x)?, address(device, bar)?);
    let (rows, columns) = (n as i32, d as i32);
    let (alpha, beta) = (1.0 - decay, decay);
    let compute = match tf32 {
        true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let blas = device.cublas_handle();
    // cuBLAS's matrices are by columns: to it, `x` is `[d, n]`.
    // SAFETY: the matrices are contiguous, of these sizes, and outlive the product in the stream's order; the scalars are of the host.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            sys::cublasOperation_t::CUBLAS_OP_N,
            sys::cublasOperation_t::CUBLAS_OP_T,
            columns,
            columns,
            rows,
            (&raw const alpha).cast::<c_void>(),
            from as *const c_void,
            kind,
            columns,
            from as *const c_void,
            kind,
            columns,
            (&raw const beta).cast::<c_void>(),
            to as *mut c_void,
            sys::cudaDataType_t::CUDA_R_32F,
            columns,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
