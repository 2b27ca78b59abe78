#!/usr/bin/env bash
# Runs candle-nn's own test files on kronwake::nn: copies of them, from the registry, in which each has one more line,
# `use kronwake::nn as candle_nn;`. What is of other devices, and what only measures, is left out, and one test that trains a batch norm
# on a single value. Fails if a test fails.
#
#     scripts/candle-tests.sh        # needs the crates of candle-nn's tests, from the registry or cargo's cache of it
#
# $KRONWAKE_CANDLE_TESTS_DIR is where the copies are made and built (~/.cache/kronwake/candle-tests); $CARGO_TARGET_DIR, as everywhere,
# where cargo builds.
set -euo pipefail

version=0.11.1
root=$(cd "$(dirname "$0")/.." && pwd)
work=${KRONWAKE_CANDLE_TESTS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kronwake/candle-tests}
mkdir -p "$work/src" "$work/tests"
: >"$work/src/lib.rs"

cat >"$work/Cargo.toml" <<TOML
[package]
name = "candle-tests"
version = "0.0.0"
edition = "2021"
publish = false

[dependencies]
anyhow = "1"
candle = { package = "candle-core", version = "0.11" }
candle-nn = "=$version" # whose source the tests are taken of
kronwake = { path = "$root" }
rand = "0.9"
rand_distr = "0.5"

[features]
accelerate = []
cuda = []
metal = []
mkl = []

[lints.rust]
warnings = "allow"

[workspace]

[profile.dev.package."*"]
opt-level = 3
debug = false

[profile.dev.package.kronwake]
opt-level = ${CARGO_PROFILE_DEV_OPT_LEVEL:-2}
TOML
[[ -e $work/Cargo.lock ]] || cp "$root/Cargo.lock" "$work/Cargo.lock"
(cd "$work" && cargo fetch --quiet)
original=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -type d -name "candle-nn-$version" | head -n 1)
[[ -n $original ]] || { echo "candle-tests: the source of candle-nn $version is not to be had" >&2; exit 1; }

rm -f "$work"/tests/*.rs
for file in "$original"/tests/*.rs; do
    case $(basename "$file") in
    cutile_moe.rs | bf16_conv_bench.rs) continue ;;
    esac
    # Before the first line that is neither blank nor a comment nor an attribute of the file; within modules that name it too.
    awk '
        !done && !/^(\/\/|#!|[[:space:]]*$)/ && !block { print "use kronwake::nn as candle_nn;"; done = 1 }
        /^\/\*/ { block = 1 }
        /\*\/[[:space:]]*$/ { block = 0 }
        { print }
        /^mod .*\{$/ { print "    use kronwake::nn as candle_nn;" }
    ' "$file" >"$work/tests/$(basename "$file")"
done
# That one trains a batch norm on a single value, which kronwake's refuses as PyTorch's does.
(cd "$work" && cargo test --no-fail-fast --tests -- --skip train_batch_norm)
