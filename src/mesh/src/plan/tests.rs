use std::collections::BTreeMap;

use super::*;

const KEY: PublicKey = PublicKey::new([1; 32]);
const OTHER_KEY: PublicKey = PublicKey::new([2; 32]);

fn address(text: &str) -> DeviceAddress {
    let (address, length) = text.split_once('/').unwrap();
    DeviceAddress { address: address.parse().unwrap(), prefix_length: length.parse().unwrap() }
}

fn desired() -> Desired {
    Desired {
        public_key: KEY,
        port: 51820,
        mtu: 1420,
        address: Some(address("fd10::7/16")),
        peers: BTreeMap::new(),
    }
}

fn plan_alone(actual: Option<&Actual>) -> Vec<Change> {
    plan(&desired(), actual, &BTreeMap::new(), &Memory::default(), SystemTime::now())
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
    assert_eq!(plan_alone(None), all);
}

#[test]
fn an_equal_device_is_not_touched() {
    assert_eq!(plan_alone(Some(&equal())), []);
}

#[test]
fn only_the_difference_is_applied() {
    let cases: &[(Actual, &[Change])] = &[
        (Actual { public_key: None, ..equal() }, &[Change::SetKey { public_key: KEY }]),
        (Actual { public_key: Some(OTHER_KEY), ..equal() }, &[Change::SetKey { public_key: KEY }]),
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
        assert_eq!(plan_alone(Some(actual)), *changes, "{actual:?}");
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
    let changes = plan_alone(Some(&worst));
    assert_eq!(changes.len(), 7);
    assert!(changes.is_sorted_by_key(|change| match change {
        Change::Create { .. } => 0,
        Change::SetKey { .. } => 1,
        Change::SetPort(_) => 2,
        Change::SetMtu(_) => 3,
        Change::AddAddress(_) => 4,
        Change::RemoveAddress(_) => 5,
        Change::SetUp => 6,
        Change::SetPeer(_) | Change::RemovePeer(_) => unreachable!(),
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
        for change in plan_alone(device.clone().as_ref()) {
            apply(&mut device, change);
        }
        assert_eq!(plan_alone(device.as_ref()), []);
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
        Change::SetPeer(_) | Change::RemovePeer(_) => unreachable!(),
    }
}
