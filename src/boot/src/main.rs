//! The command line of `kcrypt-discovery-challenger`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use kcrypt_discovery_challenger::clock::Steps;
use kcrypt_discovery_challenger::exchange::Partition;
use kcrypt_discovery_challenger::{BootError, install, logging, oem, plugin, unlock};
use lexopt::prelude::{Long, Short, Value, ValueExt};

const HELP: &str = "\
Unlock LUKS2 volumes by the TPM, or by a key server that asks the TPM.

Usage: kcrypt-discovery-challenger [--debug] [COMMAND]

Commands:
  (none)               print the TPM's pubhash, without a newline
  unlock               open the configured volumes; what the initramfs calls
  encrypt [LABEL]...   encrypt partitions in place, keeping what is on them; what an
                       installer calls. Without LABEL: install.encrypted_partitions
  get                  print the passphrase of a volume
  discovery.password   kcrypt's plugin: an event on stdin, the answer on stdout

Options:
  --debug                     say every step
  --config DIR                read cloud-config from DIR instead of /oem, /sysroot/oem and
                              /run/cos/oem; may be given more than once
  --device PATH               encrypt: the partition, instead of the one with the label
  --tpm-device DEVICE         (none) the TPM, instead of kcrypt.challenger.tpm_device
  --recovery-key              encrypt: make a recovery key as well, and print it once
  --new                       encrypt: drop what is on the partition, make a new file system
  --partition-label LABEL     get: the volume
  --partition-name NAME       get: its kernel name, for a server that goes by it
  --partition-uuid UUID       get: its partition UUID, likewise
  -h, --help                  print this
  -V, --version               print the version

Exit codes:
   0  done
   1  usage, or the system refused something
  10  configuration: the message names file, line and key
  11  no TPM            12  TPM error        13  TPM in lockout
  14  TPM owner or endorsement password set
  20  no network        21  key server unreachable, or the deadline passed
  22  the server does not speak kcrypt's protocol
  30  refused: quarantined, or unknown to the server
  31  there is no passphrase for this volume yet
  40  no such volume    41  not encrypted, or two volumes with one label
  42  the passphrase does not open the volume
  43  cryptsetup or the kernel failed
  50  the mesh identity could not be made
";

#[derive(Debug, Default)]
struct Arguments {
    command: Option<String>,
    debug: bool,
    help: bool,
    version: bool,
    config: Vec<PathBuf>,
    tpm_device: Option<String>,
    device: Option<PathBuf>,
    recovery_key: bool,
    new: bool,
    partition: Partition,
    labels: Vec<String>,
}

fn main() -> ExitCode {
    latchkey_tpm::silence_tss_log();
    keep_out_of_core_dumps();
    match parse() {
        Err(error) => {
            eprintln!("latchkey: {error}. See --help");
            ExitCode::from(1)
        }
        Ok(arguments) => {
            logging::init(arguments.debug);
            let code = match run(&arguments) {
                Ok(()) => 0,
                Err(error) => {
                    let code = error.exit_code();
                    log::error!("{error} (exit code {code})");
                    code
                }
            };
            end(code)
        }
    }
}

/// Ends the process without the exit handlers of its libraries. Where a person was quicker, the
/// automatic way's thread is still at work, and OpenSSL's handler frees the locks it stands at.
/// Nothing is lost: what is written to is not buffered, and what is secret was dropped.
fn end(code: u8) -> ! {
    // SAFETY: `_exit` takes any number, touches no memory of ours and does not return.
    #[allow(unsafe_code)]
    unsafe {
        nix::libc::_exit(code.into())
    }
}

fn run(arguments: &Arguments) -> Result<(), BootError> {
    if arguments.help {
        return print(HELP);
    }
    if arguments.version {
        return print(concat!("kcrypt-discovery-challenger ", env!("CARGO_PKG_VERSION"), "\n"));
    }
    match arguments.command.as_deref() {
        None => print_pubhash(arguments),
        Some("unlock") => unlock::run(arguments.config.clone()),
        Some("encrypt") => encrypt(arguments),
        Some("get") => print_passphrase(arguments),
        Some("discovery.password") => plugin::run(&arguments.config),
        Some(other) => Err(BootError::Usage(format!("no such command: {other}; see --help"))),
    }
}

fn parse() -> Result<Arguments, lexopt::Error> {
    let mut arguments = Arguments::default();
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        let encrypt = arguments.command.as_deref() == Some("encrypt");
        let get = arguments.command.as_deref() == Some("get");
        match argument {
            Short('h') | Long("help") => arguments.help = true,
            Short('V') | Long("version") => arguments.version = true,
            Long("debug") => arguments.debug = true,
            Long("tpm-device") => arguments.tpm_device = Some(parser.value()?.string()?),
            Long("config") => arguments.config.push(parser.value()?.into()),
            Long("device") if encrypt => arguments.device = Some(parser.value()?.into()),
            Long("recovery-key") if encrypt => arguments.recovery_key = true,
            Long("new") if encrypt => arguments.new = true,
            Long("partition-label") if get => {
                arguments.partition.label = parser.value()?.string()?
            }
            Long("partition-name") if get => arguments.partition.name = parser.value()?.string()?,
            Long("partition-uuid") if get => arguments.partition.uuid = parser.value()?.string()?,
            Value(command) if arguments.command.is_none() => {
                arguments.command = Some(command.string()?);
            }
            Value(label) if encrypt => arguments.labels.push(label.string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok(arguments)
}

/// Upstream prints the pubhash whatever state the machine is in, so a configuration that cannot be
/// read is only worth a line here; nothing is unlocked by it.
fn print_pubhash(arguments: &Arguments) -> Result<(), BootError> {
    let configured = || {
        oem::load_mounted(&arguments.config)
            .inspect_err(|error| log::warn!("{error}"))
            .ok()
            .and_then(|config| config.challenger.tpm_device)
    };
    let device = arguments.tpm_device.clone().or_else(configured);
    print(&unlock::pubhash(device.as_deref())?)
}

fn print_passphrase(arguments: &Arguments) -> Result<(), BootError> {
    let partition = &arguments.partition;
    if *partition == Partition::default() {
        return Err(BootError::Usage(
            "get needs --partition-label, --partition-name or --partition-uuid".into(),
        ));
    }
    let config = oem::load(&arguments.config, oem::PATIENCE)?;
    let steps = Steps::default();
    let passphrase = unlock::with_source(&config, &steps, |source, deadline| {
        source.release(partition, deadline, &steps)
    })?;
    write_out(&passphrase)
}

fn encrypt(arguments: &Arguments) -> Result<(), BootError> {
    let options = install::Options {
        labels: arguments.labels.clone(),
        device: arguments.device.clone(),
        recovery_key: arguments.recovery_key,
        new: arguments.new,
    };
    let config = oem::load(&arguments.config, oem::PATIENCE)?;
    install::run(&config, &options, &mut |label, key| {
        log::info!(
            "the recovery key of {label} is on stdout. Keep it off this machine: it is shown this once"
        );
        print(&format!("{label} {key}\n"))
    })
}

fn print(text: &str) -> Result<(), BootError> {
    write_out(text.as_bytes())
}

fn write_out(bytes: &[u8]) -> Result<(), BootError> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| BootError::Io { what: "write to stdout".into(), error })
}

/// Passphrases are in this memory. A kernel that refuses is no reason to leave a machine locked.
fn keep_out_of_core_dumps() {
    use nix::sys::resource::{Resource, setrlimit};
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = nix::sys::prctl::set_dumpable(false);
}
