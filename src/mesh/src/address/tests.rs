//! The vectors were made by an independent program, once:
//!
//! ```python
//! import hashlib, ipaddress
//! def candidate(key, prefix, n):
//!     net = ipaddress.ip_network(prefix)
//!     host_bits = net.max_prefixlen - net.prefixlen
//!     digest = hashlib.sha256(b"latchkey mesh address v1\0" + key + net.network_address.packed
//!                             + bytes([net.prefixlen]) + n.to_bytes(4, "big")).digest()
//!     host = "".join(f"{byte:08b}" for byte in digest)[:host_bits]
//!     return ipaddress.ip_address(int(net.network_address) | int(host, 2)) if "0" in host and "1" in host else None
//! ```

use super::*;

const ASCENDING: PublicKey = PublicKey::new([
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
    26, 27, 28, 29, 30, 31,
]);
const ALL_ONES: PublicKey = PublicKey::new([0xff; 32]);

type Candidates = [(u32, &'static str); 3];

#[rustfmt::skip]
const VECTORS: &[(PublicKey, &str, Candidates)] = &[
    (ASCENDING, "10.64.0.0/10", [(0, "10.76.224.214"), (1, "10.102.225.156"), (2, "10.122.167.144")]),
    (ASCENDING, "10.32.0.0/16", [(0, "10.32.102.15"), (1, "10.32.212.191"), (2, "10.32.69.238")]),
    (ASCENDING, "192.0.2.0/24", [(0, "192.0.2.171"), (1, "192.0.2.53"), (2, "192.0.2.129")]),
    (ASCENDING, "192.0.2.64/30", [(1, "192.0.2.66"), (3, "192.0.2.66"), (7, "192.0.2.66")]),
    (ASCENDING, "fd10::/16", [(0, "fd10:5ce4:7049:4e0c:e78:2e66:a477:e347"), (1, "fd10:4039:7f6d:394:35b9:82c9:79f0:a73d"), (2, "fd10:39e8:d4c3:32ff:90a1:f3d4:4f14:8b07")]),
    (ASCENDING, "fd10:2f2c:fb85::/48", [(0, "fd10:2f2c:fb85:f643:746b:dab1:4f9d:5be7"), (1, "fd10:2f2c:fb85:e5d:c197:d006:e994:b9b3"), (2, "fd10:2f2c:fb85:143f:669b:41d8:e831:c6df")]),
    (ASCENDING, "2001:db8:1:2::/64", [(0, "2001:db8:1:2:9ca9:933b:1903:cdd4"), (1, "2001:db8:1:2:b8f8:f3a5:b373:5af5"), (2, "2001:db8:1:2:2e4c:479f:b88:cca0")]),
    (ASCENDING, "2001:db8::fffc/126", [(1, "2001:db8::fffd"), (2, "2001:db8::fffe"), (6, "2001:db8::fffd")]),
    (ALL_ONES, "10.64.0.0/10", [(0, "10.72.23.118"), (1, "10.75.72.8"), (2, "10.112.255.18")]),
    (ALL_ONES, "10.32.0.0/16", [(0, "10.32.77.211"), (1, "10.32.25.145"), (2, "10.32.71.229")]),
    (ALL_ONES, "192.0.2.0/24", [(0, "192.0.2.198"), (1, "192.0.2.159"), (2, "192.0.2.14")]),
    (ALL_ONES, "192.0.2.64/30", [(0, "192.0.2.65"), (4, "192.0.2.65"), (5, "192.0.2.66")]),
    (ALL_ONES, "fd10::/16", [(0, "fd10:743f:f07c:e008:5d36:1dba:cd8:24b"), (1, "fd10:e11e:bb5:a857:be6a:6314:d196:d226"), (2, "fd10:333a:b15c:3ba1:c183:62fa:e77f:7ed1")]),
    (ALL_ONES, "fd10:2f2c:fb85::/48", [(0, "fd10:2f2c:fb85:21a2:9dcd:eb21:a094:226b"), (1, "fd10:2f2c:fb85:6b4f:a538:b96a:756a:d606"), (2, "fd10:2f2c:fb85:2573:7253:936:db22:6409")]),
    (ALL_ONES, "2001:db8:1:2::/64", [(0, "2001:db8:1:2:a65d:19ef:e1a0:54c0"), (1, "2001:db8:1:2:8d99:c273:5deb:e12e"), (2, "2001:db8:1:2:2893:cf32:508a:7202")]),
    (ALL_ONES, "2001:db8::fffc/126", [(1, "2001:db8::fffd"), (3, "2001:db8::fffe"), (8, "2001:db8::fffd")]),
];

#[test]
fn candidates_are_the_pinned_ones() {
    for (key, prefix, expected) in VECTORS {
        let mesh: Cidr = prefix.parse().unwrap();
        let found: Vec<_> =
            candidates(&mesh, *key).unwrap().take(3).map(|(n, a)| (n, a.to_string())).collect();
        let expected: Vec<_> = expected.iter().map(|(n, a)| (*n, a.to_string())).collect();
        assert_eq!(found, expected, "{mesh}");
    }
}

fn first_candidate(mesh: &str, key: PublicKey) -> Result<IpAddr> {
    let mesh = mesh.parse().unwrap();
    Ok(candidates(&mesh, key)?.next().unwrap().1)
}

#[test]
fn a_device_carries_the_mask_of_the_mesh() {
    let (own, mesh) = ("fd10:aaaa:1::/48".parse().unwrap(), "fd10::/16".parse().unwrap());
    assert_eq!(DeviceAddress::new(&own, &mesh).to_string(), "fd10:aaaa:1::/16");
}

#[test]
fn candidates_lie_in_the_prefix_and_are_neither_network_nor_broadcast() {
    for prefix in ["192.0.2.64/30", "10.0.0.0/29", "10.0.0.0/8", "fd10::/126", "fd10::/16"] {
        let mesh: Cidr = prefix.parse().unwrap();
        let host_mask = u128::MAX >> (128 - host_bits(&mesh));
        for (_, address) in candidates(&mesh, ASCENDING).unwrap().take(200) {
            let host = host_mask
                & match address {
                    IpAddr::V4(v4) => v4.to_bits().into(),
                    IpAddr::V6(v6) => v6.to_bits(),
                };
            assert!(mesh.contains(address), "{address} in {mesh}");
            assert!(host != 0 && host != host_mask, "{address} in {mesh}");
        }
    }
}

/// Two hosts can talk over a /31 (RFC 3021), but a mesh of two without a spare address has no room
/// for a lost race.
#[test]
fn prefixes_without_room_and_the_whole_internet_are_refused() {
    for prefix in ["192.0.2.0/31", "192.0.2.1/32", "fd10::/127", "fd10::1/128", "0.0.0.0/0", "::/0"]
    {
        assert!(first_candidate(prefix, ASCENDING).is_err(), "{prefix}");
    }
}

#[test]
fn keys_and_prefixes_change_the_address() {
    let at = |mesh: &str, key| first_candidate(mesh, key).unwrap();
    assert_ne!(at("fd10::/16", ASCENDING), at("fd10::/16", ALL_ONES));
    assert_ne!(at("fd10::/16", ASCENDING), at("fd10::/17", ASCENDING));
}
