//! `latchkey init`: a new `ikto.json` as `ikto init` prints it (protocols/ikto-kilo.md §1.3).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use latchkey_wire::member::Cidr;

use crate::error::{Error, Result};

pub const DEFAULT_MESH: &str = "fd10::/16";
pub const DEFAULT_PREFIX_LENGTH: u8 = 48;

/// How often another address is drawn in the place of one that should not be taken. With one free bit it is one of two.
const DRAWS: usize = 64;

/// The text of a new `ikto.json` with an address drawn at random, line end included. What belongs to the machine is left for
/// its operator to fill in.
///
/// # Errors
/// [`Error::Argument`] for a mesh or a length that cannot be.
pub fn init(mesh: Option<&str>, prefix_length: Option<u8>) -> Result<String> {
    let mesh = parse(mesh.unwrap_or(DEFAULT_MESH))?;
    let length = prefix_length.unwrap_or(DEFAULT_PREFIX_LENGTH);
    let bits = Cidr::host(mesh.address()).length();
    if length > bits {
        return Err(Error::Argument {
            argument: "--subnet-prefix-length",
            reason: format!(
                "an address of {mesh} has {bits} bits, not {length}; give a length of {} to {bits} (-p)",
                mesh.length().saturating_add(1)
            ),
        });
    }
    if length <= mesh.length() {
        log::warn!(
            "--subnet-prefix-length {length} leaves no room for nodes in {mesh}: the address is that of the mesh itself; \
             give a longer one (-p)"
        );
    }
    let mut address = draw(&mesh, length)?;
    for _ in 0..DRAWS {
        if !is_reserved(address, &mesh) {
            break;
        }
        address = draw(&mesh, length)?;
    }
    Ok(text(&mesh, address, length))
}

fn parse(text: &str) -> Result<Cidr> {
    let wrong = |reason: String| Error::Argument { argument: "--mesh-ip-net", reason };
    let mesh: Cidr = text
        .parse()
        .map_err(|_| wrong(format!("{text:?} is not ADDRESS/LENGTH, as {DEFAULT_MESH}")))?;
    if mesh.length() == 0 {
        return Err(wrong(format!(
            "{text} is every address there is; take a part of them, as {DEFAULT_MESH}"
        )));
    }
    Ok(mesh.masked())
}

fn draw(mesh: &Cidr, length: u8) -> Result<IpAddr> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|source| Error::Random { source })?;
    Ok(sub_prefix(mesh, length, u128::from_be_bytes(random)))
}

/// The network address of one of the prefixes of this length in the mesh. A length that is not beyond the mesh's leaves
/// none to choose.
fn sub_prefix(mesh: &Cidr, length: u8, random: u128) -> IpAddr {
    let chosen = |bits: u32| {
        let below =
            |length: u8| u128::MAX.checked_shr((128 - bits) + u32::from(length)).unwrap_or(0);
        random & (below(mesh.length()) & !below(length))
    };
    match mesh.address() {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | chosen(32) as u32).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | chosen(128)).into(),
    }
}

/// All zeros is the network, or the subnet-router anycast address (RFC 4291 §2.6.1); all ones an IPv4 network's broadcast
/// address. Whether a node has one already, only the registry knows.
fn is_reserved(address: IpAddr, mesh: &Cidr) -> bool {
    let broadcast = match (address, mesh.address()) {
        (IpAddr::V4(v4), IpAddr::V4(network)) => {
            v4.to_bits()
                == network.to_bits() | u32::MAX.checked_shr(mesh.length().into()).unwrap_or(0)
        }
        _ => false,
    };
    address == mesh.address() || broadcast
}

fn text(mesh: &Cidr, address: IpAddr, length: u8) -> String {
    format!(
        r#"{{
  "name": "",
  "advertise_address": "",
  "private_address": "{address}",
  "subnet_prefix": {length},
  "mesh_cidr": "{mesh}",
  "wg_dev_name": "wg-ikto",
  "wg_port": 51820,
  "private_key_path": "",
  "nats_creds": "",
  "nats_url": "nats://",
  "nats_kv": "ikto-mesh"
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn it_prints_what_ikto_prints() {
        let mesh = "fd10::/16".parse().unwrap();
        let expected = "{\n  \"name\": \"\",\n  \"advertise_address\": \"\",\n  \"private_address\": \"fd10:2f2c:fb85::\",\n  \
                        \"subnet_prefix\": 48,\n  \"mesh_cidr\": \"fd10::/16\",\n  \"wg_dev_name\": \"wg-ikto\",\n  \
                        \"wg_port\": 51820,\n  \"private_key_path\": \"\",\n  \"nats_creds\": \"\",\n  \
                        \"nats_url\": \"nats://\",\n  \"nats_kv\": \"ikto-mesh\"\n}\n";
        assert_eq!(text(&mesh, "fd10:2f2c:fb85::".parse().unwrap(), 48), expected);
    }

    #[test]
    fn random_bits_stand_between_the_two_lengths_and_nowhere_else() {
        for (mesh, length, all_ones) in [
            ("fd10::/16", 48, "fd10:ffff:ffff::"),
            ("fd10::/16", 17, "fd10:8000::"),
            ("fd10::/16", 128, "fd10:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("fd10::/16", 16, "fd10::"),
            ("fd10::/16", 8, "fd10::"),
            ("fd10::/16", 0, "fd10::"),
            ("10.64.0.0/10", 24, "10.127.255.0"),
            ("10.64.0.0/10", 32, "10.127.255.255"),
            ("10.64.0.0/10", 10, "10.64.0.0"),
            ("::/1", 128, "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let cidr: Cidr = mesh.parse().unwrap();
            assert_eq!(
                sub_prefix(&cidr, length, u128::MAX).to_string(),
                all_ones,
                "{mesh} {length}"
            );
            assert_eq!(sub_prefix(&cidr, length, 0), cidr.address(), "{mesh} {length}");
        }
    }

    /// 10.64.0.0/10 and -p 24 leave 14 bits: twenty draws that agree in all are one in 2²⁶⁶.
    #[test]
    fn addresses_are_drawn_and_differ() {
        for (mesh, canonical, length) in
            [(None, "fd10::/16", None), (Some("10.64.0.1/10"), "10.64.0.0/10", Some(24))]
        {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let file: Value = serde_json::from_str(&init(mesh, length).unwrap()).unwrap();
                assert_eq!(file["mesh_cidr"], canonical);
                assert_eq!(file["subnet_prefix"], length.unwrap_or(48));
                let address: IpAddr = file["private_address"].as_str().unwrap().parse().unwrap();
                let cidr: Cidr = canonical.parse().unwrap();
                assert!(cidr.contains(address) && address != cidr.address());
                seen.insert(address);
            }
            assert!(seen.len() > 1, "{seen:?}");
        }
    }

    #[test]
    fn the_network_and_the_broadcast_address_are_nobodys_where_there_are_others() {
        for _ in 0..50 {
            let file: Value =
                serde_json::from_str(&init(Some("10.0.0.0/30"), Some(32)).unwrap()).unwrap();
            assert!(["10.0.0.1", "10.0.0.2"].contains(&file["private_address"].as_str().unwrap()));
            let file: Value =
                serde_json::from_str(&init(Some("fd10::/16"), Some(17)).unwrap()).unwrap();
            assert_eq!(file["private_address"], "fd10:8000::");
        }
        // There is no other: it is drawn all the same.
        let file: Value =
            serde_json::from_str(&init(Some("10.0.0.0/31"), Some(32)).unwrap()).unwrap();
        assert!(["10.0.0.0", "10.0.0.1"].contains(&file["private_address"].as_str().unwrap()));
        let file: Value =
            serde_json::from_str(&init(Some("fd10::/16"), Some(16)).unwrap()).unwrap();
        assert_eq!(file["private_address"], "fd10::");
    }

    /// Where Ikto panics.
    #[test]
    fn what_cannot_be_is_an_error_that_names_the_argument() {
        for (mesh, length, argument) in [
            (Some("fd10::"), None, "--mesh-ip-net"),
            (Some("fleet"), None, "--mesh-ip-net"),
            (Some(""), None, "--mesh-ip-net"),
            (Some("fd10::/129"), None, "--mesh-ip-net"),
            (Some("0.0.0.0/0"), None, "--mesh-ip-net"),
            (None, Some(129), "--subnet-prefix-length"),
            (Some("10.64.0.0/10"), Some(33), "--subnet-prefix-length"),
            // Ikto's default length is one of IPv6.
            (Some("10.64.0.0/10"), None, "--subnet-prefix-length"),
        ] {
            let error = init(mesh, length).unwrap_err();
            assert!(
                matches!(&error, Error::Argument { argument: a, .. } if *a == argument),
                "{error}"
            );
        }
    }
}
