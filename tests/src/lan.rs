//! A network for machines under test where the host's user-mode one will not do: multicast, other DNS, several servers.
//!
//! A bridge in a network namespace, which ends with the last process in it; made as root. The machines get addresses by
//! DHCP. The namespace is also the host of the servers: 10.77.0.1, and `fd77::1` for IPv6.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{
    child::Running,
    error::{Doing, Error, Result, run, write},
    place::Work,
};

/// The address of servers in the network.
pub const HOST: &str = "10.77.0.1";

const SET_UP: &str = "set -e; ip link set lo up
    ip link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
    ip addr add 10.77.0.1/24 dev br0; ip -6 addr add fd77::1/64 dev br0 nodad; ip link set br0 up
    echo ready; exec sleep infinity";

/// The network. It ends when this and everything that runs in it is dropped.
#[derive(Debug)]
pub struct Lan {
    namespace: PathBuf,
    machines: AtomicU32,
    _work: Work,
    _dhcp: Running,
    _holder: Running,
}

impl Lan {
    /// A network whose DHCP server names `dns` as the DNS server.
    pub fn new(name: &str, dns: &str) -> Result<Self> {
        let work = Work::new(&format!("{name}-lan"))?;
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", SET_UP]);
        let (holder, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::piped());
        })?;
        let mut said = String::new();
        if let Some(stdout) = pipes.stdout {
            BufReader::new(stdout).read_line(&mut said).doing(|| "make a network".into())?;
        }
        if said != "ready\n" {
            return Err(Error::Setup("no network namespace with a bridge could be made".into()));
        }
        let namespace = PathBuf::from(format!("/proc/{}/ns/net", holder.id()));

        let (configuration, leases) = (work.file("udhcpd.conf"), work.file("leases"));
        write(&leases, "")?;
        write(
            &configuration,
            format!(
                "start 10.77.0.10\nend 10.77.0.99\ninterface br0\nlease_file {}\npidfile {}\n\
                 option subnet 255.255.255.0\noption router {HOST}\noption dns {dns}\n",
                leases.display(),
                work.file("pid").display()
            ),
        )?;
        let mut udhcpd = inside(&namespace, "busybox");
        udhcpd.args(["udhcpd", "-f", "-a", "10"]).arg(&configuration);
        let log = work.file("udhcpd.log");
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let (dhcp, _) = Running::start(&udhcpd, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        })?;
        let machines = AtomicU32::new(0);
        Ok(Self { namespace, machines, _work: work, _dhcp: dhcp, _holder: holder })
    }

    /// A program that will run in the network.
    pub fn command(&self, program: &str) -> Command {
        inside(&self.namespace, program)
    }

    /// Calls `open` where it finds the network's addresses: the sockets that it makes are in the network.
    pub fn within<T: Send>(&self, open: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace =
            File::open(&self.namespace).doing(|| format!("open {}", self.namespace.display()))?;
        let enter = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)
                .doing(|| "enter a network namespace".into())
        };
        // A namespace belongs to a thread, and this one is not to stay there.
        thread::scope(|scope| scope.spawn(|| enter().map(|()| open())).join())
            .unwrap_or_else(|_| Err(Error::Setup("a thread in a network panicked".into())))
    }

    /// A new port of the bridge for one machine: its TAP device, and a hardware address.
    pub(crate) fn plug_in(&self) -> Result<(String, String)> {
        let n = self.machines.fetch_add(1, Ordering::Relaxed);
        let tap = format!("tap{n}");
        run(self.command("ip").args(["tuntap", "add", "dev", &tap, "mode", "tap"]))?;
        run(self.command("ip").args(["link", "set", &tap, "master", "br0", "up"]))?;
        Ok((tap, format!("52:54:00:77:00:{n:02x}")))
    }
}

fn inside(namespace: &std::path::Path, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).arg("--").arg(program);
    command
}
