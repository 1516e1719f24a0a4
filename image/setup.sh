#!/bin/sh
# Installs what building, testing and the demo need on Debian 12, as root or with sudo. Costs nothing when all is there.
#
# setup.sh bench : also what the benchmark compares with (clevis, tang).
#
# dracut comes as dracut-core, which has no hooks: the package `dracut` would replace the host's own initramfs.
set -eu

packages="
    ca-certificates pkg-config gcc g++ libc6-dev libclang-dev libtss2-dev libcryptsetup-dev
    qemu-system-x86 seabios swtpm swtpm-tools tpm2-tools openssl make
    mmdebstrap fakeroot uidmap busybox-static kmod cpio zstd
    fdisk e2fsprogs cryptsetup-bin dosfstools mtools grub-pc-bin grub-common
    dracut-core dracut-network systemd systemd-sysv udev dbus dmsetup procps
    iproute2 wireguard-tools wireguard-go util-linux"
if [ "${1:-}" = bench ]; then
    packages="$packages clevis clevis-tpm2 clevis-luks tang jq socat curl strace time"
fi

missing=
for p in $packages; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing="$missing $p"
done
if [ -n "$missing" ]; then
    echo "setup.sh: installing$missing"
    if [ "$(id -u)" = 0 ]; then as_root=; else as_root=sudo; fi
    $as_root apt-get update -q
    # shellcheck disable=SC2086 # lists of words
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
elif [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -print -quit 2>/dev/null)" ]; then
    # The kernel and the root file system are fetched by apt, which needs its lists.
    if [ "$(id -u)" = 0 ]; then apt-get update -q; else sudo apt-get update -q; fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup.sh: no cargo on the PATH: install a Rust toolchain, 1.89 or newer" >&2
    exit 1
fi
