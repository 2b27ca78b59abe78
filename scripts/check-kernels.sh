#!/usr/bin/env bash
# Compiles every kernel file for each GPU that the crate is made for, with warnings as errors, and prints what a thread of each kernel takes:
# registers, bytes of shared memory, bytes of spilled registers. Fails on a warning and on any spill. Needs nvcc and no GPU:
#
#     source ~/.cache/kronwake/cuda-13.0/env.sh     # written by scripts/install-cuda-toolkit.sh
#     scripts/check-kernels.sh                      # or: scripts/check-kernels.sh FILE.cu ..; or: ARCHS="sm_90" for one GPU alone
set -euo pipefail
cd "$(dirname "$0")/.."

archs=${ARCHS:-sm_80 sm_90}
files=("$@")
[[ ${#files[@]} -gt 0 ]] || files=(kernels/*.cu)
command -v nvcc >/dev/null || { echo "check-kernels: nvcc is not on the PATH; scripts/install-cuda-toolkit.sh brings one" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One file for all GPUs, as build.rs compiles it: its report, or the compiler's words and a failure.
compile() {
    local file=$1 log
    log=$work/$(basename "$file")
    if ! nvcc -std=c++17 -O3 -gencode "arch=compute_80,code=[${archs// /,}]" -Werror all-warnings -Xptxas -v,-warn-spills -fatbin "$file" \
        -o "$log.fatbin" >"$log" 2>&1; then
        printf '%s:\n' "$file"
        cat "$log"
        return 1
    fi
    awk -v archs="$archs" '
        /Compiling entry function/ { split($0, part, "\x27"); kernel = part[2]; arch = part[4]; seen[arch] = 1 }
        /bytes stack frame/ {
            match($0, /[0-9]+ bytes spill stores/); stores = substr($0, RSTART, RLENGTH) + 0
            match($0, /[0-9]+ bytes spill loads/); loads = substr($0, RSTART, RLENGTH) + 0
            match($0, /[0-9]+ bytes stack frame/); stack = substr($0, RSTART, RLENGTH) + 0
        }
        / Used [0-9]+ registers/ {
            match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5) + 0
            shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
            printf "%-40s %-6s %9d %8d %7d %7d\n", kernel, arch, registers, shared, stack, stores + loads
            if (stores + loads > 0) spilled = 1
        }
        END {
            if (spilled) exit 1
            count = split(archs, wanted, " ")
            for (i = 1; i <= count; ++i)
                if (!seen[wanted[i]]) { print "no kernel for " wanted[i]; exit 1 }
        }' "$log"
}
export -f compile
export work archs

printf '%-40s %-6s %9s %8s %7s %7s\n' kernel gpu registers shared stack spilled
failed=0
# As many at once as there are cores, and the reports in order.
printf '%s\0' "${files[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c 'compile "$1" >"$work/report.$(basename "$1")"' _ {} || failed=1
for file in "${files[@]}"; do cat "$work/report.$(basename "$file")"; done
[[ $failed == 0 ]] || { echo "check-kernels: a warning or a spill, see above" >&2; exit 1; }
