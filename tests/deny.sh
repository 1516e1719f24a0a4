#!/bin/sh
# Runs cargo-deny over licences, bans and sources, from target/tools, where it is built once.
set -eu
cd "$(dirname "$0")/.."
tool=target/tools/bin/cargo-deny
if [ ! -x "$tool" ]; then
    echo "deny: building cargo-deny, about two minutes, once"
    cargo install --quiet --locked --root target/tools --target-dir target/tools/build cargo-deny
    rm -rf target/tools/build
fi
"$tool" --locked check --hide-inclusion-graph bans licenses sources
