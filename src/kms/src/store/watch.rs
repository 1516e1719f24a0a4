//! What has changed in a directory since it was last asked (inotify(7)), so that a write need not look at every file.
//!
//! It sees what this machine changes in the directory itself; changes behind symbolic links and by other machines of a
//! network file system are found by the regular poll.

use std::{collections::BTreeSet, ffi::OsString, path::Path};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

/// A watched directory.
pub(super) struct Watch(Inotify);

/// What may have changed.
pub(super) enum Changed {
    /// Files of these names.
    Names(BTreeSet<OsString>),
    /// Anything.
    Anything,
}

impl Watch {
    /// Begins to watch. Without it every file is looked at each time, which is as right and slower.
    pub(super) fn start(directory: &Path) -> Option<Self> {
        let interest = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .and_then(|inotify| inotify.add_watch(directory, interest).map(|_| Self(inotify)));
        watch
            .inspect_err(|error| {
                log::debug!("store: {}: not watched: {error}", directory.display())
            })
            .ok()
    }

    /// What has changed since the last call.
    pub(super) fn changed(&self) -> Changed {
        let mut names = BTreeSet::new();
        loop {
            match self.0.read_events() {
                Err(Errno::EAGAIN) => return Changed::Names(names),
                Err(Errno::EINTR) => {}
                Err(_) => return Changed::Anything,
                Ok(events) => {
                    for event in events {
                        match event.name {
                            Some(name) => drop(names.insert(name)),
                            None => return Changed::Anything, // the queue overflowed, or the directory is gone
                        }
                    }
                }
            }
        }
    }
}
