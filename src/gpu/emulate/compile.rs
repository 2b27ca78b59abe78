//! Kernel files as shared libraries for the host.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};

use candle_core::{Result, bail};
use libloading::Library;

/// A compiled kernel file, for one launch at a time: the emulator's state is global.
pub(super) type Compiled = Mutex<Library>;

pub(super) fn compiler() -> Option<&'static str> {
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

/// The compiled form of a kernel file and where it lies, made once a process and kept while its sources stay the same.
pub(super) fn library(source: &Path) -> Result<&'static (Compiled, PathBuf)> {
    type Loaded = HashMap<PathBuf, &'static Mutex<Option<&'static (Compiled, PathBuf)>>>;
    static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);
    // Each file has a lock of its own: others are compiled meanwhile.
    let place = *LOADED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .entry(source.to_owned())
        .or_insert_with(|| Box::leak(Box::default()));
    let mut loaded = place.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(library) = *loaded {
        return Ok(library);
    }
    let binary = compile(source)?;
    // SAFETY: the library is what `compile` made; loading it runs no code but the sanitizer's empty start.
    let library = unsafe { Library::new(&binary) }.map_err(candle_core::Error::wrap)?;
    Ok(loaded.insert(Box::leak(Box::new((Mutex::new(library), binary)))))
}

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"];

/// The hooks that the compiler calls are the emulator's own (`checks.cpp`), not the sanitizers' libraries.
const SANITIZE: &str = "-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero,float-cast-overflow";

const BASE: [&str; 5] = ["-std=c++17", "-fPIC", "-fvisibility-inlines-hidden", "-g1", "-ffp-contract=off"];

/// A kernel file with the emulator, linked.
fn compile(source: &Path) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, emulator) = (root.join("kernels"), root.join("tests/emulator"));
    let Some(compiler) = compiler() else { bail!("no C++ compiler for the emulator") };
    let own = [("emulator.cpp", "emulator"), ("checks.cpp", "checks")].map(|(file, stem)| {
        let source = emulator.join(file);
        made(stem, "o", &inputs(&source, &[&emulator])?, |object| {
            run(
                &source,
                Command::new(compiler)
                    .args(BASE)
                    .args(WARNINGS)
                    .args(["-O2", "-c"])
                    .arg(&source)
                    .arg("-o")
                    .arg(object),
            )
        })
    });
    let [first, second] = own;
    let objects = [first?, second?];
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    made(&stem, "so", &inputs(source, &[&kernels, &emulator])?, |library| {
        let object = library.with_extension("o");
        run(
            source,
            Command::new(compiler)
                .args(BASE)
                .args(WARNINGS)
                .args(["-O1", SANITIZE, "-DKRONWAKE_EMULATE", "-c", "-x", "c++", "-I"])
                .arg(&kernels)
                .arg("-I")
                .arg(&emulator)
                .arg(source)
                .arg("-o")
                .arg(&object),
        )?;
        run(
            source,
            Command::new(compiler).arg("-shared").args(&objects).arg(&object).arg("-o").arg(library),
        )?;
        std::fs::remove_file(&object).map_err(candle_core::Error::wrap)
    })
}

/// A source, and all that it may include from these folders.
fn inputs(source: &Path, folders: &[&Path]) -> Result<Vec<PathBuf>> {
    let mut inputs = vec![source.to_owned()];
    for folder in folders {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending != "cu") {
                inputs.push(path);
            }
        }
    }
    inputs.sort();
    Ok(inputs)
}

fn run(source: &Path, command: &mut Command) -> Result<()> {
    let out = command.output()?;
    if !out.status.success() {
        bail!("{}: {}", source.display(), String::from_utf8_lossy(&out.stderr))
    }
    Ok(())
}

/// The file that `make` writes from `inputs`, once for each content of theirs.
fn made(
    stem: &str,
    ending: &str,
    inputs: &[PathBuf],
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    // Threads that need the same file wait for it.
    static MAKING: LazyLock<Mutex<HashMap<String, &'static Mutex<()>>>> = LazyLock::new(Mutex::default);
    let mut hasher = std::hash::DefaultHasher::new();
    std::hash::Hasher::write(&mut hasher, include_bytes!("compile.rs"));
    for input in inputs {
        std::hash::Hasher::write(&mut hasher, &std::fs::read(input)?);
    }
    let name = format!("{stem}-{:016x}", std::hash::Hasher::finish(&hasher));
    let folder = Path::new(env!("OUT_DIR")).join("emulator");
    std::fs::create_dir_all(&folder)?;
    let made = folder.join(format!("{name}.{ending}"));
    let place = *MAKING
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .entry(name.clone())
        .or_insert_with(|| Box::leak(Box::default()));
    let _making = place.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !made.exists() {
        // Written apart and moved, so that two processes do not see each other's half.
        let part = folder.join(format!("{name}-{}.part", std::process::id()));
        make(&part)?;
        std::fs::rename(&part, &made)?;
    }
    Ok(made)
}

/// The message with its place in the machine code, `{code ..}`, replaced by that in the source, from the innermost call outwards.
pub(super) fn with_lines(message: &str, binary: &Path) -> String {
    let Some((before, rest)) = message.split_once(" {code ") else { return message.to_owned() };
    let Some((address, after)) = rest.split_once('}') else { return message.to_owned() };
    let lines = Command::new("addr2line").args(["-s", "-i", "-e"]).arg(binary).arg(address).output();
    let place = match lines {
        Ok(out) if out.status.success() => {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let lines = text.lines().map(|line| line.split(" (").next().unwrap_or(line));
            format!(" at {}", lines.collect::<Vec<_>>().join(" < "))
        }
        _ => String::new(),
    };
    format!("{before}{place}{after}")
}
