#!/bin/sh
# Prints the folder of the newest cloud kernel of the distribution: `vmlinuz`, `version`, `lib/modules/VERSION`.
#
# The package is unpacked, not installed: installing a kernel would make initial ramdisks for the host. The cloud flavour
# has tpm_tis, tpm_crb and ext4 built in and starts three seconds sooner under emulation than the generic one.
set -eu
. "$(dirname "$0")/lib.sh"

meta=linux-image-cloud-$(dpkg --print-architecture)

# The package that the meta package depends on, and its version: "NAME VERSION".
newest() {
    apt-cache show --no-all-versions "$meta" 2>/dev/null |
        sed -n 's/^Depends:.*\(linux-image-[^ ,]*\) (= \([^)]*\)).*/\1 \2/p' | head -n 1
}

unpack() {
    mkdir -p "$1/deb" "$1/tree"
    (
        cd "$1/deb"
        apt-get -o APT::Sandbox::User="$(id -un)" download -q "$package=$version"
        dpkg -x ./*.deb ../tree
    )
    v=${package#linux-image-}
    mv "$1/tree/boot/vmlinuz-$v" "$1/vmlinuz"
    mv "$1/tree/lib" "$1/lib"
    depmod -b "$1" "$v"
    echo "$v" >"$1/version"
    rm -rf "$1/deb" "$1/tree"
}

# Asking apt takes half a second: its answer holds as long as its lists stay as they are.
answer=$out/kernel-newest
if [ -s "$answer" ] && [ -n "$(find "$answer" -newer /var/lib/apt/lists)" ]; then
    name=$(cat "$answer")
else
    name=$(newest)
    echo "$name" >"$answer.$$"
    mv "$answer.$$" "$answer"
fi
if [ -z "$name" ]; then
    # No package lists on this machine: what was fetched earlier will do.
    cached=$(find "$out" -maxdepth 1 -name 'kernel-????????????????' -printf '%T@ %p\n' | sort -n | sed -n '$s/^[^ ]* //p')
    [ -n "$cached" ] || die "apt knows no package $meta: run image/setup.sh, or apt-get update"
    echo "$cached"
    exit 0
fi
package=${name% *}
version=${name#* }
cached kernel "$(key "$package" "$version" "layout 1")" "" unpack
echo "$product"
