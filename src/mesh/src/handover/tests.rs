use std::os::unix::fs::PermissionsExt;

use super::forget::remove_copies;
use super::*;

const UUID: &str = "11111111-2222-3333-4444-555555555555";

/// A directory like /run/latchkey, and one like systemd's for credentials.
struct Boot {
    _directory: tempfile::TempDir,
    hand_over: HandOver,
    credentials: PathBuf,
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::new(&[n; 32])
}

fn identity(network: &str, key: &PrivateKey) -> Zeroizing<String> {
    let bytes = Zeroizing::new(*key.as_bytes());
    Identity::new(network, bytes, UUID).unwrap().to_json().unwrap()
}

fn timeline(outcome: Outcome, reason: Option<&str>) -> String {
    let mode = latchkey_wire::timeline::Mode::Online;
    let mut timeline = Timeline::new("boot", outcome, mode);
    timeline.reason = reason.map(Into::into);
    timeline.to_json().unwrap()
}

impl Boot {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (run, credentials) =
            (directory.path().join("run"), directory.path().join("credentials"));
        fs::create_dir(&run).unwrap();
        fs::create_dir(&credentials).unwrap();
        Self { _directory: directory, hand_over: HandOver::at(run), credentials }
    }

    fn with(self, name: &str, content: &str) -> Self {
        fs::write(self.hand_over.directory.join(name), content).unwrap();
        self
    }

    fn with_credential(self, content: &str) -> Self {
        fs::write(self.credentials.join("identity"), content).unwrap();
        self
    }

    /// As it is after the service has taken `identity`.
    fn taken(self, identity: &str) -> Self {
        let boot = self.with("identity", identity).with_credential(identity);
        remove_copies(&boot.hand_over, Some(&boot.credentials)).unwrap();
        boot.with_credential("none")
    }

    /// The key of network `fleet-a`, with this key in the device.
    fn key(&self, device: Option<PrivateKey>) -> Result<PublicKey> {
        let key = self.hand_over.private_key("fleet-a", Some(&self.credentials), device)?;
        Ok(key.public())
    }
}

#[test]
fn the_handed_over_key_is_used_whatever_the_device_has() {
    for device in [None, Some(key(1)), Some(key(2))] {
        let boot = Boot::new().with_credential(&identity("fleet-a", &key(1)));
        assert_eq!(boot.key(device).unwrap(), key(1).public());
    }
}

#[test]
fn without_systemd_the_identity_is_read_where_it_was_handed_over() {
    let boot = Boot::new().with("identity", &identity("fleet-a", &key(1)));
    let key_by_hand = boot.hand_over.private_key("fleet-a", None, None).unwrap();
    assert_eq!(key_by_hand.public(), key(1).public());
}

#[test]
fn an_agent_started_again_takes_the_key_from_the_device() {
    let boot = Boot::new().taken(&identity("fleet-a", &key(1)));
    assert_eq!(boot.key(Some(key(1))).unwrap(), key(1).public());
}

#[test]
fn a_device_is_adopted_even_if_nothing_says_where_its_key_is_from() {
    let boot = Boot::new().with_credential("none");
    assert_eq!(boot.key(Some(key(1))).unwrap(), key(1).public());
}

#[test]
fn a_key_that_another_program_set_is_not_adopted() {
    let boot = Boot::new().taken(&identity("fleet-a", &key(1)));
    let error = boot.key(Some(key(2))).unwrap_err();
    assert!(matches!(&error, Error::NoIdentity { reason } if reason.contains("another program")));
}

#[test]
fn the_key_of_one_network_is_never_used_in_another() {
    let other = identity("fleet-b", &key(1));
    for boot in [Boot::new().with_credential(&other), Boot::new().taken(&other)] {
        let error = boot.key(Some(key(1))).unwrap_err();
        assert!(matches!(error, Error::OtherNetwork { .. }), "{error}");
        assert_eq!(error.exit_code(), 10);
    }
}

#[test]
fn a_missing_identity_is_explained_by_how_the_disk_was_opened() {
    let quarantined = Some("quarantined");
    let cases = [
        (None, "no /run/latchkey/timeline.json"),
        (
            Some(timeline(Outcome::Recovery, quarantined)),
            "recovery passphrase, not by the machine itself (quarantined)",
        ),
        (Some(timeline(Outcome::Refused, quarantined)), "refused this machine (quarantined)"),
        (Some(timeline(Outcome::Failed, None)), "could not unlock by itself;"),
        (Some(timeline(Outcome::Unlocked, None)), "no latchkey.mesh"),
        (Some("{".into()), "no /run/latchkey/timeline.json"),
    ];
    for (timeline, words) in cases {
        let mut boot = Boot::new().with_credential("none");
        if let Some(timeline) = timeline {
            boot = boot.with("timeline.json", &timeline);
        }
        let error = boot.key(None).unwrap_err();
        assert!(error.to_string().contains(words), "{words:?} in {error}");
        assert_eq!(error.exit_code(), 50);
    }
}

#[test]
fn an_identity_that_went_with_its_device_is_gone_until_the_next_boot() {
    let boot = Boot::new().taken(&identity("fleet-a", &key(1)));
    assert!(boot.key(None).unwrap_err().to_string().contains("taken before"));
}

#[test]
fn a_bad_identity_is_an_error_that_does_not_repeat_it() {
    let good = identity("fleet-a", &key(1));
    let cases =
        ["{", "null", &good[..good.len() - 1], &good.replace(":1,", ":2,"), &" ".repeat(5000)];
    for bad in cases {
        let error = Boot::new().with_credential(bad).key(Some(key(1))).unwrap_err();
        assert!(matches!(error, Error::BadIdentity { .. }), "{error}");
        assert_eq!(error.exit_code(), 50);
        assert!(!error.to_string().contains("AQEB"), "{error}");
    }
}

#[test]
fn only_a_machine_that_let_itself_in_misses_an_identity() {
    let cases = [
        (Boot::new(), true),
        (Boot::new().with("timeline.json", &timeline(Outcome::Recovery, None)), true),
        (Boot::new().with("timeline.json", &timeline(Outcome::Refused, None)), true),
        (Boot::new().with("timeline.json", &timeline(Outcome::Failed, None)), true),
        (Boot::new().with("timeline.json", &timeline(Outcome::Unlocked, None)), false),
        (Boot::new().with("identity", &identity("fleet-a", &key(1))), false),
        (Boot::new().taken(&identity("fleet-a", &key(1))), false),
    ];
    for (boot, idle) in cases {
        let state = boot.hand_over.state().unwrap();
        assert_eq!(boot.hand_over.reason_to_stay_idle().unwrap().is_some(), idle, "{state:?}");
    }
}

#[test]
fn forgetting_leaves_a_record_and_no_key() {
    let secret = identity("fleet-a", &key(1));
    let boot = Boot::new().with("identity", &secret).with_credential(&secret);
    assert_eq!(boot.hand_over.state().unwrap(), State::Waiting);

    // Hard links show what is left of a file that was unlinked.
    let (run, credentials) = (&boot.hand_over.directory, &boot.credentials);
    let beside = run.parent().unwrap();
    fs::hard_link(run.join("identity"), beside.join("first")).unwrap();
    fs::hard_link(credentials.join("identity"), beside.join("second")).unwrap();
    remove_copies(&boot.hand_over, Some(credentials)).unwrap();

    for left in ["first", "second"] {
        let left = fs::read(beside.join(left)).unwrap();
        assert_eq!(left, vec![0; secret.len()], "overwritten in place");
    }
    assert!(!run.join("identity").exists() && !credentials.join("identity").exists());

    let State::Taken(record) = boot.hand_over.state().unwrap() else { panic!("taken") };
    assert_eq!((record.network.as_str(), record.volume.as_str()), ("fleet-a", UUID));
    assert_eq!(record.public_key, key(1).public().to_string());
    let record = run.join("handover.json");
    assert_eq!(fs::metadata(record).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn forgetting_again_changes_nothing() {
    let boot = Boot::new().taken(&identity("fleet-a", &key(1)));
    let before = boot.hand_over.state().unwrap();
    remove_copies(&boot.hand_over, Some(&boot.credentials)).unwrap();
    remove_copies(&boot.hand_over, None).unwrap();
    assert_eq!(boot.hand_over.state().unwrap(), before);
}

/// A link in the place of the identity would have another file overwritten.
#[test]
fn forgetting_follows_no_link() {
    let boot = Boot::new();
    let victim = boot.hand_over.directory.join("victim");
    fs::write(&victim, identity("fleet-a", &key(1)).as_bytes()).unwrap();
    std::os::unix::fs::symlink(&victim, boot.hand_over.directory.join("identity")).unwrap();
    assert!(remove_copies(&boot.hand_over, None).is_err());
    assert!(fs::read_to_string(victim).unwrap().contains("fleet-a"));
}

#[test]
fn there_is_one_agent() {
    let boot = Boot::new();
    let lock = boot.hand_over.lock().unwrap();
    assert!(matches!(boot.hand_over.lock(), Err(Error::AgentRunning)));
    drop(lock);
    assert!(boot.hand_over.lock().unwrap().is_some());
    assert!(HandOver::at("/nonexistent").lock().unwrap().is_none());
}
