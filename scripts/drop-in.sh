#!/usr/bin/env bash
# Builds candle-transformers' own model files on kronwake::nn: a copy of its source in which every file that names candle_nn has one more
# line, `use kronwake::nn as candle_nn;`. Prints the modules that do not compile and why, and how many variables of some models get a
# gradient (drop-in/gradients.rs). Then trains two models by their gradients alone (drop-in/untapped.rs). Fails if a gradient is missing.
#
#     scripts/drop-in.sh        # needs the crates of candle-transformers, from the registry or cargo's cache of it
#
# $KRONWAKE_DROP_IN_DIR is where the copy is made and built (~/.cache/kronwake/drop-in); $CARGO_TARGET_DIR, as everywhere, where cargo builds.
set -euo pipefail

version=0.11.1
root=$(cd "$(dirname "$0")/.." && pwd)
work=${KRONWAKE_DROP_IN_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kronwake/drop-in}
crate=$work/crate
mkdir -p "$crate/src" "$work/fetch/src"

source_of() {
    find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -type d -name "candle-transformers-$version" 2>/dev/null | head -n 1
}
original=$(source_of)
if [[ -z $original ]]; then
    printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\ncandle-transformers = "=%s"\n[workspace]\n' \
        "$version" >"$work/fetch/Cargo.toml"
    : >"$work/fetch/src/lib.rs"
    (cd "$work/fetch" && cargo fetch)
    original=$(source_of)
fi
[[ -n $original ]] || { echo "drop-in: the source of candle-transformers $version is not to be had" >&2; exit 1; }

# A fresh copy; files that come out as they were keep their time, so that cargo builds what has changed.
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
cp -R "$original/src/." "$fresh"
chmod -R u+w "$fresh"
mkdir -p "$fresh/bin"
changed=0
while IFS= read -r file; do
    if grep -qE '^(pub )?use candle_nn;' "$file"; then
        sed -i -E 's/^(pub )?use candle_nn;/\1use kronwake::nn as candle_nn;/' "$file"
    else
        # Before the first line that is neither blank nor a comment nor an attribute of the file.
        awk '!done && !/^(\/\/|#!|[[:space:]]*$)/ { print "use kronwake::nn as candle_nn;"; done = 1 } { print }' "$file" >"$file.new"
        mv "$file.new" "$file"
    fi
    changed=$((changed + 1))
done < <(grep -rl --include='*.rs' candle_nn "$fresh")
cp "$root"/scripts/drop-in/*.rs "$fresh/bin"

cat >"$crate/Cargo.toml" <<TOML
[package]
name = "drop-in"
version = "0.0.0"
edition = "2021"
publish = false

[lib]
name = "candle_transformers"

[dependencies]
candle = { package = "candle-core", version = "0.11" }
kronwake = { path = "$root" }
byteorder = "1"
fancy-regex = "0.19"
num-traits = "0.2"
rand = "0.9"
rayon = "1"
serde = { version = "1", features = ["derive"] }
serde_json = "1"
serde_plain = "1"
tracing = "0.1"

[lints.rust]
warnings = "allow"

[workspace]

[profile.dev]
opt-level = 1
debug = false

[profile.dev.package.kronwake]
opt-level = 3
TOML
[[ -e $crate/Cargo.lock ]] || cp "$root/Cargo.lock" "$crate/Cargo.lock"

install_copy() {
    (cd "$crate/src" && find . -type f) | while IFS= read -r file; do [[ -e $fresh/$file ]] || rm "$crate/src/$file"; done
    (cd "$fresh" && find . -type f) | while IFS= read -r file; do
        cmp -s "$fresh/$file" "$crate/src/$file" || { mkdir -p "$(dirname "$crate/src/$file")"; cp "$fresh/$file" "$crate/src/$file"; }
    done
}

# Modules with an error are taken out, one round after another: an error can hide others.
install_copy
modules=$(grep -c '^pub mod' "$fresh/models/mod.rs")
left_out=()
while ! (cd "$crate" && cargo check --quiet --lib --message-format short 2>"$work/errors"); do
    broken=$(grep -oE '^src/models/[a-z0-9_]+[^ ]* error.*' "$work/errors" | sed -E 's|^src/models/([a-z0-9_]+).*|\1|' | sort -u)
    [[ -n $broken ]] || { cat "$work/errors" >&2; exit 1; }
    for module in $broken; do
        left_out+=("$module: $(grep -m 1 -E "^src/models/$module[/.].* error" "$work/errors")")
        sed -i -E "s/^pub mod $module;//" "$fresh/models/mod.rs"
    done
    install_copy
done
echo "$changed files with one line changed; $((modules - ${#left_out[@]})) of $modules modules of models compile"
[[ ${#left_out[@]} == 0 ]] || printf 'does not compile: %s\n' "${left_out[@]}"

(cd "$crate" && cargo run --quiet --bin gradients && cargo run --quiet --bin untapped)
