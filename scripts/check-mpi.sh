#!/usr/bin/env bash
# Several processes by MPI on this machine: the steps of one process on any split of the rows, files on any number of processes, and what each
# rank says when one of them goes wrong. Needs mpirun and MPI's headers (apt-get install --no-install-recommends libopenmpi-dev openmpi-bin).
# Arguments go to cargo: with `--features nccl` what is built serves scripts/check-nccl.sh too.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(cargo test --features mpi --test mpi --no-run --message-format=json "$@" |
    python3 -c 'import json,sys
for line in sys.stdin:
    found = json.loads(line)
    if found.get("reason") == "compiler-artifact" and found["target"]["name"] == "mpi" and found.get("executable"):
        print(found["executable"])' | tail -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RAYON_NUM_THREADS=1 RUST_BACKTRACE=0

# OpenMPI 4's options for ranks of one machine; others do without.
mpi() {
    local ranks=$1
    shift
    timeout 100 mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$ranks" --mca btl self,vader \
        --mca btl_vader_single_copy_mechanism none --mca mpi_yield_when_idle 1 "$program" "$@"
}

for ranks in 2 4; do
    echo "-- equal, $ranks ranks"
    mpi "$ranks" equal
done

for ranks in 2 3; do
    echo "-- gradients in bfloat16, $ranks ranks"
    mpi "$ranks" bf16
done
echo "-- messages in pieces of 100 bytes"
mpi 3 pieces 100

echo "-- saved by 2, resumed by 1, 4 and 2"
mpi 2 train "$work/state" 0 5
mpi 1 train "$work/state" 5 5
mpi 4 train "$work/state" 10 5
mpi 2 train "$work/state" 15 5

# What must be said, and how often: by each of the three ranks, or by those that are left.
fault() {
    local name=$1 times=$2 sentence=$3 status=0 begun=$SECONDS
    mpi 3 "$name" >"$work/said" 2>&1 || status=$?
    local said
    said=$(grep -c "$sentence" "$work/said" || true)
    echo "-- $name: $said times within $((SECONDS - begun)) s: $(grep -m1 "$sentence" "$work/said" || true)"
    if [ "$status" = 0 ] || [ "$status" = 124 ] || [ "$said" -lt "$times" ]; then
        echo "status $status, expected \"$sentence\" $times times in:"
        cat "$work/said"
        exit 1
    fi
}
fault model 3 'says: kfac: share: rank 1 has Var fc1.bias .*, where rank 0 has Var conv.bias'
fault options 3 'says: kfac: share: rank 1 has damping Pi(0.5), where rank 0 has damping Eigenvalue'
fault seed 3 'says: kfac: share: rank 1 has fisher .*seed: 9'
fault nan 3 'says: .*rank 1: .*NaN'
fault call 3 'says: parallel: rank [01] is in [a-z]* of kfac after 2 steps'
fault leave 2 'says: parallel: rank 1 has left'
fault hang 2 'parallel: rank 1 did not come within 3 s'
# mpirun itself ends the others, and says whose fault it was.
fault die 1 'process rank 1 .*exited on signal 9'
fault exit 1 'Process name: .*,1]'
echo "-- the example programs: the same losses on 1 and 3 processes, files of rank 0 alone"
cargo build --features mpi --example mnist --example finetune "$@"
examples=$(dirname "$program")/../examples
run() {
    local ranks=$1 name=$2
    shift 2
    program=$examples/$name mpi "$ranks" "$@"
}
for ranks in 1 3; do
    run "$ranks" mnist --device cpu --optimizer kldwrm --model cnn --dtype f64 --batch 61 --steps 6 --dropout 0.2 --placement gathered \
        --log "$work/mnist-$ranks" --out "$work/$ranks" >"$work/said-$ranks"
    run "$ranks" finetune --device cpu --scratch --optimizer adamw --model mlp:784-20-10:tanh --dtype f64 --batch 61 --epochs 1 --clip 0.5 \
        --out "$work/$ranks" >>"$work/said-$ranks"
    test -s "$work/$ranks/curves.svg" && test -s "$work/$ranks/model.safetensors" && test -s "$work/$ranks/finetune.svg"
done
# Of several processes one speaks.
test "$(grep -c '^curves:' "$work/said-3")" = 2
python3 scripts/same-losses.py "$work/mnist-1" "$work/mnist-3" 6
echo "all that was expected"
