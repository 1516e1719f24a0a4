//! What has to change on a device so that it is what it should be. Pure: an equal device yields an
//! empty plan, and is not touched.

use std::fmt;

use crate::address::DeviceAddress;
use crate::key::PublicKey;

/// How the WireGuard device should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    pub public_key: PublicKey,
    pub port: u16,
    pub mtu: u32,
    pub address: DeviceAddress,
}

/// How it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actual {
    /// None as long as no key was set.
    pub public_key: Option<PublicKey>,
    /// 0 as long as none was set and the link is down.
    pub port: u16,
    pub mtu: u32,
    pub up: bool,
    /// Without link-local ones.
    pub addresses: Vec<DeviceAddress>,
}

/// One step. In the order of this list, which is the order to apply them in: a device is complete
/// before it goes up, so that its port is its own from the first packet on, and the new address is
/// there before the old one goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    Create { mtu: u32 },
    SetKey { public_key: PublicKey },
    SetPort(u16),
    SetMtu(u32),
    AddAddress(DeviceAddress),
    RemoveAddress(DeviceAddress),
    SetUp,
}

/// The difference between `desired` and `actual`; `None` is no device at all.
pub fn plan(desired: &Desired, actual: Option<&Actual>) -> Vec<Change> {
    let fresh;
    let (mut changes, actual) = match actual {
        Some(actual) => (Vec::new(), actual),
        None => {
            fresh = Actual {
                public_key: None,
                port: 0,
                mtu: desired.mtu,
                up: false,
                addresses: Vec::new(),
            };
            (vec![Change::Create { mtu: desired.mtu }], &fresh)
        }
    };
    if actual.public_key != Some(desired.public_key) {
        changes.push(Change::SetKey { public_key: desired.public_key });
    }
    if actual.port != desired.port {
        changes.push(Change::SetPort(desired.port));
    }
    if actual.mtu != desired.mtu {
        changes.push(Change::SetMtu(desired.mtu));
    }
    if !actual.addresses.contains(&desired.address) {
        changes.push(Change::AddAddress(desired.address));
    }
    let foreign = actual.addresses.iter().filter(|address| **address != desired.address);
    changes.extend(foreign.copied().map(Change::RemoveAddress));
    if !actual.up {
        changes.push(Change::SetUp);
    }
    changes
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { mtu } => write!(f, "create the device with MTU {mtu}"),
            Self::SetKey { public_key } => write!(f, "set the key of {public_key}"),
            Self::SetPort(port) => write!(f, "listen on port {port}"),
            Self::SetMtu(mtu) => write!(f, "set MTU {mtu}"),
            Self::AddAddress(address) => write!(f, "add {address}"),
            Self::RemoveAddress(address) => write!(f, "remove {address}"),
            Self::SetUp => f.write_str("set it up"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: PublicKey = PublicKey::new([1; 32]);
    const OTHER_KEY: PublicKey = PublicKey::new([2; 32]);

    fn address(text: &str) -> DeviceAddress {
        let (address, length) = text.split_once('/').unwrap();
        DeviceAddress { address: address.parse().unwrap(), prefix_length: length.parse().unwrap() }
    }

    fn desired() -> Desired {
        Desired { public_key: KEY, port: 51820, mtu: 1420, address: address("fd10::7/16") }
    }

    fn equal() -> Actual {
        Actual {
            public_key: Some(KEY),
            port: 51820,
            mtu: 1420,
            up: true,
            addresses: vec![address("fd10::7/16")],
        }
    }

    #[test]
    fn a_missing_device_is_made_from_nothing_and_goes_up_last() {
        let all = [
            Change::Create { mtu: 1420 },
            Change::SetKey { public_key: KEY },
            Change::SetPort(51820),
            Change::AddAddress(address("fd10::7/16")),
            Change::SetUp,
        ];
        assert_eq!(plan(&desired(), None), all);
    }

    #[test]
    fn an_equal_device_is_not_touched() {
        assert_eq!(plan(&desired(), Some(&equal())), []);
    }

    #[test]
    fn only_the_difference_is_applied() {
        let cases: &[(Actual, &[Change])] = &[
            (Actual { public_key: None, ..equal() }, &[Change::SetKey { public_key: KEY }]),
            (
                Actual { public_key: Some(OTHER_KEY), ..equal() },
                &[Change::SetKey { public_key: KEY }],
            ),
            (Actual { port: 0, ..equal() }, &[Change::SetPort(51820)]),
            (Actual { port: 51821, ..equal() }, &[Change::SetPort(51820)]),
            (Actual { mtu: 1500, ..equal() }, &[Change::SetMtu(1420)]),
            (Actual { up: false, ..equal() }, &[Change::SetUp]),
            (Actual { addresses: vec![], ..equal() }, &[Change::AddAddress(address("fd10::7/16"))]),
            (
                Actual { addresses: vec![address("fd10::7/16"), address("10.0.0.1/8")], ..equal() },
                &[Change::RemoveAddress(address("10.0.0.1/8"))],
            ),
            (
                // The same address with another mask is another address: its connected route is.
                Actual { addresses: vec![address("fd10::7/48")], up: false, ..equal() },
                &[
                    Change::AddAddress(address("fd10::7/16")),
                    Change::RemoveAddress(address("fd10::7/48")),
                    Change::SetUp,
                ],
            ),
        ];
        for (actual, changes) in cases {
            assert_eq!(plan(&desired(), Some(actual)), *changes, "{actual:?}");
        }
    }

    #[test]
    fn changes_come_in_the_order_of_their_list() {
        let worst = Actual {
            public_key: None,
            port: 1,
            mtu: 1280,
            up: false,
            addresses: vec![address("fd10::8/16"), address("fd10::7/48")],
        };
        let changes = plan(&desired(), Some(&worst));
        assert_eq!(changes.len(), 7);
        assert!(changes.is_sorted_by_key(|change| match change {
            Change::Create { .. } => 0,
            Change::SetKey { .. } => 1,
            Change::SetPort(_) => 2,
            Change::SetMtu(_) => 3,
            Change::AddAddress(_) => 4,
            Change::RemoveAddress(_) => 5,
            Change::SetUp => 6,
        }));
    }

    /// Applies a plan to a model of the device: after one round nothing is left to do.
    #[test]
    fn a_plan_leads_to_the_desired_device() {
        let starts = [
            None,
            Some(equal()),
            Some(Actual {
                public_key: Some(OTHER_KEY),
                port: 1,
                mtu: 9000,
                up: false,
                addresses: vec![address("fd10::7/48")],
            }),
        ];
        for start in starts {
            let mut device = start;
            for change in plan(&desired(), device.clone().as_ref()) {
                apply(&mut device, change);
            }
            assert_eq!(plan(&desired(), device.as_ref()), []);
        }
    }

    fn apply(device: &mut Option<Actual>, change: Change) {
        if let Change::Create { mtu } = change {
            *device = Some(Actual { public_key: None, port: 0, mtu, up: false, addresses: vec![] });
        }
        let device = device.as_mut().unwrap();
        match change {
            Change::Create { .. } => {}
            Change::SetKey { public_key } => device.public_key = Some(public_key),
            Change::SetPort(port) => device.port = port,
            Change::SetMtu(mtu) => device.mtu = mtu,
            Change::AddAddress(address) => device.addresses.push(address),
            Change::RemoveAddress(address) => device.addresses.retain(|other| *other != address),
            Change::SetUp => device.up = true,
        }
    }
}
