//! `kcrypt-discovery-challenger`: the program of the initramfs. It asks the TPM, or a key server
//! that asks the TPM, for a LUKS passphrase, opens the volume, and leaves a mesh identity.
//!
//! One process, no async runtime, no shell, no exec on the way to an open volume. Two threads, and one
//! for each key server, and each of its addresses, that is being asked. The order of a boot is in [`unlock`].

pub mod automatic;
pub mod binding;
pub mod cleanup;
pub mod cli;
pub mod clock;
pub mod dial;
pub mod disk;
pub mod doctor;
pub mod encrypt;
mod error;
pub mod exchange;
pub mod fetch;
mod gpt;
pub mod handover;
pub mod info;
pub mod install;
pub mod logging;
pub mod luks;
pub mod network;
pub mod nv;
pub mod oem;
pub mod passphrase;
pub mod plugin;
pub mod prompt;
pub mod rekey;
pub mod resolver;
pub mod token;
pub mod unlock;
mod verify;

pub use error::BootError;
