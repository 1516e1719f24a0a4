#!/bin/sh
# Hooks pre-trigger and initqueue: starts `unlock` beside everything else, once.
#
# As early as udev is there to take part in device-mapper's cookies; the program waits for TPM, disks and route by itself.
. /lib/latchkey-lib.sh

if [ ! -e "$latchkey_pid" ] && [ ! -e "$latchkey_status" ]; then
    if ! latchkey_wanted; then
        info "latchkey: no unlocking in this boot, as the kernel's command line says"
        echo 0 > "$latchkey_status"
    elif [ -n "$main_loop" ] || ! getarg rd.break=initqueue > /dev/null; then
        # Whoever asked for a shell before the initqueue is to have the console for themselves until the loop runs.
        latchkey_start
    fi
fi
