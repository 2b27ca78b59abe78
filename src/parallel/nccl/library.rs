//! NVIDIA's libnccl, found when it is first needed.
//!
//! cudarc has bindings of it too. candle links what cudarc binds when a program is built, so with those a program would need
//! `libnccl.so` to be built and would not start without the library; and cudarc's own search does not know `libnccl.so.2`, the only
//! name in NVIDIA's packages. So the dozen functions of nccl.h that are used here are looked up one by one, and what is missing is an error.

use candle_core::{Error, Result};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Names the one file to load, and no search.
const VARIABLE: &str = "KRONWAKE_NCCL_LIBRARY";
/// 2.18, in which a communicator that does not block can be given up at any point.
const OLDEST: c_int = 21_800;

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;
/// `cudaStream_t`, which is the driver's `CUstream`.
pub(super) type Stream = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub [u8; 128]);

/// The first fields of `ncclConfig_t`, those that it had in 2.17: it grows at its end, and `size` and `version` say how much there is.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return at once, and what they have begun is asked for.
    pub fn without_blocking() -> Self {
        // NCCL_CONFIG_UNDEF_INT.
        let default = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: default,
            min_ctas: default,
            max_ctas: default,
            net_name: std::ptr::null(),
            split_share: default,
        }
    }
}

/// `ncclResult_t`.
pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;
/// `ncclSum`.
pub(super) const SUM: c_int = 0;

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of nccl.h.
        pub(super) struct Library {
            $($(#[$doc])* pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// The functions are in it.
            _file: libloading::Library,
        }

        impl Library {
            fn of(file: libloading::Library) -> std::result::Result<Self, String> {
                // SAFETY: the types are those of nccl.h.
                unsafe {
                    $(let $field = *file.get($name.as_bytes()).map_err(|error| reason(&error))?;)*
                    Ok(Self { $($field,)* _file: file })
                }
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> Code;
    get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    init_rank = "ncclCommInitRankConfig": fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code;
    get_async_error = "ncclCommGetAsyncError": fn(Comm, *mut Code) -> Code;
    finalize = "ncclCommFinalize": fn(Comm) -> Code;
    destroy = "ncclCommDestroy": fn(Comm) -> Code;
    abort = "ncclCommAbort": fn(Comm) -> Code;
    error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
    /// Of any communicator: the argument is not read.
    last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Code;
    reduce = "ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Comm, Stream) -> Code;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Code;
}

impl Library {
    /// The library, loaded once.
    ///
    /// # Errors
    /// When it is not there or too old, with what to install.
    pub fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| load(std::env::var_os(VARIABLE).map(PathBuf::from), &installed()));
        loaded.as_ref().map_err(|why| Error::Msg(format!("parallel: {why}")))
    }

    /// What a code means, with the library's own last words on it.
    pub fn words(&self, code: Code) -> String {
        // SAFETY: both return text that stays.
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().replace('\n', " "),
        };
        let (what, last) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        if last.is_empty() || last == what { what } else { format!("{what} ({last})") }
    }
}

/// What the loader says.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Where NVIDIA's packages put it: by name where the loader looks (the packages for Debian and Red Hat, and `LD_LIBRARY_PATH`), then in
/// the Python and conda environments that are active (the packages nvidia-nccl-cu12 and nvidia-nccl-cu13), then in CUDA's folder.
fn installed() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("libnccl.so.2"), PathBuf::from("libnccl.so")];
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(environment) = std::env::var_os(variable) else { continue };
        let library = Path::new(&environment).join("lib");
        files.push(library.join("libnccl.so.2"));
        let entries = std::fs::read_dir(&library).into_iter().flatten().flatten();
        let pythons = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("python"));
        files.extend(pythons.map(|python| python.path().join("site-packages/nvidia/nccl/lib/libnccl.so.2")));
    }
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        files.extend(["lib64", "lib"].map(|folder| Path::new(&home).join(folder).join("libnccl.so.2")));
    }
    files
}

/// The library in `named`, or in the first of these files that there is.
fn load(named: Option<PathBuf>, files: &[PathBuf]) -> std::result::Result<Library, String> {
    // SAFETY: NVIDIA's library does nothing at loading that this program would have to know of.
    let open = |file: &Path| unsafe { libloading::Library::new(file) };
    let file = match named {
        Some(named) => open(&named).map_err(|error| {
            format!("NCCL: {VARIABLE} names {}, which could not be loaded: {}", named.display(), reason(&error))
        })?,
        None => files.iter().find_map(|file| open(file).ok()).ok_or_else(|| {
            format!(
                "NCCL: libnccl.so.2 was not found by the loader, in the active Python or conda environment or in CUDA_HOME; install \
                 NVIDIA's package libnccl2, or `pip install nvidia-nccl-cu12` (or -cu13) and activate its environment, or set {VARIABLE} to \
                 the file"
            )
        })?,
    };
    let too_old = |what: String| {
        format!("NCCL: expected libnccl 2.18 or newer, got one of {what}; install a newer one")
    };
    let library = Library::of(file).map_err(|missing| too_old(format!("without a function: {missing}")))?;
    let mut version = 0;
    // SAFETY: writes a number.
    let code = unsafe { (library.get_version)(&mut version) };
    if code != SUCCESS || version < OLDEST {
        return Err(too_old(format!("version {}.{}", version / 10_000, version / 100 % 100)));
    }
    Ok(library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_an_error() {
        let said = |named: Option<&str>, files: &[&str]| {
            let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
            load(named.map(PathBuf::from), &files).err().unwrap_or_default()
        };
        let none = said(None, &["/no/libnccl.so.2"]);
        assert!(none.starts_with("NCCL: libnccl.so.2 was not found") && none.contains("install"), "{none}");
        let named = said(Some("/no/libnccl.so.2"), &[]);
        assert!(named.starts_with("NCCL: KRONWAKE_NCCL_LIBRARY names /no/libnccl.so.2, which"), "{named}");
        // A library, but not this one.
        let other = said(Some("libc.so.6"), &[]);
        assert!(other.starts_with("NCCL: expected libnccl 2.18 or newer"), "{other}");
    }

    #[test]
    fn the_structs_are_those_of_the_header() {
        assert_eq!((size_of::<UniqueId>(), size_of::<Config>()), (128, 48));
    }
}
