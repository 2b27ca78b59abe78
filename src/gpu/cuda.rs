//! Kernels on an NVIDIA GPU, through candle's device and its stream.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaGraph, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Tensor, bail};

use super::{Args, Grid, Module, Operand};

/// A struct that travels to a kernel as its bytes.
#[repr(transparent)]
struct ByValue<A>(A);

// SAFETY: `Args` promises a `repr(C)` struct that equals the kernel's.
unsafe impl<A: Args> DeviceRepr for ByValue<A> {}

pub(super) fn operand(
    device: &CudaDevice,
    storage: &CudaStorage,
    layout: &Layout,
    name: &str,
) -> Result<Operand> {
    if !storage.device.same_device(device) {
        bail!(
            "{name}: expected a tensor on {:?}, got one on {:?}",
            device.location(),
            storage.device.location()
        )
    }
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{name}: expected a contiguous tensor, got {layout:?}")
    };
    let base = |(address, size): (u64, usize)| address + (start * size) as u64;
    let dtype = candle_core::backend::BackendStorage::dtype(storage);
    let address = match &storage.slice {
        CudaStorageSlice::U8(s) => base(address(device, s)),
        CudaStorageSlice::U32(s) => base(address(device, s)),
        CudaStorageSlice::I64(s) => base(address(device, s)),
        CudaStorageSlice::F16(s) => base(address(device, s)),
        CudaStorageSlice::BF16(s) => base(address(device, s)),
        CudaStorageSlice::F32(s) => base(address(device, s)),
        CudaStorageSlice::F64(s) => base(address(device, s)),
        _ => bail!("{name}: dtype {dtype:?} found, expected f32, f64, f16, bf16, u8, u32 or i64"),
    };
    Ok(Operand {
        address,
        len: end - start,
        dtype,
        #[cfg(test)]
        _guarded: None,
    })
}

/// Where a slice begins, and the bytes of an element.
fn address<T>(device: &CudaDevice, slice: &CudaSlice<T>) -> (u64, usize) {
    let stream = device.cuda_stream();
    let (address, queued) = slice.device_ptr(&stream);
    // Dropped, it records an event for other streams. Where all of candle's work goes through one, the order of the queue is
    // all the synchronization that a kernel needs, and a step has a hundred operands.
    if !stream.context().is_managing_stream_synchronization() {
        std::mem::forget(queued);
    }
    (address, size_of::<T>())
}

pub(super) fn storage(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: the caller's kernel writes every element before any is read.
    unsafe { device.alloc_uninit(shape, dtype) }
}

pub(super) fn free_memory(device: &CudaDevice) -> Result<usize> {
    let (free, _) = device.cuda_stream().context().mem_get_info().w()?;
    Ok(free)
}

pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(count).w()?;
    Ok(usize::try_from(count).unwrap_or(1).max(1))
}

/// A device on the same GPU with a stream and handles of its own.
pub(super) fn beside(device: &CudaDevice) -> Result<CudaDevice> {
    CudaDevice::new_with_stream(device.cuda_stream().context().ordinal())
}

/// Copies of tensors for another stream of the same GPU. The copies wait for what is queued on the first stream, and what the first
/// stream queues from now on, which may give the originals' memory to somebody else, waits for the copies.
pub(super) fn across(from: &CudaDevice, to: &CudaDevice, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    // A view's copy would be that of all that it is a view of.
    let whole = tensors.iter().map(Tensor::force_contiguous).collect::<Result<Vec<_>>>()?;
    let (first, second) = (from.cuda_stream(), to.cuda_stream());
    second.join(&first).w()?;
    let device = Device::Cuda(to.clone());
    let copies = whole.iter().map(|tensor| tensor.to_device(&device)).collect::<Result<Vec<_>>>()?;
    first.join(&second).w()?;
    Ok(copies)
}

pub(super) fn launch<A: Args>(
    device: &CudaDevice,
    module: Module,
    kernel: &str,
    grid: Grid,
    args: &A,
) -> Result<()> {
    let function = device
        .get_or_load_custom_func(kernel, &format!("kronwake_{}", module.stem()), module.ptx())
        .map_err(|error| error.context(format!("kernel {kernel} of {}.cu: if the driver is older than the CUDA that the kernels were compiled with, compile them with the driver's", module.stem())))?;
    let [x, y, z] = grid.blocks;
    let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes: 0 };
    let args = ByValue(*args);
    let mut builder = function.builder();
    builder.arg(&args);
    // SAFETY: the argument is the kernel's struct, and its operands outlive the launch in the stream's order.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Recorded work, ready to launch.
pub(crate) struct Graph(CudaGraph);

impl Graph {
    pub fn launch(&self) -> Result<()> {
        self.0.launch().w()
    }
}

/// Records the work that `body` queues on the device's stream.
pub(super) fn record<T>(device: &CudaDevice, body: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
    let stream = device.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let outcome = body();
    // What `body` returns outlives a repetition, and is written at the same place by the next one.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    let output = outcome?;
    match graph.w()? {
        Some(graph) => Ok((Graph(graph), output)),
        None => bail!("a step could not be recorded as a CUDA graph: it asked the device for a value"),
    }
}
