use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use curve25519_dalek::MontgomeryPoint;
use serde_json::Value;

use super::*;

const VECTORS: &str = include_str!("../../../../tests/vectors/ikto-kilo.json");
const BUCKET: &str = "ikto-mesh";
const KEY_TEXT: &str = "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=";
const PRIVATE: [u8; 32] = [0x58; 32];

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn public(private_key: &[u8; 32]) -> [u8; 32] {
    MontgomeryPoint::mul_base_clamped(*private_key).to_bytes()
}

fn member() -> Member {
    Member {
        name: "node-A".into(),
        public_key: public(&PRIVATE),
        advertise_address: "10.99.1.2".into(),
        allowed_ip: cidr("fd10:aaaa:1::/48"),
        wg_port: 51820,
        extension: Some(Extension {
            advertise_name: Some("a.example.org".into()),
            capabilities: vec!["x".into(), "y.z-1".into()],
        }),
    }
}

fn key() -> String {
    key_of(&member().allowed_ip)
}

/// A record with some of its fields another JSON text, or left out.
fn record(changes: &[(&str, &str)]) -> Vec<u8> {
    let public_key = format!("\"{KEY_TEXT}\"");
    let fields = [
        ("name", "\"n\""),
        ("public_key", public_key.as_str()),
        ("advertise_address", "\"10.0.0.1\""),
        ("allowed_ip", "\"fd10::/48\""),
        ("wg_port", "1"),
    ];
    let changed = |(name, value)| {
        changes.iter().find(|(other, _)| *other == name).map_or((name, value), |change| *change)
    };
    let known = fields.map(changed);
    let more = changes.iter().filter(|(name, _)| fields.iter().all(|(known, _)| known != name));
    let texts: Vec<String> = known
        .iter()
        .chain(more)
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("\"{name}\":{value}"))
        .collect();
    format!("{{{}}}", texts.join(",")).into_bytes()
}

fn with(value: &[u8], from: &str, to: &str) -> Vec<u8> {
    let text = std::str::from_utf8(value).unwrap();
    assert!(text.contains(from), "{text} has no {from}");
    text.replace(from, to).into_bytes()
}

#[test]
fn real_iktos_records_are_read_and_written_byte_for_byte() {
    let vectors: Value = serde_json::from_str(VECTORS).unwrap();
    assert_eq!(vectors["ikto"]["bucket"], BUCKET);
    let mut whole = 0;
    for record in vectors["ikto"]["records"].as_array().unwrap() {
        let (key, allowed_ip) =
            (record["key"].as_str().unwrap(), record["allowed_ip"].as_str().unwrap());
        assert_eq!(key_of(&cidr(allowed_ip)), key);
        assert_eq!(cidr_of(key), Some(cidr(allowed_ip)));
        let Some(value) = record["value"].as_str() else { continue };
        whole += 1;
        let (member, signature) = read(BUCKET, key, value.as_bytes()).unwrap();
        assert_eq!(signature, Signature::Absent);
        assert_eq!(member.to_json(), value);
        assert_eq!((member.allowed_ip, member.wg_port), (cidr(allowed_ip), 51820));
        assert_eq!(member.extension, None);
    }
    assert_eq!(whole, 2);
}

/// The right column is what Go's `encoding/json` (1.22 and later) makes of the left one.
#[test]
fn names_are_escaped_as_go_does() {
    for (name, json) in [
        ("", r#""""#),
        ("a<b>&c", r#""a\u003cb\u003e\u0026c""#),
        ("\u{8}\u{c}\n\r\t\0\u{1f}\u{7f}", "\"\\b\\f\\n\\r\\t\\u0000\\u001f\u{7f}\""),
        ("\u{2028}\u{2029}\u{fffd}", "\"\\u2028\\u2029\u{fffd}\""),
        ("q\"\\/é😀'", r#""q\"\\/é😀'""#),
    ] {
        let member = Member { name: name.into(), extension: None, ..member() };
        let text = member.to_json();
        assert!(text.starts_with(&format!("{{\"name\":{json},\"public_key\":\"")), "{text}");
        assert_eq!(read(BUCKET, &key(), text.as_bytes()).unwrap(), (member, Signature::Absent));
    }
}

/// Each was shown to Go's decoder, with Ikto's types.
#[test]
fn values_are_read_as_go_reads_them() {
    let plain = record(&[]);
    let name = |name: &str, value: Vec<u8>| (value, name.to_owned(), "10.0.0.1", 1);
    let cases = [
        name("n", plain.clone()),
        name("n", [b" \n\t", plain.as_slice(), b" \r\n"].concat()),
        name("n", with(&with(&plain, "name", "NaMe"), "wg_port", "WG_PORT")),
        name(
            "n",
            with(
                &with(&plain, "public_key", "public_\u{212a}ey"),
                "address",
                "addre\u{17f}\u{17f}",
            ),
        ),
        name("", record(&[("name", "null")])),
        name("", record(&[("name", "")])),
        name("second", with(&plain, "}", ",\"name\":\"second\"}")),
        name("third", with(&plain, "}", ",\"NAME\":\"third\"}")),
        name("n", with(&plain, "}", ",\"name\":null}")),
        // Go puts one in its place.
        name("\u{fffd}\u{fffd}\u{fffd}x", record(&[("name", r#""\ud800x""#)])),
        name("😀", record(&[("name", r#""\ud83d\ude00""#)])),
        name("\0/", record(&[("name", r#""\u0000\/""#)])),
        name(
            "n",
            record(&[("unknown", r#"{"a":[1,2,{"b":null}]}"#), ("persistent_keepalive", "25")]),
        ),
        name("n", record(&[("unknown", r#""\ud800""#)])),
        name("n", record(&[("unknown", "1e999")])),
        name("n", record(&[("unknown", &format!("{}{}", "[".repeat(2000), "]".repeat(2000)))])),
        name("n", with(&plain, KEY_TEXT, &KEY_TEXT.replace("E=", "H="))),
        name("n", with(&plain, KEY_TEXT, &format!("{KEY_TEXT}\\r\\n"))),
        (record(&[("wg_port", "null")]), "n".into(), "10.0.0.1", 0),
        (record(&[("wg_port", "")]), "n".into(), "10.0.0.1", 0),
        (record(&[("wg_port", "65535")]), "n".into(), "10.0.0.1", 65535),
        (record(&[("advertise_address", "null")]), "n".into(), "", 1),
    ];
    for (value, name, advertise_address, wg_port) in cases {
        let shown = value.escape_ascii().to_string();
        let (member, signature) = read(BUCKET, "peers.x", &value).expect(&shown);
        assert_eq!(signature, Signature::Absent, "{shown}");
        let expected = Member {
            name,
            public_key: STANDARD.decode(KEY_TEXT).unwrap().try_into().unwrap(),
            advertise_address: advertise_address.into(),
            allowed_ip: cidr("fd10::/48"),
            wg_port,
            extension: None,
        };
        assert_eq!(member, expected, "{shown}");
    }
}

/// As Go replaces them: one for each byte.
#[test]
fn broken_utf8_is_replaced() {
    let broken = |bytes: &[u8]| {
        let value = record(&[("name", "\"@\"")]);
        let at = value.iter().position(|byte| *byte == b'@').unwrap();
        [&value[..at], bytes, &value[at + 1..]].concat()
    };
    for (bytes, name) in [
        (b"bad\xff\xe2\x82end".as_slice(), "bad\u{fffd}\u{fffd}\u{fffd}end"),
        (b"\xed\xa0\x80", "\u{fffd}\u{fffd}\u{fffd}"),
    ] {
        assert_eq!(read(BUCKET, "k", &broken(bytes)).unwrap().0.name, name);
    }
    let plain = record(&[]);
    let more = |bytes: &[u8]| [&plain[..plain.len() - 1], bytes].concat();
    assert!(read(BUCKET, "k", &more(b",\"\xff\":\"\xff\"}")).is_ok());
    assert!(read(BUCKET, "k", &more(b",\xff}")).is_err());
}

#[test]
fn what_go_refuses_is_refused_and_what_cannot_be_a_member() {
    let plain = record(&[]);
    let text = |value: &str| value.as_bytes().to_vec();
    let key = |value: &str| record(&[("public_key", value)]);
    let allowed_ip = |value: &str| record(&[("allowed_ip", value)]);
    let port = |value: &str| record(&[("wg_port", value)]);
    let quoted = |value: &str| format!("\"{value}\"");
    let cases = [
        // Go's decoder refuses these.
        (text(""), "not the JSON"),
        (text("[]"), "not the JSON"),
        (text("\"\""), "not the JSON"),
        ([plain.as_slice(), b"x"].concat(), "not the JSON"),
        ([plain.as_slice(), b"\0"].concat(), "not the JSON"),
        ([plain.as_slice(), &plain].concat(), "not the JSON"),
        ([b"\xef\xbb\xbf", plain.as_slice()].concat(), "not the JSON"),
        (plain[..plain.len() - 1].to_vec(), "not the JSON"),
        (record(&[("name", "1")]), "wrong type"),
        (record(&[("name", "[\"a\"]")]), "wrong type"),
        (record(&[("name", "[110]")]), "wrong type"),
        (record(&[("name", "{}")]), "wrong type"),
        (record(&[("name", "true")]), "wrong type"),
        (with(&plain, "}", ",\"name\":2}"), "wrong type"),
        (record(&[("name", "\"\t\"")]), "control character"),
        (record(&[("unknown", "\"\0\"")]), "control character"),
        (record(&[("name", "\"\\\"\n\"")]), "control character"),
        (record(&[("name", r#""\x""#)]), "not the JSON"),
        (key("null"), "public_key"),
        (key("\"\""), "public_key"),
        (key(&quoted(&KEY_TEXT[..43])), "public_key"),
        (key(&quoted(&format!("{KEY_TEXT}AAAA"))), "public_key"),
        (key("\"AAAA\""), "public_key"),
        (key(&quoted(&KEY_TEXT.replace('/', "_"))), "public_key"),
        (key(&quoted(&format!(" {KEY_TEXT}"))), "public_key"),
        (with(&key("\"AAAA\""), "}", &format!(",\"public_key\":\"{KEY_TEXT}\"}}")), "public_key"),
        (port("\"1\""), "wrong type"),
        (port("1.0"), "wrong type"),
        (port("1e3"), "wrong type"),
        (port("true"), "wrong type"),
        (port("99999999999999999999"), "wrong type"),
        // These it reads, and Ikto's agents then skip the record.
        (text("null"), "not the JSON"),
        (text("{}"), "no public_key"),
        (allowed_ip("null"), "no allowed_ip"),
        (allowed_ip("\"\""), "no allowed_ip"),
        (allowed_ip("\"fd10::\""), "not a CIDR"),
        (allowed_ip("\"fd10::1%eth0/48\""), "not a CIDR"),
        // These Ikto's agents hand to WireGuard, which cannot use them.
        (key(&quoted(&STANDARD.encode([0; 32]))), "no public_key"),
        (allowed_ip("\"::ffff:1.2.3.4/120\""), "not a CIDR"),
        (port("-1"), "-1 is no port"),
        (port("65536"), "65536 is no port"),
    ];
    for (value, reason) in cases {
        let shown = value.escape_ascii().to_string();
        let error = read(BUCKET, "peers.x", &value).expect_err(&shown).to_string();
        assert!(error.contains(reason), "{shown}: {error}");
    }
}

#[test]
fn records_of_ikto_0_2_are_told_from_broken_ones() {
    let value = with(&record(&[]), "allowed_ip", "private_cidr");
    let error = read(BUCKET, "k", &value).unwrap_err().to_string();
    assert!(error.contains("v0.2.0"), "{error}");
    // With both it is a record as any other.
    assert!(read(BUCKET, "k", &with(&record(&[]), "}", ",\"private_cidr\":\"x\"}")).is_ok());
}

#[test]
fn everything_is_bounded() {
    let long =
        |field: &str, length: usize| record(&[(field, &format!("\"{}\"", "a".repeat(length)))]);
    assert!(read(BUCKET, "k", &long("name", MAX_NAME)).is_ok());
    assert!(read(BUCKET, "k", &long("name", MAX_NAME + 1)).is_err());
    assert!(read(BUCKET, "k", &long("advertise_address", MAX_ADDRESS)).is_ok());
    assert!(read(BUCKET, "k", &long("advertise_address", MAX_ADDRESS + 1)).is_err());
    let padded = |length: usize| {
        let empty = record(&[("x", "\"\"")]).len();
        record(&[("x", &format!("\"{}\"", "a".repeat(length - empty)))])
    };
    assert_eq!(padded(MAX_MEMBER).len(), MAX_MEMBER);
    assert!(read(BUCKET, "k", &padded(MAX_MEMBER)).is_ok());
    let error = read(BUCKET, "k", &padded(MAX_MEMBER + 1)).unwrap_err();
    assert!(matches!(error, crate::Error::TooLong { limit: MAX_MEMBER, .. }), "{error}");
}

#[test]
fn our_fields_follow_iktos_five_and_the_signature_is_last() {
    let value = member().to_signed_json(BUCKET, &PRIVATE);
    let five = Member { extension: None, ..member() }.to_json();
    let ours = r#","version":1,"advertise_name":"a.example.org","capabilities":["x","y.z-1"],"signature":""#;
    let rest = value.strip_prefix(&five[..five.len() - 1]).unwrap().strip_prefix(ours).unwrap();
    assert_eq!(rest.len(), 88 + "\"}".len());
    assert_eq!(read(BUCKET, &key(), value.as_bytes()).unwrap(), (member(), Signature::Valid));
    let least = Member { extension: Some(Extension::default()), ..member() };
    assert!(least.to_json().ends_with(r#","wg_port":51820,"version":1}"#));
    let (read_back, signature) =
        read(BUCKET, &key(), least.to_signed_json(BUCKET, &PRIVATE).as_bytes()).unwrap();
    assert_eq!((read_back, signature), (least, Signature::Valid));
}

#[test]
fn the_same_record_is_signed_alike() {
    assert_eq!(
        member().to_signed_json(BUCKET, &PRIVATE),
        member().to_signed_json(BUCKET, &PRIVATE)
    );
}

#[test]
fn fields_of_the_future_are_covered_by_the_signature() {
    let text = member().to_json();
    let text = format!("{},\"attestation\":{{\"quote\":\"AAAA\"}}", &text[..text.len() - 1]);
    let bytes = signed_bytes(BUCKET, &key(), text.as_bytes());
    let signature = STANDARD.encode(sign(CONTEXT, &bytes, &PRIVATE));
    let value = format!("{text},\"signature\":\"{signature}\"}}");
    assert_eq!(read(BUCKET, &key(), value.as_bytes()).unwrap(), (member(), Signature::Valid));
    let forged = value.replace("\"AAAA\"", "\"AAAB\"");
    assert_eq!(read(BUCKET, &key(), forged.as_bytes()).unwrap().1, Signature::Invalid);
}

/// What others put there under the names of our fields is theirs, and no reason to refuse the record.
#[test]
fn an_extension_that_is_not_ours_is_none() {
    for more in [
        r#""version":"1.2.3""#,
        r#""version":0"#,
        r#""version":-1"#,
        r#""version":1.5"#,
        r#""version":null"#,
        r#""capabilities":["x"]"#,
        r#""version":1,"capabilities":"x""#,
        r#""version":1,"capabilities":["X"]"#,
        r#""version":1,"capabilities":[""]"#,
        r#""version":1,"capabilities":["x",1]"#,
        r#""version":1,"advertise_name":7"#,
    ] {
        let value = with(&record(&[]), "}", &format!(",{more}}}"));
        assert_eq!(read(BUCKET, "k", &value).expect(more).0.extension, None, "{more}");
    }
    let many =
        format!(r#","version":1,"capabilities":[{}"x"]}}"#, "\"x\",".repeat(MAX_CAPABILITIES));
    assert_eq!(read(BUCKET, "k", &with(&record(&[]), "}", &many)).unwrap().0.extension, None);
    let later = r#","version":2,"advertise_name":"a","capabilities":null,"more":1}"#;
    let extension = read(BUCKET, "k", &with(&record(&[]), "}", later)).unwrap().0.extension;
    assert_eq!(
        extension,
        Some(Extension { advertise_name: Some("a".into()), capabilities: vec![] })
    );
}

#[test]
fn a_signature_is_for_one_bucket_one_key_and_one_text() {
    let value = member().to_signed_json(BUCKET, &PRIVATE);
    let check =
        |bucket: &str, key: &str, value: &str| read(bucket, key, value.as_bytes()).unwrap().1;
    assert_eq!(check(BUCKET, &key(), &value), Signature::Valid);
    assert_eq!(check("other", &key(), &value), Signature::Invalid);
    assert_eq!(check("", &key(), &value), Signature::Invalid);
    assert_eq!(check(BUCKET, "peers.x", &value), Signature::Invalid);
    // A letter moved from the bucket to the key.
    assert_eq!(check(&BUCKET[..8], &format!("h{}", key()), &value), Signature::Invalid);
    for (from, to) in [
        ("node-A", "node-B"),
        ("10.99.1.2", "10.99.1.3"),
        ("fd10:aaaa:1::/48", "fd10:aaaa:2::/48"),
        ("51820", "51821"),
        ("a.example.org", "b.example.org"),
        ("y.z-1", "y.z-2"),
        ("\"name\"", "\"NAME\""),
        ("\"name\":", "\"name\": "),
        ("{", "{\"x\":1,"),
        (",\"version\":1", ""),
    ] {
        let forged = value.replacen(from, to, 1);
        assert_ne!(forged, value);
        assert_eq!(check(BUCKET, &key(), &forged), Signature::Invalid, "{from} -> {to}");
    }
    // Fields in another order.
    let swapped = value
        .replace(r#""name":"node-A","#, "")
        .replace(r#","wg_port":51820"#, r#","wg_port":51820,"name":"node-A""#);
    assert_eq!(check(BUCKET, &key(), &swapped), Signature::Invalid);
    // Somebody else's key, ours' signature; and the other way round.
    let other = public(&[9; 32]);
    let stolen = value.replace(&STANDARD.encode(public(&PRIVATE)), &STANDARD.encode(other));
    assert_eq!(check(BUCKET, &key(), &stolen), Signature::Invalid);
    assert_eq!(
        check(BUCKET, &key(), &member().to_signed_json(BUCKET, &[9; 32])),
        Signature::Invalid
    );
}

/// A signature at any place and in any form but the one in which we write it.
#[test]
fn games_with_the_signature_never_end_well() {
    let value = member().to_signed_json(BUCKET, &PRIVATE);
    let (before, after) = value.rsplit_once(",\"signature\":").unwrap();
    let signature = &after[..after.len() - 1];
    let bare = signature.trim_matches('"');
    let unsigned = format!("{before}}}");
    let forged = before.replace("node-A", "node-B");
    let cases = [
        (format!("{before},\"signature\":{signature},\"x\":1}}"), "not last"),
        (format!("{{\"signature\":{signature},{}}}", &before[1..]), "first"),
        (format!("{before},\"signature\":{signature},\"signature\":{signature}}}"), "twice"),
        (
            format!("{forged},\"signature\":{signature},\"signature\":{signature}}}"),
            "twice, forged",
        ),
        (format!("{before},\"Signature\":\"x\",\"signature\":{signature}}}"), "another before"),
        (
            format!("{before},\"signature\":{signature},\"SIGNATURE\":{signature}}}"),
            "another after",
        ),
        (
            format!("{before},\"\\u0073ignature\":\"x\",\"signature\":{signature}}}"),
            "escaped before",
        ),
        (format!("{before},\"\\u0073ignature\":{signature}}}"), "escaped"),
        (format!("{before},\"\u{17f}ignature\":{signature}}}"), "folded"),
        (format!("{before},\"SIGNATURE\":{signature}}}"), "in capitals"),
        (format!("{before}, \"signature\":{signature}}}"), "white space before"),
        (format!("{before},\"signature\": {signature}}}"), "white space after the name"),
        (format!("{before},\"signature\":{signature} }}"), "white space after"),
        (format!("{before},\"signature\":{signature}}} "), "white space at the end"),
        (format!("{before},\"signature\":\"\"}}"), "empty"),
        (format!("{before},\"signature\":1}}"), "a number"),
        (format!("{before},\"signature\":{{\"signature\":{signature}}}}}"), "nested"),
        (format!("{before},\"signature\":\"{}\"}}", &bare[..84]), "short"),
        (format!("{before},\"signature\":\"{bare}AAAA\"}}"), "long"),
        (format!("{before},\"signature\":\"{}\"}}", bare.replace('=', "A")), "not base64"),
        (format!("{before},\"signature\":\"{}\"}}", "A".repeat(86) + "=="), "zeros"),
        (format!("{forged},\"x\":\"\\\",\",\"signature\":{signature}}}"), "a quote before"),
    ];
    for (value, what) in cases {
        let (_, verdict) = read(BUCKET, &key(), value.as_bytes()).expect(what);
        assert_eq!(verdict, Signature::Invalid, "{what}");
    }
    // Taken away, or said to be none, it is not there; nor is it if it only looks like it.
    for value in [
        unsigned.clone(),
        format!("{before},\"signature\":null}}"),
        format!("{},\"x\":{{\"y\":1,\"signature\":{signature}}}}}", before),
        unsigned.replace("node-A", &format!("x\\\",\\\"signature\\\":\\\"{bare}")),
    ] {
        assert_eq!(read(BUCKET, &key(), value.as_bytes()).unwrap().1, Signature::Absent, "{value}");
    }
}

/// Every bit of a signed record: changed, it is no record, or not a signed one.
#[test]
fn no_bit_can_change() {
    let value = member().to_signed_json(BUCKET, &PRIVATE).into_bytes();
    for bit in 0..value.len() * 8 {
        let mut forged = value.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        if let Ok((_, signature)) = read(BUCKET, &key(), &forged) {
            assert_ne!(signature, Signature::Valid, "bit {bit}");
        }
    }
}

#[test]
fn a_record_is_read_without_looking_at_its_signature() {
    let value = member().to_signed_json(BUCKET, &PRIVATE);
    let (read_back, claim) = read_unchecked(value.as_bytes()).unwrap();
    assert_eq!(read_back, member());
    assert_eq!(
        claim.check(BUCKET, &key(), value.as_bytes(), &member().public_key),
        Signature::Valid
    );
    // Of another record, and of one too short for it.
    assert_eq!(claim.check(BUCKET, &key(), b"{}", &member().public_key), Signature::Invalid);
}
