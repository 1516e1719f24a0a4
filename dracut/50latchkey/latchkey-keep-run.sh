#!/bin/sh
# Hook cleanup: takes /run, and /run/latchkey in it, along into the new root.
#
# util-linux' switch_root does that by itself; busybox' does not, and its shell runs its own whatever else is installed.
# A second mount of the same file system and no move: udevd is told to end, through /run, only after this.
case $(command -v switch_root) in
    /*) latchkey_switch_root=$(readlink -f "$(command -v switch_root)") ;;
    *) latchkey_switch_root=busybox ;;
esac
case $latchkey_switch_root in
    *busybox*) [ -d "$NEWROOT/run" ] && mount -o bind /run "$NEWROOT/run" ;;
esac
