//! `latchkey`: the mesh agent, and the operator's command beside it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Parser;
use latchkey_config::cmdline::CMDLINE;
use latchkey_config::{Local, Mesh};
use latchkey_mesh::agent::{self, Options};
use latchkey_mesh::boot::BootReport;
use latchkey_mesh::cli::{Arguments, HandoverVerb, Verb};
use latchkey_mesh::error::{Error, Result};
use latchkey_mesh::handover::{self, HandOver};
use latchkey_mesh::settings::{Settings, from_cloud_config};
use latchkey_mesh::status::Status;
use nix::sys::stat::fstat;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let hand_over = HandOver::default();
    let mesh = || mesh(&arguments.cloud_config);
    match &arguments.verb {
        Verb::Agent { down: false } => {
            let directories = arguments.cloud_config.clone();
            let settings_again = Box::new(move || from_cloud_config(&self::mesh(&directories)?));
            agent::run(from_cloud_config(&mesh()?)?, Options { hand_over, settings_again })?
        }
        Verb::Agent { down: true } => take_down(&from_cloud_config(&mesh()?)?, &hand_over)?,
        Verb::Status { boot: true, json } => {
            return show_boot(&BootReport::read(&hand_over)?, *json);
        }
        Verb::Status { boot: false, json } => {
            return show_status(&Status::read(&mesh()?, &hand_over)?, *json);
        }
        Verb::Handover(HandoverVerb::Check) => return check(mesh(), &hand_over),
        Verb::Handover(HandoverVerb::Forget { credentials }) => {
            handover::forget(&hand_over, credentials.as_deref())?
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn mesh(directories: &[PathBuf]) -> Result<Mesh> {
    let directories: Vec<&Path> = directories.iter().map(PathBuf::as_path).collect();
    // The mesh of the command line and the files: after boot, no config_url is asked for any more.
    let cmdline = std::fs::read(CMDLINE).unwrap_or_default();
    let local = Local::read(&directories, &String::from_utf8_lossy(&cmdline))?;
    local.mesh()?.ok_or(Error::NotConfigured)
}

fn take_down(settings: &Settings, hand_over: &HandOver) -> Result<()> {
    if agent::down(settings, hand_over)? {
        log::info!(
            "{} is gone, and the key of this boot with it: the next one comes with the next boot",
            settings.interface
        );
    } else {
        log::info!("there is no {}", settings.interface);
    }
    Ok(())
}

fn show_status(status: &Status, json: bool) -> Result<ExitCode> {
    let text =
        if json { format!("{}\n", status.to_json()?) } else { status.to_text(SystemTime::now()) };
    show(&text, status.is_up())
}

fn show_boot(report: &BootReport, json: bool) -> Result<ExitCode> {
    let text = if json { format!("{}\n", report.to_json()?) } else { report.to_text() };
    show(&text, report.is_open())
}

fn show(text: &str, good: bool) -> Result<ExitCode> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Output(error)),
        _ => Ok(ExitCode::from(if good { 0 } else { 3 })),
    }
}

/// No mesh wanted, or a boot that rightly has no identity, is no failure of the service. All else
/// is: the agent will say which.
fn check(mesh: Result<Mesh>, hand_over: &HandOver) -> Result<ExitCode> {
    let (level, reason) = match mesh {
        Err(not_configured @ Error::NotConfigured) => {
            // The initramfs saw another configuration. Nobody will take what it handed over.
            handover::forget(hand_over, None)?;
            (log::Level::Info, not_configured.to_string())
        }
        _ => match hand_over.reason_to_stay_idle() {
            Ok(Some(reason)) => (log::Level::Warn, reason),
            Ok(None) | Err(_) => return Ok(ExitCode::SUCCESS),
        },
    };
    log::log!(level, "the agent stays off: {reason}");
    Ok(ExitCode::FAILURE)
}

/// `JOURNAL_STREAM` names the journal's socket (systemd.exec(5)), but it is inherited by programs
/// whose stderr is another.
fn stderr_is_journal() -> bool {
    let of_stderr = fstat(std::io::stderr()).map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
    std::env::var("JOURNAL_STREAM").is_ok_and(|journal| of_stderr == Ok(journal))
}

/// One line a message, on stderr; the journal reads the severity from `<N>` (sd-daemon(3)).
fn start_log() {
    let journal = stderr_is_journal();
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("LATCHKEY_LOG", "info"))
        .format(move |line, record| {
            let (severity, name) = match record.level() {
                log::Level::Error => (3, "error: "),
                log::Level::Warn => (4, "warning: "),
                log::Level::Info => (6, ""),
                log::Level::Debug | log::Level::Trace => (7, "debug: "),
            };
            if journal {
                writeln!(line, "<{severity}>{}", record.args())
            } else {
                writeln!(line, "latchkey: {name}{}", record.args())
            }
        })
        .init();
}
