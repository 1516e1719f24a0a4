#!/bin/sh
# Writes the DNS servers of systemd-networkd's state file to /etc/resolv.conf, where getaddrinfo looks.
#
# In an initramfs with systemd-networkd and without systemd-resolved nobody else does.
while IFS='=' read -r key value; do
    [ "$key" = DNS ] || continue
    for server in $value; do
        # "ADDRESS[:PORT][%INTERFACE][#NAME]": the name is for DNS over TLS.
        server=${server%%#*}
        case $server in
            *[!0-9a-fA-F:.%a-z]*) ;;
            *) echo "nameserver $server" ;;
        esac
    done
done < /run/systemd/netif/state > /etc/resolv.conf.new && mv /etc/resolv.conf.new /etc/resolv.conf
