//! One line on stderr for each thing that happens, and the prompt below it where one stands.

use std::io::Write;

use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::prompt::shown_on_console;

/// Logs to stderr: what an operator needs, or everything with `debug`.
///
/// Other people's libraries are not heard: tss-esapi calls an error what is an ordinary answer here.
pub fn init(debug: bool) {
    let ours = if debug { LevelFilter::Debug } else { LevelFilter::Info };
    let started = Builder::new()
        .filter_level(LevelFilter::Off)
        .filter_module("kcrypt_discovery_challenger", ours)
        .filter_module("latchkey_tpm", ours)
        .filter_module("latchkey_config", ours)
        .target(Target::Stderr)
        .format(|buffer, record| {
            let prompt = shown_on_console();
            let (before, after) = if prompt.is_empty() { ("", "") } else { ("\r", "\r\n") };
            let end = if after.is_empty() { "\n" } else { after };
            let level = if record.level() == Level::Debug { "debug: " } else { "" };
            write!(buffer, "{before}latchkey: {level}{}{end}{prompt}", record.args())
        })
        .try_init();
    if let Err(error) = started {
        eprintln!("latchkey: no log: {error}");
    }
}
