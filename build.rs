//! Compiles the kernels under `kernels/` to PTX, with the feature `cuda` alone.
//!
//! They are compiled for the compute capability in `CUDA_COMPUTE_CAP`, else for that of the GPU present.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels::compile();
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
