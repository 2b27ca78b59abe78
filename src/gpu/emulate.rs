//! Kernels on the host: the files under `kernels/` compiled as C++ against `tests/emulator/`, and every launch checked.
//!
//! Within [`emulate`], tensors on the CPU count as tensors on a GPU. Each launch runs several times from the same state, with the threads of
//! a block in different orders and different values beyond the operands' ends, and fails where a barrier or a warp operation lacks threads, where a
//! value is written beyond an operand or a shared array, or where two runs differ: a missing barrier, a read beyond an end,
//! an element that is never written.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::{Rc, Weak};
use std::sync::{LazyLock, Mutex};

use candle_core::{CpuStorage, DType, Layout, Result, Shape, WithDType, bail};
use libloading::Library;

use super::{Args, Grid, Module, Operand};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static LIVE: RefCell<Vec<Weak<Guarded>>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn is_on() -> bool {
    ON.get()
}

/// Runs `body` with the CPU's tensors taken for a GPU's. Without a C++ compiler, `body` runs on the plain CPU path; the tests then prove
/// nothing more than that, and say so.
pub(crate) fn emulate<T>(body: impl FnOnce() -> T) -> T {
    struct Off(bool);
    impl Drop for Off {
        fn drop(&mut self) {
            ON.set(self.0);
        }
    }
    let _off = Off(ON.get());
    ON.set(compiler().is_some());
    body()
}

/// Runs `body` without the kernels that it launches, as a recording does.
pub(super) fn without_launches<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    QUIET.set(true);
    let result = body();
    QUIET.set(false);
    result
}

fn compiler() -> Option<&'static str> {
    static FOUND: LazyLock<Option<&'static str>> = LazyLock::new(|| {
        let found = ["c++", "g++", "clang++"]
            .into_iter()
            .find(|name| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success()));
        if found.is_none() {
            assert!(
                std::env::var_os("KRONWAKE_REQUIRE_EMULATOR").is_none(),
                "no C++ compiler for the emulator"
            );
            eprintln!("skipped: no C++ compiler, so kernels are not emulated");
        }
        found
    });
    *FOUND
}

/// Bytes before and after an operand that no kernel may touch.
const GUARD: usize = 4096;

/// An operand's elements between two guards. They are copied in before a launch and out after it.
#[derive(Debug)]
pub(crate) struct Guarded {
    original: *mut u8,
    bytes: usize,
    /// In words, for the strictest alignment that an element has.
    memory: RefCell<Vec<u128>>,
}

impl Guarded {
    fn start(&self) -> *mut u8 {
        // SAFETY: the memory has a guard before the elements.
        unsafe { self.memory.borrow_mut().as_mut_ptr().cast::<u8>().add(GUARD) }
    }

    /// Fills the guards and copies the elements in.
    fn load(&self, content: &[u8], guard: u8) {
        let mut memory = self.memory.borrow_mut();
        let words = memory.len();
        // SAFETY: `words` of 16 bytes each.
        let all = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), words * 16) };
        all.fill(guard);
        all[GUARD..GUARD + content.len()].copy_from_slice(content);
    }

    /// The elements, and whether both guards are as `load` left them.
    fn content(&self, guard: u8) -> (Vec<u8>, bool) {
        let memory = self.memory.borrow();
        // SAFETY: as in `load`.
        let all = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), memory.len() * 16) };
        let (before, rest) = all.split_at(GUARD);
        let (content, after) = rest.split_at(self.bytes);
        (content.to_vec(), before.iter().chain(after).all(|byte| *byte == guard))
    }

    fn original(&self) -> Vec<u8> {
        // SAFETY: the tensor outlives its operand.
        unsafe { std::slice::from_raw_parts(self.original, self.bytes) }.to_vec()
    }
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
    let guarded = LIVE.with_borrow_mut(|live| -> Result<Rc<Guarded>> {
        live.retain(|other| other.strong_count() > 0);
        for other in live.iter().filter_map(Weak::upgrade) {
            if other.original == original && other.bytes == bytes {
                return Ok(other);
            }
            let (a, b) = (other.original as usize, original as usize);
            if bytes > 0 && a < b + bytes && b < a + other.bytes {
                bail!("{name}: overlaps an operand without being the same")
            }
        }
        let memory = RefCell::new(vec![0; (bytes + 2 * GUARD).div_ceil(16)]);
        let guarded = Rc::new(Guarded { original, bytes, memory });
        live.push(Rc::downgrade(&guarded));
        Ok(guarded)
    })?;
    Ok(Operand { address: guarded.start() as u64, len: end - start, dtype, _guarded: Some(guarded) })
}

/// Filled with NaN, so that an element that no kernel writes shows.
pub(super) fn storage(shape: &Shape, dtype: DType) -> Result<CpuStorage> {
    let count = shape.elem_count();
    Ok(match dtype {
        DType::U8 => CpuStorage::U8(vec![0xff; count]),
        DType::U32 => CpuStorage::U32(vec![u32::MAX; count]),
        DType::I64 => CpuStorage::I64(vec![-1; count]),
        DType::F16 => CpuStorage::F16(vec![half::f16::NAN; count]),
        DType::BF16 => CpuStorage::BF16(vec![half::bf16::NAN; count]),
        DType::F32 => CpuStorage::F32(vec![f32::NAN; count]),
        DType::F64 => CpuStorage::F64(vec![f64::NAN; count]),
        other => bail!("no kernel writes {other:?}"),
    })
}

/// Orders of threads, and what lies beyond the operands: NaN, and values that arithmetic goes on with.
const RUNS: [(u32, u8); 3] = [(0, 0xff), (1, 0x3c), (2, 0x41)];

pub(super) fn launch<A: Args>(module: Module, kernel: &str, grid: Grid, args: &A) -> Result<()> {
    if QUIET.get() {
        return Ok(());
    }
    let library = library(&source_of(module.stem()))?;
    run(library, kernel, grid, args)
}

fn source_of(stem: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(format!("{stem}.cu"))
}

type Entry = unsafe extern "C" fn(*const c_void);
type Emulate = unsafe extern "C" fn(Entry, *const c_void, *const u32, u32, u32) -> *const c_char;

fn run<A: Args>(library: &Mutex<Library>, kernel: &str, grid: Grid, args: &A) -> Result<()> {
    // One launch at a time: the emulator's state is global.
    let library = library.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let fail = |what: String| candle_core::Error::Msg(format!("kernel {kernel}: {what}")).bt();
    let live: Vec<Rc<Guarded>> = LIVE.with_borrow(|live| live.iter().filter_map(Weak::upgrade).collect());
    let before: Vec<Vec<u8>> = live.iter().map(|operand| operand.original()).collect();
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
        if grid.threads > **threads || grid.threads == 0 || grid.threads % 32 != 0 {
            return Err(fail(format!("launched with {} threads, made for {}", grid.threads, **threads)));
        }
        for (order, guard) in RUNS {
            live.iter().zip(&before).for_each(|(operand, content)| operand.load(content, guard));
            let args: *const A = args;
            let error = emulate(*entry, args.cast(), grid.blocks.as_ptr(), grid.threads, order);
            if !error.is_null() {
                return Err(fail(CStr::from_ptr(error).to_string_lossy().into_owned()));
            }
            let mut contents = Vec::with_capacity(live.len());
            for operand in &live {
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
        }
    }
    Ok(())
}

/// The compiled form of a kernel file, made once a process and kept while its sources stay the same.
fn library(source: &Path) -> Result<&'static Mutex<Library>> {
    static LOADED: LazyLock<Mutex<HashMap<PathBuf, &'static Mutex<Library>>>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(library) = loaded.get(source) {
        return Ok(library);
    }
    let binary = compile(source)?;
    // SAFETY: the library is what `compile` made; loading it runs no code of its own.
    let library = unsafe { Library::new(&binary) }.map_err(candle_core::Error::wrap)?;
    let library: &'static Mutex<Library> = Box::leak(Box::new(Mutex::new(library)));
    loaded.insert(source.to_owned(), library);
    Ok(library)
}

fn compile(source: &Path) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, emulator) = (root.join("kernels"), root.join("tests/emulator"));
    let Some(compiler) = compiler() else { bail!("no C++ compiler for the emulator") };
    let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut inputs = vec![source.to_owned()];
    for folder in [&kernels, &emulator] {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending != "cu") {
                inputs.push(path);
            }
        }
    }
    inputs.sort();
    let mut hasher = std::hash::DefaultHasher::new();
    for input in &inputs {
        std::hash::Hasher::write(&mut hasher, &std::fs::read(input)?);
    }
    let folder = Path::new(env!("OUT_DIR")).join("emulator");
    std::fs::create_dir_all(&folder)?;
    let binary = folder.join(format!("{stem}-{:016x}.so", std::hash::Hasher::finish(&hasher)));
    if binary.exists() {
        return Ok(binary);
    }
    // Written apart and moved, so that two processes do not see each other's half.
    let part = folder.join(format!("{stem}-{}.part", std::process::id()));
    let out = Command::new(compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ])
        .args(["-ffp-contract=off", "-DKRONWAKE_EMULATE", "-I"])
        .arg(&kernels)
        .arg("-I")
        .arg(&emulator)
        .args(["-x", "c++"])
        .arg(source)
        .arg(emulator.join("emulator.cpp"))
        .arg("-o")
        .arg(&part)
        .output()?;
    if !out.status.success() {
        bail!("{}: {}", source.display(), String::from_utf8_lossy(&out.stderr))
    }
    std::fs::rename(&part, &binary)?;
    Ok(binary)
}
