#!/bin/sh
# Runs libFuzzer on each target (or on those named) for a number of seconds, without cargo-fuzz and on a stable compiler.
#
# run.sh SECONDS [TARGET...]. What is found lies in target/fuzz/artifacts; once fixed, it is kept in fuzz/regressions/TARGET.
# The corpus grows in target/fuzz/corpus. The same flags as `cargo fuzz run --sanitizer none`: the code is safe Rust, whose
# panics and overflow checks tell what a sanitizer would.
set -eu
cd "$(dirname "$0")/.."
seconds=$1
shift

out=$PWD/target/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
# With --target the flags are for the programs and not for build scripts.
RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table" \
    CARGO_TARGET_DIR="$out/build" \
    "${CARGO:-cargo}" build --quiet --release --manifest-path fuzz/Cargo.toml --target "$host"
programs=$out/build/$host/release
"${CARGO:-cargo}" run --quiet --locked -p latchkey-fuzz-targets --bin seeds "$out/corpus"

if [ $# = 0 ]; then
    for file in fuzz/fuzz_targets/*.rs; do set -- "$@" "$(basename "$file" .rs)"; done
fi
status=0
for target; do
    mkdir -p "$out/artifacts/$target" "$out/corpus/$target" "fuzz/regressions/$target"
    log=$out/$target.log
    dictionary=
    [ ! -e "fuzz/dictionaries/$target.dict" ] || dictionary=-dict=fuzz/dictionaries/$target.dict
    # No leak check: it is the sanitizer's. A message is at most 64 KiB, a file may be longer, and says nothing new.
    if "$programs/$target" "$out/corpus/$target" "fuzz/regressions/$target" -max_total_time="$seconds" -max_len=8192 \
        -timeout=25 ${dictionary:+"$dictionary"} -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix="$out/artifacts/$target/" > "$log" 2>&1
    then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        covered=$(sed -n 's/.*cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
        echo "fuzz: $target: $runs inputs, $covered edges, nothing found"
    else
        status=1
        echo "fuzz: $target FAILED, see $log" >&2
        tail -n 30 "$log" >&2
    fi
    rmdir --ignore-fail-on-non-empty "fuzz/regressions/$target"
done
exit $status
