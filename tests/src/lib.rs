//! The harness of the whole-system tests: software TPMs, disks, virtual machines with a console to read and type at, the
//! key server, and the report that a booted machine gives of itself.
//!
//! A scenario is: a [`tpm::Tpm`], a [`kms::Kms`], a [`disk::Disk`], then boots ([`vm::Vm`]) of that disk with that TPM.
//! Meshes need no machines: their hosts are network namespaces ([`mesh`]), their registry real nats-servers ([`nats`]).
//! Everything is made anew for each scenario from one cached image, and ends with it.

pub mod child;
pub mod disk;
pub mod error;
pub mod front;
pub mod kms;
pub mod lan;
pub mod lane;
pub mod mesh;
pub mod nats;
pub mod place;
pub mod report;
pub mod scenario;
pub mod shell;
pub mod tls;
pub mod tpm;
pub mod transcript;
pub mod vm;
