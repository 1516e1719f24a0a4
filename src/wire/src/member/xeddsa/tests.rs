use super::*;

/// The one that Signal's own curve25519 library tests itself with (`xeddsa_fast_test`): 200 zero bytes, and a private key of
/// zeros but for one 189.
const KNOWN: [u8; 64] = [
    0x11, 0xc7, 0xf3, 0xe6, 0xc4, 0xdf, 0x9e, 0x8a, 0x51, 0x50, 0xe1, 0xdb, 0x3b, 0x30, 0xf9, 0x2d,
    0xe3, 0xa3, 0xb3, 0xaa, 0x43, 0x86, 0x56, 0x54, 0x5f, 0xa7, 0x39, 0x0f, 0x4b, 0xcc, 0x7b, 0xb2,
    0x6c, 0x43, 0x1d, 0x9e, 0x90, 0x64, 0x3e, 0x4f, 0x0e, 0xaa, 0x0e, 0x9c, 0x55, 0x77, 0x66, 0xfa,
    0x69, 0xad, 0xa5, 0x76, 0xd6, 0x3d, 0xca, 0xf2, 0xac, 0x32, 0x6c, 0x11, 0xd0, 0xb9, 0x77, 0x02,
];

fn known_key() -> [u8; 32] {
    let mut key = [0; 32];
    key[8] = 189;
    key
}

fn public(private_key: &[u8; 32]) -> [u8; 32] {
    MontgomeryPoint::mul_base_clamped(*private_key).to_bytes()
}

#[test]
fn signals_known_answer_verifies() {
    let key = public(&known_key());
    assert!(verify_bytes(&[0; 200], &key, &KNOWN));
    assert!(!verify_bytes(&[0; 199], &key, &KNOWN));
    for bit in 0..512 {
        let mut wrong = KNOWN;
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(!verify_bytes(&[0; 200], &key, &wrong), "bit {bit}");
    }
}

/// Signs with many keys, so that both signs of the Edwards point occur.
#[test]
fn signatures_verify_under_the_converted_key_alone() {
    let mut signs = [0; 2];
    for number in 0..32 {
        let private_key: [u8; 32] = Sha512::digest([number])[..32].try_into().unwrap();
        let edwards_sign =
            EdwardsPoint::mul_base_clamped(private_key).compress().as_bytes()[31] >> 7;
        signs[usize::from(edwards_sign)] += 1;
        let (key, message) = (public(&private_key), [number; 100]);
        let signature = sign_bytes(&message, &private_key);
        assert!(verify_bytes(&message, &key, &signature));
        assert!(!verify_bytes(&[number; 99], &key, &signature));
        assert!(!verify_bytes(&message, &public(&[number; 32]), &signature));
        // As an Ed25519 signature, by the rules of RFC 8032 §5.1.7: on the point with the sign 0.
        let plain = edwards(&key).unwrap();
        assert_eq!(plain.as_bytes()[31] >> 7, 0);
        plain.verify_strict(&message, &Signature::from_bytes(&signature)).unwrap();
        // And no scalar of 2²⁵³ or more, in the bits that some variants use for the sign.
        assert_eq!(signature[63] & 0b1110_0000, 0);
    }
    assert!(signs[0] > 5 && signs[1] > 5, "{signs:?}");
}

/// What Go's crypto/ed25519 accepted under the key below: the scheme's nonce is ours, so that this holds our own form still.
#[test]
fn our_own_known_answer() {
    let signature = sign("latchkey test", b"a message", &known_key());
    assert_eq!(
        hex(edwards(&public(&known_key())).unwrap().as_bytes()),
        "9cdcadd470c055ccbf7083ba0956c245c42cad21bd28adb85f257f9a9bb9311c"
    );
    assert_eq!(
        hex(&signature),
        "2dc991b0f847eccf6ac0396d43fec559b8a7b6ebb870ef2403aa3d9a2a9fa592dde112bb75e5e375c7ce854478d5331cb8271f4ef03ae4cd103a814d07664000"
    );
}

/// By another library.
#[cfg(feature = "server")]
#[test]
fn aws_lc_verifies_our_signatures() {
    use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};

    for number in 0..32 {
        let private_key = [number; 32];
        let key = edwards(&public(&private_key)).unwrap();
        let message = framed("latchkey test", &[number]);
        let signature = sign("latchkey test", &[number], &private_key);
        UnparsedPublicKey::new(&ED25519, key.as_bytes()).verify(&message, &signature).unwrap();
    }
    let known = edwards(&public(&known_key())).unwrap();
    UnparsedPublicKey::new(&ED25519, known.as_bytes()).verify(&[0; 200], &KNOWN).unwrap();
}

#[test]
fn contexts_and_messages_do_not_run_into_each_other() {
    let key = [3; 32];
    let signature = sign("ab", b"c", &key);
    assert!(verify("ab", b"c", &public(&key), &signature));
    for (context, message) in
        [("a", "bc"), ("abc", ""), ("", "abc"), ("", "ab\0c"), ("ab", "\0c"), ("ab", "C")]
    {
        assert!(
            !verify(context, message.as_bytes(), &public(&key), &signature),
            "{context} {message}"
        );
    }
}

/// An unclamped key is the key that X25519 makes of it.
#[test]
fn keys_are_clamped() {
    for key in [[0xff; 32], [0; 32]] {
        let clamped = curve25519_dalek::scalar::clamp_integer(key);
        assert_eq!(sign_bytes(b"x", &key), sign_bytes(b"x", &clamped));
        assert!(verify_bytes(b"x", &public(&key), &sign_bytes(b"x", &key)));
    }
}

/// All u of order 1, 2, 4 and 8, those on the twist among them, as RFC 7748 §7 and its references list them, and every other
/// way to write them. With the neutral element for R and 0 for s such a key "signs" one message in a few.
#[test]
fn keys_of_low_order_sign_nothing() {
    let p_plus = |small: u8| {
        let mut u = [0xff; 32];
        (u[0], u[31]) = (0xed + small, 0x7f);
        u
    };
    let mut p_minus_1 = p_plus(0);
    p_minus_1[0] -= 1;
    let mut one = [0; 32];
    one[0] = 1;
    let mut keys = vec![
        [0; 32],
        one,
        unhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        unhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        p_minus_1,
        p_plus(0),
        p_plus(1),
    ];
    keys.extend(keys.clone().into_iter().map(high_bit));
    let mut signature = [0; 64];
    signature[0] = 1;
    for key in keys {
        assert!(edwards(&key).is_none(), "{}", hex(&key));
        for message in 0..64 {
            assert!(!verify_bytes(&[message], &key, &signature), "{}", hex(&key));
        }
    }
    assert!(edwards(&[0xff; 32]).is_none());
}

/// Two keys that X25519 does not tell apart would be two members with one signature.
#[test]
fn a_key_is_written_in_one_way() {
    let private_key = [5; 32];
    let (key, signature) = (public(&private_key), sign_bytes(b"x", &private_key));
    assert!(verify_bytes(b"x", &key, &signature));
    assert!(!verify_bytes(b"x", &high_bit(key), &signature));
    // 9, the base point, is p + 9 as well.
    let mut base = [0; 32];
    base[0] = 9;
    assert!(edwards(&base).is_some());
    let mut other = [0xff; 32];
    (other[0], other[31]) = (0xed + 9, 0x7f);
    assert!(edwards(&other).is_none());
}

#[test]
fn half_of_all_keys_are_on_the_twist_and_sign_nothing() {
    let twisted = (2..=255u8).filter(|u| {
        let mut key = [0; 32];
        key[0] = *u;
        edwards(&key).is_none()
    });
    assert!((64..192).contains(&twisted.count()));
}

/// s + q is the same signature by the equation, and another by its bytes.
#[test]
fn a_signature_cannot_be_changed_into_another_one() {
    let mut forged = KNOWN;
    let order = unhex::<32>("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010");
    let mut carry = 0;
    for (byte, add) in forged[32..].iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        (*byte, carry) = (sum as u8, sum >> 8);
    }
    assert_eq!(carry, 0);
    assert!(!verify_bytes(&[0; 200], &public(&known_key()), &forged));
}

fn high_bit(mut key: [u8; 32]) -> [u8; 32] {
    key[31] |= 0x80;
    key
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> [u8; N] {
    std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
}
