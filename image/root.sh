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
version=$(cat "$kernel/version")
unit=${LATCHKEY_UNIT:-$root/systemd/latchkey.service}
[ -f "$unit" ] || die "no unit at $unit"

# What a machine that lives for ten seconds can do without; each costs time under emulation, udev more than a second.
masked="apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
    systemd-tmpfiles-clean.timer getty.target serial-getty@ttyS0.service systemd-logind.service systemd-update-utmp.service
    systemd-update-utmp-runlevel.service systemd-user-sessions.service systemd-random-seed.service
    systemd-ask-password-console.path systemd-ask-password-wall.path systemd-hwdb-update.service
    systemd-modules-load.service kmod-static-nodes.service systemd-journal-flush.service systemd-fsckd.socket
    systemd-initctl.socket dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount
    sys-kernel-config.mount sys-fs-fuse-connections.mount systemd-sysctl.service systemd-machine-id-commit.service
    proc-sys-fs-binfmt_misc.automount systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket
    systemd-udev-trigger.service systemd-udev-settle.service systemd-tmpfiles-setup-dev.service"

fill() {
    tar -C "$1" -xf "$rootfs"
    (cd "${1:?}" && rm -rf var/lib/apt var/cache/* var/log/* usr/lib/*/gconv usr/share/zoneinfo usr/share/i18n dev/*)
    # Loaded after switch_root, by the kernel's own request.
    for m in wireguard virtio_net dm_crypt; do
        modprobe -d "$kernel" -S "$version" -D "$m" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | sort -u | while read -r f; do
        install -D -m644 "$f" "$1/usr/lib/modules/${f##*/lib/modules/}"
    done
    cp "$kernel/lib/modules/$version"/modules.builtin* "$kernel/lib/modules/$version/modules.order" "$1/usr/lib/modules/$version/"
    depmod -b "$1" "$version"

    install -m755 "$latchkey" "$1/usr/bin/latchkey"
    install -m755 "$kcrypt" "$1/usr/bin/kcrypt-discovery-challenger"
    install -d "$1/system/discovery" "$1/oem" "$1/usr/local" "$1/boot/grub"
    ln -s /usr/bin/kcrypt-discovery-challenger "$1/system/discovery/kcrypt-discovery-challenger"
    install -m644 "$unit" "$1/usr/lib/systemd/system/latchkey.service"

    install -D -m755 "$report" "$1/usr/lib/latchkey-test/report"
    install -m755 "$here/root/install" "$here/root/mount-volumes" "$1/usr/lib/latchkey-test/"
    install -m644 "$here"/root/*.service "$1/usr/lib/systemd/system/"
    install -m644 "$here/root/fstab" "$1/etc/fstab"
    install -D -m644 "$here/root/journald.conf" "$1/etc/systemd/journald.conf.d/test.conf"
    install -d "$1/etc/systemd/system/multi-user.target.wants" "$1/etc/systemd/system/local-fs.target.wants"
    for u in latchkey latchkey-test-report latchkey-test-install; do
        ln -s "/usr/lib/systemd/system/$u.service" "$1/etc/systemd/system/multi-user.target.wants/$u.service"
    done
    ln -s /usr/lib/systemd/system/latchkey-test-volumes.service "$1/etc/systemd/system/local-fs.target.wants/"
    for u in $masked; do ln -sfn /dev/null "$1/etc/systemd/system/$u"; done
    ln -sfn /usr/lib/systemd/system/multi-user.target "$1/etc/systemd/system/default.target"

    echo latchkey-test >"$1/etc/hostname"
    echo "nameserver 10.0.2.3" >"$1/etc/resolv.conf"
    # Not a first boot: no presets, no generated id.
    echo 5d1c6b0f7e0a4f3d9b7a2c1e0f9d8b7a >"$1/etc/machine-id"
    touch "$1/etc/.updated" "$1/var/.updated"
}

build() {
    tree=$1.tree
    rm -rf "$tree"
    mkdir -p "$tree"
    fill "$tree"
    truncate -s "$STATE_SIZE" "$1"
    mkfs.ext4 -q -F -L COS_STATE -m 0 -O ^has_journal -E lazy_itable_init=1 -d "$tree" "$1"
    rm -rf "$tree"
}

cached root "$(key "in $rootfs $kernel" "$latchkey" "$kcrypt" "$report" "$unit" "$here/root.sh" "$here"/root/*)" .img build
echo "$product"
