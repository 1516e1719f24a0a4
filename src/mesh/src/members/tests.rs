use latchkey_wire::member::{Member, key_of};

use super::*;

#[test]
fn a_record_is_a_peer_until_it_is_deleted() {
    let allowed_ip: Cidr = "fd10:aaaa:1::/48".parse().unwrap();
    let member = Member {
        name: "a".into(),
        public_key: [1; 32],
        advertise_address: "10.99.1.2".into(),
        allowed_ip,
        wg_port: 51820,
        extension: None,
    };
    let mut members = Members::new(Rules {
        bucket: "ikto-mesh".into(),
        mesh: "fd10::/16".parse().unwrap(),
        own: PublicKey::new([9; 32]),
        signatures: SignaturePolicy::Prefer,
        strict: true,
    });
    let entry = Entry { key: key_of(&allowed_ip), value: member.to_json().into(), revision: 7 };
    assert!(members.put(entry.clone()));
    assert_eq!(members.problems(), []);
    assert_eq!(members.taken(&"fd10:aaaa:1::7/128".parse().unwrap()).unwrap().revision, 7);
    assert_eq!(members.peers().len(), 1);
    assert!(!members.put(entry.clone()));
    assert!(members.delete(&entry.key, 8));
    assert!(!members.put(entry));
    assert!(members.peers().is_empty());
}
