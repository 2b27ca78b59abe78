//! Where hand-written kernels run: on an NVIDIA GPU, or, in tests, on the host under the emulator.
//!
//! An operation has a plain CPU version and a version for a [`Gpu`] side by side, and its kernel is the file of the same
//! stem under `kernels/`. The GPU version takes its operands' addresses, fills in the kernel's one argument, a C struct, and launches:
//! the same code on a GPU and in the tests, where the kernel runs as C++ (see `emulate.rs`).
//!
//! Work is queued on the device's stream and nothing waits for it, so a launch reports what is wrong with the launch, and what
//! goes wrong in a kernel shows at the next read by the host.

#![cfg_attr(not(any(test, feature = "cuda")), allow(dead_code, unused_variables))]

pub(crate) mod background;
#[cfg(feature = "cuda")]
pub(crate) mod blas;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod emulate;
mod module;
pub(crate) mod table;

pub(crate) use module::Module;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// A kernel's only parameter.
///
/// # Safety
/// The type is `repr(C)`, without padding, and field by field the struct of the kernel.
pub(crate) unsafe trait Args: Copy {}

/// Declares the argument of a kernel, or a part of it: field by field the kernel's struct, addresses as `u64`.
macro_rules! args {
    ($(#[$doc:meta])* $seen:vis struct $name:ident { $($(#[$note:meta])* $shown:vis $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        // Only kernels read the fields.
        #[allow(dead_code)]
        $seen struct $name { $($(#[$note])* $shown $field: $type),* }

        // SAFETY: `repr(C)`; that its size is the kernel's is checked at every launch under emulation.
        unsafe impl $crate::gpu::Args for $name {}
    };
}
pub(crate) use args;

/// How many threads a kernel runs with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub blocks: [u32; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
}

impl Grid {
    /// `blocks` blocks in a row, at least one.
    pub fn line(blocks: usize, threads: u32) -> Result<Self> {
        Self::new([blocks, 1, 1], threads)
    }

    /// # Errors
    /// If there are more blocks than a GPU takes.
    pub fn new(blocks: [usize; 3], threads: u32) -> Result<Self> {
        let [x, y, z] = blocks.map(|count| count.max(1));
        if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
            bail!("a kernel on {x} x {y} x {z} blocks: a GPU takes 2147483647 x 65535 x 65535")
        }
        Ok(Self { blocks: [x as u32, y as u32, z as u32], threads })
    }
}

/// An array that a kernel reads or writes. The tensor that it belongs to must outlive the launches with it.
#[derive(Debug, Clone)]
pub(crate) struct Operand {
    address: u64,
    pub len: usize,
    pub dtype: DType,
    #[cfg(test)]
    _guarded: Option<std::rc::Rc<emulate::Guarded>>,
}

impl Operand {
    /// What a kernel is given.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The address of an element.
    pub fn at(&self, index: usize) -> u64 {
        self.address + (index * self.dtype.size_in_bytes()) as u64
    }
}

/// A place where kernels run.
#[derive(Debug, Clone)]
pub(crate) enum Gpu {
    #[cfg(feature = "cuda")]
    Cuda(candle_core::CudaDevice),
    #[cfg(test)]
    Emulated,
}

impl Gpu {
    /// The place of a device's kernels; none for a CPU, or a device that this crate has no kernels for.
    pub fn of(device: &Device) -> Option<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Some(Self::Cuda(device.clone())),
            Device::Cpu => Self::emulated(),
            _ => None,
        }
    }

    /// The emulator, where a test asks for it.
    pub fn emulated() -> Option<Self> {
        #[cfg(test)]
        return emulate::is_on().then_some(Self::Emulated);
        #[cfg(not(test))]
        None
    }

    /// The elements of a contiguous tensor.
    ///
    /// # Errors
    /// If the tensor is not contiguous or lies on another device.
    pub fn operand(&self, tensor: &Tensor, name: &str) -> Result<Operand> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => self.on_cpu(storage, layout, name),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => self.on_cuda(storage, layout, name),
            _ => bail!(
                "{name}: expected a tensor on the GPU that the others are on, got {:?}",
                tensor.device()
            ),
        }
    }

    /// [`Gpu::operand`] for a custom operation's arguments under emulation.
    pub fn on_cpu(&self, storage: &CpuStorage, layout: &Layout, name: &str) -> Result<Operand> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => {
                let _ = (storage, layout);
                bail!("{name}: expected a tensor on the GPU, got one on the CPU")
            }
            #[cfg(test)]
            Self::Emulated => emulate::operand(storage, layout, name),
        }
    }

    /// [`Gpu::operand`] for a custom operation's arguments on a GPU.
    #[cfg(feature = "cuda")]
    pub fn on_cuda(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
        name: &str,
    ) -> Result<Operand> {
        match self {
            Self::Cuda(device) => cuda::operand(device, storage, layout, name),
            #[cfg(test)]
            Self::Emulated => bail!("{name}: expected a tensor on the CPU under emulation"),
        }
    }

    /// [`Gpu::operand`] for [`Gpu::storage`] of `len` elements.
    pub fn of_storage(&self, storage: &Storage, len: usize, name: &str) -> Result<Operand> {
        let layout = Layout::contiguous(len);
        match storage {
            Storage::Cpu(storage) => self.on_cpu(storage, &layout, name),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => self.on_cuda(storage, &layout, name),
            other => bail!("{name}: expected storage on the GPU, got it on {:?}", other.device().location()),
        }
    }

    /// Storage of a shape whose elements a kernel will write, every one of them.
    pub fn storage(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Storage> {
        self.allocate(&shape.into(), dtype, true)
    }

    /// Storage, of which the emulator checks that kernels write it in `whole`.
    fn allocate(&self, shape: &Shape, dtype: DType, whole: bool) -> Result<Storage> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => {
                let _ = whole;
                cuda::storage(device, shape, dtype).map(Storage::Cuda)
            }
            #[cfg(test)]
            Self::Emulated => emulate::storage(shape, dtype, whole).map(Storage::Cpu),
        }
    }

    /// A tensor of a shape whose elements a kernel will write, every one of them.
    pub fn tensor(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        Ok(tensor_of(self.storage(&shape, dtype)?, shape))
    }

    /// A tensor for kernels alone: they may leave elements of it unwritten that none reads.
    pub fn scratch(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        Ok(tensor_of(self.allocate(&shape, dtype, false)?, shape))
    }

    /// Bytes of memory that nobody uses; nothing where that is not known.
    pub fn free_memory(&self) -> Result<Option<usize>> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => cuda::free_memory(device).map(Some),
            #[cfg(test)]
            Self::Emulated => Ok(None),
        }
    }

    /// How many multiprocessors share the blocks of a launch; a few under emulation.
    pub fn multiprocessors(&self) -> Result<usize> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => cuda::multiprocessors(device),
            #[cfg(test)]
            Self::Emulated => Ok(3),
        }
    }

    /// Queues a kernel.
    ///
    /// # Errors
    /// If the module does not load (the message names the driver's and the compiler's version), or the launch is refused.
    pub fn launch<A: Args>(&self, module: Module, kernel: &str, grid: Grid, args: &A) -> Result<()> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => cuda::launch(device, module, kernel, grid, args),
            #[cfg(test)]
            Self::Emulated => emulate::launch(module, kernel, grid, args),
        }
    }
}

/// A tensor of a storage, without a history.
pub(crate) fn tensor_of(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false)
}

/// Recorded work.
pub(crate) enum Graph {
    #[cfg(feature = "cuda")]
    Cuda(cuda::Graph),
    #[cfg(test)]
    Emulated,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Queues the recorded work. Under emulation nothing is recorded, and the work is done again by `again`, whose result comes
    /// back.
    pub fn launch<T>(&self, again: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref graph) => {
                drop(again);
                graph.launch().map(|()| None)
            }
            #[cfg(test)]
            Self::Emulated => again().map(Some),
        }
    }
}

impl Gpu {
    /// Whether [`Gpu::record`] can do so: not where a device has a stream of the user's own, and events order the streams.
    pub fn can_record(&self) -> bool {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => cuda::can_record(device),
            #[cfg(test)]
            Self::Emulated => true,
        }
    }

    /// Records the work that `body` queues, without doing it. Nothing, and `body` is not called, while another thread calls a library that does
    /// not go with recording.
    ///
    /// # Errors
    /// What `body` reports, or that it asked the device for a value.
    pub fn record<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<Option<(Graph, T)>> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => {
                let recorded = cuda::record(device, body)?;
                Ok(recorded.map(|(graph, output)| (Graph::Cuda(graph), output)))
            }
            #[cfg(test)]
            Self::Emulated => Ok(Some((Graph::Emulated, emulate::without_launches(body)?))),
        }
    }

    /// Keeps candle's small uploads (shapes and strides) on the device as long as the guard lives: a recording may not upload.
    pub fn keep_uploads(&self) -> impl Sized + use<> {
        match *self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ref device) => Some(device.enable_cuda_graph_htod_cache()),
            #[cfg(all(test, feature = "cuda"))]
            Self::Emulated => None,
            #[cfg(all(test, not(feature = "cuda")))]
            Self::Emulated => (),
        }
    }
}

/// What a custom operation returns under emulation.
pub(crate) fn into_cpu(storage: Storage) -> Result<CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => bail!("a kernel's output is on {:?}, expected it on the CPU", other.device().location()),
    }
}

/// What a custom operation returns on a GPU.
#[cfg(feature = "cuda")]
pub(crate) fn into_cuda(storage: Storage) -> Result<candle_core::CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        other => bail!("a kernel's output is on {:?}, expected it on a GPU", other.device().location()),
    }
}

/// `name` with the dtype's suffix, as the kernels of several types are called.
pub(crate) fn typed(name: &str, dtype: DType) -> Result<String> {
    let suffix = match dtype {
        DType::F32 => "f32",
        DType::F64 => "f64",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => bail!("{name}: dtype {other:?} found, expected f32, f64, f16 or bf16"),
    };
    Ok(format!("{name}_{suffix}"))
}
