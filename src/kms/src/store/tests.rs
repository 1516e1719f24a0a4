//! Changing the store: what is written where, next to operators and other programs that write too.

use std::{fs, os::unix::fs::PermissionsExt, thread};

use latchkey_wire::{
    manifest::{ObjectName, Partition, SEALED_VOLUME, SECRET},
    pubhash::Pubhash,
};

use super::*;

const HASH: &str = "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd";

fn node() -> String {
    format!(
        "# ours\n---\napiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata:\n  name: node # the attic\nspec:\n  TPMHash: {HASH}\n---\napiVersion: v1\nkind: Secret\nmetadata: {{name: node-x}}   # odd\nstringData: {{passphrase: geheim}}\n"
    )
}

fn store(files: &[(&str, &str)]) -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn text(directory: &tempfile::TempDir, name: &str) -> String {
    fs::read_to_string(directory.path().join(name)).unwrap()
}

fn quarantine(store: &Store) -> Result<bool, EditError> {
    store.edit_volume("default", "node", |volume| volume.spec.quarantined = true)
}

fn add_partition(store: &Store, label: &str) {
    let partition = Partition { label: label.to_owned(), ..Partition::default() };
    assert!(
        store
            .edit_volume("default", "node", |volume| volume.spec.partitions.push(partition.clone()))
            .unwrap()
    );
}

fn labels(store: &Store) -> Vec<String> {
    store.read(|snapshot| {
        let volume = snapshot.volume("default", "node").unwrap();
        volume.spec.partitions.iter().map(|partition| partition.label.clone()).collect()
    })
}

#[test]
fn a_change_is_in_the_file_and_in_memory_at_once_and_the_rest_stays() {
    let (directory, store) = store(&[("all.yaml", &node())]);
    let path = directory.path().join("all.yaml");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(quarantine(&store).unwrap());
    assert!(!quarantine(&store).unwrap(), "nothing to change");
    assert!(store.read(|snapshot| snapshot.volume("default", "node").unwrap().spec.quarantined));
    assert_eq!(
        text(&directory, "all.yaml"),
        node().replace(HASH, &format!("{HASH}\n  quarantined: true"))
    );
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left over");
}

#[test]
fn what_the_operator_wrote_a_moment_ago_counts() {
    let (directory, store) = store(&[("all.yaml", &node())]);
    for round in 0..5 {
        // In place, of the same size, within one tick of the clock.
        let location = format!("# ouR{round:02}\n");
        fs::write(directory.path().join("all.yaml"), node().replace("# ours\n", &location))
            .unwrap();
        assert!(quarantine(&store).unwrap(), "{round}");
        let now = text(&directory, "all.yaml");
        assert!(now.starts_with(&location) && now.contains("quarantined: true"), "{now}");
    }
    fs::remove_file(directory.path().join("all.yaml")).unwrap();
    assert!(matches!(quarantine(&store), Err(EditError::Io { .. })));
    fs::write(directory.path().join("again.yaml"), node()).unwrap();
    (0..2).for_each(|_| store.poll());
    assert!(quarantine(&store).unwrap());
}

/// An operator's editor is at work in place: what the file held before stays in use, and nothing is made that it mentions.
#[test]
fn a_file_that_is_being_written_is_neither_used_nor_passed_over() {
    let (directory, store) = store(&[("all.yaml", &node())]);
    let machine = Pubhash::parse(HASH).unwrap();
    let knows = |store: &Store| store.read(|snapshot| snapshot.volumes(&machine).len());
    let path = directory.path().join("all.yaml");
    fs::write(&path, "").unwrap();
    drop(store.change().unwrap());
    assert_eq!(knows(&store), 1, "a file that was emptied is about to be written");
    store.poll();
    assert_eq!(knows(&store), 1);
    fs::remove_file(&path).unwrap();
    drop(store.change().unwrap());
    store.poll();
    assert_eq!(knows(&store), 1, "a file that is gone is about to come back");
    store.poll();
    assert_eq!(knows(&store), 0);

    let half = node().split("---\napiVersion: v1").next().unwrap().to_owned();
    for name in ["new.yaml", "gone.yaml"] {
        fs::write(directory.path().join(name), &half).unwrap();
    }
    let change = store.change().unwrap();
    assert!(
        change
            .read(|snapshot| snapshot.volumes(&machine).is_empty() && snapshot.may_know(&machine))
    );
    assert!(change.read(|snapshot| snapshot.is_volume_name_taken("default", "node")));
    assert!(!change.read(|snapshot| snapshot.may_know(&Pubhash::of_spki(b"another"))));
    drop(change);
    fs::remove_file(directory.path().join("gone.yaml")).unwrap();
    (0..2).for_each(|_| store.poll());
    assert_eq!(knows(&store), 1);
    fs::remove_file(directory.path().join("new.yaml")).unwrap();
    (0..2).for_each(|_| store.poll());
    assert!(!store.read(|snapshot| snapshot.may_know(&machine)), "the marks are gone too");
}

#[test]
fn a_file_with_a_mistake_is_not_touched() {
    let (directory, store) = store(&[("all.yaml", &node())]);
    let broken = node().replace("metadata: {name: node-x}", "metadata: {name: node-x");
    fs::write(directory.path().join("all.yaml"), &broken).unwrap();
    let error = quarantine(&store).unwrap_err().to_string();
    assert!(error.contains("all.yaml") && error.contains("line"), "{error}");
    assert_eq!(text(&directory, "all.yaml"), broken);
}

#[test]
fn a_volume_in_two_files_is_not_changed_but_behind_a_link_it_is() {
    let (directory, twice) = store(&[("a.yaml", &node()), ("b.yaml", &node())]);
    assert!(matches!(quarantine(&twice), Err(EditError::Twice { .. })));
    assert_eq!(text(&directory, "a.yaml"), node());

    let target = tempfile::tempdir().unwrap();
    fs::write(target.path().join("real"), node()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for link in ["one.yaml", "two.yaml"] {
        std::os::unix::fs::symlink(target.path().join("real"), directory.path().join(link))
            .unwrap();
    }
    let linked = Store::open(directory.path()).unwrap();
    assert!(quarantine(&linked).unwrap());
    assert!(linked.read(|snapshot| snapshot.volume("default", "node").unwrap().spec.quarantined));
    assert!(fs::symlink_metadata(directory.path().join("one.yaml")).unwrap().is_symlink());
    assert!(fs::read_to_string(target.path().join("real")).unwrap().contains("quarantined: true"));
}

#[test]
fn objects_are_removed_one_by_one_and_the_file_with_the_last() {
    let (directory, store) = store(&[("all.yaml", &node())]);
    let object = |kind, name| ObjectName { kind, namespace: "default", name };
    store.change().unwrap().remove(&object(SEALED_VOLUME, "node")).unwrap();
    assert!(store.read(|snapshot| snapshot.volume("default", "node").is_none()));
    assert!(text(&directory, "all.yaml").contains("# odd"));
    assert!(matches!(
        store.change().unwrap().remove(&object(SEALED_VOLUME, "node")),
        Err(EditError::Absent(_))
    ));
    store.change().unwrap().remove(&object(SECRET, "node-x")).unwrap();
    let gone =
        |snapshot: &Snapshot| matches!(snapshot.secret("default", "node-x"), ReadSecret::Absent);
    assert!(store.read(gone));
    assert!(!directory.path().join("all.yaml").exists());
}

/// Changes of several programs with several threads each: none is lost, and each sees the others'.
#[test]
fn changes_wait_for_each_other_within_and_between_programs() {
    let (directory, first) = store(&[("all.yaml", &node())]);
    let second = Store::open(directory.path()).unwrap();
    thread::scope(|scope| {
        for writer in 0..4 {
            let store = if writer % 2 == 0 { &first } else { &second };
            scope
                .spawn(move || (0..5).for_each(|n| add_partition(store, &format!("P{writer}{n}"))));
        }
    });
    assert!(!first.edit_volume("default", "node", |_| {}).unwrap());
    let mut all = labels(&first);
    assert_eq!(all.len(), 20);
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 20);
    assert!(text(&directory, "all.yaml").contains("# the attic"));
}

#[test]
fn a_file_that_is_not_told_of_is_found_by_the_poll() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("real");
    fs::write(&target, "# nothing yet\n").unwrap();
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&target, directory.path().join("link.yaml")).unwrap();
    let store = Store::open(directory.path()).unwrap();
    fs::write(&target, node()).unwrap(); // behind the link: not in the watched directory
    assert!((0..3).any(|_| {
        store.poll();
        store.read(|snapshot| snapshot.volume("default", "node").is_some())
    }));
}

#[test]
fn a_file_that_changes_while_it_is_being_changed_is_left_to_whoever_changed_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("all.yaml");
    for theirs in ["# theirs\n", "# other\n"] {
        fs::write(&path, "# before\n").unwrap();
        let read = file::read(&path).unwrap();
        fs::write(&path, theirs).unwrap();
        let error = file::exchange(&path, &read, b"# ours\n").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy);
        assert_eq!(
            file::remove(&path, &read).unwrap_err().kind(),
            std::io::ErrorKind::ResourceBusy
        );
        assert_eq!(text(&directory, "all.yaml"), theirs);
    }
    let read = file::read(&path).unwrap();
    file::exchange(&path, &read, b"# ours\n").unwrap();
    assert_eq!(text(&directory, "all.yaml"), "# ours\n");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left over");
}
