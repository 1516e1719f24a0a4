#!/bin/sh
# Hooks emergency and shutdown-emergency: says why, when it is us, and leaves the console to the shell.
. /lib/latchkey-lib.sh

if [ -n "$DRACUT_SYSTEMD" ]; then
    if systemctl -q is-failed latchkey-unlock.service; then
        latchkey_code=$(systemctl show -P ExecMainStatus latchkey-unlock.service)
        # Of a process that was killed this is the signal.
        [ "$(systemctl show -P ExecMainCode latchkey-unlock.service)" = 1 ] || latchkey_code="signal $latchkey_code"
        warn "latchkey: the encrypted volumes stay closed: $(latchkey_explain "$latchkey_code")"
        getargbool 1 rd.shell \
            && warn "latchkey: 'journalctl -u latchkey-unlock' has the whole story; leaving the shell tries again" \
            && warn "latchkey: $latchkey_doctor"
    fi
elif [ -e "$latchkey_pid" ] && [ ! -e "$latchkey_status" ]; then
    # Another trouble than ours: the prompt must not take what is typed into the shell.
    read -r latchkey_process < "$latchkey_pid"
    kill "$latchkey_process"
fi
