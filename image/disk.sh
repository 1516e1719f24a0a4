#!/bin/sh
# disk.sh ROOT : prints the path of the base disk around the root image ROOT; every scenario works on a copy of it.
#
# GPT: 1 bios_grub with GRUB's core image, 2 COS_STATE (the root), 3 COS_OEM, 4 COS_PERSISTENT. 3 and 4 are empty here: the
# harness writes what a scenario wants there (the offsets are printed by build.sh). GRUB is put in place by writing its
# two images where they belong, since grub-bios-setup would want a loop device.
set -eu
. "$(dirname "$0")/lib.sh"

root_image=${1:?usage: disk.sh ROOT}
grub=/usr/lib/grub/i386-pc
[ -f "$grub/boot.img" ] || die "no $grub/boot.img: run image/setup.sh"

# le64 N : N as eight little-endian bytes.
le64() {
    l_n=$1
    for _ in 1 2 3 4 5 6 7 8; do
        # shellcheck disable=SC2059 # an octal escape is the format
        printf "\\$(printf '%03o' $((l_n % 256)))"
        l_n=$((l_n / 256))
    done
}

# put FILE OFFSET [sparse] : standard input over FILE at a byte offset. `sparse` only where FILE is empty: what is zero is not
# written then.
put() {
    dd of="$1" bs=1M seek="$2" iflag=fullblock oflag=seek_bytes conv="notrunc${3:+,$3}" status=none
}

install_grub() {
    core=$1.core
    # Before grub.cfg is looked for, so that GRUB can say on the serial console that it finds none.
    cat >"$1.early" <<G
serial --unit=0
terminal_output serial
G
    grub-mkimage -O i386-pc -d "$grub" -c "$1.early" -p '(hd0,gpt2)/boot/grub' -o "$core" \
        biosdisk part_gpt ext2 normal linux serial terminal echo test search search_label loadenv regexp configfile minicmd
    # diskboot.img, the first sector of the core: where the rest of it begins (its length is already there).
    le64 $((GRUB_START / 512 + 1)) | put "$core" $((0x1f4))
    put "$1" "$GRUB_START" <"$core"
    # boot.img without its partition table, and in it the sector of the core.
    head -c 440 "$grub/boot.img" | put "$1" 0
    le64 $((GRUB_START / 512)) | put "$1" $((0x5c))
    rm -f "$core" "$1.early"
}

build() {
    truncate -s "$DISK_SIZE" "$1"
    sfdisk -q --no-reread --no-tell-kernel "$1" <<P
label: gpt
start=$((GRUB_START / 512)), size=$((GRUB_SIZE / 512)), type=21686148-6449-6E6F-744E-656564454649, name=bios_grub
start=$((STATE_START / 512)), size=$((STATE_SIZE / 512)), name=COS_STATE
start=$((OEM_START / 512)), size=$((OEM_SIZE / 512)), name=COS_OEM
start=$((PERSISTENT_START / 512)), size=$((PERSISTENT_SIZE / 512)), name=COS_PERSISTENT
P
    install_grub "$1"
    put "$1" "$STATE_START" sparse <"$root_image"
}

cached disk "$(key "in $root_image $GRUB_START $STATE_START $STATE_SIZE $OEM_START $PERSISTENT_START $DISK_SIZE" "$here/disk.sh" "$grub/boot.img")" .img build
echo "$product"
