//! The command line of `kcrypt-discovery-challenger`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use kcrypt_discovery_challenger::cli::{self, Command, Invocation, table, usage};
use kcrypt_discovery_challenger::clock::Steps;
use kcrypt_discovery_challenger::exchange::Partition;
use kcrypt_discovery_challenger::info::{DEFAULT_PCRS, Info};
use kcrypt_discovery_challenger::nv::Nv;
use kcrypt_discovery_challenger::passphrase::Deadline;
use kcrypt_discovery_challenger::{
    BootError, cleanup, doctor, encrypt, install, logging, oem, plugin, prompt, rekey, unlock,
};
use latchkey_config::{Challenger, Config};
use latchkey_tpm::Tpm;

/// The TPM's driver is loaded by now, or never.
const TPM_PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    latchkey_tpm::silence_tss_log();
    keep_out_of_core_dumps();
    match Invocation::parse(lexopt::Parser::from_env()) {
        Err(error) => {
            eprintln!("latchkey: {error}. See --help");
            ExitCode::from(1)
        }
        Ok(invocation) => {
            logging::init(invocation.has(&table::DEBUG));
            let code = match run(&invocation) {
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

fn run(invocation: &Invocation) -> Result<(), BootError> {
    if invocation.has(&table::HELP) {
        return print(&usage(invocation.verb));
    }
    if invocation.has(&table::VERSION) {
        return print(&format!("{} {}\n", cli::NAME, env!("CARGO_PKG_VERSION")));
    }
    match invocation.verb.command {
        Command::Pubhash => print_pubhash(invocation),
        Command::Unlock => unlock::run(directories(invocation)),
        Command::Encrypt => encrypt_partitions(invocation),
        Command::Rekey => change_key(invocation),
        Command::Get => print_passphrase(invocation),
        Command::Info => show_info(invocation),
        Command::CheckNv => print(&open_nv(invocation)?.check()?),
        Command::ReadNv => write_out(&open_nv(invocation)?.read()?),
        Command::Cleanup => clean_up(invocation),
        Command::Doctor => examine(invocation),
        Command::DiscoveryPassword => plugin::run(&directories(invocation)),
    }
}

fn directories(invocation: &Invocation) -> Vec<PathBuf> {
    invocation.values(&table::CONFIG).map(PathBuf::from).collect()
}

/// What concerns the TPM, for verbs that only look: they work whatever state the machine is in, so a configuration that
/// cannot be read is only worth a line.
fn tpm_settings(invocation: &Invocation) -> Result<Challenger, BootError> {
    let configured = oem::load_mounted(&directories(invocation));
    let configured = configured.inspect_err(|error| log::warn!("{error}"));
    let settings = configured.map(|config| config.challenger).unwrap_or_default();
    with_tpm_options(invocation, settings)
}

/// What concerns the sealed passphrase. A configuration that cannot be read might name another NV index.
fn nv_settings(invocation: &Invocation) -> Result<Challenger, BootError> {
    let settings = match oem::load_mounted(&directories(invocation)) {
        Ok(config) => config.challenger,
        Err(error) if !invocation.has(&table::NV_INDEX) => return Err(error),
        Err(error) => {
            log::warn!("{error}");
            Challenger::default()
        }
    };
    with_tpm_options(invocation, settings)
}

fn with_tpm_options(
    invocation: &Invocation,
    mut settings: Challenger,
) -> Result<Challenger, BootError> {
    if let Some(device) = invocation.text(&table::TPM_DEVICE)? {
        settings.tpm_device = Some(device);
    }
    if let Some(index) = invocation.text(&table::NV_INDEX)? {
        settings.nv_index = cli::handle(&table::NV_INDEX, &index, 0x0100_0000..=0x01ff_ffff)?;
    }
    Ok(settings)
}

fn open_tpm(settings: &Challenger) -> Result<Tpm, BootError> {
    Ok(Tpm::open_within(settings.tpm_device.as_deref(), TPM_PATIENCE)?)
}

fn print_pubhash(invocation: &Invocation) -> Result<(), BootError> {
    print(&unlock::pubhash(tpm_settings(invocation)?.tpm_device.as_deref())?)
}

fn show_info(invocation: &Invocation) -> Result<(), BootError> {
    let settings = tpm_settings(invocation)?;
    let pcrs = match invocation.text(&table::PCRS)? {
        Some(text) => cli::pcrs(&text)?,
        None => DEFAULT_PCRS.to_vec(),
    };
    let mut tpm = open_tpm(&settings)?;
    let info = Info::read(&mut tpm, settings.nv_index, settings.c_index, &pcrs);
    let json = invocation.has(&table::JSON);
    print(&if json { info.to_json() } else { info.to_text() })?;
    Ok(info.complete()?)
}

fn open_nv(invocation: &Invocation) -> Result<Nv, BootError> {
    let settings = nv_settings(invocation)?;
    Ok(Nv::new(open_tpm(&settings)?, settings))
}

fn clean_up(invocation: &Invocation) -> Result<(), BootError> {
    let settings = nv_settings(invocation)?;
    let options = cleanup::Options {
        keys: invocation.has(&table::KEYS),
        force: invocation.has(&table::FORCE),
        sure: invocation.has(&table::SURE),
    };
    cleanup::run(&mut open_tpm(&settings)?, &settings, options)
}

fn examine(invocation: &Invocation) -> Result<(), BootError> {
    let options = doctor::Options {
        directories: directories(invocation),
        tpm_device: invocation.text(&table::TPM_DEVICE)?,
        unlock_test: invocation.has(&table::UNLOCK_TEST),
    };
    let json = invocation.has(&table::JSON);
    let findings = doctor::run(&options, &mut |finding| {
        if json { Ok(()) } else { print(&format!("{finding}\n")) }
    })?;
    if json {
        print(&doctor::to_json(&findings))?;
    }
    doctor::verdict(&findings)
}

fn print_passphrase(invocation: &Invocation) -> Result<(), BootError> {
    let text = |flag| Ok::<_, BootError>(invocation.text(flag)?.unwrap_or_default());
    let partition = Partition {
        label: text(&table::PARTITION_LABEL)?,
        name: text(&table::PARTITION_NAME)?,
        uuid: text(&table::PARTITION_UUID)?,
    };
    if partition == Partition::default() {
        return Err(BootError::Usage(
            "get needs --partition-label, --partition-name or --partition-uuid".into(),
        ));
    }
    let attempts = attempts(invocation)?;
    let config = get_configuration(invocation)?;
    let steps = Steps::default();
    let passphrase = unlock::with_source(&config, &steps, |source, deadline| {
        source.release(&partition, Deadline { attempts, ..deadline }, &steps)
    })?;
    write_out(&passphrase)
}

fn attempts(invocation: &Invocation) -> Result<Option<u32>, BootError> {
    let wrong =
        || BootError::Usage(format!("--{}: a number from 1 on is wanted", table::ATTEMPTS.long));
    let text = invocation.text(&table::ATTEMPTS)?;
    let number = text.map(|text| text.parse().ok().filter(|number| *number > 0).ok_or_else(wrong));
    number.transpose()
}

/// The configuration, and over it what was given. Whoever names a server needs no configuration.
fn get_configuration(invocation: &Invocation) -> Result<Config, BootError> {
    let servers = invocation.texts(&table::CHALLENGER_SERVER)?;
    let directories = directories(invocation);
    let mut config = if servers.is_empty() {
        oem::load(&directories, oem::PATIENCE)?
    } else {
        oem::load_mounted(&directories)?
    };
    let challenger = &mut config.challenger;
    if !servers.is_empty() {
        challenger.servers = servers;
        challenger.mdns = false;
    }
    challenger.mdns |= invocation.has(&table::MDNS);
    if let Some(certificate) = invocation.text(&table::CERTIFICATE)? {
        challenger.certificate = Some(pem(certificate)?);
    }
    if let Some(device) = invocation.text(&table::TPM_DEVICE)? {
        challenger.tpm_device = Some(device);
    }
    Ok(config)
}

/// PEM text, or what is in the file.
fn pem(text_or_path: String) -> Result<String, BootError> {
    if text_or_path.contains("-----BEGIN ") {
        return Ok(text_or_path);
    }
    let error = |error| {
        BootError::Setting(format!("--{} {text_or_path}: {error}", table::CERTIFICATE.long))
    };
    std::fs::read_to_string(&text_or_path).map_err(error)
}

fn encrypt_partitions(invocation: &Invocation) -> Result<(), BootError> {
    let options = install::Options {
        labels: invocation.operands.clone(),
        device: invocation.value(&table::DEVICE).map(PathBuf::from),
        recovery_key: invocation.has(&table::RECOVERY_KEY),
        new: invocation.has(&table::NEW),
    };
    let config = oem::load(&directories(invocation), oem::PATIENCE)?;
    if invocation.has(&table::DRY_RUN) {
        return print(&install::plan(&config, &options)?);
    }
    install::run(&config, &options, &mut |label, key| {
        log::info!(
            "the recovery key of {label} is on stdout. Keep it off this machine: it is shown this once"
        );
        print(&format!("{label} {key}\n"))?;
        // Not into a file or a journal, where nobody could read it off with a telephone.
        match encrypt::qr_code(key).filter(|_| std::io::stdout().is_terminal()) {
            Some(code) => print(&code),
            None => Ok(()),
        }
    })
}

fn change_key(invocation: &Invocation) -> Result<(), BootError> {
    let config = oem::load(&directories(invocation), oem::PATIENCE)?;
    let label = invocation.operands.first().cloned().unwrap_or_default();
    let wait = invocation.text(&table::WAIT)?;
    let options = rekey::Options {
        device: invocation.value(&table::DEVICE).map(PathBuf::from),
        wait: cli::seconds(&table::WAIT, wait.as_deref().unwrap_or("0"))?,
        key: match invocation.has(&table::KEY_STDIN) {
            true => Some(prompt::from_stdin(&format!("A key of {label}: "))?),
            false => None,
        },
        label,
    };
    rekey::run(&config, &options)
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
