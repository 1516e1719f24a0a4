# shellcheck shell=sh
# What the hooks of module `latchkey` share: whether to unlock, the unlock process, what its exit code means.
#
# Sourced by dash, bash and busybox ash, after dracut-lib.sh.

# Where the hooks keep the process id and the exit code. On the initramfs' own file system: it ends with it.
latchkey_pid=/tmp/latchkey.pid
latchkey_status=/tmp/latchkey.status

# For whoever gets a shell.
# shellcheck disable=SC2034 # the hooks say it
latchkey_doctor="'kcrypt-discovery-challenger doctor' goes over all that an unlock needs and says what to do"

# Not when told so, and not in a system that runs from a medium or the network: its disks are about to be installed, or
# are another system's. latchkey-unlock.service has the same words as conditions.
latchkey_wanted() {
    read -r latchkey_cmdline < /proc/cmdline
    for latchkey_word in $latchkey_cmdline; do
        case $latchkey_word in
            rd.latchkey=0 | rd.latchkey=no | latchkey.unlock=0 | latchkey.unlock=no | latchkey.test=install) return 1 ;;
            rd.cos.disable | rd.immucore.disable | cdroot | netboot) return 1 ;;
            install-mode | install-mode-interactive) return 1 ;;
            boot=live | rd.live.image | rd.live.dir=* | rd.live.squashimg=*) return 1 ;;
        esac
    done
    return 0
}

# Starts `unlock` beside the caller; its exit code appears in $latchkey_status when it has ended.
latchkey_start() {
    rm -f "$latchkey_status"
    # The noise of the TPM libraries: what matters, the program says itself.
    (
        TSS2_LOG=all+NONE kcrypt-discovery-challenger unlock &
        echo $! > "$latchkey_pid"
        wait $!
        echo $? > "$latchkey_status.new"
        mv "$latchkey_status.new" "$latchkey_status"
    ) &
}

# What exit code $1 of `unlock` means, and what to do.
latchkey_explain() {
    case $1 in
        10) echo "the cloud-config cannot be used (10). Correct the file and key that the log names; it is on COS_OEM." ;;
        11) echo "no TPM was found (11). Switch it on in the firmware's set-up; its driver must be in the initramfs." ;;
        12) echo "the TPM answered with an error (12). The log names the command; cut the power and try again." ;;
        13) echo "the TPM is locked out after wrong authorisations (13). Wait for it to recover, or use the recovery passphrase." ;;
        14) echo "the TPM's owner or endorsement hierarchy has a password (14). Clear it, or use the recovery passphrase." ;;
        20) echo "no network came up (20). The kernel's command line needs rd.neednet=1; look at the cable and at DHCP." ;;
        21) echo "the key server did not answer in time (21). See whether it runs and can be reached from this machine." ;;
        22) echo "the key server's answer is not what the protocol says (22). Look at its log and its version." ;;
        30) echo "the key server refused this machine (30). Quarantined or unknown: it is for its operator to allow." ;;
        31) echo "there is no secret for this volume (31), at the key server or in the TPM. Was it encrypted on this machine?" ;;
        40) echo "the encrypted volume was not found (40). Look for the disk and the label of its partition." ;;
        41) echo "the volume with this label is not encrypted, or there are two of them (41). Is a foreign disk connected?" ;;
        42) echo "the passphrase does not open the volume (42). Use the recovery passphrase." ;;
        43) echo "the kernel could not map the volume (43). Are dm_crypt and the cipher in the initramfs?" ;;
        50) echo "the volume is open, but the mesh identity could not be handed over (50). See /run/latchkey." ;;
        *) echo "the unlock program ended with $1. Its lines in the log say more." ;;
    esac
}

# Does what rd.emergency= says, or stops, and never returns. Without systemd dracut's own `reboot` only asks process 1, which
# is dracut's script and does not listen, and the boot would go on.
latchkey_give_up() {
    # Time to read what was said.
    sleep 5
    case $(getarg rd.emergency) in
        reboot) echo b > /proc/sysrq-trigger ;;
        poweroff) echo o > /proc/sysrq-trigger ;;
    esac
    warn "latchkey: stopped here"
    while :; do sleep 3600; done
}
