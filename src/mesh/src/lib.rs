//! The mesh agent: the identity handed over at boot, the address that follows from it, the
//! WireGuard device that carries both.

pub mod address;
pub mod admin;
pub mod advertise;
pub mod agent;
pub mod boot;
pub mod cache;
pub mod claim;
pub mod cli;
mod clients;
pub mod device;
pub mod error;
pub mod handover;
pub mod ikto;
pub mod info;
pub mod key;
pub mod leave;
pub mod members;
pub mod metrics;
pub mod milestones;
mod netlink;
mod notify;
pub mod path;
pub mod plan;
pub mod registry;
mod resolve;
pub mod settings;
pub mod status;
pub mod terminal;
mod userspace;
pub mod view;
