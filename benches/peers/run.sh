#!/usr/bin/env bash
# The example `mnist` beside plain PyTorch on this machine: seconds of training an epoch, as a table in
# benches/results/peers.md. A python with torch is in $PYTHON (default: python3).
#   benches/peers/run.sh DATA_DIR [REPEATS [EPOCHS]]
# All programs train the CNN with dropout on batches of 512 in f32, with curvature every 30 steps, in turn, REPEATS times
# over; nothing else should run meanwhile.
set -euo pipefail
data=$(realpath "${1:?the folder with the IDX files of MNIST}")
repeats=${2:-5} epochs=${3:-3} batch=512 period=30
python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
cargo build --release --example mnist
mnist=${CARGO_TARGET_DIR:-target}/release/examples/mnist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

torch() { # name, optimizer, threads, repeat
    "$python" benches/peers/torch_cnn.py --data "$data" --optimizer "$2" --threads "$3" --epochs "$epochs" \
        --batch "$batch" --period "$period" --seed "$4" >"$work/PyTorch $1.$3.$4.jsonl"
}

ours() { # name, optimizer, threads, repeat, further options
    "$mnist" --data-dir "$data" --optimizer "$2" --threads "$3" --epochs "$epochs" --batch "$batch" --dropout 0.5 \
        --seed "$4" --out "$work" --log "$work/kronwake $1.$3.$4.jsonl" "${@:5}" >"$work/output" 2>&1 || {
        cat "$work/output"
        exit 1
    }
}

curvature=(--factor-every "$period" --inverse-every "$period")
for repeat in $(seq "$repeats"); do
    for threads in 1 2; do
        torch Adam adam "$threads" "$repeat"
        ours AdamW adamw "$threads" "$repeat"
        torch K-FAC kfac "$threads" "$repeat"
        ours K-FAC kfac "$threads" "$repeat" "${curvature[@]}"
        ours SO so "$threads" "$repeat" "${curvature[@]}"
        ours Q q "$threads" "$repeat" "${curvature[@]}"
        ours QE qe "$threads" "$repeat" "${curvature[@]}"
        ours KLD-WRM kldwrm "$threads" "$repeat" "${curvature[@]}"
    done
    echo "round $repeat of $repeats" >&2
done

{
    cat <<TEXT
# Beside PyTorch

\`benches/peers/run.sh\`, $(LC_ALL=C date '+%-d %B %Y'), $(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1),
$("$python" -c 'import torch; print("PyTorch", torch.__version__)'), $(rustc --version | cut -d' ' -f1,2): seconds of training an epoch of MNIST (60,000 images), the CNN of 4,712
parameters with dropout 0.5, batch $batch, f32, factors and inverses every $period steps; $repeats rounds of $epochs epochs, the programs
in turn. PyTorch's programs are \`benches/peers/torch_cnn.py\`. The accuracies say that the programs learn, no more:
nothing was tuned for $epochs epochs.

TEXT
    "$python" benches/peers/table.py "$work"
} >"$work/table"
mv "$work/table" benches/results/peers.md
cat benches/results/peers.md
