//! Kernels on an NVIDIA GPU, through candle's device and its stream.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock, TryLockError};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUgraphInstantiate_flags, CUmemPool_attribute, CUmemoryPool, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig,
    PushKernelArg, result, result::mem_pool,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
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
    // Dropped, it records an event for other streams, though the kernel is yet to come. Where all of candle's work goes through one, the order
    // of the queue is all the synchronization that a kernel needs; else `queued` waits.
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
    let stream = device.cuda_stream();
    let context = stream.context();
    let (free, _) = context.mem_get_info().w()?;
    let Some(pool) = pool(context)? else { return Ok(free) };
    // Freed memory stays with the pool.
    let size = |what| -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: the pool is the device's, and these attributes are 64-bit numbers.
        unsafe { mem_pool::get_attribute(pool, what, (&raw mut bytes).cast()) }.w()?;
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
    };
    let reserved = size(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    Ok(free + reserved.saturating_sub(size(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?))
}

/// The pool that the device's memory comes from; none where the device has no pools.
fn pool(context: &CudaContext) -> Result<Option<CUmemoryPool>> {
    if !context.has_async_alloc() {
        return Ok(None);
    }
    // SAFETY: the device is the context's.
    Ok(Some(unsafe { result::device::get_default_mem_pool(context.cu_device()) }.w()?))
}

/// Lets the pool keep what is freed. By default each wait for the device hands it back, and what is allocated next is mapped anew. Who
/// has set a threshold keeps it.
fn keep_memory(context: &CudaContext) -> Result<()> {
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let Some(pool) = pool(context)? else { return Ok(()) };
    let mut bytes = 0u64;
    // SAFETY: the pool is the device's, and this attribute is a 64-bit number.
    unsafe {
        mem_pool::get_attribute(pool, threshold, (&raw mut bytes).cast()).w()?;
        if bytes == 0 {
            bytes = u64::MAX;
            mem_pool::set_attribute(pool, threshold, (&raw mut bytes).cast()).w()?;
        }
    }
    Ok(())
}

pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(count).w()?;
    Ok(usize::try_from(count).unwrap_or(1).max(1))
}

/// A device on the same GPU with a stream and handles of its own.
pub(super) fn beside(device: &CudaDevice) -> Result<CudaDevice> {
    let beside = CudaDevice::new_with_stream(device.cuda_stream().context().ordinal())?;
    // SAFETY: what lies on it is used and freed in the order of its one stream, and goes from and to other streams by `across`, which
    // orders the two; `Worker` gives it to nobody else.
    unsafe { beside.disable_event_tracking() };
    Ok(beside)
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

/// A module on a GPU, and the kernels of it that have been launched.
struct Loaded {
    module: Arc<CudaModule>,
    kernels: HashMap<String, CudaFunction>,
}

/// By the GPU's ordinal: all of candle's devices on a GPU share its primary context, to which modules belong. They stay.
static LOADED: LazyLock<RwLock<HashMap<(usize, Module), Loaded>>> = LazyLock::new(RwLock::default);

/// A kernel, of a module that is loaded once a GPU.
fn loaded(device: &CudaDevice, module: Module, kernel: &str) -> Result<CudaFunction> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let key = (context.ordinal(), module);
    let found = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = found.get(&key).and_then(|loaded| loaded.kernels.get(kernel)) {
        return Ok(function.clone());
    }
    drop(found);
    let stem = module.stem();
    let mut all = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    if !all.keys().any(|(ordinal, _)| *ordinal == key.0) {
        keep_memory(context)?;
    }
    let loaded = match all.entry(key) {
        Entry::Occupied(found) => found.into_mut(),
        Entry::Vacant(free) => {
            let module = context.load_module(Ptx::from_binary(module.code().to_vec())).w().map_err(|error| {
                error.context(format!(
                    "{stem}.cu could not be loaded: if the driver is older than the CUDA that the kernels were compiled with, \
                     compile them with the driver's; they are for GPUs of compute capability 8.0 and newer"
                ))
            })?;
            free.insert(Loaded { module, kernels: HashMap::new() })
        }
    };
    let found = loaded.module.load_function(kernel).w();
    let function = found.map_err(|error| error.context(format!("kernel {kernel} of {stem}.cu")))?;
    loaded.kernels.insert(kernel.into(), function.clone());
    Ok(function)
}

pub(super) fn launch<A: Args>(
    device: &CudaDevice,
    module: Module,
    kernel: &str,
    grid: Grid,
    args: &A,
) -> Result<()> {
    let (function, stream) = (loaded(device, module, kernel)?, device.cuda_stream());
    let [x, y, z] = grid.blocks;
    let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes: 0 };
    let args = ByValue(*args);
    let mut builder = stream.launch_builder(&function);
    builder.arg(&args);
    // SAFETY: the argument is the kernel's struct, and its operands outlive the launch in the stream's order.
    unsafe { builder.launch(config) }.w()?;
    queued(device)
}

/// After work was queued by addresses alone: cudarc orders the streams of a context by events of each tensor, which nobody records for it.
pub(super) fn queued(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    if stream.context().is_managing_stream_synchronization() {
        stream.synchronize().w()?;
    }
    Ok(())
}

/// Recorded work, ready to launch.
pub(crate) struct Graph(CudaGraph);

impl Graph {
    pub fn launch(&self) -> Result<()> {
        self.0.launch().w()
    }
}

/// Whether work can be recorded: not where [`queued`] waits.
pub(super) fn can_record(device: &CudaDevice) -> bool {
    !device.cuda_stream().context().is_managing_stream_synchronization()
}

/// Held while work is recorded, and by each call of a library that may use the legacy stream: one of another thread would break the recording.
static RECORDING: Mutex<()> = Mutex::new(());

thread_local! {
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// As long as it lives, this thread records.
struct Recording;

impl Recording {
    fn begin() -> Self {
        RECORDS.set(true);
        Self
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDS.set(false);
    }
}

/// Calls `body` while no thread records.
///
/// # Errors
/// If this thread does, or what `body` reports.
pub(crate) fn not_recording<T>(name: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    if RECORDS.get() {
        bail!("{name}: cannot be recorded in a CUDA graph; it belongs into a step that runs as it is")
    }
    let _held = RECORDING.lock().unwrap_or_else(PoisonError::into_inner);
    body()
}

/// Records the work that `body` queues on the device's stream; nothing, while another thread is in [`not_recording`], maybe for seconds.
pub(super) fn record<T>(device: &CudaDevice, body: impl FnOnce() -> Result<T>) -> Result<Option<(Graph, T)>> {
    if RECORDS.get() {
        bail!("a step that is recorded as a CUDA graph records another")
    }
    let _held = match RECORDING.try_lock() {
        Ok(held) => held,
        Err(TryLockError::Poisoned(held)) => held.into_inner(),
        Err(TryLockError::WouldBlock) => return Ok(None),
    };
    let stream = device.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let recording = Recording::begin();
    let outcome = body();
    drop(recording);
    // What `body` returns outlives a repetition, and is written at the same place by the next one.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    let output = outcome?;
    match graph.w()? {
        Some(graph) => Ok(Some((Graph(graph), output))),
        None => bail!("a step could not be recorded as a CUDA graph: it asked the device for a value"),
    }
}
