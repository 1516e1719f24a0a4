//! Records of the mesh's registry (`protocols/ikto-kilo.md` §1.4), and their keys.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use latchkey_wire::member::{
    Claim, Extension, Member, Signature, cidr_of, key_of, read, read_unchecked,
};
use serde_json::Value;

pub(crate) const BUCKET: &str = "ikto-mesh";
pub(crate) const PRIVATE_KEY: [u8; 32] = [7; 32];

/// Of [`PRIVATE_KEY`], which is the key of nobody.
static PUBLIC_KEY: LazyLock<[u8; 32]> = LazyLock::new(|| {
    STANDARD.decode("E75P6uryBMf9M1j8nAByGIHRdCeBKCJ+xnTzf3/pe20=").unwrap().try_into().unwrap()
});

/// A record that [`PRIVATE_KEY`] signed.
pub(crate) fn signed() -> (String, String) {
    let member = Member {
        name: "node <A>".into(),
        public_key: *PUBLIC_KEY,
        advertise_address: "10.99.1.2".into(),
        allowed_ip: "fd10:aaaa:1::7/48".parse().unwrap(),
        wg_port: 51820,
        extension: Some(Extension {
            advertise_name: Some("a.example.org".into()),
            capabilities: vec!["attest.v1".into()],
        }),
    };
    (key_of(&member.allowed_ip), member.to_signed_json(BUCKET, &PRIVATE_KEY))
}

/// The bytes as a record, and as the name of one.
pub(crate) fn member(data: &[u8]) {
    if let Some(cidr) = std::str::from_utf8(data).ok().and_then(cidr_of) {
        assert_eq!(key_of(&cidr).as_bytes(), data);
    }
    let (mut member, claim) = match read_unchecked(data) {
        Ok(read) => read,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 2000, "an error of {} bytes", text.len());
            assert!(!text.chars().any(char::is_control), "{text:?}");
            return;
        }
    };
    let key = key_of(&member.allowed_ip);
    assert_eq!(cidr_of(&key), Some(member.allowed_ip));
    let written = member.to_json();
    assert_eq!(read_unchecked(written.as_bytes()).unwrap(), (member.clone(), Claim::Absent));
    looked_at(data, &claim);

    // Whatever there was, with our key it is signed, and nobody else's.
    member.public_key = *PUBLIC_KEY;
    let written = member.to_signed_json(BUCKET, &PRIVATE_KEY);
    let (again, signature) = read(BUCKET, &key, written.as_bytes()).unwrap();
    assert_eq!((again, signature), (member, Signature::Valid));
    assert_eq!(read("other", &key, written.as_bytes()).unwrap().1, Signature::Invalid);
}

/// A signature is only what is last, and there is one only if a plain reader finds a field of that name; none that was made
/// for another text is good for this.
fn looked_at(data: &[u8], claim: &Claim) {
    let (key, known) = signed();
    let fields = match serde_json::from_slice(data) {
        Ok(Value::Object(fields)) => fields,
        _ => return, // half a surrogate pair, a number too great: ours reads on
    };
    if let Claim::Made { signature, signed } = claim {
        let text = fields["signature"].as_str().unwrap();
        assert_eq!(STANDARD.decode(text).unwrap(), **signature);
        assert_eq!(&data[*signed..], format!(",\"signature\":\"{text}\"}}").as_bytes());
        let valid = claim.check(BUCKET, &key, data, &PUBLIC_KEY) == Signature::Valid;
        assert_eq!(valid, data == known.as_bytes());
    }
    if fields.get("signature").is_some_and(|signature| !signature.is_null()) {
        assert_ne!(*claim, Claim::Absent);
    }
}
