//! The key server under load: what a request of either generation costs it, and a boot storm.
//!
//! Clients and server share the machine's cores, and a client's part (two RSA private key operations) is dearer than the
//! server's. So what the server can do is told from the processor time it used, not from the clock.

use std::{
    sync::{
        Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use latchkey_soft_identity::SoftIdentity;
use latchkey_tests::kms::{Kms, Volume, secret_yaml};

use crate::fleet::{self, Generation};
use crate::process::{cpu, memory};

const FLEET: usize = 2000;
/// Requests of each generation for the steady load, and how many clients make them.
const REQUESTS: usize = 4000;
const CLIENTS: usize = 8;
/// A client of the storm waits, and signs; it needs little.
const STACK: usize = 256 * 1024;

pub(crate) fn run() {
    let machines = fleet::machines(FLEET);
    println!(
        "The key server: {FLEET} machines with TPM identities of their own, all with the server's default limits\n"
    );
    let v1 = server_of_v1(&machines);
    let mut v2 = Kms::new("bench-v2").expect("a key server");
    v2.start().expect("the key server starts");

    println!("Storms: all {FLEET} machines connect at the same moment\n");
    println!(
        "{:44} {:>8} {:>9} {:>9} {:>9} {:>9} {:>10}",
        "", "failed", "all in s", "p50 ms", "p99 ms", "CPU s", "peak MiB"
    );
    storm("v2, first boot: enrolment, two files synced", &v2, &machines, &|machine| {
        fleet::enrol(v2.port(), machine)
    });
    storm("v2, second boot: its PCRs are learned", &v2, &machines, &|machine| {
        fleet::unlock(v2.port(), machine, Generation::V2)
    });
    storm("v2, any later boot", &v2, &machines, &|machine| {
        fleet::unlock(v2.port(), machine, Generation::V2)
    });
    storm("v1, boot", &v1, &machines, &|machine| fleet::unlock(v1.port(), machine, Generation::V1));

    println!(
        "\nSteady load: {CLIENTS} clients, {REQUESTS} requests of each generation, in turns of a quarter\n"
    );
    println!(
        "{:20} {:>12} {:>12} {:>16} {:>9} {:>9} {:>9} {:>9}",
        "", "CPU ms/req", "req/s, core", "req/s, as run", "p50 ms", "p99 ms", "RSS MiB", "failed"
    );
    let mut loads = [Load::new(&v1, Generation::V1), Load::new(&v2, Generation::V2)];
    for _ in 0..4 {
        loads.iter_mut().for_each(|load| load.turn(&machines, REQUESTS / 4));
    }
    loads.iter_mut().for_each(Load::tell);
    let [v1, v2] = &loads;
    println!("\n  a request of v2 costs {:.2} x one of v1\n", v2.cpu_each() / v1.cpu_each());
}

/// A server that has a volume with an operator's passphrase for each machine, one file each.
fn server_of_v1(machines: &[SoftIdentity]) -> Kms {
    let mut kms = Kms::new("bench-v1").expect("a key server");
    for (number, machine) in machines.iter().enumerate() {
        let (volume, secret) = (format!("node-{number}"), format!("secret-{number}"));
        let hash = machine.pubhash().to_string();
        let volume = Volume {
            name: &volume,
            tpm_hash: &hash,
            secret: Some((&secret, "passphrase")),
            quarantined: false,
        };
        let yaml = format!("{}---\n{}", volume.yaml(), secret_yaml(&secret, "passphrase", &hash));
        std::fs::write(kms.store().join(format!("node-{number}.yaml")), yaml).unwrap();
    }
    kms.start().expect("the key server starts");
    kms
}

type Exchange<'a> = &'a (dyn Fn(&SoftIdentity) -> Result<Vec<u8>, String> + Sync);

fn storm(name: &str, kms: &Kms, machines: &[SoftIdentity], exchange: Exchange<'_>) {
    let before = cpu(pid(kms));
    let start = Barrier::new(machines.len() + 1);
    let took = Mutex::new(Vec::with_capacity(machines.len()));
    let failures = Mutex::new(Vec::new());
    let all = thread::scope(|scope| {
        for machine in machines {
            let (start, took, failures) = (&start, &took, &failures);
            thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, move || {
                    start.wait();
                    let begun = Instant::now();
                    match exchange(machine) {
                        Ok(_) => took.lock().unwrap().push(begun.elapsed()),
                        Err(error) => failures.lock().unwrap().push(error),
                    }
                })
                .unwrap();
        }
        start.wait();
        Instant::now()
    })
    .elapsed();
    let (took, failures) = (took.into_inner().unwrap(), failures.into_inner().unwrap());
    println!(
        "{name:44} {:>8} {:>9.1} {:>9.0} {:>9.0} {:>9.2} {:>10.1}",
        failures.len(),
        all.as_secs_f64(),
        quantile(&took, 0.5),
        quantile(&took, 0.99),
        (cpu(pid(kms)) - before).as_secs_f64(),
        memory(pid(kms), "VmHWM:"),
    );
    if let Some(failure) = failures.first() {
        println!("    the first failure: {failure}");
    }
}

/// A steady load of one generation.
struct Load<'a> {
    kms: &'a Kms,
    generation: Generation,
    took: Vec<Duration>,
    failed: usize,
    cpu: Duration,
    all: Duration,
}

impl<'a> Load<'a> {
    fn new(kms: &'a Kms, generation: Generation) -> Self {
        let (cpu, all) = (Duration::ZERO, Duration::ZERO);
        Self { kms, generation, took: Vec::new(), failed: 0, cpu, all }
    }

    fn turn(&mut self, machines: &[SoftIdentity], requests: usize) {
        let (before, begun) = (cpu(pid(self.kms)), Instant::now());
        let next = AtomicUsize::new(0);
        let (port, generation) = (self.kms.port(), self.generation);
        let client = || {
            let (mut took, mut failed) = (Vec::new(), 0);
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= requests {
                    return (took, failed);
                }
                let begun = Instant::now();
                match fleet::unlock(port, &machines[number % machines.len()], generation) {
                    Ok(_) => took.push(begun.elapsed()),
                    Err(_) => failed += 1,
                }
            }
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
            for client in clients {
                let (took, failed) = client.join().unwrap();
                self.took.extend(took);
                self.failed += failed;
            }
        });
        self.all += begun.elapsed();
        self.cpu += cpu(pid(self.kms)) - before;
    }

    /// Seconds of the processor for one request.
    fn cpu_each(&self) -> f64 {
        self.cpu.as_secs_f64() / self.took.len() as f64
    }

    fn tell(&mut self) {
        let name = match self.generation {
            Generation::V1 => "v1, /getPass",
            Generation::V2 => "v2, /tpm-attestation",
        };
        println!(
            "{name:20} {:>12.3} {:>12.0} {:>16.0} {:>9.1} {:>9.1} {:>9.1} {:>9}",
            self.cpu_each() * 1e3,
            1.0 / self.cpu_each(),
            self.took.len() as f64 / self.all.as_secs_f64(),
            quantile(&self.took, 0.5),
            quantile(&self.took, 0.99),
            memory(pid(self.kms), "VmRSS:"),
            self.failed,
        );
    }
}

/// Milliseconds.
fn quantile(times: &[Duration], part: f64) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    let at = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
    times.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

fn pid(kms: &Kms) -> u32 {
    kms.process().expect("a running server")
}
