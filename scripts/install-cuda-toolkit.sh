#!/usr/bin/env bash
# Installs NVIDIA's CUDA 13.0 compiler and libraries for building with `--features cuda` where no toolkit is installed,
# and writes the environment file that a build needs:
#
#     scripts/install-cuda-toolkit.sh          # into ~/.cache/kronwake/cuda-13.0, or $KRONWAKE_CUDA_DIR
#     source ~/.cache/kronwake/cuda-13.0/env.sh
#     cargo build --release --features cuda
#
# The parts come as wheels from the Python package index and are unpacked to one tree; nothing outside that folder is
# touched, and a second call finds the work done. Neither a GPU nor a driver is needed: a stub stands in for libcuda.so
# when linking, and answers "no device" to a program that is run without one. CUDA 13.0, not newer: what a newer compiler
# writes does not load under a driver of the 580 series.
set -euo pipefail

dir=${KRONWAKE_CUDA_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kronwake/cuda-13.0}
version=13.0.3
parts=nvcc,cudart,cublas,curand,cusolver,nvrtc,cccl,crt,nvvm
done_mark=$dir/installed-$version-1

if [[ -e $done_mark ]]; then
    printf 'CUDA %s is already in %s\n' "$version" "$dir"
    exit 0
fi
for tool in python3 gcc; do
    command -v "$tool" >/dev/null || { printf 'install-cuda-toolkit: %s is needed and was not found\n' "$tool" >&2; exit 1; }
done

mkdir -p "$dir"
python3 -m venv "$dir/python"
"$dir/python/bin/pip" install --quiet --disable-pip-version-check --no-compile "cuda-toolkit[$parts]==$version"
tree=$(echo "$dir"/python/lib/python3*/site-packages/nvidia/cu13)
test -x "$tree/bin/nvcc"

# The linker looks for libcublas.so, the wheels carry libcublas.so.13.
(
    cd "$tree/lib"
    for lib in cublas cublasLt cudart curand cusolver cusparse nvrtc nvJitLink; do
        ln -sf "$(ls "lib$lib.so".* | head -n 1)" "lib$lib.so"
    done
)
ln -sfn lib "$tree/lib64"

# A driver of no function: every name of the driver's header, each answering CUDA_ERROR_NO_DEVICE.
mkdir -p "$tree/stubs"
{ grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$tree/include/cuda.h"; printf 'cuProfiler%s\n' Initialize Start Stop; } | sort -u \
    | sed 's/.*/int &(void) { return 100; }/' >"$tree/stubs/cuda.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$tree/stubs/libcuda.so" "$tree/stubs/cuda.c"
ln -sf libcuda.so "$tree/stubs/libcuda.so.1"
rm "$tree/stubs/cuda.c"

cat >"$dir/env.sh" <<ENV
# Written by install-cuda-toolkit.sh; source it before a build with --features cuda.
export CUDA_HOME="$tree" CUDA_PATH="$tree" CUDA_TOOLKIT_ROOT_DIR="$tree"
export PATH="$tree/bin:\$PATH"
export LIBRARY_PATH="$tree/lib:$tree/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
# What the kernels are compiled for, unless the build says otherwise: 90 is Hopper, 80 Ampere.
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
# The libraries at run time; the stub only where no driver is installed.
export LD_LIBRARY_PATH="$tree/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
if ! ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; then
    export LD_LIBRARY_PATH="\$LD_LIBRARY_PATH:$tree/stubs"
fi
ENV
touch "$done_mark"
printf 'CUDA %s is in %s\nsource %s/env.sh before a build with --features cuda\n' "$version" "$dir" "$dir"
