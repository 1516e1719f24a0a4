//! One line on stderr for each thing that happens, and the prompt below it where one stands.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;

use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::prompt::shown_on_console;

/// CRYPT_LOG_ERROR of libcryptsetup.h.
const ERROR: c_int = 1;

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
    libcryptsetup_rs::set_log_callback::<()>(Some(cryptsetup_says), None);
}

/// libcryptsetup writes to stdout by itself, where a plugin's answer and nothing else may be. What it
/// calls an error names the cause, which its return code does not.
extern "C" fn cryptsetup_says(level: c_int, message: *const c_char, _user: *mut c_void) {
    if message.is_null() {
        return;
    }
    // SAFETY: libcryptsetup passes a NUL-terminated string that lives as long as this call.
    #[allow(unsafe_code)]
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let level = if level == ERROR { Level::Warn } else { Level::Debug };
    log::log!(level, "cryptsetup: {}", message.trim_end());
}
