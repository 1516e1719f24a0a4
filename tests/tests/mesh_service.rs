//! The mesh service in a booted machine: it takes its identity and leaves no copy, survives restarts, reloads and a hung agent
//! without touching the device, repairs what others change, goes on in user space where the kernel has no WireGuard, and
//! says clearly what is wrong.

use std::process::Command;

use latchkey_tests::{
    disk::{Disk, Persistent},
    error::{Result, run, write},
    place::{Image, Work, project},
    scenario::{CloudConfig, Machine},
    transcript::Transcript,
};

const UNIT: &str = "\
[Unit]
Description=Try latchkey.service in all ways, and stop
After=latchkey.service local-fs.target
Before=latchkey-test-report.service
[Service]
Type=oneshot
ExecStart=/bin/bash /usr/lib/latchkey-test/mesh
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
TimeoutStartSec=300
";

/// What the machine does. Each line `MESH name: value` is asserted below.
const SCRIPT: &str = r#"
say() { echo "MESH $1: $2"; }
property() { systemctl show latchkey --property "$1" --value; }
service() { echo "$(property ActiveState) $(property Result)"; }
# Without the link-local one that a tun link gives itself.
address() { ip -oneline address show wg-latchkey | awk '$4 !~ /^fe80:/ {print $4}'; }
index() { cat /sys/class/net/wg-latchkey/ifindex; }
# `latchkey ARGUMENTS` with its exit code, and the words in its answer that matter.
latchkey_says() { answer=$(latchkey $2 2>&1); say "$1" "$? $(grep -oE "$3" <<<"$answer" | head -n1)"; }
modes() { stat -c %a /run/latchkey /run/latchkey/agent /var/lib/latchkey | tr '\n' ' '; }
# Puts other settings into the unit, for as long as the machine runs.
drop_in() { mkdir -p /run/systemd/system/latchkey.service.d; printf '[Service]\n%s\n' "$@" >/run/systemd/system/latchkey.service.d/test.conf; systemctl daemon-reload; }
is_restarted() { [ "$(property NRestarts)" -gt "$restarts" ] && systemctl is-active --quiet latchkey; }
# Waits until a command succeeds.
until_true() { for _ in $(seq 300); do "$@" && return; sleep 0.2; done; }

key=$(wg show wg-latchkey private-key)
key_is_there() { [ "$(wg show wg-latchkey private-key)" = "$key" ]; }
address=$(address)
journal_says() { journalctl --boot --output=cat --unit latchkey | grep -qF -e "$1"; }
address_is_back() { [ "$(address)" = "$address" ]; }
# Files with the private key, below /run as the host and as the service see it.
copies() {
    local pid; pid=$(property MainPID)
    local seen=/run; [ "$pid" = 0 ] || seen="/run /proc/$pid/root/run /proc/$pid/root/tmp"
    grep -rlsF -e "$key" $seen | tr '\n' ' '
}

echo "$key" >/run/planted; say planted "$(copies | wc -w)"; rm /run/planted
say "after boot" "$(service) [$(copies)]"
say "files" "$(cd /run/latchkey && echo *)"
say "credentials" "$(ls /run/credentials/latchkey.service | wc -l)"
say "modes" "$(modes)"
say "exposure" "$(systemd-analyze security --no-pager latchkey.service | tail -n 1 | grep -oE '[0-9.]+ [A-Z]+')"
say "derived address" "$(address | grep -cE '^fd10:[0-9a-f:]+/16$')"

# A peer that is nobody's record: it goes, and nothing else.
wg set wg-latchkey peer "$(wg genkey | wg pubkey)" allowed-ips fd10::1/128
before=$(index); ip monitor link address >/tmp/events & monitor=$!
# Set again and again until the monitor shows it: from then on it misses nothing.
heard() { ip link set wg-latchkey alias "try $RANDOM"; [ -s /tmp/events ]; }
until_true heard; sleep 0.5; heard=$(wc -c </tmp/events)
systemctl restart latchkey; sleep 0.5; kill $monitor
say "after restart" "$(service) [$(copies)]"
say "monitored" "$([ "$heard" -gt 0 ] && echo yes)"
say "bytes of events in a restart" "$(($(wc -c </tmp/events) - heard))"
say "same device" "$([ "$before" = "$(index)" ] && key_is_there && echo yes) $(wg show wg-latchkey peers | wc -l)"

port() { wg show wg-latchkey listen-port; }
port_is() { [ "$(port)" = "$1" ]; }
configure() { mount -o remount,rw /oem; sed -i "s/port: .*/port: $1/" /oem/90_custom.yaml; systemctl reload latchkey; }
agent=$(property MainPID)
configure 51821; until_true port_is 51821; say "reloaded" "$(port)"
configure nonsense; until_true journal_says "latchkey.mesh.port"; say "reloaded with a mistake" "$(port)"
configure 51820; until_true port_is 51820; say "reloaded again" "$(port)"
say "one process for all of them" "$([ "$agent" = "$(property MainPID)" ] && service)"

# An agent that hangs is ended by the watchdog, and started again.
drop_in WatchdogSec=4 TimeoutAbortSec=1 RestartSec=1; systemctl restart latchkey
ip monitor link address >/tmp/events & monitor=$!
until_true heard; sleep 0.5; heard=$(wc -c </tmp/events); restarts=$(property NRestarts)
kill -STOP "$(property MainPID)"; until_true is_restarted; sleep 0.5; kill $monitor
say "after the watchdog" "$(service) [$(copies)]"
say "bytes of events by the watchdog" "$(($(wc -c </tmp/events) - heard))"
drop_in RestartSec=1

systemctl stop latchkey
say "after stop" "$(service) [$(copies)]"
say "modes when stopped" "$(modes)"
say "stopped, the device stays" "$(key_is_there && address_is_back && echo yes)"
systemctl start latchkey
say "after start" "$(service) [$(copies)]"
restarts=$(property NRestarts); kill -9 "$(property MainPID)"; until_true is_restarted
say "after kill" "$(service) [$(copies)]"

ip address flush dev wg-latchkey; until_true address_is_back; say "address repaired" "$(address_is_back && echo yes)"
ip address add 10.9.9.9/24 dev wg-latchkey; until_true address_is_back; say "foreign address removed" "$(address_is_back && echo yes)"
ip link delete wg-latchkey; until_true key_is_there; until_true address_is_back; say "device repaired" "$(key_is_there && address_is_back && echo yes)"

latchkey_says "status" "status" "private key: .hidden."
latchkey_says "down beside the agent" "agent --down" "an agent is running"
latchkey_says "agent beside the agent" "agent" "an agent is running"
answer=$(setpriv --bounding-set=-net_admin latchkey status 2>&1); say "status without the capability" "$? $(grep -o CAP_NET_ADMIN <<<"$answer")"

systemctl stop latchkey
latchkey_says "down" "agent --down" "wg-latchkey is gone"
say "no device" "$(ip link show wg-latchkey 2>&1 | grep -c 'does not exist')"
latchkey_says "down again" "agent --down" "there is no wg-latchkey"
latchkey_says "status without a device" "status" "device: none"
systemctl start latchkey
say "started without an identity" "$(property ActiveState) $(property ExecMainStatus) [$(copies)]"

ip link set eth0 down; ip link set eth0 name wg-latchkey
latchkey_says "name taken" "agent" "exists, but is hardware, not a WireGuard device"
latchkey_says "down of another's" "agent --down" "exists, but is hardware"
ip link set wg-latchkey name eth0

# An identity by hand, as the initramfs leaves it.
hand_over() {
    rm -f /run/latchkey/handover.json
    printf '{"version":1,"network":"%s","private_key":"%s","volume":"v"}' "$1" "$key" >/run/latchkey/identity
}
hand_over another; latchkey_says "another network" "agent" "was made for network .another."
hand_over fleet-a
rmmod wireguard; mv /usr/lib/modules/"$(uname -r)"/kernel/drivers/net/wireguard /root/module; mv /usr/bin/wireguard-go /root/
latchkey_says "no module" "agent" "this kernel has no WireGuard"

# With wireguard-go the mesh is up all the same. Its process is the data plane, so it outlives the agent in every way.
mv /root/wireguard-go /usr/bin/; modprobe tun
systemctl reset-failed latchkey; systemctl start latchkey; plane=$(pidof wireguard-go)
plane_is_there() { [ -n "$plane" ] && [ "$plane" = "$(pidof wireguard-go)" ] && key_is_there && address_is_back && echo yes; }
say "user space" "$(service) [$(copies)] $(plane_is_there)"
say "user space is said" "$(journal_says wireguard-go && echo yes)"
latchkey_says "status in user space" "status" "private key: .hidden."
systemctl restart latchkey; say "user space after restart" "$(service) [$(copies)] $(plane_is_there)"
restarts=$(property NRestarts); kill -9 "$(property MainPID)"; until_true is_restarted; say "user space after kill" "$(service) $(plane_is_there)"
systemctl stop latchkey; say "user space after stop" "$(service) $(plane_is_there)"
latchkey_says "down in user space" "agent --down" "wg-latchkey is gone"
say "no user space" "$(pidof wireguard-go)$(ip link show wg-latchkey 2>&1 | grep -c 'does not exist')"

hand_over fleet-a; mv /root/module /usr/lib/modules/"$(uname -r)"/kernel/drivers/net/wireguard
systemctl reset-failed latchkey; systemctl start latchkey
say "module loaded from the sandbox" "$(service) $(lsmod | grep -c '^wireguard ') [$(copies)]"
# An identity in a system that wants no mesh: nobody would take it.
systemctl stop latchkey; hand_over fleet-a
latchkey_says "no mesh" "--cloud-config /nonexistent handover check" "no mesh is configured"
say "after no mesh" "[$(copies)]"
# Where Latchkey unlocked nothing: an agent by an ikto.json, whose registry is away.
rm -rf /run/latchkey; mkdir -p /etc/latchkey; wg genkey >/etc/latchkey/key
latchkey init | sed -e 's,"advertise_address": "","advertise_address": "10.0.2.15",' -e 's,"private_key_path": "","private_key_path": "/etc/latchkey/key",' >/etc/latchkey/ikto.json
chmod 600 /etc/latchkey/*; cp /usr/lib/latchkey-test/ikto.conf /run/systemd/system/latchkey.service.d/; systemctl daemon-reload
systemctl reset-failed latchkey; systemctl start latchkey
say "by an ikto.json" "$(service)"
latchkey_says "info" "info" "Advertise Address: .*"

say "journal" "$(journalctl --boot --output=cat | grep -cF -e "$key")"
say done yes
systemctl poweroff -ff
"#;

/// What the lines must say, in their order.
const EXPECTED: &[(&str, &str)] = &[
    ("planted", "2"), // once as the host sees it, once as the service does
    ("after boot", "active success []"),
    ("files", "agent handover.json timeline.json"),
    ("credentials", "0"),
    ("modes", "700 700 700"),
    ("exposure", "1.8 OK"),
    ("derived address", "1"),
    ("after restart", "active success []"),
    ("monitored", "yes"),
    ("bytes of events in a restart", "0"),
    ("same device", "yes 0"),
    ("reloaded", "51821"),
    ("reloaded with a mistake", "51821"),
    ("reloaded again", "51820"),
    ("one process for all of them", "active success"),
    ("after the watchdog", "active success []"),
    ("bytes of events by the watchdog", "0"),
    ("after stop", "inactive success []"),
    ("modes when stopped", "700 700 700"),
    ("stopped, the device stays", "yes"),
    ("after start", "active success []"),
    ("after kill", "active success []"),
    ("address repaired", "yes"),
    ("foreign address removed", "yes"),
    ("device repaired", "yes"),
    ("status", "0 private key: (hidden)"),
    ("down beside the agent", "1 an agent is running"),
    ("agent beside the agent", "1 an agent is running"),
    ("status without the capability", "60 CAP_NET_ADMIN"),
    ("down", "0 wg-latchkey is gone"),
    ("no device", "1"),
    ("down again", "0 there is no wg-latchkey"),
    ("status without a device", "3 device: none"),
    ("started without an identity", "failed 50 []"),
    ("name taken", "62 exists, but is hardware, not a WireGuard device"),
    ("down of another's", "62 exists, but is hardware"),
    ("another network", "10 was made for network \"another\""),
    ("no module", "61 this kernel has no WireGuard"),
    ("user space", "active success [] yes"),
    ("user space is said", "yes"),
    ("status in user space", "0 private key: (hidden)"),
    ("user space after restart", "active success [] yes"),
    ("user space after kill", "active success yes"),
    ("user space after stop", "inactive success yes"),
    ("down in user space", "0 wg-latchkey is gone"),
    ("no user space", "1"),
    ("module loaded from the sandbox", "active success 1 []"),
    ("no mesh", "1 no mesh is configured"),
    ("after no mesh", "[]"),
    ("by an ikto.json", "active success"),
    ("info", "0 Advertise Address: 10.0.2.15"),
    ("journal", "0"),
    ("done", "yes"),
];

#[test]
fn the_service_keeps_the_device_and_no_copy_of_the_key() -> Result<()> {
    let machine = Machine::new("mesh", &CloudConfig::offline(), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);
    put_on_root(&machine.disk)?;

    let vm = machine.vm("boot")?.append("systemd.wants=latchkey-test-mesh.service");
    let mut vm = vm.start()?;
    vm.wait_for_power_off()?;
    assert_eq!(said(vm.console())?, EXPECTED.iter().map(line).collect::<Vec<_>>());
    Ok(())
}

fn line((name, value): &(&str, &str)) -> String {
    format!("MESH {name}: {value}")
}

fn said(console: &Transcript) -> Result<Vec<String>> {
    Ok(console
        .matching("^MESH ")?
        .into_iter()
        .map(|line| line.text.trim_end().to_owned())
        .collect())
}

/// Writes unit and script into the root file system of a disk.
fn put_on_root(disk: &Disk) -> Result<()> {
    let work = Work::new("mesh-script")?;
    write(&work.file("unit"), UNIT)?;
    write(&work.file("script"), SCRIPT)?;
    let commands = format!(
        "write {} /usr/lib/systemd/system/latchkey-test-mesh.service\nwrite {} /usr/lib/latchkey-test/mesh\n\
         write {} /usr/lib/latchkey-test/ikto.conf\n",
        work.file("unit").display(),
        work.file("script").display(),
        project().join("systemd/latchkey.ikto.conf").display(),
    );
    write(&work.file("debugfs"), commands)?;
    let root = format!("{}?offset={}", disk.path().display(), Image::get()?.state_start);
    run(Command::new("debugfs").arg("-w").arg("-f").arg(work.file("debugfs")).arg(root)).map(drop)
}
