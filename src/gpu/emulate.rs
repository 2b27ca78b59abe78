//! Kernels on the host: the files under `kernels/` compiled as C++ against `tests/emulator/`, and every launch checked.
//!
//! Within [`emulate`], tensors on the CPU count as tensors on a GPU. A launch fails where a barrier or a warp operation lacks threads, where threads
//! access an element without an order between them, one of them writing, where an access is misaligned or lies beyond the operands and the
//! shared arrays, and where something is read that nothing has written. Each runs several times from the same state, with the threads in different
//! orders and different values beyond the operands' ends, and fails where two runs differ.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::rc::{Rc, Weak};

use candle_core::{CpuStorage, DType, Layout, Result, Shape, WithDType, bail};

use super::{Args, Grid, Module, Operand};

mod compile;
mod tests;

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static LIVE: RefCell<Vec<Weak<Guarded>>> = const { RefCell::new(Vec::new()) };
    /// Where storage for kernels to write has been made, and whether they shall write all of it.
    static FRESH: RefCell<Vec<((usize, usize), bool)>> = const { RefCell::new(Vec::new()) };
    /// Arrays that no operand stands for any more and that kernels have written in part.
    static UNFINISHED: RefCell<Vec<Unfinished>> = const { RefCell::new(Vec::new()) };
    /// The kernels launched since somebody counts.
    static LAUNCHED: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct Unfinished {
    place: (usize, usize),
    what: String,
}

pub(super) fn is_on() -> bool {
    ON.get()
}

/// Runs `body` with the CPU's tensors taken for a GPU's. Without a C++ compiler, `body` runs on the plain CPU path; the tests then prove
/// nothing more than that, and say so.
///
/// # Panics
/// If kernels have left elements of an array unwritten.
pub(crate) fn emulate<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ON.set(self.0);
        }
    }
    let restore = Restore(ON.replace(compile::compiler().is_some()));
    if !restore.0 {
        FRESH.take();
        UNFINISHED.take();
    }
    let result = body();
    if !restore.0
        && let Some(first) = UNFINISHED.take().first()
    {
        panic!("{}", first.what)
    }
    result
}

/// Runs `body` under emulation, with the names of the kernels that it launches, in order; none without a C++ compiler.
pub(crate) fn launches<T>(body: impl FnOnce() -> T) -> (T, Vec<String>) {
    LAUNCHED.set(Some(vec![]));
    let result = emulate(body);
    (result, LAUNCHED.take().unwrap_or_default())
}

/// Runs `body` without the kernels that it launches, as a recording does.
pub(super) fn without_launches<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    QUIET.set(true);
    let result = body();
    QUIET.set(false);
    result
}

/// Bytes before and after an operand that no kernel may touch.
const GUARD: usize = 4096;

/// An operand's elements between two guards. They are copied in before a launch and out after it.
#[derive(Debug)]
pub(crate) struct Guarded {
    name: CString,
    dtype: DType,
    /// The bytes of an element that nothing has written, for storage made by [`storage`].
    mark: Option<&'static [u8]>,
    /// Whether kernels shall write all of it.
    whole: bool,
    original: *mut u8,
    bytes: usize,
    /// Bytes before the elements: the guard, and the place that the elements have within a multiple of 256 bytes on a GPU.
    start: usize,
    /// In words, for the strictest alignment that an element has.
    memory: RefCell<Vec<u128>>,
    /// The first element that the last launch has left as no kernel ever wrote it.
    unwritten: Cell<Option<usize>>,
}

impl Guarded {
    fn start(&self) -> *mut u8 {
        // SAFETY: the memory has `start` bytes before the elements.
        unsafe { self.memory.borrow_mut().as_mut_ptr().cast::<u8>().add(self.start) }
    }

    /// Fills the guards and copies the elements in.
    fn load(&self, content: &[u8], guard: u8) {
        let mut memory = self.memory.borrow_mut();
        let words = memory.len();
        // SAFETY: `words` of 16 bytes each.
        let all = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), words * 16) };
        all[..self.start].fill(guard);
        all[self.start + content.len()..].fill(guard);
        all[self.start..][..content.len()].copy_from_slice(content);
    }

    /// The elements, and whether both guards are as `load` left them.
    fn content(&self, guard: u8) -> (Vec<u8>, bool) {
        let memory = self.memory.borrow();
        // SAFETY: as in `load`.
        let all = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), memory.len() * 16) };
        let (before, rest) = all.split_at(self.start);
        let (content, after) = rest.split_at(self.bytes);
        (content.to_vec(), before.iter().chain(after).all(|byte| *byte == guard))
    }

    fn original(&self) -> Vec<u8> {
        // SAFETY: the tensor outlives its operand.
        unsafe { std::slice::from_raw_parts(self.original, self.bytes) }.to_vec()
    }

    fn first_unwritten(&self, content: &[u8]) -> Option<usize> {
        let mark = self.mark.filter(|_| self.whole)?;
        content.chunks_exact(mark.len()).position(|element| element == mark)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(first) = self.unwritten.get() {
            let name = self.name.to_string_lossy();
            let what = format!("no kernel has written element {first} of {name}");
            UNFINISHED.with_borrow_mut(|unfinished| {
                unfinished.push(Unfinished { place: (self.original as usize, self.bytes), what });
            });
        }
    }
}

/// The bytes of an element that nothing has written yet: a NaN that arithmetic does not make, or an unlikely integer.
/// Bytes have none to spare.
fn unwritten(dtype: DType) -> Option<&'static [u8]> {
    Some(match dtype {
        DType::U32 => &[0xa5; 4],
        DType::I64 => &[0xa5; 8],
        DType::F16 => &[0x5a, 0x7e],
        DType::BF16 => &[0xe5, 0x7f],
        DType::F32 => &[0xa5, 0xa5, 0xe5, 0x7f],
        DType::F64 => &[0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xfa, 0x7f],
        _ => return None,
    })
}

pub(super) fn operand(storage: &CpuStorage, layout: &Layout, name: &str) -> Result<Operand> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{name}: expected a contiguous tensor, got {layout:?}")
    };
    fn base<T: WithDType>(storage: &CpuStorage) -> Result<*mut u8> {
        Ok(T::cpu_storage_as_slice(storage)?.as_ptr().cast_mut().cast())
    }
    let dtype = candle_core::backend::BackendStorage::dtype(storage);
    let base = match dtype {
        DType::U8 => base::<u8>(storage)?,
        DType::U32 => base::<u32>(storage)?,
        DType::I64 => base::<i64>(storage)?,
        DType::F16 => base::<half::f16>(storage)?,
        DType::BF16 => base::<half::bf16>(storage)?,
        DType::F32 => base::<f32>(storage)?,
        DType::F64 => base::<f64>(storage)?,
        other => bail!("{name}: dtype {other:?} found, expected f32, f64, f16, bf16, u8, u32 or i64"),
    };
    let size = dtype.size_in_bytes();
    // SAFETY: `start` lies within the storage.
    let original = unsafe { base.add(start * size) };
    let bytes = (end - start) * size;
    let place = (original as usize, bytes);
    let guarded = LIVE.with_borrow_mut(|live| -> Result<Rc<Guarded>> {
        live.retain(|other| other.strong_count() > 0);
        for other in live.iter().filter_map(Weak::upgrade) {
            if other.original == original && other.bytes == bytes {
                return Ok(other);
            }
            if overlap((other.original as usize, other.bytes), place) {
                bail!("{name}: overlaps an operand without being the same")
            }
        }
        UNFINISHED.with_borrow_mut(|unfinished| {
            unfinished.retain(|other| !overlap(other.place, place));
        });
        let fresh = FRESH.with_borrow(|fresh| {
            fresh.iter().find(|(other, _)| overlap(*other, place)).map(|(_, whole)| *whole)
        });
        let mut memory = vec![0u128; (bytes + 2 * GUARD).div_ceil(16) + 32];
        // As far from a multiple of 256 bytes as on a GPU, where storage begins at one.
        let address = memory.as_mut_ptr() as usize;
        let begin = (address + GUARD).next_multiple_of(256) + start * size % 256 - address;
        let guarded = Rc::new(Guarded {
            name: CString::new(name).map_err(candle_core::Error::wrap)?,
            dtype,
            mark: unwritten(dtype).filter(|_| fresh.is_some()),
            whole: fresh == Some(true),
            original,
            bytes,
            start: begin,
            memory: RefCell::new(memory),
            unwritten: Cell::new(None),
        });
        live.push(Rc::downgrade(&guarded));
        Ok(guarded)
    })?;
    Ok(Operand { address: guarded.start() as u64, len: end - start, dtype, _guarded: Some(guarded) })
}

/// Whether two stretches of memory, each its address and bytes, share a byte.
fn overlap(a: (usize, usize), b: (usize, usize)) -> bool {
    a.1 > 0 && b.1 > 0 && a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

/// Filled with the mark of what nothing has written; `whole` if kernels shall write every element.
pub(super) fn storage(shape: &Shape, dtype: DType, whole: bool) -> Result<CpuStorage> {
    fn filled<T: Copy>(value: T, count: usize, whole: bool) -> Vec<T> {
        let elements = vec![value; count];
        let place = (elements.as_ptr() as usize, count * size_of::<T>());
        FRESH.with_borrow_mut(|fresh| {
            fresh.retain(|(other, _)| !overlap(*other, place));
            fresh.push((place, whole));
        });
        elements
    }
    let count = shape.elem_count();
    Ok(match dtype {
        DType::U8 => CpuStorage::U8(filled(0xa5, count, whole)),
        DType::U32 => CpuStorage::U32(filled(0xa5a5_a5a5, count, whole)),
        DType::I64 => CpuStorage::I64(filled(i64::from_ne_bytes([0xa5; 8]), count, whole)),
        DType::F16 => CpuStorage::F16(filled(half::f16::from_bits(0x7e5a), count, whole)),
        DType::BF16 => CpuStorage::BF16(filled(half::bf16::from_bits(0x7fe5), count, whole)),
        DType::F32 => CpuStorage::F32(filled(f32::from_bits(0x7fe5_a5a5), count, whole)),
        DType::F64 => CpuStorage::F64(filled(f64::from_bits(0x7ffa_a5a5_a5a5_a5a5), count, whole)),
        other => bail!("no kernel writes {other:?}"),
    })
}

/// Orders of threads, and what lies beyond the operands: NaN, and values that arithmetic goes on with.
const RUNS: [(u32, u8); 3] = [(0, 0xff), (1, 0x3c), (2, 0x41)];

pub(super) fn launch<A: Args>(module: Module, kernel: &str, grid: Grid, args: &A) -> Result<()> {
    if QUIET.get() {
        return Ok(());
    }
    LAUNCHED.with_borrow_mut(|launched| launched.iter_mut().for_each(|names| names.push(kernel.to_owned())));
    let source = format!("kernels/{}.cu", module.stem());
    launch_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join(source), kernel, grid, args)
}

/// A launch of a kernel of the file `source`.
fn launch_of<A: Args>(source: &Path, kernel: &str, grid: Grid, args: &A) -> Result<()> {
    let live: Vec<Rc<Guarded>> = LIVE.with_borrow(|live| live.iter().filter_map(Weak::upgrade).collect());
    run(source, kernel, grid, args, &live).inspect_err(|_| {
        // What is unwritten follows from the failure.
        UNFINISHED.take();
        live.iter().for_each(|operand| operand.unwritten.set(None));
    })
}

/// An operand as `emulator.cpp` declares it.
#[repr(C)]
struct Access {
    start: u64,
    bytes: u64,
    unit: u64,
    name: *const c_char,
    mask: u64,
    mark: u64,
}

type Entry = unsafe extern "C" fn(*const c_void);
type Emulate = unsafe extern "C" fn(
    Entry,
    *const c_void,
    usize,
    *const u32,
    u32,
    *const Access,
    usize,
    u32,
) -> *const c_char;

fn run<A: Args>(source: &Path, kernel: &str, grid: Grid, args: &A, live: &[Rc<Guarded>]) -> Result<()> {
    let (library, binary) = compile::library(source)?;
    let library = library.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let fail = |what: String| candle_core::Error::Msg(format!("kernel {kernel}: {what}")).bt();
    let before: Vec<Vec<u8>> = live.iter().map(|operand| operand.original()).collect();
    let accesses: Vec<Access> = live
        .iter()
        .map(|operand| {
            let unit = operand.dtype.size_in_bytes();
            let bytes = |element: &[u8]| {
                u64::from_ne_bytes(std::array::from_fn(|i| element.get(i).copied().unwrap_or(0)))
            };
            let (mask, mark) = operand.mark.map_or((0, 1), |mark| (bytes(&[0xff; 8][..unit]), bytes(mark)));
            Access {
                start: operand.start() as u64,
                bytes: operand.bytes as u64,
                unit: unit as u64,
                name: operand.name.as_ptr(),
                mask,
                mark,
            }
        })
        .collect();
    let mut first: Option<Vec<Vec<u8>>> = None;
    // SAFETY: the symbols have the types that `shim.h` and `emulator.cpp` give them.
    unsafe {
        let missing = |error| fail(format!("not in the compiled file: {error}"));
        let emulate = library.get::<Emulate>(b"emulate").map_err(missing)?;
        let entry = library.get::<Entry>(kernel.as_bytes()).map_err(missing)?;
        let size = library.get::<*const usize>(format!("{kernel}_size").as_bytes()).map_err(missing)?;
        let threads = library.get::<*const u32>(format!("{kernel}_threads").as_bytes()).map_err(missing)?;
        if **size != size_of::<A>() {
            return Err(fail(format!(
                "its argument has {} bytes, the launch gives {}",
                **size,
                size_of::<A>()
            )));
        }
        if grid.threads > **threads || grid.threads == 0 || !grid.threads.is_multiple_of(32) {
            return Err(fail(format!("launched with {} threads, made for {}", grid.threads, **threads)));
        }
        for (order, guard) in RUNS {
            live.iter().zip(&before).for_each(|(operand, content)| operand.load(content, guard));
            let args: *const A = args;
            let error = emulate(
                *entry,
                args.cast(),
                size_of::<A>(),
                grid.blocks.as_ptr(),
                grid.threads,
                accesses.as_ptr(),
                accesses.len(),
                order,
            );
            if !error.is_null() {
                return Err(fail(compile::with_lines(&CStr::from_ptr(error).to_string_lossy(), binary)));
            }
            let mut contents = Vec::with_capacity(live.len());
            for operand in live {
                let (content, intact) = operand.content(guard);
                if !intact {
                    return Err(fail("a write beyond an operand".to_owned()));
                }
                contents.push(content);
            }
            match &first {
                None => first = Some(contents),
                Some(first) if *first != contents => {
                    let what = "differs with the order of its threads or with what lies beyond its operands";
                    return Err(fail(what.to_owned()));
                }
                Some(_) => {}
            }
        }
        for (operand, content) in live.iter().zip(first.iter().flatten()) {
            std::ptr::copy_nonoverlapping(content.as_ptr(), operand.original, operand.bytes);
            operand.unwritten.set(operand.first_unwritten(content));
        }
    }
    Ok(())
}
