#!/bin/sh
# Prints the path of a nats-server program: the distribution's, unpacked below target/image/tools.
#
# The package is unpacked, not installed: installing it would start a server on the user's machine. Fetched once; `make
# clean` takes it away.
set -eu
. "$(dirname "$0")/lib.sh"

program=$out/tools/nats-server

fetch() {
    work=$out/.tmp-nats-$$
    rm -rf "$work"
    mkdir -p "$work/deb" "$work/tree"
    (
        cd "$work/deb"
        apt-get -o APT::Sandbox::User="$(id -un)" download -q nats-server
        dpkg -x ./*.deb ../tree
    )
    mkdir -p "$out/tools"
    mv "$work/tree/usr/sbin/nats-server" "$program"
    rm -rf "$work"
}

if [ ! -x "$program" ]; then
    exec 9>"$out/.nats.lock"
    flock 9
    if [ ! -x "$program" ]; then
        echo "nats.sh: fetching nats-server" >&2
        fetch >&2
    fi
    exec 9>&-
fi
echo "$program"
