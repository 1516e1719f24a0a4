//! What comes from a network before anybody is authenticated: DNS and mDNS, and the answer to a GET.

use kcrypt_discovery_challenger::fetch::Response;
use latchkey_wire::dns::{self, Data, Kind, Name, Outcome};

pub(crate) fn dns(data: &[u8]) {
    if let Ok(response) = dns::Response::parse(data) {
        assert!(response.records.len() <= 256);
        for record in &response.records {
            let shown = record.name.to_string();
            assert!(shown.len() <= 4 * 255 && !shown.chars().any(char::is_control), "{shown:?}");
            match response.addresses(&record.name) {
                Outcome::Found(addresses) => assert!(!addresses.is_empty()),
                Outcome::NotFound | Outcome::Failed(_) => {}
            }
            if let Data::Service { target, .. } | Data::Pointer(target) | Data::Alias(target) =
                &record.data
            {
                let _ = response.addresses(target);
                let _ = target.is_below(&record.name);
            }
        }
    }
    if let Ok(name) =
        std::str::from_utf8(data).map_err(drop).and_then(|t| Name::new(t).map_err(drop))
    {
        let query = dns::query(7, &name, Kind::A);
        assert!(dns::Response::parse(&query).is_err(), "a query is no response");
    }
}

pub(crate) fn http(data: &[u8]) {
    const MAX: usize = 1000;
    if let Ok(response) = Response::read(&mut &*data, MAX) {
        assert!(response.body.len() <= MAX && (200..600).contains(&response.status));
        assert!(!response.location.is_some_and(|place| place.contains(['\r', '\n', '\0'])));
    }
}
