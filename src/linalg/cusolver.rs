//! NVIDIA's dense LAPACK, the few functions that the decompositions take from it.
//!
//! Its matrices are column-major. A symmetric matrix is its own transpose, so ours, which are row-major, pass as they are:
//! its upper triangle is our lower one, and the eigenvectors that it puts into columns are our rows.
//!
//! The functions are queued on candle's stream; those for eigenvalues wait for the device in between, so none of this can be captured
//! into a graph. What they find wrong with a matrix goes to an array of codes on the device.
use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use cudarc::cusolver::{DnHandle, sys};

use crate::gpu::Gpu;
use crate::gpu::cuda::not_recording;

/// Our lower triangle.
const TRIANGLE: sys::cublasFillMode_t = sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
const VECTORS: sys::cusolverEigMode_t = sys::cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;

/// Up to this size a batch is decomposed together; larger matrices fill a GPU one by one, and need less work space so.
#[cfg(cusolver_syev_batched)]
const BATCHED: usize = 1024;

/// Devices whose handles are kept.
const KEPT: usize = 8;

struct Library {
    dense: DnHandle,
    #[cfg(cusolver_syev_batched)]
    params: sys::cusolverDnParams_t,
}

// SAFETY: a plain heap object of the library, used by one thread at a time under the `Mutex`.
unsafe impl Send for Library {}

#[cfg(cusolver_syev_batched)]
impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made by `Library::new` and destroyed once. An error here would leave nothing to be done.
        unsafe { sys::cusolverDnDestroyParams(self.params) };
    }
}

impl Library {
    fn new(device: &CudaDevice) -> Result<Self> {
        let dense =
            DnHandle::new(device.cuda_stream()).map_err(|error| failed("cusolverDnCreate", error.0))?;
        #[cfg(cusolver_syev_batched)]
        let params = {
            let mut params = std::ptr::null_mut();
            // SAFETY: the pointer is to a place for the object.
            check("cusolverDnCreateParams", unsafe { sys::cusolverDnCreateParams(&mut params) })?;
            params
        };
        Ok(Self {
            dense,
            #[cfg(cusolver_syev_batched)]
            params,
        })
    }
}

fn failed(what: &str, status: sys::cusolverStatus_t) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuSOLVER: {what}: {status:?}"))
}

fn check(what: &str, status: sys::cusolverStatus_t) -> Result<()> {
    match status {
        sys::cusolverStatus_t::CUSOLVER_STATUS_SUCCESS => Ok(()),
        status => Err(failed(what, status)),
    }
}

/// The library on one device.
pub(super) struct Solver {
    gpu: Gpu,
    device: CudaDevice,
    library: Arc<Mutex<Library>>,
}

/// Calls the function for f64 or for f32, and reports what it returns.
macro_rules! call {
    ($dtype:expr, $double:ident, $single:ident, ($($argument:expr),+ $(,)?)) => {
        check(
            stringify!($single),
            if $dtype == DType::F64 { sys::$double($($argument),+) } else { sys::$single($($argument),+) },
        )
    };
}

/// Overwrites each group's triangle by a function for f64 or f32, and its codes.
macro_rules! triangles {
    ($solver:expr, $m:expr, $double_size:ident, $single_size:ident, $double:ident, $single:ident) => {{
        let (groups, dim, dtype) = ($m.dim(0)?, $m.dim(1)?, $m.dtype());
        let (n, info) = (int(dim)?, $solver.codes(&$m)?);
        let [a, code] = [$solver.array(&$m)?, $solver.array(&info)?];
        let mut work = 0;
        $solver.with(|library| {
            let handle = library.dense.cu();
            // SAFETY: as in `eigen_each`.
            unsafe {
                call!(dtype, $double_size, $single_size, (handle, TRIANGLE, n, a.group(0), n, &mut work))?;
                let (_space, space) = $solver.workspace(work, dtype)?;
                for group in 0..groups {
                    call!(
                        dtype,
                        $double,
                        $single,
                        (handle, TRIANGLE, n, a.group(group), n, space.group(0), work, code.group(group))
                    )?;
                }
                Ok(())
            }
        })?;
        Ok(($m, info))
    }};
}

/// Matrices `[groups, dim, dim]`, or a vector a group, as the library takes them.
struct Array {
    address: u64,
    /// Bytes from one group to the next.
    stride: usize,
}

impl Array {
    fn group<T>(&self, index: usize) -> *mut T {
        (self.address + (index * self.stride) as u64) as *mut T
    }
}

impl Solver {
    /// The library's handles are kept from call to call, those of the last [`KEPT`] devices: a step's stream and the one beside it take turns.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        static HANDLES: Mutex<Vec<(DeviceId, Arc<Mutex<Library>>)>> = Mutex::new(Vec::new());
        let gpu = Gpu::Cuda(device.clone());
        device.cuda_stream().context().bind_to_thread().w()?;
        let id = device.id();
        let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
        let library = match handles.iter().position(|(other, _)| *other == id) {
            Some(at) => handles.remove(at).1,
            None => {
                handles.truncate(KEPT - 1);
                Arc::new(Mutex::new(not_recording("cuSOLVER", || Library::new(device))?))
            }
        };
        handles.insert(0, (id, library.clone()));
        Ok(Self { gpu, device: device.clone(), library })
    }

    /// Runs `body` with the library and the context of the device.
    fn with<T>(&self, body: impl FnOnce(&Library) -> Result<T>) -> Result<T> {
        self.device.cuda_stream().context().bind_to_thread().w()?;
        not_recording("a decomposition", || {
            body(&self.library.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }

    fn array(&self, tensor: &Tensor) -> Result<Array> {
        let operand = self.gpu.operand(tensor, "cuSOLVER")?;
        let stride = operand.len / tensor.dim(0)?.max(1) * operand.dtype.size_in_bytes();
        Ok(Array { address: operand.address(), stride })
    }

    fn workspace(&self, count: c_int, dtype: DType) -> Result<(Tensor, Array)> {
        let tensor = self.gpu.tensor((1, count.max(1) as usize), dtype)?;
        let array = self.array(&tensor)?;
        Ok((tensor, array))
    }

    /// Zeros, one 32-bit code a group.
    fn codes(&self, m: &Tensor) -> Result<Tensor> {
        Tensor::zeros(m.dim(0)?, DType::U32, m.device())
    }

    /// Ascending eigenvalues `[groups, dim]`, eigenvectors in rows, codes `[groups]`. Overwrites `m`.
    ///
    /// One matrix goes through divide and conquer, which is the second opinion on what a batched method fails at.
    pub fn eigen(&self, m: Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (groups, dim, dtype) = (m.dim(0)?, m.dim(1)?, m.dtype());
        let (values, info) = (self.gpu.tensor((groups, dim), dtype)?, self.codes(&m)?);
        let arrays = [self.array(&m)?, self.array(&values)?, self.array(&info)?];
        self.with(|library| {
            #[cfg(cusolver_syev_batched)]
            if groups > 1 && dim <= BATCHED {
                return self.eigen_batched(library, (groups, dim, dtype), &arrays);
            }
            self.eigen_each(library, (groups, dim, dtype), &arrays)
        })?;
        Ok((values, m, info))
    }

    fn eigen_each(
        &self,
        library: &Library,
        (groups, dim, dtype): (usize, usize, DType),
        [a, w, code]: &[Array; 3],
    ) -> Result<()> {
        let (handle, n, mut work) = (library.dense.cu(), int(dim)?, 0);
        // SAFETY: `a` is `groups` matrices of `n` rows, contiguous and with a leading dimension of `n`; `w` and `code` have
        // `n` elements and one element a group. The workspace has the size that was asked for, and everything is freed in the
        // stream's order.
        unsafe {
            call!(
                dtype,
                cusolverDnDsyevd_bufferSize,
                cusolverDnSsyevd_bufferSize,
                (handle, VECTORS, TRIANGLE, n, a.group(0), n, w.group(0), &mut work)
            )?;
            let (_space, space) = self.workspace(work, dtype)?;
            for i in 0..groups {
                call!(
                    dtype,
                    cusolverDnDsyevd,
                    cusolverDnSsyevd,
                    (
                        handle,
                        VECTORS,
                        TRIANGLE,
                        n,
                        a.group(i),
                        n,
                        w.group(i),
                        space.group(0),
                        work,
                        code.group(i)
                    )
                )?;
            }
        }
        Ok(())
    }

    #[cfg(cusolver_syev_batched)]
    fn eigen_batched(
        &self,
        library: &Library,
        (groups, dim, dtype): (usize, usize, DType),
        [a, w, code]: &[Array; 3],
    ) -> Result<()> {
        let kind = if dtype == DType::F64 {
            sys::cudaDataType_t::CUDA_R_64F
        } else {
            sys::cudaDataType_t::CUDA_R_32F
        };
        let (handle, params, n, count) = (library.dense.cu(), library.params, dim as i64, groups as i64);
        let (matrices, values) = (a.group(0), w.group(0));
        let (mut on_device, mut on_host) = (0, 0);
        // SAFETY: as in `eigen_each`; the two workspaces have the bytes that were asked for, and the library is done with the one
        // on the host when it returns.
        unsafe {
            let size = sys::cusolverDnXsyevBatched_bufferSize(
                handle,
                params,
                VECTORS,
                TRIANGLE,
                n,
                kind,
                matrices,
                n,
                kind,
                values,
                kind,
                &mut on_device,
                &mut on_host,
                count,
            );
            check("cusolverDnXsyevBatched_bufferSize", size)?;
            let space = self.gpu.tensor((1, on_device.max(1)), DType::U8)?;
            let mut host = vec![0u8; on_host];
            let done = sys::cusolverDnXsyevBatched(
                handle,
                params,
                VECTORS,
                TRIANGLE,
                n,
                kind,
                matrices,
                n,
                kind,
                values,
                kind,
                self.array(&space)?.group(0),
                on_device,
                host.as_mut_ptr().cast(),
                on_host,
                code.group(0),
                count,
            );
            check("cusolverDnXsyevBatched", done)
        }
    }

    /// Values and vectors with `current v = value bar v` and `v^T bar v = 1`, as [`Solver::eigen`] gives them. A code
    /// above `dim` exceeds by that much the number of the first pivot of `bar`, from 1 on, that is not positive.
    /// Overwrites both.
    pub fn generalized(&self, bar: Tensor, current: Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (groups, dim, dtype) = (bar.dim(0)?, bar.dim(1)?, bar.dtype());
        let n = int(dim)?;
        let (values, info) = (self.gpu.tensor((groups, dim), dtype)?, self.codes(&bar)?);
        let [a, b] = [self.array(&current)?, self.array(&bar)?];
        let [w, code] = [self.array(&values)?, self.array(&info)?];
        let kind = sys::cusolverEigType_t::CUSOLVER_EIG_TYPE_1;
        let mut work = 0;
        self.with(|library| {
            let handle = library.dense.cu();
            // SAFETY: as in `eigen_each`, with a second matrix of the first one's size.
            unsafe {
                call!(
                    dtype,
                    cusolverDnDsygvd_bufferSize,
                    cusolverDnSsygvd_bufferSize,
                    (handle, kind, VECTORS, TRIANGLE, n, a.group(0), n, b.group(0), n, w.group(0), &mut work)
                )?;
                let (_space, space) = self.workspace(work, dtype)?;
                for group in 0..groups {
                    call!(
                        dtype,
                        cusolverDnDsygvd,
                        cusolverDnSsygvd,
                        (
                            handle,
                            kind,
                            VECTORS,
                            TRIANGLE,
                            n,
                            a.group(group),
                            n,
                            b.group(group),
                            n,
                            w.group(group),
                            space.group(0),
                            work,
                            code.group(group)
                        )
                    )?;
                }
                Ok(())
            }
        })?;
        Ok((values, current, info))
    }

    /// Cholesky factors in the lower triangles, and codes: one more than the first pivot that is not positive. Overwrites `m`.
    pub fn cholesky(&self, m: Tensor) -> Result<(Tensor, Tensor)> {
        triangles!(
            self,
            m,
            cusolverDnDpotrf_bufferSize,
            cusolverDnSpotrf_bufferSize,
            cusolverDnDpotrf,
            cusolverDnSpotrf
        )
    }

    /// The lower triangles of the inverses, from the Cholesky factors in those of `factor`, which it overwrites; and codes,
    /// not 0 where a factor is singular.
    pub fn inverse(&self, factor: Tensor) -> Result<(Tensor, Tensor)> {
        triangles!(
            self,
            factor,
            cusolverDnDpotri_bufferSize,
            cusolverDnSpotri_bufferSize,
            cusolverDnDpotri,
            cusolverDnSpotri
        )
    }
}

fn int(size: usize) -> Result<c_int> {
    match c_int::try_from(size) {
        Ok(size) => Ok(size),
        Err(_) => bail!("cuSOLVER: expected sizes below 2^31, got {size}"),
    }
}
