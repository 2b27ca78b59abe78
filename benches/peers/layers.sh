#!/usr/bin/env bash
# Training steps of whole models from this crate's layers, from candle's and in PyTorch, in turn, as a table on standard output. A python with torch is
# in $PYTHON (default: python3), the program of `cargo bench --bench layers` in $LAYERS (default: it is built).
#   benches/peers/layers.sh [ROUNDS [STEPS]]
set -euo pipefail
rounds=${1:-3} steps=${2:-5}
python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
if [ -z "${LAYERS:-}" ]; then
    LAYERS=$(cargo bench -p kronwake-benches --bench layers --no-run --message-format=json |
        "$python" -c 'import json, sys; print([x for x in (json.loads(l).get("executable") for l in sys.stdin) if x][-1])')
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for threads in 1 2; do
    export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads CANDLE_NUM_THREADS=$threads
    for model in minilm bert2 decoder; do
        for round in $(seq "$rounds"); do
            "$python" benches/peers/torch_layers.py $model --threads "$threads" --steps "$steps" >>"$work/$threads.$model.PyTorch" 2>>"$work/errors"
            for side in kronwake candle; do
                "$LAYERS" $model $side --threads "$threads" --steps "$steps" >>"$work/$threads.$model.$side"
            done
            echo "$threads threads, $model, round $round of $rounds" >&2
        done
    done
done
"$python" - "$work" <<'TEXT'
import json, pathlib, statistics, sys

print("| model | threads | program | CPU ms | of PyTorch's | wall ms | forward | backward | update |")
print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
for model in ["minilm", "bert2", "decoder"]:
    for threads in [1, 2]:
        base = None
        for side in ["PyTorch", "kronwake", "candle"]:
            path = pathlib.Path(sys.argv[1]) / f"{threads}.{model}.{side}"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            cpu, wall, forward, backward, update = (
                1e3 * statistics.median(row[key] for row in rows) for key in ["cpu", "wall", "forward", "backward", "update"]
            )
            base = base or cpu
            print(f"| {model} | {threads} | {side} | {cpu:.0f} | {cpu / base:.2f} | {wall:.0f} | {forward:.0f} | {backward:.0f} | {update:.0f} |")
TEXT
