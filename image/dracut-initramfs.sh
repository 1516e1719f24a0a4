#!/bin/sh
# dracut-initramfs.sh VARIANT [OUT] : prints the path of an initramfs that dracut made with dracut/50latchkey, OUT a copy.
#
# VARIANT   init           network back end
#   sysd-networkd    systemd        systemd-networkd
#   sysd-legacy      systemd        network-legacy (dhclient, shell)
#   sh-busybox       dracut's, ash  network-legacy
#   sh-dash, sh-bash the same with another shell
#
# The host's dracut runs with a folder of modules of its own, and on a kernel that is not installed, so that nothing of the
# host's is changed. From the environment, for tests of what goes wrong: LATCHKEY_KCRYPT, the program to take; LATCHKEY_KERNEL,
# a kernel folder as kernel.sh leaves it; LATCHKEY_WITHOUT=1, the same image without our module; LATCHKEY_BESIDE, a folder of
# further dracut modules, all of which are included.
set -eu
. "$(dirname "$0")/lib.sh"

variant=${1:?usage: dracut-initramfs.sh VARIANT [OUT]}
program=${LATCHKEY_KCRYPT-$target/boot/kcrypt-discovery-challenger}
kernel=${LATCHKEY_KERNEL:-$("$here/kernel.sh")}
version=$(cat "$kernel/version")
module=$root/dracut/50latchkey
beside=${LATCHKEY_BESIDE:-}
dracut=${dracutbasedir:-/usr/lib/dracut}
[ -d "$dracut/modules.d" ] || die "dracut is not installed: run image/setup.sh"

systemd="bash systemd systemd-initrd systemd-udevd systemd-journald systemd-modules-load systemd-sysctl systemd-tmpfiles \
systemd-sysusers dracut-systemd shutdown"
case $variant in
sysd-networkd) modules="$systemd dbus dbus-daemon systemd-networkd" ;;
sysd-legacy) modules="$systemd network-legacy" ;;
sh-busybox) modules="busybox network-legacy" ;;
sh-dash) modules="dash network-legacy" ;;
sh-bash) modules="bash network-legacy" ;;
*) die "no variant $variant" ;;
esac
modules="$modules base fs-lib rootfs-block udev-rules"
# `network` by name only without ours, which depends on it.
if [ -n "${LATCHKEY_WITHOUT:-}" ]; then modules="$modules network"; else modules="$modules latchkey"; fi
for m in ${beside:+"$beside"/*}; do modules="$modules ${m##*/[0-9][0-9]}"; done

build() {
    work=$1.work
    rm -rf "$work"
    mkdir -p "$work/dracut/modules.d" "$work/conf" "$work/tmp"
    # dracut takes its own files and all modules from one folder.
    for f in "$dracut"/*; do
        [ "${f##*/}" = modules.d ] || ln -s "$f" "$work/dracut/"
    done
    ln -s "$dracut"/modules.d/* "$module" ${beside:+"$beside"/*} "$work/dracut/modules.d/"
    # Not hostonly: that would look at this machine. The drivers are those of the test machine.
    dracutbasedir=$work/dracut latchkey_program=$program dracut --force --quiet \
        --conf /dev/null --confdir "$work/conf" --tmpdir "$work/tmp" \
        --kver "$version" --kmoddir "$kernel/lib/modules/$version" \
        --no-hostonly --no-hostonly-cmdline --no-early-microcode --nofscks --nomdadmconf --nolvmconf --reproducible \
        --strip --compress "zstd -3 -T0 -q" \
        --modules "$modules" --drivers "virtio_pci virtio_net virtio_blk ext4" \
        "$1" "$version" || {
        status=$?
        rm -rf "$work" "$1"
        return $status
    }
    rm -rf "$work"
}

cached "dracut-$variant" "$(key "$modules" "$kernel" "$program" "$(dpkg-query -W -f '${Version}' dracut-core systemd udev 2>/dev/null)" \
    "$module"/* "$here/dracut-initramfs.sh")" .img build
[ -z "${2:-}" ] || cp "$product" "$2"
echo "$product"
