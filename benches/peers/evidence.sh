#!/usr/bin/env bash
# Gradients of the evidence by the hyperparameters beside PyTorch and laplace-torch on this machine, as tables. A python with torch and
# laplace-torch is in $PYTHON (default: python3); the program is built in profile $PROFILE (default: release).
#   benches/peers/evidence.sh DATA_DIR [SECONDS]
# SECONDS is what the repeats of one figure take. The programs run in turn, with one thread and with two.
set -euo pipefail
data=$(realpath "${1:?the folder with the IDX files of MNIST}")
seconds=${2:-5} python=${PYTHON:-python3} profile=${PROFILE:-release}
cd "$(dirname "$0")/../.."
ours=$(cargo build --profile "$profile" --bench evidence --message-format=json |
    sed -n 's/.*"name":"evidence".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for threads in 1 2; do
    export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads
    "$ours" --threads "$threads" speed --data-dir "$data" --seconds "$seconds" --save "$work" --json "$work/ours$threads" >&2
    "$python" -W ignore benches/peers/torch_marglik.py --data-dir "$data" --nets "$work" --threads "$threads" \
        --seconds "$seconds" --check "$work/ours$threads" --json "$work/torch$threads" >&2
done
for threads in 1 2; do
    "$python" - "$work/ours$threads" "$work/torch$threads" <<'TEXT'
import json
import sys

ours, torch = (json.load(open(name)) for name in sys.argv[1:])
print(f"\n{ours['threads']} thread(s), PyTorch {torch['torch']}: ms computed (and passed, the median) a gradient\n")
print("| net | estimate | kronwake | PyTorch, analytic | PyTorch, autograd | laplace-torch | times faster |")
print("|---|---|---|---|---|---|---|")


def shown(figure):
    return f"{1e3 * figure['computed_seconds']:.1f} ({1e3 * figure['median_seconds']:.1f})" if figure else "-"


for figure in ours["figures"]:
    if figure["estimator"] == "check":
        continue
    same = {f["how"]: f for f in torch["figures"] if all(f[k] == figure[k] for k in ("net", "estimator"))}
    peers = [same.get(how) for how in ("analytic", "autograd", "laplace-torch")]
    ratios = [f"{p['computed_seconds'] / figure['computed_seconds']:.1f}" for p in peers if p]
    print(f"| {figure['net']} | {figure['estimator']} | {shown(figure)} | {' | '.join(map(shown, peers))} | {', '.join(ratios) or '-'} |")
TEXT
done
