use super::*;

#[test]
fn what_is_stored_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/er/mesh-a.json");
    let key = PrivateKey::new(&[7; 32]);
    let entry = Entry { key: "peers.x".into(), value: Bytes::from_static(b"{\xff}"), revision: 3 };
    let cached = Cached {
        incarnation: "2026".into(),
        own: "fd10::7/128".parse().ok(),
        entries: vec![entry],
    };
    assert_eq!(load(&path, &key, "a").unwrap(), None);
    store(&path, &key, "a", &cached).unwrap();
    assert_eq!(load(&path, &key, "a").unwrap(), Some(cached));
}
