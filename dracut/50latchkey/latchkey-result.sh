#!/bin/sh
# Hook pre-mount: goes on only when the volumes are open. What happens otherwise is dracut's emergency handling
# (rd.shell, rd.emergency); whoever leaves its shell starts another attempt.
. /lib/latchkey-lib.sh

while read -r latchkey_code < "$latchkey_status" && [ "$latchkey_code" != 0 ]; do
    if [ "$latchkey_code" = 50 ]; then
        warn "latchkey: $(latchkey_explain 50)"
        break
    fi
    latchkey_message="latchkey: the encrypted volumes stay closed: $(latchkey_explain "$latchkey_code")"
    if getargbool 1 rd.shell || getarg rd.break > /dev/null; then
        emergency_shell -n latchkey "$latchkey_message $latchkey_doctor."
        getarg rd.emergency > /dev/null && latchkey_give_up
    else
        warn "$latchkey_message"
        latchkey_give_up
    fi
    latchkey_start
    while [ ! -e "$latchkey_status" ]; do sleep 0.2; done
done
