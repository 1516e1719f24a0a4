//! `make bench`: what a release costs here and with clevis, in one run on one machine, so that the
//! ratios hold where the times do not. Nothing here passes or fails.

// A bench that cannot go on says so and stops.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "bench/fleet.rs"]
mod fleet;
#[path = "bench/mesh.rs"]
mod mesh;
#[path = "bench/process.rs"]
mod process;
#[path = "bench/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use latchkey_soft_tpm::{SoftTpm, command_name};
use latchkey_tests::kms::{Kms, Volume, secret_yaml};
use latchkey_tests::place::{Work, project, target};

const RUNS: usize = 11;
const LABEL: &str = "COS_PERSISTENT";

/// Everything, or one part: `release`, `server` or `mesh`.
fn main() {
    let part = std::env::args().nth(1);
    let wanted = |name: &str| part.as_deref().is_none_or(|part| part == name);
    if wanted("release") {
        let bench = Bench::new();
        bench.releases();
        bench.luks();
        bench.initramfs();
    }
    if wanted("server") {
        server::run();
    }
    if wanted("mesh") {
        mesh::run();
    }
}

struct Bench {
    tpm: SoftTpm,
    work: Work,
    kms: Kms,
    tang: Tang,
}

/// A command that releases a passphrase, by name.
struct Contender {
    name: &'static str,
    command: Vec<String>,
    stdin: PathBuf,
}

/// Has it ask for another partition.
fn rename(contender: &mut Contender, label: &str) {
    contender
        .command
        .iter_mut()
        .filter(|word| *word == LABEL)
        .for_each(|word| *word = label.into());
}

/// What a contender cost.
struct Cost {
    millis: f64,
    kibibytes: u64,
    processes: usize,
    tpm: BTreeMap<u32, u32>,
}

impl Bench {
    fn new() -> Self {
        let mut kms = Kms::new("bench").expect("a key server");
        kms.start().expect("the key server starts");
        let work = Work::new("bench").expect("a work folder");
        let tang = Tang::start(&work);
        Self { tpm: SoftTpm::certified(), work, kms, tang }
    }

    fn releases(&self) {
        let contenders = [
            self.offline(),
            self.sealed(),
            self.operators(),
            self.attested(),
            self.clevis_tpm2(),
            self.clevis_tang(),
        ];
        println!(
            "One release of a passphrase, median of {RUNS} (swtpm: no bus, fast crypto; count commands, not their time)\n"
        );
        println!("{:34} {:>9} {:>10} {:>10} {:>9}", "", "ms", "peak KiB", "processes", "TPM cmds");
        let costs: Vec<_> = self.measure(&contenders);
        for (contender, cost) in contenders.iter().zip(&costs) {
            println!(
                "{:34} {:>9.1} {:>10} {:>10} {:>9}",
                contender.name,
                cost.millis,
                cost.kibibytes,
                cost.processes,
                cost.tpm.values().sum::<u32>()
            );
        }
        let ratio = |ours: usize, theirs: usize| costs[theirs].millis / costs[ours].millis;
        println!("\n  clevis tpm2 takes {:.1} x the time of offline", ratio(0, 4));
        println!(
            "  clevis tang takes {:.1} x the time of an operator's passphrase online, which makes an attestation key\n",
            ratio(2, 5)
        );
        self.after_the_network(&contenders[1..4]);
        println!("TPM commands by name, one release");
        for (contender, cost) in contenders.iter().zip(&costs) {
            let mut named = BTreeMap::<&str, u32>::new();
            for (code, count) in &cost.tpm {
                *named.entry(command_name(*code)).or_default() += count;
            }
            let list: Vec<_> =
                named.iter().map(|(name, count)| format!("{name} {count}")).collect();
            println!("  {:32} {}", contender.name, list.join(", "));
        }
        println!();
    }

    /// What is left to do once there is a route: the rest is done while it comes up.
    fn after_the_network(&self, contenders: &[Contender]) {
        for contender in contenders {
            let millis = median((0..RUNS).map(|_| self.exchange_millis(contender)).collect());
            println!(
                "  {}: {millis:.0} ms from the first connection to the passphrase",
                contender.name
            );
        }
        println!();
    }

    /// The steps from the exchange on, as `--debug` tells them.
    fn exchange_millis(&self, contender: &Contender) -> f64 {
        let done = self
            .command(&contender.command[0])
            .arg("--debug")
            .args(&contender.command[1..])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        let step = |line: &str| {
            let (name, rest) = line.strip_prefix("latchkey: debug: ")?.split_once(": ")?;
            let millis = rest.strip_suffix(" ms")?.parse::<f64>().ok()?;
            matches!(name, "exchange" | "tpm-unseal").then_some(millis)
        };
        told.lines().filter_map(step).sum()
    }

    /// Round after round, each contender once, so that what else the machine does hits all alike.
    fn measure(&self, contenders: &[Contender]) -> Vec<Cost> {
        let mut times = vec![Vec::new(); contenders.len()];
        for _ in 0..RUNS {
            for (contender, times) in contenders.iter().zip(&mut times) {
                times.push(self.run(contender, &[]).as_secs_f64() * 1e3);
            }
        }
        contenders
            .iter()
            .zip(times)
            .map(|(contender, times)| {
                self.tpm.take_counts();
                let kibibytes = self.peak(contender);
                let tpm = self.tpm.take_counts();
                Cost { millis: median(times), kibibytes, processes: self.processes(contender), tpm }
            })
            .collect()
    }

    fn run(&self, contender: &Contender, before: &[&str]) -> Duration {
        let all: Vec<&str> =
            before.iter().copied().chain(contender.command.iter().map(String::as_str)).collect();
        let began = Instant::now();
        let done = self
            .command(all[0])
            .args(&all[1..])
            .stdin(std::fs::File::open(&contender.stdin).expect("its input"))
            .output()
            .expect("it starts");
        let took = began.elapsed();
        assert!(
            done.status.success(),
            "{}: {}",
            contender.name,
            String::from_utf8_lossy(&done.stderr)
        );
        took
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", self.tpm.device()))
            .env("TSS2_LOG", "all+NONE");
        command
    }

    /// The largest resident set of any one process of it, by time(1).
    fn peak(&self, contender: &Contender) -> u64 {
        let report = self.work.file("peak");
        self.run(
            contender,
            &["/usr/bin/time", "--quiet", "-f", "%M", "-o", report.to_str().unwrap()],
        );
        std::fs::read_to_string(report).unwrap().trim().parse().expect("a number of KiB")
    }

    /// Programs started, itself included, by strace(1).
    fn processes(&self, contender: &Contender) -> usize {
        let report = self.work.file("execs");
        self.run(
            contender,
            &["strace", "-f", "-qq", "-e", "trace=execve", "-o", report.to_str().unwrap()],
        );
        let text = std::fs::read_to_string(report).unwrap();
        text.lines().filter(|line| line.contains("execve(") && line.ends_with("= 0")).count()
    }

    fn offline(&self) -> Contender {
        let contender = self.ours("latchkey, offline (TPM alone)", "offline", None);
        self.install(&contender, LABEL);
        contender
    }

    /// What installing does: the plugin asked for a partition that is no LUKS volume yet.
    fn install(&self, contender: &Contender, label: &str) {
        let event = format!(
            r#"{{"name":"discovery.password","data":"{{\"filesystem_label\":\"{label}\",\"type\":\"ext4\"}}","file":""}}"#
        );
        self.feed(
            &[&contender.command[0], "--config", &contender.command[2], "discovery.password"],
            &event,
        );
    }

    /// Generation 2: the server makes the passphrase, and wants a quote. The machine and its partition are learned on first use.
    fn attested(&self) -> Contender {
        let mut contender =
            self.ours("latchkey, online, v2 attested", "attested", Some((&self.url(), "v2")));
        rename(&mut contender, "BENCH_ATTESTED");
        self.install(&contender, "BENCH_ATTESTED");
        self.await_release(&contender);
        contender
    }

    /// An operator's passphrase, in a volume of its own that goes by the partition's name.
    fn operators(&self) -> Contender {
        let mut contender =
            self.ours("latchkey, online, v1 operator's", "static", Some((&self.url(), "v1")));
        let pubhash = self.pubhash(&contender);
        let yaml = Volume {
            name: "static",
            tpm_hash: &pubhash,
            secret: Some(("static", "pass")),
            quarantined: false,
        }
        .yaml()
        .replace(LABEL, "BENCH_STATIC");
        self.kms.put("static.yaml", &yaml).unwrap();
        self.kms.put("secret.yaml", &secret_yaml("static", "pass", "an operator's own")).unwrap();
        rename(&mut contender, "BENCH_STATIC");
        self.await_release(&contender);
        contender
    }

    fn sealed(&self) -> Contender {
        let contender =
            self.ours("latchkey, online, v1 machine's own", "sealed", Some((&self.url(), "v1")));
        let pubhash = self.pubhash(&contender);
        let volume =
            Volume { name: "node", tpm_hash: &pubhash, secret: None, quarantined: false }.yaml();
        // Held to its EK and to no PCR: such a machine may come by either generation.
        self.kms.put("node.yaml", &format!("{volume}  attestation: {{}}\n")).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        self.install(&contender, LABEL);
        self.await_release(&contender);
        contender
    }

    /// The boot program with a configuration of its own; `server` is URL and generation.
    fn ours(&self, name: &'static str, folder: &str, server: Option<(&str, &str)>) -> Contender {
        let config = self.work.file(folder);
        std::fs::create_dir(&config).unwrap();
        let server = server.map_or_else(String::new, |(url, generation)| {
            format!("    challenger_server: {url}\nlatchkey:\n  protocol: {generation}\n")
        });
        let yaml = format!(
            "#cloud-config\nkcrypt:\n  challenger:\n    tpm_device: {}\n{server}",
            self.tpm.device()
        );
        std::fs::write(config.join("c.yaml"), yaml).unwrap();
        let program = target().join("boot/kcrypt-discovery-challenger");
        let words = [
            program.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
            "get",
            "--partition-label",
            LABEL,
        ];
        Contender { name, command: words.map(str::to_owned).to_vec(), stdin: "/dev/null".into() }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.kms.port())
    }

    fn pubhash(&self, contender: &Contender) -> String {
        self.feed(&[&contender.command[0], "--tpm-device", &self.tpm.device()], "")
    }

    /// The server re-reads its store within a second or so.
    fn await_release(&self, contender: &Contender) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self
            .command(&contender.command[0])
            .args(&contender.command[1..])
            .output()
            .unwrap()
            .status
            .success()
        {
            assert!(Instant::now() < deadline, "{}: never released", contender.name);
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn clevis_tpm2(&self) -> Contender {
        self.clevis("clevis decrypt, tpm2 pin", "tpm2", "{}")
    }

    fn clevis_tang(&self) -> Contender {
        let server = format!(r#"{{"url":"http://127.0.0.1:{}"}}"#, self.tang.port);
        self.clevis("clevis decrypt, tang pin", "tang", &server)
    }

    fn clevis(&self, name: &'static str, pin: &str, settings: &str) -> Contender {
        let jwe = self.work.file(&format!("{pin}.jwe"));
        let bound = self
            .feed(&["clevis", "encrypt", pin, settings, "-y"], "a passphrase of 32 characters...");
        std::fs::write(&jwe, bound).unwrap();
        Contender { name, command: vec!["clevis".into(), "decrypt".into()], stdin: jwe }
    }

    fn feed(&self, words: &[&str], stdin: &str) -> String {
        feed(self.command(words[0]).args(&words[1..]), stdin)
    }

    fn luks(&self) {
        println!("Opening a LUKS2 key slot (cryptsetup open --test-passphrase, median of 5)\n");
        println!("{:44} {:>9} {:>10}", "", "ms", "peak KiB");
        let ours = self.our_volume();
        let plain: [(&str, &[&str]); 2] = [
            ("cryptsetup's defaults (argon2id)", &[]),
            ("as Kairos formats (--iter-time 5)", &["--iter-time", "5"]),
        ];
        let mut rows: Vec<(&str, f64)> = Vec::new();
        for (name, options) in plain {
            let image = self.work.file("luks");
            std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
            let mut format = Command::new("cryptsetup");
            format
                .args(["luksFormat", "-q", "--type", "luks2", "--key-file", "-"])
                .args(options)
                .arg(&image);
            feed(&mut format, "a passphrase");
            rows.push((name, self.open(name, &image, "a passphrase")));
        }
        let name = "as `encrypt` makes it";
        rows.push((name, self.open(name, &ours.0, &ours.1)));
        let millis = |row: usize| rows[row].1;
        println!(
            "\n  the defaults take {:.0} x, Kairos' way {:.0} x the time of ours\n",
            millis(0) / millis(2),
            millis(1) / millis(2)
        );
    }

    fn our_volume(&self) -> (PathBuf, String) {
        let image = self.work.file("ours");
        std::fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", LABEL])
            .arg(&image)
            .arg("32M")
            .status();
        assert!(made.unwrap().success());
        let program = target().join("boot/kcrypt-discovery-challenger");
        let (program, config) = (program.to_str().unwrap(), self.work.file("offline"));
        let config = config.to_str().unwrap();
        self.feed(
            &[program, "--config", config, "encrypt", "--device", image.to_str().unwrap(), LABEL],
            "",
        );
        let passphrase =
            self.feed(&[program, "--config", config, "get", "--partition-label", LABEL], "");
        (image, passphrase)
    }

    fn open(&self, name: &str, image: &Path, passphrase: &str) -> f64 {
        let key = self.work.file("key");
        std::fs::write(&key, passphrase).unwrap();
        let words = [
            "cryptsetup",
            "open",
            "--test-passphrase",
            "--key-slot",
            "0",
            "--key-file",
            key.to_str().unwrap(),
            image.to_str().unwrap(),
        ];
        let contender = Contender {
            name: "cryptsetup",
            command: words.map(str::to_owned).to_vec(),
            stdin: "/dev/null".into(),
        };
        let times = (0..5).map(|_| self.run(&contender, &[]).as_secs_f64() * 1e3).collect();
        let millis = median(times);
        println!("{name:44} {millis:>9.1} {:>10}", self.peak(&contender));
        millis
    }

    fn initramfs(&self) {
        println!("What it adds to a dracut initramfs, compressed (zstd -3)\n");
        for variant in ["sh-busybox", "sysd-networkd"] {
            let with = dracut(variant, false);
            let without = dracut(variant, true);
            println!(
                "  {variant:16} {without:>10} bytes without, {with:>10} with: {:>5} KiB more",
                (with - without) / 1024
            );
        }
        let program = target().join("boot/kcrypt-discovery-challenger");
        let size = std::fs::metadata(program).unwrap().len();
        println!("  the program alone is {} KiB before compression", size / 1024);
    }
}

fn dracut(variant: &str, without: bool) -> u64 {
    let mut command = Command::new(project().join("image/dracut-initramfs.sh"));
    command.arg(variant);
    if without {
        command.env("LATCHKEY_WITHOUT", "1");
    }
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let path = String::from_utf8(done.stdout).unwrap();
    std::fs::metadata(path.trim()).unwrap().len()
}

/// Runs a command with `stdin` and returns its output.
fn feed(command: &mut Command, stdin: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A tang server behind socat, as its systemd socket would start it: one process per request.
struct Tang {
    port: u16,
    socat: Child,
}

impl Tang {
    fn start(work: &Work) -> Self {
        let keys = work.file("tang");
        std::fs::create_dir(&keys).unwrap();
        let made = Command::new("/usr/libexec/tangd-keygen")
            .arg(&keys)
            .status()
            .expect("tang is installed");
        assert!(made.success());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let socat = Command::new("socat")
            .arg(format!("TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr"))
            .arg(format!("EXEC:/usr/libexec/tangd {}", keys.display()))
            .stderr(Stdio::null())
            .spawn()
            .expect("socat is installed");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "tang does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, socat }
    }
}

impl Drop for Tang {
    fn drop(&mut self) {
        let _ = self.socat.kill();
        let _ = self.socat.wait();
    }
}
