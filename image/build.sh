#!/bin/sh
# Builds whatever of the test machine is not built yet, and prints what the harness needs, NAME=VALUE, one a line.
#
# Programs are taken from LATCHKEY_KCRYPT, LATCHKEY_AGENT and LATCHKEY_REPORT, or from where programs.sh leaves them.
set -eu
. "$(dirname "$0")/lib.sh"

kcrypt=${LATCHKEY_KCRYPT:-$target/boot/kcrypt-discovery-challenger}
agent=${LATCHKEY_AGENT:-$target/release/latchkey}
report=${LATCHKEY_REPORT:-$target/release/latchkey-guest-report}

kernel=$("$here/kernel.sh")
initramfs=$("$here/initramfs.sh" "$kcrypt")
root_image=$("$here/root.sh" "$agent" "$kcrypt" "$report")
disk=$("$here/disk.sh" "$root_image")
nats=$("$here/nats.sh")

echo "kernel=$kernel/vmlinuz"
echo "kernel_version=$(cat "$kernel/version")"
echo "initramfs=$initramfs"
echo "disk=$disk"
echo "state_start=$STATE_START"
echo "oem_start=$OEM_START"
echo "oem_size=$OEM_SIZE"
echo "persistent_start=$PERSISTENT_START"
echo "persistent_size=$PERSISTENT_SIZE"
echo "tpm_setup=$("$here/tpm-ca.sh")"
echo "nats_server=$nats"
