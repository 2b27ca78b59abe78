//! Compiles the kernels under `kernels/` to PTX, with the feature `cuda` alone.
//!
//! They are compiled for the compute capability in `CUDA_COMPUTE_CAP`, else for that of the GPU present.

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
    use std::path::Path;
    use std::process::exit;

    pub fn compile() {
        println!("cargo:rerun-if-changed=kernels");
        println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
        let shared: Vec<_> = files("cuh");
        let compiled = cudaforge::KernelBuilder::new()
            .source_files(files("cu"))
            .watch(shared)
            .arg("-std=c++17")
            .arg("-O3")
            .arg("-Werror=all-warnings")
            .arg("-Ikernels")
            .build_ptx();
        if let Err(error) = compiled {
            eprintln!(
                "kronwake: the CUDA kernels could not be compiled: {error}\n\
                 The feature `cuda` needs nvcc of CUDA 12.1 or newer on the PATH (or CUDA_HOME set), and CUDA_COMPUTE_CAP \
                 (90, say) where no GPU is present to ask. Without a toolkit, scripts/install-cuda-toolkit.sh brings one \
                 and writes the environment file to source."
            );
            exit(1)
        }
    }

    fn files(ending: &str) -> Vec<std::path::PathBuf> {
        let Ok(entries) = std::fs::read_dir(Path::new("kernels")) else { return Vec::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut found: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
        found.sort();
        found
    }
}
