#!/bin/sh
# initramfs.sh PROGRAM : prints the path of the fast initramfs around the unlock program PROGRAM.
#
# No dracut, no udev, no systemd: busybox, a handful of modules and the program. It is what most scenarios boot with,
# since it takes five seconds under emulation where dracut takes fifteen; dracut's own images are made in dracut/.
set -eu
. "$(dirname "$0")/lib.sh"

program=${1:?usage: initramfs.sh PROGRAM}
[ -x "$program" ] || die "no program at $program: build it first (image/programs.sh)"
kernel=$("$here/kernel.sh")
version=$(cat "$kernel/version")
modules="virtio_pci virtio_net virtio_blk dm_crypt xts aesni_intel ext4"
# Loaded by dlopen, so ldd does not show it.
tcti=$(ldconfig -p | sed -n 's/.* => \(.*libtss2-tcti-device\.so\.0\)$/\1/p' | head -n 1)
[ -n "$tcti" ] || die "libtss2-tcti-device.so.0 is not installed: run image/setup.sh"
gcc_s=$(ldconfig -p | sed -n 's/.* => \(.*libgcc_s\.so\.1\)$/\1/p' | head -n 1)

# with_libraries DIR FILE : FILE and the libraries it is linked to, at the same paths below DIR.
with_libraries() {
    {
        echo "$2"
        ldd "$2" 2>/dev/null | grep -o '/[^ )]*' || true
    } | while read -r f; do
        [ -e "$1$f" ] || install -D -m755 "$f" "$1$f"
    done
}

build() {
    tree=$1.tree
    rm -rf "$tree"
    mkdir -p "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/run" "$tree/sysroot" "$tree/tmp" "$tree/etc" "$tree/usr/bin" "$tree/modules"
    cp /bin/busybox "$tree/bin/busybox"
    for applet in sh mount umount insmod udhcpc switch_root ip cat mkdir sleep poweroff sync dmesg tail printf seq; do
        ln -s busybox "$tree/bin/$applet"
    done
    install -m755 "$program" "$tree/usr/bin/kcrypt-discovery-challenger"
    ldd "$program" | grep -o '/[^ )]*' | while read -r f; do with_libraries "$tree" "$f"; done
    with_libraries "$tree" "$tcti"
    with_libraries "$tree" "$gcc_s"
    for m in $modules; do
        modprobe -d "$kernel" -S "$version" -D "$m" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r f; do
        cp "$f" "$tree/modules/"
        echo "${f##*/}" >>"$tree/modules/order"
    done
    install -m755 "$here/initramfs/init" "$tree/init"
    install -m755 "$here/initramfs/udhcpc" "$tree/udhcpc"
    (cd "$tree" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) | zstd -3 -q >"$1"
    rm -rf "$tree"
}

cached initramfs "$(key "in $kernel" "$program" "$tcti" "$here/initramfs/init" "$here/initramfs/udhcpc" "$here/initramfs.sh" /bin/busybox)" .img build
echo "$product"
