#!/bin/sh
# root.sh LATCHKEY KCRYPT REPORT : prints the path of the root image, ext4, labelled COS_STATE.
#
# LATCHKEY, KCRYPT: the programs `latchkey` and `kcrypt-discovery-challenger`; REPORT: `latchkey-guest-report`, which tells
# the harness what the booted machine looks like. The image is made from a folder by mkfs.ext4: no loop device, no mount.
set -eu
. "$(dirname "$0")/lib.sh"

latchkey=${1:?usage: root.sh LATCHKEY KCRYPT REPORT}
kcrypt=${2:?usage: root.sh LATCHKEY KCRYPT REPORT}
report=${3:?usage: root.sh LATCHKEY KCRYPT REPORT}
for f in "$latchkey" "$kcrypt" "$report"; do
    [ -x "$f" ] || die "no program at $f: build it first (image/programs.sh)"
done
rootfs=$("$here/rootfs.sh")
kernel=$("$here/kernel.sh")
unit=${LATCHKEY_UNIT:-$root/systemd/latchkey.service}
[ -f "$unit" ] || die "no unit at $unit"

build() {
    # The tree's files belong to root, whoever runs this.
    as_root "$here/root/make" "$1" "$rootfs" "$kernel" "$latchkey" "$kcrypt" "$report" "$unit"
}

cached root "$(key "in $rootfs $kernel" "$latchkey" "$kcrypt" "$report" "$unit" "$here/root.sh" "$here"/root/*)" .img build
echo "$product"
