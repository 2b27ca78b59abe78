#!/usr/bin/env bash
# Several processes with a GPU on the host each, by a stand-in for NVIDIA's NCCL (tests/host_gpu/nccl.cpp): the steps of one process on any split of
# the rows, gradients in bfloat16, files on any number of processes, and what each rank says when one of them goes wrong. Needs what
# scripts/host-gpu.sh needs, and mpirun for the last checks, which are left out without it.
set -euo pipefail
cd "$(dirname "$0")/.."
features=nccl
command -v mpirun >/dev/null && features=nccl,mpi
program=$(cargo test --features "$features" --test nccl --no-run --message-format=json "$@" |
    python3 -c 'import json,sys
for line in sys.stdin:
    found = json.loads(line)
    if found.get("reason") == "compiler-artifact" and found["target"]["name"] == "nccl" and found.get("executable"):
        print(found["executable"])' | tail -1)
scripts/host-gpu.sh true
gpu=${CARGO_TARGET_DIR:-target}/host-gpu
# In a folder of its own, so that the library can be missing.
mkdir -p "$gpu/nccl"
ln -sf ../libhost_gpu.so "$gpu/nccl/libnccl.so.2"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RAYON_NUM_THREADS=1 RUST_BACKTRACE=0 KRONWAKE_HOST_NCCL=$work KRONWAKE_HOST_GPUS=3
export LD_LIBRARY_PATH="$gpu/nccl:$gpu:${LD_LIBRARY_PATH:-}"
# Below those that the system gives to sockets.
port=$((20000 + $$ % 10000))

# As torchrun does; what all have said is in $work/said. 1 where a rank fails.
ranks() {
    local size=$1 rank outcome=0 pids=()
    shift
    port=$((port + 1))
    for ((rank = 0; rank < size; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$size MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 100 "$@" >"$work/said.$rank" 2>&1 &
        pids+=($!)
    done
    for rank in "${!pids[@]}"; do wait "${pids[$rank]}" || outcome=1; done
    cat "$work"/said.[0-9] >"$work/said"
    rm "$work"/said.[0-9]
    return $outcome
}
well() {
    ranks "$@" || { cat "$work/said"; exit 1; }
    cat "$work/said"
}

for order in late early 7; do
    for size in 2 3; do
        echo "-- equal, $size ranks, order $order"
        KRONWAKE_HOST_GPU_ORDER=$order well "$size" "$program" equal
    done
done
echo "-- gradients in bfloat16"
for size in 2 3; do well "$size" "$program" bf16; done
echo "-- saved by 2, resumed by 3 and 1"
well 2 "$program" train "$work/state" 0 3
well 3 "$program" train "$work/state" 3 3
well 1 "$program" train "$work/state" 6 3

# What must be said, and how often: by each of the three ranks, or by those that are left.
fault() {
    local name=$1 times=$2 sentence=$3 status=0 begun=$SECONDS said
    ranks 3 "$program" "$name" || status=$?
    said=$(grep -c "$sentence" "$work/said" || true)
    echo "-- $name: $said times within $((SECONDS - begun)) s: $(grep -m1 "$sentence" "$work/said" || true)"
    if [ "$status" = 0 ] || [ "$said" -lt "$times" ]; then
        echo "status $status, expected \"$sentence\" $times times in:"
        cat "$work/said"
        exit 1
    fi
}
fault options 3 'says: kfac: share: rank 1 has damping Pi(0.5), where rank 0 has damping Eigenvalue'
fault seed 3 'says: kfac: share: rank 1 has fisher .*seed: 9'
fault nan 3 'says: .*rank 1: .*NaN'
fault leave 2 'says: parallel: rank 1 has left'
fault late 2 'says: .*rank 1 did not come within 3 s'
# In a group of messages, begun by all: killed, hanging, and with an error of the library.
for fault in die hang fail; do
    export KRONWAKE_HOST_NCCL_FAULT=$fault:1:9
    case $fault in
    die) fault within-$fault 2 'says: .*rank 1 has left' ;;
    hang) fault within-$fault 3 'says: .*NCCL: a message did not end within 3 s' ;;
    fail) fault within-$fault 1 'says: .*NCCL: a message: remote process exited' && fault within-$fault 2 'says: .*rank 1 has left' ;;
    esac
done
export KRONWAKE_HOST_NCCL_FAULT=fail:1:0
fault init 3 'says: rank 1: parallel: NCCL: the communicator: '
unset KRONWAKE_HOST_NCCL_FAULT
# Where a machine has the library none of it is missing.
known=$(PATH=$PATH:/sbin ldconfig -p 2>/dev/null || true)
[[ $known == *libnccl* ]] || (
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH#*:}
    unset VIRTUAL_ENV CONDA_PREFIX CUDA_HOME
    fault missing 3 'says: rank 0: parallel: NCCL: libnccl.so.2 was not found .*install'
)
export KRONWAKE_HOST_NCCL_VERSION=21403
fault old 3 'says: rank 0: parallel: NCCL: expected libnccl 2.18 or newer, got one of version 2.14'
unset KRONWAKE_HOST_NCCL_VERSION

mpi() {
    timeout 100 mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$1" --mca btl self,vader \
        --mca btl_vader_single_copy_mechanism none --mca mpi_yield_when_idle 1 "${@:2}"
}
if [ $features = nccl,mpi ]; then
    echo "-- processes that met by MPI"
    mpi 2 "$program" over-mpi
fi
echo "-- the example programs: the same losses on 1 and 2 processes, files of rank 0 alone"
cargo build --features "$features" --example mnist --example finetune "$@"
examples=$(dirname "$program")/../examples
for size in 1 2; do
    well "$size" "$examples/mnist" --optimizer kldwrm --model cnn --dtype f64 --batch 13 --steps 3 --placement gathered \
        --log "$work/mnist-$size" --out "$work/$size" >"$work/said-$size"
    well "$size" "$examples/finetune" --scratch --optimizer adamw --model mlp:784-20-10:tanh --dtype f64 --batch 61 --epochs 1 \
        --out "$work/$size" >>"$work/said-$size"
    test -s "$work/$size/curves.svg" && test -s "$work/$size/model.safetensors" && test -s "$work/$size/finetune.svg"
done
# Of several processes one speaks.
test "$(grep -c '^curves:' "$work/said-2")" = 2
python3 scripts/same-losses.py "$work/mnist-1" "$work/mnist-2" 3
echo "all that was expected"
