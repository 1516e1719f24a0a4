#!/bin/sh
# Builds the programs that the test machine and the scenarios run, where build.sh and the harness look for them.
set -eu
. "$(dirname "$0")/lib.sh"

cd "$root"
export CARGO_TARGET_DIR="$target"
cargo build --quiet --profile boot -p kcrypt-discovery-challenger
cargo build --quiet --release -p latchkey -p latchkey-kms
cargo build --quiet --release -p latchkey-tests --bin latchkey-guest-report
