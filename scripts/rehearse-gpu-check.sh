#!/usr/bin/env bash
# Rehearses scripts/gpu-check.sh with its real programs where there is no GPU: on the GPU on the host (scripts/host-gpu.sh), without cargo, with
# the deadline cut to a tenth. However a run ends, OUT must have at most 8 files, a whole report.json that says of each part what became
# of it, and a summary with a verdict. Runs that are tried: to the deadline, full size; the smallest sizes, where what is measured is in the
# report; stopped by a signal; killed, which leaves what the last command that ended had left; single tests again.
#
#     source ~/.cache/kronwake/cuda-13.0/env.sh
#     scripts/rehearse-gpu-check.sh [DIR]       # DIR is what `gpu-check.sh --collect DIR` filled; without it, it is filled now
#
# $KRONWAKE_PROFILE is the profile of the build, $PYTHON a python; if it has torch, that runs on the CPU in the run of the smallest sizes.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
programs=${1:-$work/programs}
[[ -e $programs/gpu-check.sh ]] || scripts/gpu-check.sh --collect "$programs"
programs=$(cd "$programs" && pwd)
# What is checked is this script, whatever DIR has.
cp scripts/gpu-check.sh "$programs/gpu-check.sh"
python=$(command -v "${PYTHON:-python3}")

# The check, by a shell that has none of the toolkit on its PATH. Each replaces the one before: the process is the check's.
mkdir "$work/tmp"
check=(scripts/host-gpu.sh env PATH=/usr/bin:/bin CUDA_HOME=/nowhere "TMPDIR=$work/tmp" "PYTHON=$python" "$programs/gpu-check.sh")

# What a run has left, and its exit code, against what it should be; `judge OUT CODE whole|killed SECONDS [PART..]`: parts with figures.
judge() {
    "$python" - "$@" <<'PYTHON'
import json, os, sys
out, code, kind, seconds, figures = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5:]
files = sorted(os.listdir(out))
assert len(files) <= 8, files
# What was killed could not put away what a program was writing.
assert kind == "killed" or set(files) <= {"log.txt", "report.json", "summary.txt"}, files
report = json.load(open(out + "/report.json"))
assert report["commit"] and report["results"] is not None and report["verdict"], report
summary = open(out + "/summary.txt").read().splitlines()
if kind == "killed":
    code = "of a signal" if code > 128 else sys.exit("it ended by itself")
    assert "not at its end" in report["verdict"], report["verdict"]
else:
    assert summary[-1] == "verdict: " + report["verdict"], summary[-1]
    bad = [r for r in report["results"] if r.get("cut_off") or r.get("exit_code", 0) != 0]
    assert (code == 0) == (not bad and "signal" not in report["verdict"]), (code, report["verdict"])
for part in figures:
    assert part in report, (part, sorted(report))
    assert report[part].get("steps") or report[part].get("kernels"), part
# A command that does not end when it is told to is killed after 2 s; the rest is for unpacking, on a machine that does other work.
assert report["seconds"] <= report["deadline_seconds"] + 30, report["seconds"]
done = [r for r in report["results"] if not r.get("cut_off") and "exit_code" in r]
cut = [r for r in report["results"] if r.get("cut_off")]
names = ", ".join(f"{name} {os.path.getsize(out + '/' + name)}" for name in files)
print(f"{os.path.basename(out)}: {report['seconds']} s of {report['deadline_seconds']} ({seconds:.1f} s with the start), exit code {code}, {len(done)} commands to their end, {len(cut)} cut off; {names}")
print(f"    {report['verdict']}")
PYTHON
}

rehearse() { # kind, name, parts with figures, `--`, options
    local kind=$1 name=$2 code=0 start=$EPOCHREALTIME figures=()
    shift 2
    while [[ $1 != -- ]]; do figures+=("$1"); shift; done
    shift
    local out=$work/$name
    mkdir "$out"
    "${check[@]}" --out "$out" "$@" >"$work/words" 2>&1 || code=$?
    judge "$out" "$code" "$kind" "$(awk "BEGIN { print $EPOCHREALTIME - $start }")" "${figures[@]}" || { cat "$work/words"; exit 1; }
}

# With a signal after some seconds.
interrupted() { # signal, seconds, kind, name
    local signal=$1 after=$2 kind=$3 out=$work/$4 code=0 start=$EPOCHREALTIME
    mkdir "$out"
    "${check[@]}" --out "$out" --deadline 48 >"$work/words" 2>&1 &
    local child=$!
    sleep "$after"
    kill "-$signal" "$child"
    wait "$child" || code=$?
    judge "$out" "$code" "$kind" "$(awk "BEGIN { print $EPOCHREALTIME - $start }")" || { cat "$work/words"; exit 1; }
}

du -sb "$programs"/*
scripts/host-gpu.sh true
rehearse whole to-the-deadline -- --deadline 48
# Eigendecompositions of LeNet-300-100 on the GPU on the host take minutes: last, and cut off.
with=(kernels)
! "$python" -c 'import torch' 2>/dev/null || with+=(torch torch_stack)
TORCH_DEVICE=cpu rehearse whole smallest-sizes "${with[@]}" lenet300 -- --deadline 240 --quick kernels torch torch_stack lenet300 stack
rehearse whole one-second -- --deadline 1
rehearse whole again -- --again ops::mix
interrupted TERM 12 whole stopped
interrupted KILL 20 killed killed
echo 'the check ends with a whole report and a verdict, whatever is cut off'
