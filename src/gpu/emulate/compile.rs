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
    type Loaded = HashMap<PathBuf, &'static (Compiled, PathBuf)>;
    static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(library) = loaded.get(source) {
        return Ok(library);
    }
    let binary = compile(source)?;
    // SAFETY: the library is what `compile` made; loading it runs no code but the sanitizer's empty start.
    let library = unsafe { Library::new(&binary) }.map_err(candle_core::Error::wrap)?;
    let library: &'static _ = Box::leak(Box::new((Mutex::new(library), binary)));
    loaded.insert(source.to_owned(), library);
    Ok(library)
}

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"];

/// The hooks that the compiler calls are the emulator's own (`checks.cpp`), not the sanitizers' libraries.
const SANITIZE: &str = "-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero,float-cast-overflow";

fn compile(source: &Path) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, emulator) = (root.join("kernels"), root.join("tests/emulator"));
    let Some(compiler) = compiler() else { bail!("no C++ compiler for the emulator") };
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
    std::hash::Hasher::write(&mut hasher, include_bytes!("compile.rs"));
    for input in &inputs {
        std::hash::Hasher::write(&mut hasher, &std::fs::read(input)?);
    }
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let name = format!("{stem}-{:016x}", std::hash::Hasher::finish(&hasher));
    let folder = Path::new(env!("OUT_DIR")).join("emulator");
    std::fs::create_dir_all(&folder)?;
    let binary = folder.join(&name).with_extension("so");
    if binary.exists() {
        return Ok(binary);
    }
    // Written apart and moved, so that two processes do not see each other's half.
    let part = |ending: &str| folder.join(format!("{name}-{}.{ending}", std::process::id()));
    let (object, whole) = (part("o"), part("part"));
    let run = |command: &mut Command| -> Result<()> {
        let out = command.output()?;
        if !out.status.success() {
            bail!("{}: {}", source.display(), String::from_utf8_lossy(&out.stderr))
        }
        Ok(())
    };
    let base = ["-std=c++17", "-fPIC", "-fvisibility-inlines-hidden", "-g1", "-ffp-contract=off"];
    run(Command::new(compiler)
        .args(base)
        .args(WARNINGS)
        .args(["-O1", SANITIZE, "-DKRONWAKE_EMULATE", "-c", "-x", "c++", "-I"])
        .arg(&kernels)
        .arg("-I")
        .arg(&emulator)
        .arg(source)
        .arg("-o")
        .arg(&object))?;
    run(Command::new(compiler)
        .args(base)
        .args(WARNINGS)
        .args(["-O2", "-shared"])
        .args([emulator.join("emulator.cpp"), emulator.join("checks.cpp")])
        .arg(&object)
        .arg("-o")
        .arg(&whole))?;
    std::fs::remove_file(&object)?;
    std::fs::rename(&whole, &binary)?;
    Ok(binary)
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
