//! `encrypt`: what becomes of a partition, what is refused, and that no power cut loses data.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod disk;
mod outcome;
mod power;
mod rotation;
mod trace;
