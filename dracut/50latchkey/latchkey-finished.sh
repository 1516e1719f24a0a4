#!/bin/sh
# Hook initqueue/finished: the initqueue, which brings up the network, goes on until `unlock` has ended.
[ -e /tmp/latchkey.status ]
