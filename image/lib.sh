# shellcheck shell=sh disable=SC2034
# What the image scripts share: where products go, and a cache in which each product is named by a hash of its inputs.
#
# Sourced, after `set -eu`, by the scripts beside it. A product, once there, is complete and never changes, so that
# several callers may build and boot at the same time.

here=${here:-$(cd "$(dirname "$0")" && pwd)}
root=$(dirname "$here")
target=${LATCHKEY_TARGET:-$root/target}
out=$target/image
mkdir -p "$out"

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# key TEXT... : 16 hex digits over the texts, and over the content of those that are files.
key() {
    for k_part in "$@"; do
        if [ -f "$k_part" ]; then sha256sum <"$k_part"; else echo "$k_part"; fi
    done | sha256sum | cut -c1-16
}

# cached NAME KEY SUFFIX FUNCTION : sets $product to the file or folder NAME-KEY.SUFFIX. FUNCTION is called with the name
# of a path to fill when it is not there yet.
cached() {
    product=$out/$1-$2$3
    if [ ! -e "$product" ]; then
        # The lock is per kind of product: a second caller with the same need waits and then finds it done.
        exec 9>"$out/.$1.lock"
        flock 9
        if [ ! -e "$product" ]; then
            echo "${0##*/}: making ${product#"$root"/}" >&2
            c_tmp=$out/.tmp-$1-$$
            rm -rf "$c_tmp"
            "$4" "$c_tmp" >&2
            mv "$c_tmp" "$product"
        fi
        exec 9>&-
    fi
    touch -c "$product"
    # Products of earlier inputs that nobody has asked for during three hours.
    find "$out" -maxdepth 1 -name "$1-????????????????$3" -mmin +180 ! -path "$product" -exec rm -rf {} +
}

# as_root COMMAND... : file owners as root sees them, whoever runs this; needed where a file system is made from a folder.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else fakeroot -- "$@"; fi
}

# The partitions of the test disk, bytes. COS_PERSISTENT's file system is smaller than its partition (see the harness), as
# encrypting in place needs room for the LUKS2 header.
MIB=1048576
GRUB_START=$((1 * MIB)) GRUB_SIZE=$((1 * MIB))
STATE_START=$((2 * MIB)) STATE_SIZE=$((384 * MIB))
OEM_START=$((386 * MIB)) OEM_SIZE=$((8 * MIB))
PERSISTENT_START=$((394 * MIB)) PERSISTENT_SIZE=$((96 * MIB))
DISK_SIZE=$((491 * MIB))
