//! Compiles the kernels under `kernels/`, with the feature `cuda` alone: a file each that holds the code of several GPUs.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(cusolver_syev_batched)");
    #[cfg(feature = "cuda")]
    {
        kernels::compile();
        if toolkit::version().is_some_and(|version| version >= (12, 8)) {
            println!("cargo:rustc-cfg=cusolver_syev_batched");
        }
    }
}

#[cfg(feature = "cuda")]
mod toolkit {
    use std::process::Command;

    /// The version of CUDA that cudarc's bindings are for, found as cudarc does.
    pub fn version() -> Option<(u32, u32)> {
        println!("cargo:rerun-if-env-changed=CUDARC_CUDA_VERSION");
        if let Ok(number) = std::env::var("CUDARC_CUDA_VERSION") {
            let number: u32 = number.trim().parse().ok()?;
            return Some((number / 1000, number % 1000 / 10));
        }
        let out = Command::new("nvcc").arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let (major, rest) = text.split_once("release ")?.1.split_once('.')?;
        Some((major.parse().ok()?, rest.split(',').next()?.trim().parse().ok()?))
    }
}

#[cfg(feature = "cuda")]
mod kernels {
    use std::ffi::OsStr;
    use std::path::{Path, PathBuf};
    use std::process::{Command, exit};
    use std::sync::Mutex;
    use std::time::SystemTime;
    use std::{env, fs, io, thread};

    /// Code for Ampere (8.x) and Hopper, and PTX that the driver compiles for every later GPU. One frontend pass serves all three.
    const GPUS: &str = "arch=compute_80,code=[sm_80,sm_90,compute_80]";

    pub fn compile() {
        println!("cargo:rerun-if-changed=kernels");
        for variable in ["CUDA_HOME", "NVCC"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        if let Err(error) = compile_all() {
            eprintln!(
                "kronwake: the CUDA kernels could not be compiled: {error}\n\
                 The feature `cuda` needs nvcc of CUDA 12.1 or newer on the PATH (or CUDA_HOME or NVCC set). Without a \
                 toolkit, scripts/install-cuda-toolkit.sh brings one and writes the environment file to source."
            );
            exit(1)
        }
    }

    /// Makes `OUT_DIR/STEM.fatbin` of each `kernels/STEM.cu` that has changed, as many at once as cargo allows.
    fn compile_all() -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo has set no OUT_DIR")?);
        let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified());
        // Headers, and this script with its flags.
        let mut shared = modified(&env::current_exe().map_err(text)?).map_err(text)?;
        for header in files("cuh").map_err(text)? {
            shared = shared.max(modified(&header).map_err(text)?);
        }
        let mut jobs = Vec::new();
        for source in files("cu").map_err(text)? {
            let made = out.join(source.file_name().unwrap_or_default()).with_extension("fatbin");
            let newest: SystemTime = shared.max(modified(&source).map_err(text)?);
            if modified(&made).map_or(true, |made| made < newest) {
                jobs.push((source, made));
            }
        }
        let (nvcc, jobs, errors) = (nvcc(), Mutex::new(jobs.into_iter()), Mutex::new(Vec::new()));
        let work = || {
            while let Some((source, made)) = take(&jobs) {
                if let Err(error) = compile_one(&nvcc, &source, &made) {
                    errors.lock().unwrap_or_else(|held| held.into_inner()).push(error);
                }
            }
        };
        let at_once = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        thread::scope(|threads| {
            for _ in 0..at_once {
                threads.spawn(work);
            }
        });
        let errors = errors.into_inner().unwrap_or_else(|held| held.into_inner());
        if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
    }

    fn take<T>(jobs: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
        jobs.lock().unwrap_or_else(|held| held.into_inner()).next()
    }

    fn compile_one(nvcc: &OsStr, source: &Path, made: &Path) -> Result<(), String> {
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3", "-Werror=all-warnings", "-Ikernels", "-gencode", GPUS, "-fatbin"]);
        // The GPU on the host (tests/host_gpu) reads the PTX.
        command.arg("-no-compress").arg(source).arg("-o").arg(made);
        let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let words = [output.stdout, output.stderr].concat();
        Err(format!("{}: {}\n{}", source.display(), output.status, String::from_utf8_lossy(&words)))
    }

    fn nvcc() -> std::ffi::OsString {
        let of_home =
            || Some(PathBuf::from(env::var_os("CUDA_HOME")?).join("bin/nvcc")).filter(|nvcc| nvcc.exists());
        env::var_os("NVCC").or_else(|| of_home().map(Into::into)).unwrap_or_else(|| "nvcc".into())
    }

    fn files(ending: &str) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("kernels")? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == ending) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}
