//! `latchkey`: the mesh agent, and the operator's command beside it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Parser;
use latchkey_config::cmdline::CMDLINE;
use latchkey_config::{Local, Membership};
use latchkey_mesh::agent::{self, Options};
use latchkey_mesh::boot::BootReport;
use latchkey_mesh::cli::{self, Arguments, HandoverVerb, RegistryVerb, Source, Verb};
use latchkey_mesh::error::{EXIT_REGISTRY, Error, Result};
use latchkey_mesh::handover::{self, HandOver};
use latchkey_mesh::registry::nats::{self, BucketOptions, BucketState};
use latchkey_mesh::settings::{KeyFrom, Settings, from_cloud_config};
use latchkey_mesh::status::{self, Detail, Form, Status};
use latchkey_mesh::terminal::printable;
use latchkey_mesh::{admin, ikto, info, leave};
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
    let settings = |source: &Source| settings(source.config.as_deref(), &arguments.cloud_config);
    match &arguments.verb {
        Verb::Init { mesh_ip_net, subnet_prefix_length } => {
            return print(&ikto::init(Some(mesh_ip_net), Some(*subnet_prefix_length))?);
        }
        Verb::Agent(agent) if agent.down => {
            take_down(&at(&agent.socket, settings(&agent.source)?), &hand_over)?
        }
        Verb::Agent(agent) => run_agent(agent, arguments.cloud_config.clone(), hand_over)?,
        Verb::Info { socket } => {
            let socket = socket.clone().unwrap_or_else(admin::default_socket);
            return print(&info::to_text(&admin::node_info(&socket)?));
        }
        Verb::Status(cli::Status { boot: true, json, .. }) => {
            return show_boot(&BootReport::read(&hand_over)?, *json);
        }
        Verb::Status(status) => {
            return show_status(status, &arguments.cloud_config, &hand_over);
        }
        Verb::Leave { source, socket } => {
            log::info!("{}", leave::run(&at(socket, settings(source)?), &hand_over)?)
        }
        Verb::Registry(RegistryVerb::Create { source, replicas }) => {
            return create_bucket(&settings(source)?, *replicas);
        }
        Verb::Handover(HandoverVerb::Check) => {
            return check(mesh(&arguments.cloud_config), &hand_over);
        }
        Verb::Handover(HandoverVerb::Forget { credentials }) => {
            handover::forget(&hand_over, credentials.as_deref())?
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// From the file if there is one, else from the cloud-config.
fn settings(config: Option<&Path>, cloud_config: &[PathBuf]) -> Result<Settings> {
    match config {
        Some(file) => ikto::Config::read(file),
        None => from_cloud_config(&mesh(cloud_config)?),
    }
}

/// With the socket that the command line names.
fn at(socket: &Option<PathBuf>, configured: Settings) -> Settings {
    Settings { socket: socket.clone().unwrap_or(configured.socket), ..configured }
}

fn mesh(directories: &[PathBuf]) -> Result<Membership> {
    let directories: Vec<&Path> = directories.iter().map(PathBuf::as_path).collect();
    // The mesh of the command line and the files: after boot, no config_url is asked for any more.
    let cmdline = std::fs::read(CMDLINE).unwrap_or_default();
    let local = Local::read(&directories, &String::from_utf8_lossy(&cmdline))?;
    local.membership()?.ok_or(Error::NotConfigured)
}

/// What stands on the command line goes before what is configured, also when that is read again.
fn run_agent(
    arguments: &cli::Agent,
    cloud_config: Vec<PathBuf>,
    hand_over: HandOver,
) -> Result<()> {
    let config = arguments.source.config.clone();
    let (socket, metrics) = (arguments.socket.clone(), arguments.metrics);
    let settings_again = Box::new(move || {
        let configured = at(&socket, settings(config.as_deref(), &cloud_config)?);
        Ok(Settings { metrics: metrics.or(configured.metrics), ..configured })
    });
    agent::run(settings_again()?, Options { hand_over, settings_again })
}

fn create_bucket(settings: &Settings, replicas: u8) -> Result<ExitCode> {
    let registry = settings.registry.as_ref().ok_or(Error::NoRegistry)?;
    let runtime = event_loop()?;
    let bucket = &registry.bucket;
    match runtime.block_on(nats::create_bucket(registry, BucketOptions { replicas }))? {
        BucketState::Created => log::info!("bucket {bucket} is created, replicas: {replicas}"),
        BucketState::Equal => log::info!("bucket {bucket} is there, and as it should be"),
        BucketState::Different(differences) => {
            log::error!(
                "bucket {bucket} is there, and differs from what a mesh needs; it is left as it is"
            );
            differences.iter().for_each(|difference| log::error!("{difference}"));
            return Ok(ExitCode::from(EXIT_REGISTRY));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn take_down(settings: &Settings, hand_over: &HandOver) -> Result<()> {
    let interface = &settings.interface;
    match (agent::down(settings, hand_over)?, &settings.key) {
        (false, _) => log::info!("there is no {interface}"),
        (true, KeyFrom::File(_)) => log::info!("{interface} is gone"),
        (true, KeyFrom::HandOver { .. }) => log::info!(
            "{interface} is gone, and the key of this boot with it: the next one comes with the next boot"
        ),
    }
    Ok(())
}

fn show_status(
    arguments: &cli::Status,
    cloud_config: &[PathBuf],
    hand_over: &HandOver,
) -> Result<ExitCode> {
    let settings = match settings(arguments.source.config.as_deref(), cloud_config) {
        Err(Error::NotConfigured) => None, // an agent with an ikto.json may run, whose socket says all
        settings => Some(settings?),
    };
    let configured = settings.as_ref().map(|settings| settings.socket.clone());
    let socket = arguments.socket.clone().or(configured).unwrap_or_else(admin::default_socket);
    let read = async || {
        let view = admin::fetch_view(&socket).await;
        match Status::read(settings.as_ref(), view, hand_over) {
            Err(Error::NoAgent { .. }) if arguments.socket.is_none() => Err(Error::NotConfigured),
            status => status,
        }
    };
    let form = match (arguments.json, arguments.verbose) {
        (true, _) => Form::Json,
        (false, true) => Form::Text(Detail::Full),
        (false, false) => Form::Text(Detail::Brief),
    };
    let runtime = event_loop()?;
    if arguments.watch {
        runtime.block_on(status::watch(read, form))?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = runtime.block_on(read())?;
    let text = match form {
        Form::Json => format!("{}\n", status.to_json()?),
        Form::Text(detail) => status.to_text(detail, SystemTime::now()),
    };
    show(&text, status.is_up())
}

fn show_boot(report: &BootReport, json: bool) -> Result<ExitCode> {
    let text = if json { format!("{}\n", report.to_json()?) } else { report.to_text() };
    show(&text, report.is_open())
}

fn show(text: &str, good: bool) -> Result<ExitCode> {
    print(text)?;
    Ok(ExitCode::from(if good { 0 } else { 3 }))
}

/// Whoever reads may stop when he has seen enough.
fn print(text: &str) -> Result<ExitCode> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Output(error)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn event_loop() -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| Error::Kernel { action: "start the event loop".into(), source })
}

/// No mesh wanted, or a boot that rightly has no identity, is no failure of the service. All else
/// is: the agent will say which.
fn check(mesh: Result<Membership>, hand_over: &HandOver) -> Result<ExitCode> {
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

/// One line a message, on stderr; the journal reads the severity from `<N>` (sd-daemon(3)). Messages name members,
/// addresses and reasons that others have written, so none of it may end the line or be obeyed by a terminal.
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
            let text = record.args().to_string();
            let text = printable(&text);
            if journal {
                writeln!(line, "<{severity}>{text}")
            } else {
                writeln!(line, "latchkey: {name}{text}")
            }
        })
        .init();
}
