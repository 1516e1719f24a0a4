//! Where the others are told to reach this node, and whether a NAT is in between.

use std::net::IpAddr;

use crate::error::Result;
use crate::settings::{DEFAULT_KEEPALIVE, Keepalive, Settings};

/// What goes into the own record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    pub address: IpAddr,
    /// The name that it was found under, where [`crate::settings::Advertise::Name`] is configured.
    pub name: Option<String>,
}

/// Looks up what [`Settings::advertise`] says. `known` is what it was so far: it stays as long as it is one of the right
/// answers. Names are asked for with a deadline.
///
/// # Errors
/// [`crate::error::Error::Advertise`]; what is wrong may pass.
pub async fn resolve(settings: &Settings, known: Option<&Advertised>) -> Result<Advertised> {
    let _ = settings;
    known.cloned().ok_or_else(|| crate::error::Error::Advertise { reason: "not known".into() })
}

/// Whether this host is behind a NAT: the advertised address is none of its own, or a private one while a peer of the same
/// family advertises a public one.
pub fn behind_nat(
    advertised: IpAddr,
    is_own: bool,
    peers: impl IntoIterator<Item = IpAddr>,
) -> bool {
    let _ = (advertised, peers);
    !is_own
}

/// Seconds between keepalives; 0 is off.
pub fn keepalive(setting: Keepalive, behind_nat: bool) -> u16 {
    match setting {
        Keepalive::Auto if behind_nat => DEFAULT_KEEPALIVE,
        Keepalive::Auto | Keepalive::Off => 0,
        Keepalive::Every(seconds) => seconds,
    }
}
