//! Messages of both generations and of the plug-in protocol (`protocols/kcrypt.md` §5, §6, §8).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use latchkey_wire::attest::{AttestationParameters, RsaPublicArea};
use latchkey_wire::credential::split_credential;
use latchkey_wire::ek::RsaPublicKey;
use latchkey_wire::plugin;
use latchkey_wire::quote::PcrQuote;
use latchkey_wire::v1::{Challenge, ChallengeResponse, Payload, Token};
use latchkey_wire::v2::{Answer, Init, Proof, challenge_to_json};

use crate::{tells_nothing, tpm};

/// The bytes as they come, and as what is inside the base64 of a header.
pub(crate) fn v1_token(data: &[u8]) {
    let wrapped = STANDARD.encode(data);
    for header in [data, wrapped.as_bytes()] {
        let Ok(token) = Token::parse_authorization(header) else { continue };
        let written = token.authorization_header();
        // A header that is too long is one that we would not send.
        if written.len() <= latchkey_wire::v1::MAX_AUTHORIZATION {
            assert_eq!(Token::parse_authorization(written.as_bytes()).unwrap(), token);
        }
        if let Ok(key) = RsaPublicKey::from_pem(&token.ek_pem) {
            assert_eq!(RsaPublicKey::from_spki(&key.spki()).unwrap(), key);
        }
        parameters(&token.ak);
    }
}

fn parameters(ak: &AttestationParameters) {
    assert_eq!(AttestationParameters::from_json(ak.to_json().as_bytes()).unwrap(), *ak);
    for part in [&ak.public, &ak.create_data, &ak.create_attestation, &ak.create_signature] {
        tpm::structure(part);
    }
    let _ = RsaPublicArea::parse(&ak.public);
}

pub(crate) fn v1_message(data: &[u8]) {
    if let Ok(challenge) = Challenge::from_json(data) {
        assert_eq!(Challenge::from_json(challenge.to_json().as_bytes()).unwrap(), challenge);
        assert_eq!(
            Challenge::from_json(challenge_to_json(&challenge).as_bytes()).unwrap(),
            Challenge::default(),
            "generation 2 has another shape"
        );
        let _ = split_credential(&challenge.credential, &challenge.secret);
    }
    match ChallengeResponse::from_json(data) {
        Ok(response) => {
            let again = ChallengeResponse::from_json(response.to_json().as_bytes()).unwrap();
            assert_eq!(again.secret, response.secret);
        }
        Err(error) => tells_nothing(&error),
    }
    match Payload::from_json(data) {
        Ok(payload) => {
            assert_eq!(Payload::from_json(payload.to_json().as_bytes()).unwrap(), payload);
            let has_error = !payload.error.is_empty();
            assert!(!(has_error && payload.classify().is_ok()), "an error was overheard");
        }
        Err(error) => tells_nothing(&error),
    }
}

pub(crate) fn v2_message(data: &[u8]) {
    if let Ok(init) = Init::from_json(data) {
        assert_eq!(Init::from_json(init.to_json().as_bytes()).unwrap(), init);
        parameters(&init.ak);
        let _ = RsaPublicKey::from_spki(&init.ek_spki);
    }
    match Proof::from_json(data) {
        Ok(proof) => {
            let again = Proof::from_json(proof.to_json().as_bytes()).unwrap();
            assert_eq!((again.secret, again.pcr_quote), (proof.secret, proof.pcr_quote.clone()));
            quote(&proof.pcr_quote);
        }
        Err(error) => tells_nothing(&error),
    }
    if let Ok(pcr_quote) = PcrQuote::from_json(data) {
        quote(&pcr_quote);
    }
    match Answer::from_json(data) {
        Ok(answer) => {
            let last = Answer { challenge: None, ..answer.clone() };
            assert_eq!(Answer::from_json(last.to_json().as_bytes()).unwrap(), last);
            let has_error = !answer.error.is_empty();
            assert!(
                !(has_error && answer.clone().into_challenge().is_ok()),
                "an error was overheard"
            );
            if let Ok(release) = answer.classify() {
                assert!(!has_error, "an error was overheard");
                let _ = release.sealed_in_disguise();
            }
        }
        Err(error) => tells_nothing(&error),
    }
}

fn quote(quote: &PcrQuote) {
    assert_eq!(PcrQuote::from_json(quote.to_json().as_bytes()).unwrap(), *quote);
    assert!(quote.pcrs.len() <= 32);
    tpm::structure(&quote.quote);
    tpm::structure(&quote.signature);
}

pub(crate) fn plugin_event(data: &[u8]) {
    if let Ok(request) = plugin::Request::from_json(data) {
        query(request.data.as_bytes());
    }
    query(data);
    match plugin::Response::from_json(data) {
        Ok(response) => {
            let again = plugin::Response::from_json(response.to_json().as_bytes()).unwrap();
            assert_eq!(again.data, response.data);
            assert_eq!((again.state, again.error), (response.state, response.error));
        }
        Err(error) => tells_nothing(&error),
    }
}

fn query(data: &[u8]) {
    if let Ok(query) = plugin::PartitionQuery::from_json(data) {
        let facts = [query.label, query.name, query.uuid];
        assert!(facts.iter().any(|fact| !fact.is_empty()), "nothing to look for");
        assert!(facts.iter().all(|fact| fact != "unknown"), "`unknown` is no identifier");
    }
}
