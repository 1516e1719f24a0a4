//! What must hold for every parser of foreign bytes, whatever the bytes.
//!
//! A target takes bytes and panics if something does not hold: that what was read and written again reads the same, that an
//! error tells nothing secret, that more input never means less caution. libFuzzer runs them (`make fuzz`), and so does an
//! ordinary test on [`seeds`] and on all that was ever found (`fuzz/regressions`).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a target fails by panicking"
)]

mod configuration;
mod files;
mod ikto;
mod member;
mod messages;
mod network;
mod responder;
pub mod seeds;
mod tpm;
mod userspace;

/// A parser, and what its bytes come from.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As in `fuzz/fuzz_targets/NAME.rs`.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 19] = [
    Target { name: "v1_token", run: messages::v1_token },
    Target { name: "v1_message", run: messages::v1_message },
    Target { name: "v2_message", run: messages::v2_message },
    Target { name: "plugin_event", run: messages::plugin_event },
    Target { name: "tpm_structure", run: tpm::structure },
    Target { name: "ek", run: tpm::ek },
    Target { name: "cloud_config", run: configuration::cloud_config },
    Target { name: "cmdline", run: configuration::cmdline },
    Target { name: "manifest", run: files::manifest },
    Target { name: "disk", run: files::disk },
    Target { name: "luks_token", run: files::luks_token },
    Target { name: "identity", run: files::identity },
    Target { name: "timeline", run: files::timeline },
    Target { name: "dns", run: network::dns },
    Target { name: "mdns", run: responder::mdns },
    Target { name: "http", run: network::http },
    Target { name: "member", run: member::member },
    Target { name: "ikto", run: ikto::ikto },
    Target { name: "uapi", run: userspace::answer },
];

/// Runs the target of this name.
///
/// # Panics
/// If there is none, and if the target finds something.
pub fn run(name: &str, data: &[u8]) {
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        panic!("there is no target {name}")
    };
    (target.run)(data);
}

/// What stands for a secret in the seeds. No error may repeat it.
pub(crate) const SECRET: &str = "correct-horse-battery";

/// An error of a message that holds a secret.
pub(crate) fn tells_nothing(error: &impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.contains(SECRET), "a secret is in an error: {text}");
    assert!(text.len() < 1000, "an error of {} bytes", text.len());
}
