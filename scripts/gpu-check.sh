#!/usr/bin/env bash
# Checks and measures the CUDA backend on a machine that has a GPU, its driver and CUDA 13's libraries, but no cargo.
#
#     scripts/gpu-check.sh --collect DIR            # on the machine that builds: fills DIR, 64 MiB at most
#     DIR/gpu-check.sh --out OUT [PART..]           # on the machine with the GPU
#
# Parts, all of them by default:
#     tests       tests/cuda and cli/tests/cli/cuda.rs, with KRONWAKE_REQUIRE_CUDA=1
#     sanitizer   compute-sanitizer's memcheck and racecheck over the operations and a short training
#     kernels     `benches/kernels`: ceilings and single operations
#     lenet300, stack   its training steps, and those of benches/peers/torch_kfac.py where python3 has torch with CUDA
#
# A part that fails does not stop the others; the end says which did, and the exit code is 1. What a machine does not have
# (compute-sanitizer, torch) is skipped and said to be. OUT gets report.json, summary.txt and a log a part: 7 files.
#
# $PYTHON is the python (python3). $KRONWAKE_SECONDS bounds every command (500). A build takes kernels for
# $CUDA_COMPUTE_CAP and processors of $KRONWAKE_TARGET_CPU (x86-64-v3), not for those of the machine that builds.
set -euo pipefail

# Test programs, and what of each is run by itself.
tests=(cuda cli)
declare -A subjects=([cuda]='ops:: linalg:: optim:: evidence::' [cli]=cuda::)
parts=(tests sanitizer kernels lenet300 stack)
python=${PYTHON:-python3}
seconds=${KRONWAKE_SECONDS:-500}
most=$((64 << 20))
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() { printf 'gpu-check: %s\n' "$1" >&2; exit 2; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

collect() { # folder
    local into root stage name path
    mkdir -p "$1"
    into=$(cd "$1" && pwd)
    cd "$here/.."
    root=$PWD
    command -v cargo >/dev/null || die 'cargo is needed to collect and was not found'
    local targets=(--bench kernels --example mnist)
    for name in "${tests[@]}"; do targets+=(--test "$name"); done
    # No `target-cpu=native`: the machine with the GPU may have another processor.
    RUSTFLAGS="-C target-cpu=${KRONWAKE_TARGET_CPU:-x86-64-v3}" cargo build --release --features cuda "${targets[@]}" \
        --message-format=json-render-diagnostics >"$into/messages"
    stage=$(mktemp -d)
    # Expanded now: the name is local.
    # shellcheck disable=SC2064
    trap "rm -rf '$stage'" EXIT
    for name in "${tests[@]}" kernels mnist; do
        path=$(sed -n "s/.*\"target\":{\"kind\":\[[^]]*\],\"crate_types\":\[[^]]*\],\"name\":\"$name\".*\"executable\":\"\([^\"]*\)\".*/\1/p" \
            "$into/messages" | tail -n 1)
        [[ -n $path ]] || die "the build named no program for $name"
        strip -o "$stage/$name" "$path"
    done
    rm "$into/messages"
    cp benches/peers/torch_kfac.py "$stage/"
    git -C "$root" describe --always --dirty >"$stage/commit" 2>/dev/null || echo unknown >"$stage/commit"
    XZ_OPT=-T0 tar -C "$stage" -cJf "$into/programs.tar.xz" .
    cp scripts/gpu-check.sh "$into/gpu-check.sh"
    local size
    size=$(du -sb "$into" | cut -f1)
    ((size <= most)) || die "$into has $size bytes, more than $most"
    printf '%s: %s bytes\n' "$into" "$size"
}

# Results of the commands that have run, as JSON objects, and the names of those that failed or were skipped.
results=() failed=() skipped=()

# Runs a command with its output in a part's log; `attempt PART NAME COMMAND..`.
attempt() {
    local part=$1 name=$2 start=$SECONDS code=0 verdict=ok
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" >>"$out/$part.log"
    timeout --kill-after=10 "$seconds" "$@" >>"$out/$part.log" 2>&1 || code=$?
    if ((code != 0)); then
        verdict=FAILED
        ((code == 124 || code == 137)) && verdict="FAILED, stopped after $seconds s"
        failed+=("$name")
    fi
    say "$name: $verdict ($((SECONDS - start)) s)"
    results+=("{\"part\":\"$part\",\"name\":\"$name\",\"exit_code\":$code,\"seconds\":$((SECONDS - start))}")
}

skip() { # name, reason
    say "$1: skipped, $2"
    skipped+=("$1")
    results+=("{\"name\":\"$1\",\"skipped\":\"$2\"}")
}

say() { printf '%s\n' "$1" | tee -a "$out/summary.txt"; }

# Where libraries of CUDA may lie: a toolkit, and the wheels that a python with torch has.
libraries() {
    local folder found=()
    for folder in "${CUDA_HOME:-/usr/local/cuda}"/lib64 /usr/local/cuda*/lib64; do
        [[ -d $folder ]] && found+=("$folder")
    done
    while read -r folder; do
        [[ -n $folder ]] && found+=("$folder")
    done < <("$python" - 2>/dev/null <<'PYTHON'
import glob, sys
for folder in sys.path:
    print(*sorted(glob.glob(folder + "/nvidia/*/lib")), sep="\n")
PYTHON
    )
    local IFS=:
    printf '%s' "${found[*]}"
}

run_tests() {
    local name subject
    for name in "${tests[@]}"; do
        for subject in ${subjects[$name]}; do
            # One at a time: they would share the device, and its memory, without need.
            attempt tests "$name, $subject" "$programs/$name" --test-threads=1 --nocapture "$subject"
        done
    done
}

run_sanitizer() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1) || true
    if [[ -z $sanitizer ]]; then
        skip sanitizer 'compute-sanitizer was not found'
        return
    fi
    mkdir -p "$work/training"
    for tool in memcheck racecheck; do
        attempt sanitizer "$tool, operations" "$sanitizer" --tool "$tool" --error-exitcode 9 "$programs/cuda" \
            --test-threads=1 ops:: --skip wrong_device
        attempt sanitizer "$tool, training" "$sanitizer" --tool "$tool" --error-exitcode 9 "$programs/mnist" --device cuda \
            --optimizer q --steps 4 --batch 100 --factor-every 2 --inverse-every 2 --out "$work/training"
    done
}

bench() { # part, name of the file, options
    local part=$1 file=$2
    shift 2
    attempt "$part" "bench $part" "$programs/kernels" --device cuda --json "$work/$file.json" "$@"
}

run_kernels() {
    local only=()
    for name in ceilings second_moment patch_moment 'grouped products' mix softmax layer_norm max_pool2d penalty sample eigh inverse; do
        only+=(--only "$name")
    done
    bench kernels kernels "${only[@]}"
}

run_steps() { # model
    bench "$1" "$1" --only "step: $1"
    if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        attempt "$1" "PyTorch, $1" "$python" "$programs/torch_kfac.py" --device cuda --only "$1" --json "$work/torch-$1.json"
    else
        skip "PyTorch, $1" "$python has no torch with CUDA"
    fi
}

quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\n\r\t"\\')"; }

report() {
    local file join=''
    {
        printf '{\n"commit": %s,\n"gpu": %s,\n"nvcc": %s,\n"results": [' "$(quoted "$(cat "$programs/commit")")" \
            "$(quoted "$gpu")" "$(quoted "$(nvcc --version 2>/dev/null | grep -o 'release [0-9.]*' || true)")"
        for file in "${results[@]}"; do
            printf '%s\n%s' "$join" "$file"
            join=,
        done
        printf '\n]'
        for file in "$work"/*.json; do
            # A program that was stopped may have left nothing.
            [[ -s $file ]] && printf ',\n"%s": %s' "$(basename "$file" .json)" "$(cat "$file")"
        done
        printf '\n}\n'
    } >"$out/report.json"
}

check() { # parts
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    : >"$out/summary.txt"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    programs=$work/programs
    mkdir "$programs"
    [[ -e $here/programs.tar.xz ]] || die "$here has no programs.tar.xz; run DIR/gpu-check.sh of a DIR that --collect filled"
    tar -C "$programs" -xJf "$here/programs.tar.xz"
    export KRONWAKE_REQUIRE_CUDA=1 KRONWAKE_MNIST=$programs/mnist
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(libraries)"
    gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>/dev/null | head -n 1) || true
    say "commit: $(cat "$programs/commit")"
    say "GPU: ${gpu:-none that nvidia-smi shows}"
    local missing part
    missing=$(ldd "$programs/cuda" 2>/dev/null | sed -n 's/^[[:space:]]*\([^ ]*\) => not found$/\1/p' | sort -u | tr '\n' ' ')
    [[ -z $missing ]] || say "libraries that are missing: $missing"
    for part in "$@"; do
        case $part in
            lenet300 | stack) run_steps "$part" ;;
            *) "run_$part" ;;
        esac
        # What follows may be cut off from outside.
        report
    done
    ((${#skipped[@]} == 0)) || say "skipped: $(printf '%s; ' "${skipped[@]}")"
    if ((${#failed[@]} > 0)); then
        say "FAILED: $(printf '%s; ' "${failed[@]}")"
        exit 1
    fi
    say 'nothing failed'
}

out='' chosen=()
while (($# > 0)); do
    case $1 in
        --collect) collect "${2:?--collect needs a folder}"; exit ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        --help | -h) usage; exit ;;
        -*) die "$1: expected --collect DIR, --out OUT or --help" ;;
        *) [[ " ${parts[*]} " == *" $1 "* ]] || die "$1: expected one of ${parts[*]}"; chosen+=("$1") ;;
    esac
    shift
done
[[ -n $out ]] || { usage; exit 2; }
((${#chosen[@]} > 0)) || chosen=("${parts[@]}")
check "${chosen[@]}"
