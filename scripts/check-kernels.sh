#!/usr/bin/env bash
# Compiles every kernel file for each GPU that the crate is made for, with warnings as errors, and prints what a thread of each kernel takes:
# registers, bytes of shared memory, bytes of spilled registers; and in what order the loop that stores most loads from (L) and stores to
# (S) the GPU's memory: `8L 4S` is eight loads and then four stores. Fails on a warning, on any spill, and where a kernel of
# kernels/staged.cuh stores before it has loaded all, so that its next loads would wait. Needs nvcc and no GPU:
#
#     source ~/.cache/kronwake/cuda-13.0/env.sh     # written by scripts/install-cuda-toolkit.sh
#     scripts/check-kernels.sh                      # or: scripts/check-kernels.sh FILE.cu ..; or: ARCHS="sm_90" for one GPU alone
#
# The order takes nvdisasm. Where that is not on the PATH, it is fetched once into the tree of scripts/install-cuda-toolkit.sh; where that cannot
# be, the order is not looked at, and the script says so.
set -euo pipefail
cd "$(dirname "$0")/.."

archs=${ARCHS:-sm_80 sm_90}
# Without their types.
staged='wake update carries adam precondition mix group_map spatial_gradient'
files=("$@")
[[ ${#files[@]} -gt 0 ]] || files=(kernels/*.cu)
command -v nvcc >/dev/null || { echo "check-kernels: nvcc is not on the PATH; scripts/install-cuda-toolkit.sh brings one" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The disassembler, or nothing.
disassembler() {
    local python=${KRONWAKE_CUDA_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kronwake/cuda-13.0}/python/bin/python found
    found=$(command -v nvdisasm) && { printf '%s' "$found"; return; }
    [[ -x $python ]] && "$python" -m pip install --quiet --disable-pip-version-check --no-compile nvidia-cuda-nvdisasm==13.5.37 2>/dev/null >&2 || return 0
    found=$("$python" -c 'import glob, sys; print(*[f for p in sys.path for f in glob.glob(p + "/nvidia/cu13/bin/nvdisasm")][:1])')
    [[ -z $found ]] || printf '%s' "$found"
}
nvdisasm=$(disassembler)

# The order of a cubin's kernels, a line each: `KERNEL 8L 4S`.
order() {
    "$nvdisasm" -c "$1" | awk '
        function runs(body,    text, count, i, letter) {
            text = ""
            for (i = 1; i <= length(body); i += count) {
                letter = substr(body, i, 1)
                for (count = 1; substr(body, i + count, 1) == letter; ++count);
                text = text (text == "" ? "" : " ") count letter
            }
            return text
        }
        function end() { if (kernel != "") print kernel, best == "" ? "-" : runs(best) }
        /^\.text\./ { end(); kernel = substr($1, 7); sub(/:.*/, "", kernel); all = best = ""; split("", begins) }
        /^\.L_x_[0-9]+:/ { label = $1; sub(/:/, "", label); begins[label] = length(all) }
        / LDG[. ]/ { all = all "L" }
        / STG[. ]/ { all = all "S" }
        # Back to a label: a loop. That which stores most.
        / BRA / && match($0, /\.L_x_[0-9]+/) {
            label = substr($0, RSTART, RLENGTH)
            if (label in begins) {
                body = substr(all, begins[label] + 1)
                if (gsub(/S/, "S", body) > gsub(/S/, "S", best)) best = body
            }
        }
        END { end() }'
}

# One file for all GPUs, as build.rs compiles it: its report, or the compiler's words and a failure.
compile() {
    local file=$1 log arch
    log=$work/$(basename "$file")
    mkdir "$log.parts"
    if ! nvcc -std=c++17 -O3 -gencode "arch=compute_80,code=[${archs// /,}]" -Werror all-warnings -Xptxas -v,-warn-spills -fatbin "$file" \
        --keep --keep-dir "$log.parts" -o "$log.fatbin" >"$log" 2>&1; then
        printf '%s:\n' "$file"
        cat "$log"
        return 1
    fi
    for arch in $archs; do
        local code=$log.parts/$(basename "$file" .cu).$arch.cubin
        # Of one GPU alone.
        [[ -e $code ]] || code=${code%.$arch.cubin}.cubin
        [[ -z $nvdisasm ]] || order "$code" | sed "s/^/order $arch /"
    done >"$log.order"
    rm -r "$log.parts"
    awk -v archs="$archs" -v staged="$staged" -v looked="$nvdisasm" '
        $1 == "order" { key = $3 " " $2; $1 = $2 = $3 = ""; sub(/^ */, ""); order[key] = $0; next }
        /Compiling entry function/ { split($0, part, "\x27"); kernel = part[2]; arch = part[4]; seen[arch] = 1 }
        /bytes stack frame/ {
            match($0, /[0-9]+ bytes spill stores/); stores = substr($0, RSTART, RLENGTH) + 0
            match($0, /[0-9]+ bytes spill loads/); loads = substr($0, RSTART, RLENGTH) + 0
            match($0, /[0-9]+ bytes stack frame/); stack = substr($0, RSTART, RLENGTH) + 0
        }
        / Used [0-9]+ registers/ {
            match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5) + 0
            shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
            found = order[kernel " " arch]
            printf "%-40s %-6s %9d %8d %7d %7d   %s\n", kernel, arch, registers, shared, stack, stores + loads, substr(found, 1, 24)
            if (stores + loads > 0) bad = 1
            base = kernel
            sub(/_[a-z]*[0-9]+$/, "", base)
            if (looked != "" && (" " staged " ") ~ (" " base " ") && found !~ /^[0-9]+L [0-9]+S$/) {
                print kernel ": expected loads and then stores, as in kernels/staged.cuh, found " (found == "-" ? "no loop" : found)
                bad = 1
            }
        }
        END {
            if (bad) exit 1
            count = split(archs, wanted, " ")
            for (i = 1; i <= count; ++i)
                if (!seen[wanted[i]]) { print "no kernel for " wanted[i]; exit 1 }
        }' "$log.order" "$log"
}
export -f compile order
export work archs staged nvdisasm

printf '%-40s %-6s %9s %8s %7s %7s   %s\n' kernel gpu registers shared stack spilled order
failed=0
# As many at once as there are cores, and the reports in order.
printf '%s\0' "${files[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c 'compile "$1" >"$work/report.$(basename "$1")"' _ {} || failed=1
for file in "${files[@]}"; do cat "$work/report.$(basename "$file")"; done
[[ $failed == 0 ]] || { echo "check-kernels: a warning, a spill or a wait, see above" >&2; exit 1; }
[[ -n $nvdisasm ]] || echo "check-kernels: the order of loads and stores was not looked at: nvdisasm is missing, and could not be fetched"
