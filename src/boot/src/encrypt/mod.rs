//! `encrypt`: makes a LUKS2 volume of a partition, at install time, and keeps what is on it (protocols/kcrypt.md §11.2, §12.2).
//!
//! The power may go at any write. Whatever was on the partition is then still there, and running again goes on from the
//! state that [`probe`] finds:
//!
//! ```text
//!             --new, or empty                      format                      mkfs.ext4
//!   anything ──────────────────▶ (no signature) ──────────▶ WithoutFileSystem ───────────▶ Encrypted
//!                                                                                             ▲
//!                copy, move,            first sector                                          │ copy wiped
//!   Plain ─────────────────────▶ Plain ──────────────▶ HalfInstalled                      Cleaning
//!     ▲            record                of header       │       │                            ▲
//!     └────────── undo: the head restored from its copy ─┘       │ rest of header,            │ last zone
//!                                                                │ record renewed             │
//!                                                                └───────────────────────▶ Encrypting ─┐
//!                                                                                             ▲        │ zone
//!                                                                                             └────────┘
//! ```
//!
//! The steps up to `Encrypting` are in [`journal`], where everything is on the partition in [`layout`], and the zones are
//! libcryptsetup's: it records each zone in the header before it touches it, and never overwrites a zone's source before the
//! header says that the zone is done. (There are two gaps in that, both after the last zone: see [`journal`] and [`closing`].)

mod closing;
mod content;
mod device;
mod error;
mod fresh;
mod header;
mod journal;
mod layout;
mod qr;
mod recovery;
mod rotate;
mod volume;

use std::path::Path;

use crate::token::{self, Unfinished};

pub use crate::token::Unlock;
pub use content::Ext;
pub use error::EncryptError;
pub use qr::qr_code;
pub use recovery::{normalize_recovery_key, recovery_key};
pub use rotate::{
    begin as begin_rotation, finish as finish_rotation, has_other_key, is_begun_with,
};

use content::Content;
use device::Device;
use header::{BinaryHeader, Metadata, Reencryption};
use journal::Record;
use layout::Layout;
use volume::{MACHINE_SLOT, Memory, Plan, RECOVERY_SLOT, Volume};

/// What to do with one partition.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// A block device, or a regular file.
    pub device: &'a Path,
    /// Of the volume, and of the file system in it.
    pub label: &'a str,
    /// The machine's: 1 to 512 bytes without NUL, CR and LF, for keyslot 0.
    pub passphrase: &'a [u8],
    /// A passphrase for keyslot 1. One that is there already is replaced: the one given last is the one that opens.
    pub recovery: Option<&'a [u8]>,
    /// How the machine gets its passphrase, for the token.
    pub unlock: Unlock,
    /// Make a new volume with an empty file system, whatever there was.
    pub new: bool,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("device", &self.device)
            .field("label", &self.label)
            .field("recovery", &self.recovery.is_some())
            .field("unlock", &self.unlock)
            .field("new", &self.new)
            .finish_non_exhaustive()
    }
}

/// What a partition is, seen from here. See the module's picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing but zeros at both ends.
    Empty,
    /// A file system that nothing has been done to.
    Plain(Ext),
    /// Neither a file system nor a header any more, but the former can be restored.
    HalfInstalled,
    /// A new volume, the file system of which is not made yet.
    WithoutFileSystem,
    /// Some zones are encrypted, some are not.
    Encrypting,
    /// All is encrypted, but there may still be a piece of the old file system at the partition's end.
    Cleaning,
    /// A LUKS2 volume that is finished, of whoever made it.
    Encrypted { label: String, uuid: String },
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Empty => f.write_str("empty"),
            Self::Plain(ext) => {
                write!(f, "a file system labelled {:?} of {} MiB", ext.label, ext.size >> 20)
            }
            Self::HalfInstalled => f.write_str("what an interrupted run left at its beginning"),
            Self::WithoutFileSystem => f.write_str("a new volume without its file system"),
            Self::Encrypting => f.write_str("encrypted in part, by an interrupted run"),
            Self::Cleaning => f.write_str("encrypted, and not yet cleaned up"),
            Self::Encrypted { label, uuid } => {
                write!(f, "encrypted already: LUKS2 volume {uuid} labelled {label:?}")
            }
        }
    }
}

/// What is being done, for the person who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// An interrupted run had half replaced the file system's head; it is put back.
    Restoring,
    /// Copying the head, making the header.
    Preparing,
    /// A zone had been interrupted; it is completed.
    Recovering,
    /// In bytes.
    Encrypting {
        done: u64,
        of: u64,
    },
    MakingFileSystem,
    AddingRecoveryKey,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of the LUKS2 volume.
    pub uuid: String,
    /// What the partition was found to be.
    pub found: State,
    /// The recovery key that was given opens keyslot 1.
    pub recovery: bool,
    /// Cost of checking the volume key, at each boot; 1000 for volumes made here.
    pub digest_iterations: u64,
}

/// What the partition is. Nothing is written, not even what libcryptsetup would repair in a header: it gets a copy.
///
/// # Errors
/// [`EncryptError::UnknownContent`], [`EncryptError::Header`] or [`EncryptError::BegunElsewhere`] for what is in none of the
/// states.
pub fn probe(device: &Path) -> Result<State, EncryptError> {
    let device = Device::open(device)?;
    let copy = Memory::of_header(&device)?;
    state(&device, copy.path())
}

/// What [`run`] would find and accept. Nothing is written, and no key is tried.
///
/// # Errors
/// What `run` would refuse.
pub fn examine(device: &Path, label: &str, new: bool) -> Result<State, EncryptError> {
    check_label(label)?;
    let device = Device::open_unused(device)?;
    let copy = Memory::of_header(&device)?;
    let found = accept(&device, state(&device, copy.path()), label, new)?;
    if let (State::Plain(_), false) = (&found, new) {
        fits(&device, label)?;
    }
    Ok(found)
}

/// Brings the partition to [`State::Encrypted`], from any state. Slow: all of it is read and written once.
///
/// # Errors
/// See [`EncryptError`].
pub fn run(
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, EncryptError> {
    check(request)?;
    let device = Device::claim(request.device)?;
    let found = state(&device, request.device);
    let found = accept(&device, found, request.label, request.new)?;
    log::info!("{} is {found}", request.device.display());
    match &found {
        _ if request.new => create(&device, request, progress)?,
        State::Empty | State::WithoutFileSystem => create(&device, request, progress)?,
        State::Plain(_) => {
            begin(&device, request, progress)?;
            finish(&device, request, progress)?;
        }
        State::HalfInstalled => {
            restore(&device, progress)?;
            begin(&device, request, progress)?;
            finish(&device, request, progress)?;
        }
        State::Encrypting | State::Cleaning => finish(&device, request, progress)?,
        State::Encrypted { .. } => {}
    }
    verify(&device, request, found, progress)
}

/// Marks a finished volume, of whoever made it, as enrolled on the machine whose TPM made `mac`, so that no other can be put
/// in its place. A token of ours is made where there is none; what else is in the header stays.
///
/// # Errors
/// [`EncryptError::Header`] for what is no LUKS2 volume.
pub fn bind(device: &Path, unlock: Unlock, mac: &[u8; 32]) -> Result<(), EncryptError> {
    let mut volume = Volume::load(device)?;
    let metadata = volume.metadata()?;
    match metadata.token() {
        Some((number, token)) => {
            let bound = token::bound(token, unlock, mac);
            if bound == *token { Ok(()) } else { volume.set_token(number, &bound) }
        }
        None => volume.add_token(&token::bound(&token::encode(unlock, None), unlock, mac)),
    }
}

fn check(request: &Request<'_>) -> Result<(), EncryptError> {
    for passphrase in [Some(request.passphrase), request.recovery].into_iter().flatten() {
        let why = match passphrase {
            [] => "it is empty",
            long if long.len() > 512 => "it is longer than the 512 bytes that cryptsetup reads",
            // Kairos formats with what stands before the first newline and unlocks with all of it.
            bytes if bytes.iter().any(|byte| b"\0\r\n".contains(byte)) => {
                "it has NUL, CR or LF in it"
            }
            _ => continue,
        };
        return Err(EncryptError::BadPassphrase { why });
    }
    check_label(request.label)
}

fn check_label(label: &str) -> Result<(), EncryptError> {
    // 48 bytes in the LUKS2 header, with a NUL.
    if (1..48).contains(&label.len()) && !label.chars().any(char::is_control) {
        return Ok(());
    }
    Err(EncryptError::BadLabel { label: label.to_owned() })
}

/// Whether what was found may be encrypted, or with `new` be thrown away: not what is part of something larger, and nothing with
/// the label of something else.
fn accept(
    device: &Device,
    found: Result<State, EncryptError>,
    label: &str,
    new: bool,
) -> Result<State, EncryptError> {
    let path = device.path().to_owned();
    if let Some(found) = content::member(device)? {
        return Err(EncryptError::Member { path, found });
    }
    let other = match &found {
        Ok(State::Plain(ext)) => &ext.label,
        Ok(State::Encrypted { label, .. }) => label,
        _ => "",
    };
    if !other.is_empty() && !same_label(other, label) {
        let (found, wanted) = (other.to_owned(), label.to_owned());
        return Err(EncryptError::OtherLabel { path, found, wanted });
    }
    match found {
        // The state of what is to be thrown away does not matter.
        Err(_) if new => Ok(State::Empty),
        found => found,
    }
}

/// `header` is what libcryptsetup is to read the header from: the device, or a copy.
fn state(device: &Device, header: &Path) -> Result<State, EncryptError> {
    let head = device.read_up_to(0, header::SECONDARY + 512)?;
    if header::has_magic(&head) {
        return match undo_record(device, &head)? {
            Some(_) => Ok(State::HalfInstalled),
            None => luks_state(device, header),
        };
    }
    match content::look(device)? {
        Content::Ext(ext) => Ok(State::Plain(ext)),
        Content::Empty => Ok(State::Empty),
        Content::Other(found) => {
            let secondary = usize::try_from(header::SECONDARY).ok().and_then(|at| head.get(at..));
            // The power went while libcryptsetup wrote the first copy of the header.
            if secondary.is_some_and(header::has_secondary_magic) {
                return luks_state(device, header);
            }
            let found = found.to_owned();
            Err(EncryptError::UnknownContent { path: device.path().to_owned(), found })
        }
    }
}

/// What is there to restore the file system's head, in the place of which is (part of) a header.
fn undo_record(device: &Device, head: &[u8]) -> Result<Option<Record>, EncryptError> {
    BinaryHeader::parse(head).map_or(Ok(None), |header| Record::to_undo(device, &header))
}

fn luks_state(device: &Device, header: &Path) -> Result<State, EncryptError> {
    let path = device.path();
    let mut volume = Volume::load_from(header, path)?;
    let metadata = volume.metadata()?;
    let unfinished = unfinished(device, &metadata)?;
    match (metadata.reencryption(), unfinished) {
        (Reencryption::None, None) => {
            // The first copy may be torn; libcryptsetup goes by the other then.
            let parsed = |at| Ok(BinaryHeader::parse_copy(&device.read(at, 512)?));
            let header = match parsed(0)? {
                None => parsed(header::SECONDARY)?,
                first => first,
            };
            let label = header.map(|header| header.label).unwrap_or_default();
            Ok(State::Encrypted { label, uuid: volume.uuid()? })
        }
        (Reencryption::None, Some(Unfinished::FileSystem)) => Ok(State::WithoutFileSystem),
        (Reencryption::None, Some(Unfinished::Encryption { .. })) => Ok(State::Cleaning),
        (_, Some(Unfinished::Encryption { .. })) => Ok(State::Encrypting),
        (_, _) => Err(EncryptError::BegunElsewhere { path: path.to_owned() }),
    }
}

/// What our token says is left to do; `None` also if there is no token of ours.
fn unfinished(device: &Device, metadata: &Metadata) -> Result<Option<Unfinished>, EncryptError> {
    let unfinished = metadata.token().and_then(|(_, token)| token::unfinished(token));
    let header =
        |why: &str| EncryptError::Header { path: device.path().to_owned(), why: why.to_owned() };
    unfinished.transpose().map_err(header)
}

fn create(
    device: &Device,
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), EncryptError> {
    progress(Progress::Preparing);
    fresh::format(device, request)?;
    fresh::make_filesystem(device, request, progress)
}

/// From [`State::HalfInstalled`] back to [`State::Plain`].
fn restore(device: &Device, progress: &mut dyn FnMut(Progress)) -> Result<(), EncryptError> {
    progress(Progress::Restoring);
    let layout = Layout::of(device.path(), device.size())?;
    match undo_record(device, &device.read(0, 512)?)? {
        Some(record) => journal::undo(device, &layout, &record),
        None => Ok(()),
    }
}

/// From [`State::Plain`] to [`State::Encrypting`].
fn begin(
    device: &Device,
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), EncryptError> {
    let layout = fits(device, request.label)?;
    progress(Progress::Preparing);
    // One from an earlier run must not speak for the copy that is made now.
    journal::forget(device, &layout)?;
    let head = device.read(0, layout.shift)?;
    device.write(layout.copy, &head)?;
    device.sync()?;

    let todo = Unfinished::Encryption { copy: layout.copy, size: layout.shift };
    let token = token::encode(request.unlock, Some(&todo));
    let plan =
        Plan { label: request.label, passphrase: request.passphrase, token, bytes: layout.shift };
    let header = volume::header_and_move(device.path(), &plan, &layout)?;
    device.sync()?;

    for (offset, what) in [
        (0, "the file system's first part, which nobody should have changed"),
        (layout.copy, "the copy of the file system's first part"),
        (layout.moved, "the moved first part of the file system"),
    ] {
        if device.read(offset, layout.shift)? != head {
            return Err(EncryptError::Verify { path: device.path().to_owned(), what });
        }
    }
    journal::install(device, &layout, &header, &head)
}

/// Whether the file system is the right one and leaves room.
fn fits(device: &Device, label: &str) -> Result<Layout, EncryptError> {
    let path = device.path().to_owned();
    let ext = match content::look(device)? {
        Content::Ext(ext) => ext,
        Content::Empty => {
            return Err(EncryptError::UnknownContent { path, found: "nothing".to_owned() });
        }
        Content::Other(found) => {
            return Err(EncryptError::UnknownContent { path, found: found.to_owned() });
        }
    };
    if !ext.label.is_empty() && !same_label(&ext.label, label) {
        return Err(EncryptError::OtherLabel { path, found: ext.label, wanted: label.to_owned() });
    }
    let layout = Layout::of(&path, device.size())?;
    if ext.size > layout.room() {
        return Err(EncryptError::NoRoom {
            path,
            free: device.size().saturating_sub(ext.size),
            needed: device.size().saturating_sub(layout.room()),
            kib: layout.room() / 1024,
        });
    }
    Ok(layout)
}

/// ext4 keeps 16 bytes of a label; and `X_LUKS` is the name newer Kairos gives the volume of `X` (protocols/kcrypt.md §11.2).
fn same_label(found: &str, wanted: &str) -> bool {
    let plain = |label: &'_ str| label.strip_suffix("_LUKS").unwrap_or(label).to_owned();
    plain(found) == plain(wanted) || wanted.get(..16) == Some(found)
}

/// From [`State::Encrypting`] or [`State::Cleaning`] to [`State::Encrypted`].
fn finish(
    device: &Device,
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), EncryptError> {
    let mut volume = Volume::load(device.path())?;
    // Before anything else: with a wrong passphrase nothing is to be changed.
    volume.key(request.passphrase)?;
    let metadata = volume.metadata()?;
    let layout = layout_of(device, &metadata)?;
    match metadata.reencryption() {
        Reencryption::None => {}
        Reencryption::Clean => encrypt(device, request, &layout, volume, progress)?,
        Reencryption::Unclosed => close(device, volume)?,
        Reencryption::Crashed { moved } => {
            progress(Progress::Recovering);
            if moved {
                journal::restore_moved(device, &layout)?;
            }
            volume.recover(&layout, request.passphrase)?;
            let mut volume = Volume::load(device.path())?;
            // It was the last zone, or there are more.
            if volume.metadata()?.reencryption() != Reencryption::None {
                encrypt(device, request, &layout, volume, progress)?;
            }
        }
    }
    journal::clean(device, &layout)?;
    finish_token(&mut Volume::load(device.path())?)
}

/// From [`Reencryption::Unclosed`]. libcryptsetup has the header in its memory and must not write it any more.
fn close(device: &Device, volume: Volume) -> Result<(), EncryptError> {
    drop(volume);
    closing::close(device)
}

fn encrypt(
    device: &Device,
    request: &Request<'_>,
    layout: &Layout,
    mut volume: Volume,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), EncryptError> {
    journal::renew(device, layout)?;
    volume.encrypt(layout, request.passphrase, progress)
}

/// Where things are, by what the token says.
fn layout_of(device: &Device, metadata: &Metadata) -> Result<Layout, EncryptError> {
    let path = || device.path().to_owned();
    let Some(Unfinished::Encryption { copy, size }) = unfinished(device, metadata)? else {
        return Err(EncryptError::BegunElsewhere { path: path() });
    };
    Layout::from_copy(device.size(), copy, size).ok_or_else(|| EncryptError::Header {
        path: path(),
        why: format!("a copy of {size} bytes at {copy}; has the partition been made smaller?"),
    })
}

/// Takes away what our token says is to be done.
fn finish_token(volume: &mut Volume) -> Result<(), EncryptError> {
    match volume.metadata()?.token() {
        Some((number, token)) => volume.set_token(number, &token::finished(token)),
        None => Ok(()),
    }
}

/// That what came out opens; and the recovery key, last, when everything else is certain.
fn verify(
    device: &Device,
    request: &Request<'_>,
    found: State,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, EncryptError> {
    let path = device.path();
    let State::Encrypted { label, uuid } = state(device, path)? else {
        let what = "the finished volume";
        return Err(EncryptError::Verify { path: path.to_owned(), what });
    };
    if !same_label(&label, request.label) {
        let (found, wanted) = (label, request.label.to_owned());
        return Err(EncryptError::OtherLabel { path: path.to_owned(), found, wanted });
    }
    let mut volume = Volume::load(path)?;
    let metadata = volume.metadata()?;
    if !metadata.has_keyslot(MACHINE_SLOT) {
        return Err(EncryptError::WrongPassphrase { path: path.to_owned() });
    }
    let key = volume.key(request.passphrase)?;
    if let Some(recovery) = request.recovery {
        let taken = metadata.has_keyslot(RECOVERY_SLOT);
        if taken && metadata.token().is_none() {
            return Err(EncryptError::RecoverySlotTaken { path: path.to_owned() });
        }
        progress(Progress::AddingRecoveryKey);
        volume.set_recovery(taken, &key, recovery)?;
    }
    Ok(Report {
        uuid,
        found,
        recovery: request.recovery.is_some(),
        digest_iterations: metadata.digest_iterations().unwrap_or_default(),
    })
}
