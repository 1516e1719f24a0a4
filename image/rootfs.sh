#!/bin/sh
# Prints the path of a tar of the root file system: Debian bookworm, as small as the test machine can be.
#
# Nothing of the project is in it, so that it is made once and kept.
set -eu
. "$(dirname "$0")/lib.sh"

# The libraries are what kcrypt-discovery-challenger is linked to; the TCTI is loaded at run time. wireguard-go is for the mesh
# where the kernel module is missing.
packages=systemd,systemd-sysv,udev,kmod,iproute2,iputils-ping,wireguard-tools,wireguard-go,dmsetup,libcryptsetup12
packages=$packages,libtss2-esys-3.0.2-0,libtss2-mu0,libtss2-tctildr0,libtss2-tcti-device0,libgcc-s1

bootstrap() {
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt=path-exclude=/usr/share/doc/* --dpkgopt=path-exclude=/usr/share/man/* \
        --dpkgopt=path-exclude=/usr/share/locale/* --dpkgopt=path-exclude=/usr/share/info/* \
        --format=tar bookworm "$1"
}

cached rootfs "$(key "$packages" "$here/rootfs.sh")" .tar bootstrap
echo "$product"
