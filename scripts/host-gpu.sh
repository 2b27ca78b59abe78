#!/usr/bin/env bash
# Runs a command with a GPU on the host: stand-ins for the CUDA driver, cuBLAS, cuSOLVER and cuRAND (tests/host_gpu), which do this crate's
# and candle's kernels as C++. So everything that is compiled with `--features cuda` runs as it does on a GPU, to the last call of the
# driver, only not fast. Streams do what is queued on them as late as they may, unless KRONWAKE_HOST_GPU_ORDER says `early` or
# is a number, from which an order in between follows. Freed and fresh memory is full of NaN. Needs a C++ compiler, and the CUDA headers:
#
#     source ~/.cache/kronwake/cuda-13.0/env.sh     # written by scripts/install-cuda-toolkit.sh
#     scripts/host-gpu.sh cargo test --features cuda --test cuda optim::
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

(($# > 0)) || { echo "host-gpu: expected a command to run, got none" >&2; exit 2; }
[[ -n ${CUDA_HOME:-} ]] || { echo "host-gpu: CUDA_HOME is not set; scripts/install-cuda-toolkit.sh brings the headers" >&2; exit 1; }
cxx=$(command -v c++ || command -v g++ || command -v clang++) || { echo "host-gpu: no C++ compiler" >&2; exit 1; }
host=$(rustc -vV | sed -n 's/^host: //p')
candle=$(cd "$root" && cargo metadata --format-version 1 --features cuda --filter-platform "$host" |
    python3 -c 'import json, sys; print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"))')
candle=$(dirname "$candle")/src
out=${CARGO_TARGET_DIR:-$root/target}/host-gpu
mkdir -p "$out/kernels"

flags=(-std=c++17 -O2 -fPIC -fvisibility-inlines-hidden -ffp-contract=off -fno-strict-aliasing -I "$root/tests/emulator" -I "$root/tests/host_gpu")
# Made anew where one of the files that it follows from is newer.
newer() {
    local made=$1 file
    shift
    [[ -e $made ]] || return 0
    for file in "$0" "$root"/tests/emulator/* "$@"; do [[ $file -nt $made ]] && return 0; done
    return 1
}
own=("$root"/kernels/*) candles=$root/tests/host_gpu/candle.h
build=()
for file in "$root"/kernels/*.cu; do
    made=$out/kernels/$(basename "$file" .cu).so
    newer "$made" "${own[@]}" || continue
    build+=("$cxx ${flags[*]} -w -DKRONWAKE_EMULATE -I $root/kernels -shared -x c++ $file -o $made")
done
# candle's kernels for what has no use here need more of CUDA.
for name in affine binary cast conv fill indexing reduce ternary unary; do
    made=$out/kernels/candle-$name.so
    newer "$made" "$candle/$name.cu" "$candles" || continue
    build+=("$cxx ${flags[*]} -w -I $CUDA_HOME/include -I $CUDA_HOME/include/cccl -include candle.h -shared -x c++ $candle/$name.cu -o $made")
done
library=$out/libhost_gpu.so
if newer "$library" "$root"/tests/host_gpu/*; then
    printf '%s\n' 'libcublas.so.13 { global: cublas*; };' 'libcusolver.so.12 { global: cusolver*; };' 'libcurand.so.10 { global: curand*; };' >"$out/versions"
    files=$(ls "$root"/tests/host_gpu/*.cpp | grep -v /check.cpp | tr '\n' ' ')$root/tests/emulator/emulator.cpp
    build+=("$cxx ${flags[*]} -Wall -Wextra -Werror -shared -pthread -Wl,--version-script=$out/versions $files -ldl -o $library")
fi
[[ ${#build[@]} -eq 0 ]] || printf '%s\0' "${build[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c '{}'
if [[ ! $out/check -nt $library || ! $out/check -nt $root/tests/host_gpu/check.cpp ]]; then
    "$cxx" -std=c++17 -Wall -Wextra -Werror "$root/tests/host_gpu/check.cpp" "$library" -Wl,-rpath,"$out" -o "$out/check"
    KRONWAKE_HOST_GPU_ORDER=late "$out/check" >"$out/check.log" 2>&1 || { cat "$out/check.log" >&2; rm "$out/check"; exit 1; }
fi
for name in libcuda.so.1 libcublas.so.13 libcusolver.so.12 libcurand.so.10; do ln -sf libhost_gpu.so "$out/$name"; done

LD_LIBRARY_PATH="$out:${LD_LIBRARY_PATH:-}" KRONWAKE_REQUIRE_CUDA=1 exec "$@"
