#!/usr/bin/env bash
# Checks and measures the CUDA backend on a machine that has a GPU, its driver and CUDA 13's libraries, but no cargo.
#
#     scripts/gpu-check.sh --collect DIR            # on the machine that builds: fills DIR, 64 MiB at most with what git tracks
#     DIR/gpu-check.sh --out OUT [PART..]           # on the machine with the GPU
#     DIR/gpu-check.sh --out OUT --again TEST ..    # single tests of tests/cuda under compute-sanitizer
#
# Parts, the most telling first, and the second until which each may run; all of them by default:
#     ops 110, linalg 140, optim 230    tests/cuda, on the GPU alone, with KRONWAKE_REQUIRE_CUDA=1
#     kernels 290                       `benches/kernels`: ceilings, second moments beside GemmEx, grouped products
#     lenet300 325, torch 345           its training steps, and benches/peers/torch_kfac.py (AdamW, K-FAC, Muon) where python3 has torch with CUDA
#     stack 420, torch_stack 450        the same on a stack of transformer blocks
#     memcheck 475                      compute-sanitizer over the operations
#     more 480                          other tests and operations, the example, racecheck: what there is time for
#
# A part that fails or is cut off does not stop the others. Where --deadline S is not 480, all times are scaled. What is cut off keeps what it
# has written: programs write straight to OUT, and report.json and summary.txt are whole after every command. The exit code is 0 if nothing
# has failed or been cut off. What a machine does not have (compute-sanitizer, torch) is skipped and said to be. OUT gets 8 files at most.
# --quick takes the smallest sizes of what is measured. scripts/rehearse-gpu-check.sh tries all this where there is no GPU.
#
# $PYTHON is the python (python3), $TORCH_DEVICE what torch uses (cuda), $KRONWAKE_PROFILE the profile of the build (release).
set -euo pipefail

# Test programs.
tests=(cuda cli)
parts=(ops linalg optim kernels lenet300 torch stack torch_stack memcheck more)
declare -A until=([ops]=110 [linalg]=140 [optim]=230 [kernels]=290 [lenet300]=325 [torch]=345 [stack]=420 [torch_stack]=450 [memcheck]=475 [more]=480)
python=${PYTHON:-python3}
torch_device=${TORCH_DEVICE:-cuda}
deadline=480
quick=()
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
    # Without the `target-cpu=native` of .cargo/config.toml: the machine with the GPU may have another processor.
    CARGO_ENCODED_RUSTFLAGS='' cargo build --profile "${KRONWAKE_PROFILE:-release}" --features cuda "${targets[@]}" \
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
    # One block, and a dictionary that holds all programs: they have most of their code in common.
    if command -v xz >/dev/null; then
        tar -C "$stage" -c . | xz -T1 --lzma2=preset=6,dict=192MiB >"$into/programs.tar.xz"
    else
        tar -C "$stage" -czf "$into/programs.tar.gz" .
    fi
    cp scripts/gpu-check.sh "$into/gpu-check.sh"
    local size tracked
    size=$(du -sb "$into" | cut -f1)
    tracked=$(git -C "$root" ls-files -z 2>/dev/null | (cd "$root" && du -cb --files0-from=- 2>/dev/null) | tail -n 1 | cut -f1)
    printf '%s: %s bytes, and %s that git tracks\n' "$into" "$size" "${tracked:-0}"
    ((size + ${tracked:-0} <= most)) || die "together that is more than $most"
}

# What the commands that have run have come to, as JSON objects, and the names of those that failed, were cut off or were skipped.
results=() failed=() cut=() skipped=()
child='' running='' ended=false

milliseconds() { printf '%s' "$((10#${EPOCHREALTIME//[^0-9]/} / 1000))"; }
elapsed() { printf '%s' "$(($(milliseconds) - started))"; }

# Milliseconds that a part has left.
left() { printf '%s' "$((${until[$1]} * deadline * 1000 / 480 - $(elapsed)))"; }

# Runs a command until its part's time is over; `attempt PART NAME COMMAND..`.
attempt() {
    local part=$1 name=$2 start code=0 verdict=ok limit
    shift 2
    start=$(elapsed)
    limit=$(left "$part")
    if ((limit < 200)); then
        say "$name: cut off before it began"
        cut+=("$name")
        results+=("{\"part\":\"$part\",\"name\":\"$name\",\"cut_off\":true,\"seconds\":0}")
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    # In the background, so that a signal from outside is heard at once.
    timeout --kill-after=2 "$((limit / 1000)).$(printf '%03d' $((limit % 1000)))" "$@" >>"$out/log.txt" 2>&1 &
    child=$!
    running="\"part\":\"$part\",\"name\":\"$name\""
    wait "$child" || code=$?
    child=''
    local seconds=$(($(elapsed) - start))
    seconds=$((seconds / 1000)).$(printf '%03d' $((seconds % 1000)))
    local was_cut=false
    if ((code == 124 || code == 137)); then
        verdict='cut off' was_cut=true
        cut+=("$name")
    elif ((code != 0)); then
        verdict=FAILED
        failed+=("$name")
    fi
    say "$name: $verdict ($seconds s)"
    results+=("{\"part\":\"$part\",\"name\":\"$name\",\"exit_code\":$code,\"cut_off\":$was_cut,\"seconds\":$seconds}")
    report
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

# A program of ours, which needs CUDA's libraries; python has its own.
ours() { # part, name, command
    local part=$1 name=$2
    shift 2
    attempt "$part" "$name" env "LD_LIBRARY_PATH=$libraries" "$@"
}

# Tests of tests/cuda, one at a time: they would share the device, and its memory, without need.
run_tests() { ours "$1" "cuda, $2" "$programs/cuda" --test-threads=1 --nocapture "$2"; }

run_ops() { run_tests ops ops::; }
run_linalg() { run_tests linalg linalg:: && run_tests linalg modules::; }
run_optim() {
    # Recorded steps, the same bits twice, and what is not finite, before whole trainings.
    for name in recorded two_runs not_finite optim::; do run_tests optim "$name"; done
}

bench() { # part, options
    local part=$1
    shift
    ours "$part" "bench $part" "$programs/kernels" --device cuda --json "$out/$part.json" "${quick[@]}" "$@"
}

run_kernels() { bench kernels --only ceilings --only second_moment --only 'grouped products'; }
run_lenet300() { bench lenet300 --only 'step: lenet300'; }
run_stack() { bench stack --only 'step: stack'; }

pytorch() { # part, model
    local has=('import torch; raise SystemExit(not torch.cuda.is_available())' "$python has no torch with CUDA")
    [[ $torch_device == cuda* ]] || has=('import torch' "$python has no torch")
    # Finding out takes seconds, too.
    if (($(left "$1") < 200)) || timeout 30 "$python" -c "${has[0]}" >/dev/null 2>&1; then
        attempt "$1" "PyTorch, $2" "$python" "$programs/torch_kfac.py" --device "$torch_device" --only "$2" --periods 30 --longest 3 \
            --json "$out/$1.json" "${quick[@]}"
    else
        skip "PyTorch, $2" "${has[1]}"
    fi
}

run_torch() { pytorch torch lenet300; }
run_torch_stack() { pytorch torch_stack stack; }

sanitize() { # part, tool, command
    local part=$1 tool=$2 sanitizer
    shift 2
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1) || true
    if [[ -z $sanitizer ]]; then
        skip "$tool" 'compute-sanitizer was not found'
        return
    fi
    ours "$part" "$tool, ${*: -1}" "$sanitizer" --tool "$tool" --error-exitcode 9 "$@"
}

run_memcheck() { sanitize memcheck memcheck "$programs/cuda" --test-threads=1 --skip wrong_device ops::; }

run_more() {
    local only=()
    for name in patch_moment mix softmax layer_norm max_pool2d penalty sample eigh inverse; do only+=(--only "$name"); done
    bench more "${only[@]}"
    run_tests more evidence::
    ours more 'cli' env "KRONWAKE_MNIST=$programs/mnist" "$programs/cli" --test-threads=1 --nocapture cuda::
    sanitize more racecheck "$programs/cuda" --test-threads=1 --skip wrong_device ops::
}

# Single tests, as the summary names them.
run_again() {
    local test
    for test in "$@"; do sanitize more memcheck "$programs/cuda" --test-threads=1 --nocapture --exact "$test"; done
}

# Tests that failed or were running when they were cut off, by the log.
failed_tests() {
    { sed -n 's/^    \([a-z_]*::[a-z_0-9:]*\)$/\1/p' "$out/log.txt"
      awk '/^test [a-z_]+::/ { if (open != "") print open; open = $2 } /^(ok|FAILED|ignored)$|\.\.\. (ok|FAILED|ignored)/ { open = "" }
           /^== / { if (open != "") print open; open = "" } END { if (open != "") print open }' "$out/log.txt"
    } 2>/dev/null | sort -u | tr '\n' ' '
}

quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\n\r\t"\\')"; }

# All that is known, as JSON. What programs have written goes into it, and then leaves OUT.
report() {
    local file join=''
    # Of a program that was stopped while it wrote.
    for file in "${parts[@]}"; do rm -f "$out/$file.json.part"; done
    {
        printf '{\n"commit": %s,\n"gpu": %s,\n"deadline_seconds": %s,\n"seconds": %s,\n"verdict": %s,\n"results": [' \
            "$(quoted "$(cat "$programs/commit")")" "$(quoted "$gpu")" "$deadline" "$(($(elapsed) / 1000))" "$(quoted "$(verdict)")"
        for file in "${results[@]}"; do
            printf '%s\n%s' "$join" "$file"
            join=,
        done
        printf '\n]'
        for file in "${parts[@]}"; do
            [[ ! -s $out/$file.json ]] || cp "$out/$file.json" "$work/figures/"
            # A program that was stopped may have left nothing. They write whole files.
            [[ ! -s $work/figures/$file.json ]] || printf ',\n"%s": %s' "$file" "$(cat "$work/figures/$file.json")"
        done
        printf '\n}\n'
    } >"$out/report.part"
    mv "$out/report.part" "$out/report.json"
    for file in "${parts[@]}"; do rm -f "$out/$file.json"; done
}

verdict() {
    local text=''
    $ended || text+='not at its end; '
    ((${#failed[@]} > 0)) && text+="FAILED: $(printf '%s; ' "${failed[@]}")"
    ((${#cut[@]} > 0)) && text+="cut off: $(printf '%s; ' "${cut[@]}")"
    ((${#skipped[@]} > 0)) && text+="skipped: $(printf '%s; ' "${skipped[@]}")"
    [[ -n $text ]] || text='nothing failed'
    printf '%s' "$text"
}

# Whatever ends the script: the report is whole, and the summary ends with a verdict.
finish() {
    local again
    trap - EXIT TERM INT
    ended=true
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    report
    again=$(failed_tests)
    [[ -z $again ]] || say "again: gpu-check.sh --out OUT --again $again"
    say "verdict: $(verdict)"
    rm -rf "$work"
    ((${#failed[@]} == 0 && ${#cut[@]} == 0)) || exit 1
    exit 0
}

stopped() {
    [[ -z $child ]] || results+=("{$running,\"cut_off\":true}")
    cut+=("all that was left, by a signal")
    exit 1
}

unpack() {
    if [[ -e $here/programs.tar.gz ]]; then
        tar -C "$programs" -xzf "$here/programs.tar.gz"
    elif [[ ! -e $here/programs.tar.xz ]]; then
        die "$here has no programs.tar.xz; run DIR/gpu-check.sh of a DIR that --collect filled"
    elif command -v xz >/dev/null; then
        tar -C "$programs" -xJf "$here/programs.tar.xz"
    else
        "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2])' "$here/programs.tar.xz" "$programs"
    fi
}

check() { # parts, or `again` and tests
    local missing part
    started=$(milliseconds)
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    # Of an earlier run.
    for part in "${parts[@]}" report; do rm -f "$out/$part.json" "$out/$part.json.part"; done
    : >"$out/summary.txt"
    : >"$out/log.txt"
    work=$(mktemp -d)
    programs=$work/programs
    mkdir "$programs" "$work/figures"
    unpack
    export KRONWAKE_REQUIRE_CUDA=1 KRONWAKE_CUDA_ONLY=1
    # What a driver compiles of candle's kernels is compiled once.
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$work/cache} CUDA_CACHE_MAXSIZE=4294967296
    libraries=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(libraries)
    gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>/dev/null | head -n 1) || true
    trap finish EXIT
    trap stopped TERM INT
    report
    say "commit: $(cat "$programs/commit")"
    say "GPU: ${gpu:-none that nvidia-smi shows}"
    missing=$(LD_LIBRARY_PATH=$libraries ldd "$programs/cuda" 2>/dev/null | sed -n 's/^[[:space:]]*\([^ ]*\) => not found$/\1/p' | sort -u | tr '\n' ' ') || true
    [[ -z $missing ]] || say "libraries that are missing: $missing"
    if [[ $1 == again ]]; then
        shift
        run_again "$@"
        return
    fi
    for part in "$@"; do "run_$part"; done
}

out='' chosen=() again=()
while (($# > 0)); do
    case $1 in
        --collect) collect "${2:?--collect needs a folder}"; exit ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        --deadline) deadline=${2:?--deadline needs seconds}; shift ;;
        --quick) quick=(--quick) ;;
        --again) shift; again=("$@"); (($# > 0)) || die '--again: expected names of tests'; shift $(($# - 1)) ;;
        --help | -h) usage; exit ;;
        -*) die "$1: expected --collect DIR, --out OUT, --deadline S, --quick, --again TEST .. or --help" ;;
        *) [[ " ${parts[*]} " == *" $1 "* ]] || die "$1: expected one of ${parts[*]}"; chosen+=("$1") ;;
    esac
    shift
done
[[ -n $out ]] || { usage; exit 2; }
[[ $deadline =~ ^[1-9][0-9]*$ ]] || die "--deadline $deadline: expected whole seconds"
if ((${#again[@]} > 0)); then
    check again "${again[@]}"
elif ((${#chosen[@]} > 0)); then
    # Whoever chooses gives each all the time that is left.
    for part in "${chosen[@]}"; do until[$part]=480; done
    check "${chosen[@]}"
else
    check "${parts[@]}"
fi
