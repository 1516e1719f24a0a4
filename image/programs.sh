#!/bin/sh
# Builds the programs that the test machine and the scenarios run, where build.sh and the harness look for them.
set -eu
. "$(dirname "$0")/lib.sh"

cd "$root"
# Called from a test, this has what cargo tells tests in its environment; build scripts look at some of it, and would have
# everything built anew each time.
for v in $(env | sed -n 's/^\(CARGO_[A-Z0-9_]*\)=.*/\1/p'); do
    case $v in
    CARGO_PKG_* | CARGO_MANIFEST_* | CARGO_BIN_* | CARGO_CRATE_* | CARGO_PRIMARY_*) unset "$v" ;;
    esac
done
export CARGO_TARGET_DIR="$target"
cargo build --profile boot -p kcrypt-discovery-challenger
cargo build --release -p latchkey -p latchkey-kms
cargo build --release -p latchkey-tests --bin latchkey-guest-report
