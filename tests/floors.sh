#!/bin/sh
# Which crate may know which: the house's floors, checked on the resolved dependencies and, for the lowest, in its source.
set -eu
cd "$(dirname "$0")/.."
status=0

bad() {
    echo "floors: $*" >&2
    status=1
}

# The crates of a program, without what only its tests need.
tree() {
    cargo tree --quiet --locked --package "$1" --edges normal,build --target all --prefix none --format '{p}' | sed 's/ .*//' | sort -u
}

forbid() {
    crate=$1
    shift
    have=$(tree "$crate")
    for name in "$@"; do
        if printf '%s\n' "$have" | grep -qx "$name"; then
            bad "$crate must not reach $name: $(cargo tree --quiet --package "$crate" --edges normal,build --invert "$name" --prefix none | head -n 4 | tr '\n' ' ')"
        fi
    done
}

only() {
    crate=$1
    shift
    for ours in $(tree "$crate" | grep '^latchkey\|^kcrypt' | grep -vx "$crate"); do
        case " $* " in
            *" $ours "*) ;;
            *) bad "$crate must not rest on $ours" ;;
        esac
    done
}

runtimes="tokio async-std smol async-executor futures-executor mio hyper reqwest axum actix-web kube async-nats nats"
only latchkey-wire
only latchkey-tpm latchkey-wire
only latchkey-config latchkey-wire
only kcrypt-discovery-challenger latchkey-wire latchkey-tpm latchkey-config
only latchkey-kms latchkey-wire
only latchkey latchkey-wire latchkey-config
# shellcheck disable=SC2086 # a list of words
forbid kcrypt-discovery-challenger $runtimes aws-lc-rs clap curve25519-dalek ed25519-dalek
forbid latchkey-kms tss-esapi tss-esapi-sys libcryptsetup-rs
forbid latchkey tss-esapi tss-esapi-sys libcryptsetup-rs

if grep -rnE 'std::(fs|net|env|process|os)|SystemTime|Instant' src/wire/src; then
    bad "wire opens no file, knows no network and reads no clock"
fi
# `unlock` and what it calls start no program; `encrypt --new` alone may call mkfs.
if grep -rnE 'process::Command|Command::new' src/boot/src src/tpm/src src/config/src src/wire/src | grep -v '^src/boot/src/encrypt/fresh.rs' | grep -v 'mod tests' | grep -vE '^src/boot/src/gpt.rs'; then
    bad "only src/boot/src/encrypt/fresh.rs may start a program"
fi
[ $status = 0 ] && echo "floors: every crate rests on what it may"
exit $status
